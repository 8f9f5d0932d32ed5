"""Perturbing what an embedding puts out, where the inputs themselves are tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def shifted(layer: nn.Module, delta: Tensor) -> Iterator[None]:
    """While this lasts ``layer`` puts out ``delta`` more, so that gradients still reach its own weights.

    Raises:
        ValueError: if the layer puts out another shape, is called again, or not at all.

    Example:
        >>> layer = nn.Embedding(2, 1)
        >>> with shifted(layer, torch.ones(1, 1)):
        ...     moved = layer(torch.tensor([1]))
        >>> bool((moved - layer(torch.tensor([1])) == 1).all())
        True
    """
    calls = 0

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if output.shape != delta.shape or calls > 1:
            raise ValueError(
                f"the embedding put out {tuple(output.shape)} in call {calls}, and the perturbation for its one call "
                f"has shape {tuple(delta.shape)}; name a layer that is called once a forward pass"
            )
        return output + delta.to(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise ValueError("the embedding was not called, so nothing was perturbed; name the layer that makes embeddings")


def embedded(layer: nn.Module, forward: Callable[[], Any]) -> tuple[Tensor, Tensor | None]:
    """What ``layer`` puts out in one forward pass, and where it may be perturbed.

    Args:
        layer: an ``nn.Embedding``, or any layer with one tensor as its output.
        forward: makes the pass.

    Returns:
        The output, detached, and truth values that broadcast to it: false where an ``nn.Embedding`` met its
        ``padding_idx``; None if it has none.

    Raises:
        ValueError: if the layer was not called exactly once, or puts out no tensor of floats.
    """
    found: list[tuple[Any, Any]] = []
    handle = layer.register_forward_hook(lambda _, args, output: found.append((args, output)))
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    if len(found) != 1 or not isinstance(found[0][1], Tensor) or not found[0][1].is_floating_point():
        raise ValueError(
            f"a forward pass called the embedding {len(found)} times"
            + (f" and got a {type(found[0][1]).__name__}" if found else "")
            + "; name a layer that is called once and puts out one tensor of floats"
        )
    args, output = found[0]
    if not isinstance(layer, nn.Embedding) or layer.padding_idx is None:
        return output.detach(), None
    return output.detach(), (args[0] != layer.padding_idx)[..., None]
