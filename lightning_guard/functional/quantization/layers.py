"""The layers of a network as they compute with quantised weights and inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_guard.functional.quantization.grids import (
    activation_grid,
    fake_quantize,
    fake_quantize_input,
    short,
    snapped,
    weight_scale,
)
from lightning_guard.functional.quantization.learned import fitted_range, fitted_step, lsq

_AXES: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.Linear, 0), (nn.Conv1d, 0), (nn.Conv2d, 0), (nn.Conv3d, 0), (nn.Embedding, 0), (nn.EmbeddingBag, 0),
    (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 1), (nn.ConvTranspose3d, 1),
)  # fmt: skip
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
Range = tuple[float, float]


class LostRows(ValueError):
    """A layer's inputs have other rows than the batch, so it is not known which example they are of."""


@dataclass(frozen=True, eq=False)
class Slot:
    """One weight of a layer.

    Args:
        name: the parameter's name in the network.
        owner: the module that holds it.
        key: its name there.
        axis: the dimension of the output channels.
    """

    name: str
    owner: nn.Module
    key: str
    axis: int

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, also while a rounded copy stands in its place."""
        parameter = self.owner._parameters[self.key]
        assert parameter is not None
        return parameter


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer whose weights are rounded.

    Args:
        name: the module's name in the network.
        module: the module.
        slots: its weights.
        inputs: how many of its arguments are rounded: 1, of attention 3, of embeddings 0.
    """

    name: str
    module: nn.Module
    slots: tuple[Slot, ...]
    inputs: int


def quantizable(network: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers that can be quantised, by name: Linear, convolutions, embeddings and attention.

    The projections of ``nn.MultiheadAttention`` belong to it: its inner Linear is never called by itself.
    """
    found: dict[str, QuantizedLayer] = {}
    inner: set[nn.Module] = set()
    for name, module in network.named_modules():
        if module in inner:
            continue
        if isinstance(module, nn.MultiheadAttention):
            inner.add(module.out_proj)
            pairs = [(module, key) for key in _PROJECTIONS if getattr(module, key) is not None]
            owned = [(owner, key, key) for owner, key in pairs] + [(module.out_proj, "weight", "out_proj.weight")]
            slots = tuple(Slot(f"{name}.{said}".lstrip("."), owner, key, 0) for owner, key, said in owned)
            found[name] = QuantizedLayer(name, module, slots, 3)
            continue
        for kind, axis in _AXES:
            if isinstance(module, kind):
                inputs = 0 if isinstance(module, nn.Embedding | nn.EmbeddingBag) else 1
                slot = Slot(f"{name}.weight".lstrip("."), module, "weight", axis)
                found[name] = QuantizedLayer(name, module, (slot,), inputs)
                break
    return found


class FakeQuantization:
    """Layers that compute as they will when quantised, with what is known of their inputs' ranges.

    Nothing of it is in the network: put :meth:`around` a layer's ``forward``. Weights follow their own largest value,
    or learned steps; ranges of inputs are observed (a moving average of the smallest and largest value of an optimizer
    step), learned, or given.

    Args:
        layers: what to quantise.
        bits: of weights.
        activation_bits: of the inputs of layers; None leaves them.
        learned: whether steps are learned (LSQ).
        given: ranges by layer, which are then neither observed nor learned.
        device: of the ranges.
    """

    def __init__(
        self,
        layers: Sequence[QuantizedLayer],
        bits: int = 8,
        activation_bits: int | None = 8,
        learned: bool = False,
        given: Mapping[str, Range] | None = None,
        device: torch.device | str | None = None,
    ):
        self.layers, self.bits, self.activation_bits, self.learned = list(layers), bits, activation_bits, learned
        self.slots = {slot.weight: slot for layer in self.layers for slot in layer.slots}
        self.rounded = [layer for layer in self.layers if layer.inputs] if activation_bits is not None else []
        self.on, self.observing = False, False
        self.rows: int | None = None  # of the batch, where inputs are looked at example by example
        self._each: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: the least and largest input of each example
        self.known = [False] * len(self.rounded)
        self.low, self.high = (torch.zeros(len(self.rounded), device=device) for _ in range(2))
        self.scale, self.zero = torch.ones_like(self.low), torch.zeros_like(self.low)
        self._scales, self._zeros = self.scale.unbind(), self.zero.unbind()
        self._lows = [torch.full((), torch.inf, device=device) for _ in self.rounded]  # of this optimizer step
        self._highs = [torch.full((), -torch.inf, device=device) for _ in self.rounded]
        self.steps: dict[nn.Parameter, Tensor] = {}  # logarithms of learned steps
        self.input_steps: list[Tensor] = []
        self.learns_inputs = learned and given is None
        if given is not None:
            self._take({i: given[layer.name] for i, layer in enumerate(self.rounded)})

    def begin_learning(self) -> list[Tensor]:
        """Start learned steps from the weights as they are; returns the logarithms to be trained."""
        for weight, slot in self.slots.items():
            largest = 2 ** (self.bits - 1) - 1
            self.steps[weight] = fitted_step(weight, -largest, largest, slot.axis).log().requires_grad_()
        if self.learns_inputs:
            self.input_steps = [torch.zeros((), device=self.low.device).requires_grad_() for _ in self.rounded]
        return [*self.steps.values(), *self.input_steps]

    # What a layer computes ---------------------------------------------------------------------------------------

    def around(self, layer: QuantizedLayer, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of a layer with rounded weights and inputs."""
        index = next((i for i, one in enumerate(self.rounded) if one is layer), None)
        slots = layer.slots

        def quantized(*args: Any, **kwargs: Any) -> Any:
            if index is not None and self.rows is not None:
                for x in self._given(layer.inputs, args, kwargs).values():
                    self._look(index, x, self.rows)
            if not self.on:
                return forward(*args, **kwargs)
            if index is not None:
                args, kwargs = self._arguments(index, layer.inputs, args, kwargs)
            for slot in slots:  # an attribute of the instance goes before its parameter of the same name
                vars(slot.owner)[slot.key] = self.weight(slot)
            try:
                return forward(*args, **kwargs)
            finally:
                for slot in slots:
                    del vars(slot.owner)[slot.key]

        return quantized

    def weight(self, slot: Slot) -> Tensor:
        """The rounded weight, with the gradient of the method."""
        weight = slot.weight
        if not self.learned:
            return fake_quantize(weight, self.bits, slot.axis)
        largest = 2 ** (self.bits - 1) - 1
        return lsq(weight, _exact(self.steps[weight]), -largest, largest, axis=slot.axis)

    def _arguments(
        self, index: int, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self._given(count, args, kwargs)
        done: dict[int, Tensor] = {}  # attention asks whether query, key and value are one tensor
        for x in given.values():
            if id(x) not in done:
                done[id(x)] = self._input(index, x)
        new = {key: done[id(x)] for key, x in given.items()}
        places = min(len(args), count)
        args = (*list(new.values())[:places], *args[places:])
        return args, {key: new.get(key, value) for key, value in kwargs.items()}

    @staticmethod
    def _given(count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The arguments of a layer that are rounded, in order."""
        keys = ("query", "key", "value") if count == 3 else ("input",)
        return {**dict(zip(keys, args, strict=False)), **{key: kwargs[key] for key in keys if key in kwargs}}

    def _look(self, index: int, x: Tensor, rows: int) -> None:
        """Note the least and the largest input of each example, over all calls of the step."""
        if x.dim() < 2 or len(x) != rows:
            name = self.rounded[index].name
            raise LostRows(
                f"{name} sees inputs of shape {tuple(x.shape)} in a batch of {rows} rows, so it is not known which "
                f"example they are of; keep the batch in front, or give ignore=[{name!r}] or fixed ranges"
            )
        values = x.detach().flatten(1)
        low, high = values.amin(1), values.amax(1)
        if index in self._each:
            low, high = torch.minimum(low, self._each[index][0]), torch.maximum(high, self._each[index][1])
        self._each[index] = low, high

    @contextmanager
    def looking(self, rows: int | None) -> Iterator[Callable[[], tuple[list[Tensor], list[Tensor]]]]:
        """Look at inputs example by example in this block; None looks at nothing.

        Args:
            rows: of the batch, which every layer must see in front.

        Yields:
            What gives the least and the largest inputs so far, ``(rows,)`` for each layer; NaN of a layer not called.
        """
        was, self.rows, self._each = (self.rows, self._each), rows, {}
        seen = self._each

        def found() -> tuple[list[Tensor], list[Tensor]]:
            none = torch.full((rows or 0,), torch.nan, device=self.low.device)
            pairs = [seen.get(i, (none, none)) for i in range(len(self.rounded))]
            return [low for low, _ in pairs], [high for _, high in pairs]

        try:
            yield found
        finally:
            self.rows, self._each = was

    def _input(self, index: int, x: Tensor) -> Tensor:
        assert self.activation_bits is not None
        if self.observing and x.numel() and not (self.learns_inputs and self.known[index]):
            values = x.detach()
            low, high = fitted_range(values, self.activation_bits) if self.learns_inputs else torch.aminmax(values)
            self._lows[index].copy_(torch.minimum(self._lows[index], low))
            self._highs[index].copy_(torch.maximum(self._highs[index], high))
        if not self.known[index]:
            return x
        if not self.learns_inputs:
            return fake_quantize_input(x, self._scales[index], self._zeros[index], self.activation_bits)
        levels = 2**self.activation_bits - 1
        features = max(x[:1].numel(), 1)
        step = self.input_steps[index].exp()
        return lsq(x, step, 0, levels, self._zeros[index], gradient_scale=(features * levels) ** -0.5)

    # What is known of the inputs -----------------------------------------------------------------------------------

    @torch.no_grad()
    def take_observations(self, momentum: float, smallest: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        """Count what was seen since the last time: the first range as it is, later ones with weight ``momentum``.

        Args:
            momentum: weight of the new range in the moving average.
            smallest: the smallest over all processes, elementwise.
        """
        if not self.rounded:
            return
        both = smallest(torch.stack([*self._lows, *(-high for high in self._highs)]))
        low, high = both[: len(self._lows)], -both[len(self._lows) :]
        usable = low.isfinite() & high.isfinite()  # a step that overflowed, or a layer that was not called
        if self.learns_inputs:
            usable &= ~torch.tensor(self.known, device=usable.device)
        weight = torch.tensor([momentum if known else 1.0 for known in self.known], device=low.device) * usable
        self.low.lerp_(torch.where(usable, low, self.low), weight)
        self.high.lerp_(torch.where(usable, high, self.high), weight)
        fresh = (
            [not known and bool(now) for known, now in zip(self.known, usable, strict=True)]
            if not all(self.known)
            else []
        )
        self.known = [known or now for known, now in zip(self.known, fresh or self.known, strict=True)]
        self._regrid()
        for i, now in enumerate(fresh if self.learns_inputs else ()):
            if now:
                self.input_steps[i].copy_(self.scale[i].log())
        for one, none in ((self._lows, torch.inf), (self._highs, -torch.inf)):
            for tensor in one:
                tensor.fill_(none)

    def _regrid(self) -> None:
        if self.activation_bits is not None:
            scale, zero = activation_grid(self.low, self.high, self.activation_bits)
            self.scale.copy_(scale)
            self.zero.copy_(zero)

    def take_ranges(self, ranges: Iterable[Range]) -> None:
        """The range of each layer whose inputs are rounded, in order."""
        self._take(dict(enumerate(ranges)))

    @torch.no_grad()
    def _take(self, ranges: Mapping[int, Sequence[float] | Tensor]) -> None:
        for i, (low, high) in ranges.items():
            self.low[i], self.high[i], self.known[i] = low, high, True
        self._regrid()

    @property
    def ranges(self) -> dict[str, Range]:
        """The range of each layer's inputs that its grid covers, as far as known."""
        if not self.rounded:
            return {}
        assert self.activation_bits is not None
        low, high = self.low, self.high
        if self.learns_inputs and self.input_steps:
            step = torch.stack(self.input_steps).detach().exp()
            low, high = -self.zero * step, (2**self.activation_bits - 1 - self.zero) * step
        pairs = zip(self.rounded, self.known, low.tolist(), high.tolist(), strict=True)
        return {layer.name: (bottom, top) for layer, known, bottom, top in pairs if known}

    def state(self) -> dict[str, Any]:
        """What a resume needs, as tensors by name."""
        known = [i for i, seen in enumerate(self.known) if seen]
        return {
            "observed": {self.rounded[i].name: torch.stack([self.low[i], self.high[i]]) for i in known},
            "log_steps": {self.slots[weight].name: step.detach().clone() for weight, step in self.steps.items()},
            "log_input_steps": {
                layer.name: step.detach().clone() for layer, step in zip(self.rounded, self.input_steps, strict=False)
            },
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave; learning has begun before, if it had then."""
        places = {layer.name: i for i, layer in enumerate(self.rounded)}
        self._take({places[name]: pair for name, pair in state["observed"].items()})
        for weight, step in self.steps.items():
            step.copy_(state["log_steps"][self.slots[weight].name])
        for layer, step in zip(self.rounded, self.input_steps, strict=False):
            step.copy_(state["log_input_steps"][layer.name])

    # What the weights become ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def on_grid(self, slot: Slot, weight: Tensor | None = None) -> Tensor:
        """A weight, the slot's own or another in its place, at the nearest point of its grid."""
        value = slot.weight if weight is None else weight
        learned = self.steps.get(slot.weight)
        scale = weight_scale(value, self.bits, slot.axis) if learned is None else short(learned.exp())
        return snapped(value, scale.to(value.device), self.bits, slot.axis)

    @torch.no_grad()
    def snap_(self) -> bool:
        """Put every weight on its grid; whether that moved any."""
        moved = False
        for weight, slot in self.slots.items():
            value = self.on_grid(slot)
            moved |= not torch.equal(value, weight)
            weight.copy_(value)
        return moved


def _exact(logarithm: Tensor) -> Tensor:
    """The step with 17 significant bits, with the gradient of the whole."""
    step = logarithm.exp()
    return step + (short(step.detach()) - step.detach())


@contextmanager
def fake_quantized(
    network: nn.Module,
    ranges: Mapping[str, Range] | None = None,
    bits: int | None = 8,
    activation_bits: int = 8,
    layers: Iterable[str] | None = None,
) -> Iterator[None]:
    """A network that computes inside this block as it would when quantised, e.g. to judge one after training.

    Args:
        network: any module; nothing of it stays changed.
        ranges: of the inputs of layers by name, as a guard has learned them; layers without one keep their inputs.
        bits: of weights; None leaves them, e.g. because they lie on their grids already.
        activation_bits: of inputs.
        layers: names of the layers to quantise; None for all that can be.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with fake_quantized(layer, {"": (0.0, 1.0)}):
        ...     y = layer(torch.rand(3, 2))
    """
    found = quantizable(network)
    chosen = list(found.values()) if layers is None else [found[name] for name in layers]
    if bits is None:
        chosen = [replace(layer, slots=()) for layer in chosen]
    given = {name: pair for name, pair in (ranges or {}).items() if name in found}
    quantization = FakeQuantization(chosen, bits or 8, activation_bits, device=_device(network))
    quantization._take({i: given[one.name] for i, one in enumerate(quantization.rounded) if one.name in given})
    quantization.on = True
    was = torch.backends.mha.get_fastpath_enabled()
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it computes with weights without asking their layers
        for layer in chosen:
            replaced.append((layer.module, vars(layer.module).get("forward")))
            vars(layer.module)["forward"] = quantization.around(layer, layer.module.forward)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
        for module, forward in replaced:
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))
