"""Layers and optimizers as privacy needs them."""

import torch
from torch import nn


def group_norms(module: nn.Module) -> int:
    """Put GroupNorm in the place of every BatchNorm, with its weight and bias; returns how many.

    BatchNorm makes what the network says of one example depend on the others and remembers them all. Groups have at
    least eight channels, and there are at most 32 of them (Wu and He, ECCV 2018, arXiv:1803.08494).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16))
        >>> group_norms(net), net[1].num_groups
        (1, 2)
    """
    done: dict[nn.Module, nn.Module] = {}  # a layer may have several names
    for parent in list(module.modules()):
        for name, layer in list(parent._modules.items()):
            if layer in done:
                setattr(parent, name, done[layer])
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
                channels = layer.num_features
                groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 8))
                made = nn.GroupNorm(groups, channels, layer.eps, layer.affine)
                if layer.affine:
                    made.weight, made.bias = layer.weight, layer.bias
                made.train(layer.training)
                setattr(parent, name, made)
                done[layer] = made
    return len(done)


@torch.no_grad()
def correct_adam_(optimizer: torch.optim.Optimizer, variance: float, floor: float) -> None:
    r"""Redo the step that Adam or AdamW just took without the noise's share of its second moment.

    The noise adds its variance :math:`\Phi` to every entry of the second moment, and Adam then takes equal steps
    everywhere. The corrected step is :math:`\eta\, \hat m / \sqrt{\max(\hat v - \Phi, \gamma')}`.

    Args:
        optimizer: right after its step.
        variance: :math:`\Phi`, of the noise of each gradient entry.
        floor: :math:`\gamma'`, the least denominator, squared, as a fraction of :math:`\Phi`.

    Reference:
        Tang, Shpilevskiy and Lécuyer, DP-AdamBC, AAAI 2024, arXiv:2312.14334.
    """
    for group in optimizer.param_groups:
        first, second = group["betas"]
        for p in group["params"]:
            state = optimizer.state.get(p)
            if not state or p.grad is None:
                continue
            count = float(state["step"])
            m = state["exp_avg"] / (1 - first**count)
            v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"] / (1 - second**count)
            taken = 1 / (v.sqrt() + group["eps"])
            wanted = (v - variance).clamp_(min=max(floor * variance, group["eps"] ** 2)).rsqrt_()
            p.add_(m.mul_(wanted.sub_(taken)), alpha=-float(group["lr"]))  # maximize is in the moments already
