"""Running statistics of BatchNorm, estimated anew for the weights that are there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(network: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics and update them just now."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]


@contextmanager
def anew(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Passes inside this block replace the running statistics by their plain average over the passes.

    Rounded weights jump between grid points in training, and a moving average lags behind (Nagel et al., 2022).

    | case                                | result                     |
    |-------------------------------------|----------------------------|
    | a layer that no pass has reached    | its statistics as they were |
    | counts of batches, momentum, modes  | as they were               |

    Reference:
        Nagel et al., Overcoming Oscillations in Quantization-Aware Training, ICML 2022, arXiv:2203.11086.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with anew([norm]), torch.no_grad():
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean, norm.running_var
        (tensor([2.]), tensor([2.]))
    """
    kept = [(m.momentum, m.training, [buffer.clone() for buffer in m.buffers()]) for m in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        yield
    finally:
        with torch.no_grad():
            for norm, (momentum, training, (mean, variance, count)) in zip(norms, kept, strict=True):
                norm.momentum, norm.training = momentum, training
                assert norm.running_mean is not None
                assert norm.running_var is not None
                assert norm.num_batches_tracked is not None
                if not norm.num_batches_tracked:
                    norm.running_mean.copy_(mean)
                    norm.running_var.copy_(variance)
                norm.num_batches_tracked.copy_(count)
