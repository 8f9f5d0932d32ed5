"""Book-keeping: clipped sums of per-example gradients from one backward pass of the user's own mean loss."""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_guard.functional.privacy.records import Full, Masked, Record, Scratch, squared_norms
from lightning_guard.functional.privacy.rules import RULES, PerExample, Rule

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # a tensor and the part of it: offset, size, stride

# A contribution may exceed its bound by what rounding does to norms and products; clipping to a little less covers it.
MARGIN = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
_ROUNDED = {"tf32": 2.0**-9, "bf16": 2.0**-6}  # where torch may round what float32 layers multiply


class Unbooked(ValueError):
    """A gradient that cannot be bounded: the message names the parameter, the reason and the remedy."""


@dataclass
class Part:
    """A tensor whose gradients are booked, or a view of it."""

    root: Tensor  # a parameter, or a tensor computed from parameters alone
    view: Tensor
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        size = tuple(self.view.shape)
        stride = tuple(step if n > 1 else 0 for step, n in zip(self.view.stride(), size, strict=True))
        self.key = (id(self.root), int(self.view.storage_offset()), size, stride)

    def of(self, gradient: Tensor) -> Tensor:
        """The same part of the root's gradient."""
        if self.view is self.root:
            return gradient
        _, offset, size, stride = self.key
        return gradient.as_strided(size, stride, gradient.storage_offset() + offset - self.root.storage_offset())


class _Booked(torch.autograd.Function):
    """A layer that books its inputs and its output's gradient instead of computing its weight's gradient.

    It depends on ``anchor`` and not on the parameters, so autograd never forms a raw gradient of a parameter, and
    whatever autograd does bring to a parameter came past the book.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rule: Rule, x: Tensor) -> Tensor:
        ctx.rule = rule
        out, *saved = rule.forward(x)
        assert out is not None
        ctx.save_for_backward(*saved)
        # Of a view that was made in here autograd allows no change in place, as of a ReLU.
        return out if out._base is None else torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, b: Tensor) -> tuple[None, None, Tensor | None]:
        book = ctx.rule.book
        was, book.muted = book.muted, book.active and book.deferred
        try:
            return None, None, ctx.rule.backward(b, ctx.saved_tensors, ctx.needs_input_grad[2])
        finally:
            book.muted = was


class Bookkeeper(TorchFunctionMode):
    """While it is entered, what multiplies by a trainable parameter is booked.

    It sees calls of torch, not modules, so it does not matter who makes them: a layer, a functional call with
    somebody's weight, attention, a tied head. Nothing is wrapped and no hook is set on a layer.

    What has as many rows as the step is taken for its examples. Positions or classes of just that number, beside a bare
    parameter or in an embedding, cannot be told apart on the first step; on later ones they can, if ever the numbers
    differed. So try another number first, as :func:`~lightning_guard.functional.privacy.probe` does.

    Args:
        parameters: the trainable parameters by name.
        error: makes the exception of a message.
        masks: of parameters that are partly held at zero, 1 where not and 0 where so, of the parameter's shape. What is
            booked of them are the gradients where the mask is 1, and nothing else enters a norm or a sum.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> book = Bookkeeper(layer.named_parameters())
        >>> with book.step(units=4):
        ...     loss = layer(torch.ones(4, 3)).square().mean()
        >>> loss.backward()
        >>> book.squared_norms().shape, layer.weight.grad is None
        (torch.Size([1, 4]), True)
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        error: Callable[[str], Exception] | None = None,
        masks: Mapping[Tensor, Tensor] | None = None,
    ):
        super().__init__()
        self.error, self.masks = error or Unbooked, {} if masks is None else masks
        self.names: dict[int, str] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        for name, parameter in parameters:
            self.names.setdefault(id(parameter), name)
            self.parameters[id(parameter)] = parameter
        self.seq_first = False  # inside torch's attention, where time comes before the batch
        self.active = False
        self.deferred = False  # the step's own backward pass comes after the step: others count for nothing
        self.muted = False
        self.raw: nn.Parameter | None = None  # the last that got a raw gradient
        self.derived: dict[int, Tensor] = {}
        self.aliases: dict[int, tuple[Tensor, nn.Parameter]] = {}  # whose gradient is that of a parameter
        self.units, self.rows = 0, 1
        self.weights: Tensor | None = None
        self._met: dict[int, str] = {}
        self._strange: nn.Parameter | None = None  # the first beside a batch in a function without a rule
        self._batchless: set[tuple[frozenset[int], str, int]] = set()
        self.scratch = Scratch()
        self.clear()

    # One step ---------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget what is booked."""
        self.records: dict[Key, list[Record]] = {}
        self.parts: dict[Key, Part] = {}
        self.dtype = torch.float64  # the coarsest in which something was booked

    @contextmanager
    def step(self, units: int, rows: int = 1, weights: Tensor | None = None) -> Iterator[None]:
        """Book the forward passes of one step: ``units`` of ``rows`` consecutive rows each, with weights ``(N,)``."""
        self.clear()
        self.derived, self.aliases, self._strange = {}, {}, None
        self.units, self.rows, self.weights = units, rows, weights
        self.anchor = torch.zeros((), requires_grad=True)
        self.active = True
        try:
            with self:
                yield
        finally:
            self.active = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Book nothing for a while."""
        was, self.active = self.active, False
        try:
            yield
        finally:
            self.active = was

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Book more forward passes of the step that has just been booked, on the same rows."""
        if self.active or not self.units:
            yield
            return
        self.active = True
        try:
            with self:
                yield
        finally:
            self.active = False

    @property
    def booked(self) -> bool:
        """Whether a backward pass has booked anything."""
        return bool(self.records)

    def forbid_raw(self) -> Callable[[], None]:
        """From now on a backward pass that brings a raw gradient to a parameter raises; returns how to undo it."""
        hooks = [p.register_post_accumulate_grad_hook(self._raw) for p in self.parameters.values()]

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def _raw(self, parameter: Tensor) -> None:
        parameter.grad = None  # nobody may see it
        # What follows a layer without a rule may get raw gradients because of it.
        self.raw = self._strange if self._strange is not None else self.parameters[id(parameter)]
        name, met = self.names[id(self.raw)], self._met.get(id(self.raw))
        how = "in a pass that is not booked"
        if met:
            how = f"through {met}, for which there is no rule or not with a batch of {self.units * self.rows} rows"
        raise self.error(
            f"{name} got a raw gradient {how}; multiply by it with a layer or function of torch.nn, freeze it with "
            "requires_grad_(False), and use neither checkpointing nor backward passes of your own in training"
        )

    def fall_back(self, module: nn.Module, undo: ExitStack) -> None:
        """Compute the gradients of a module that no rule knows example by example, with functorch.

        It must take one tensor and return one, draw no random numbers and be called with its batch in front.
        """
        old = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.active or not torch.is_grad_enabled() or len(args) != 1 or kwargs:
                return old(*args, **kwargs)
            return self.apply(PerExample(self, module, old), args[0])

        shadowed = "forward" in vars(module)
        module.forward = forward
        undo.callback(lambda: setattr(module, "forward", old) if shadowed else delattr(module, "forward"))

    # Calls of torch ---------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types_: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active or not torch.is_grad_enabled() or not self._concerned(args, kwargs):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            was, self.seq_first = self.seq_first, True
            try:
                with self:
                    return _attention(*args, **kwargs)
            finally:
                self.seq_first = was
        rule = RULES.get(func)
        if rule is not None:
            out = rule(self, func, args, kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out.requires_grad:
            self._derive(func, out, args, kwargs)
        elif isinstance(out, tuple | list):
            for one in out:
                if isinstance(one, Tensor) and one.requires_grad:
                    self._derive(func, one, args, kwargs)
        return out

    def _concerned(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        for arg in args:
            if isinstance(arg, Tensor):
                if arg.requires_grad and self.root(arg) is not None:
                    return True
            elif isinstance(arg, tuple | list) and any(isinstance(a, Tensor) and self.root(a) is not None for a in arg):
                return True
        return bool(kwargs) and any(isinstance(a, Tensor) and self.root(a) is not None for a in kwargs.values())

    def root(self, x: Tensor) -> Tensor | None:
        """The parameter, or tensor computed from parameters alone, that this is or is a view of."""
        key = id(x)
        if key in self.parameters or key in self.derived:
            return x
        if key in self.aliases:
            return self.aliases[key][1]
        base = x._base
        if base is None or not any(id(base) in known for known in (self.parameters, self.derived, self.aliases)):
            return None
        if _overlaps(x):  # expanded, say: what its entries get adds up in the base's
            self.derived[key] = x
            return x
        return self.aliases[id(base)][1] if id(base) in self.aliases else base

    def alias(self, out: Tensor, given: Tensor) -> None:
        """Note that ``out`` was computed from ``given`` by a function with the gradient of the identity."""
        parameter = self.parameters.get(id(given))
        if parameter is None:
            self.derived[id(out)] = out
        else:
            self.aliases[id(out)] = out, parameter

    def part(self, x: Any) -> Part | None:
        """What to book the gradients of ``x`` under; None if it is not trained."""
        if not isinstance(x, Tensor) or not x.requires_grad:
            return None
        root = self.root(x)
        if root is None or root is x:
            return None if root is None else Part(root, x)
        whole = x if x._base is None else x._base
        if id(whole) in self.aliases:  # the same part of the parameter
            offset = x.storage_offset() - whole.storage_offset() + root.storage_offset()
            x = root if x is whole else root.detach().as_strided(x.shape, x.stride(), offset)
        return Part(root, x)

    def _derive(self, func: Any, out: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note that ``out`` was computed from parameters, natively."""
        if self.root(out) is not None:
            return
        tensors = list(_tensors((*args, *kwargs.values())))
        name = getattr(func, "__name__", str(func))
        count = self.units * self.rows
        beside = any(a.is_floating_point() and a.shape[:1] == (count,) and self.root(a) is None for a in tensors)
        for arg in tensors:
            root = self.root(arg)
            if root is not None:
                self._met[id(root)] = name
                if beside and func not in RULES and self._strange is None:
                    self._strange = self.parameters.get(id(root))
        if all(self.root(a) is not None for a in tensors if a.requires_grad):
            self.derived[id(out)] = out

    def batchless(self, part: Part, how: str, dims: int, first: int) -> bool:
        """Whether what a part meets in some kind of call has no batch dimension in front, but for instance positions.

        The sizes may be equal by chance. So what was once seen without one, beside the same parameters and with as many
        dimensions, is taken to be without one ever after.
        """
        count = self.units * self.rows
        leaves = _leaves(part.root) if part.root.grad_fn is not None else [part.root]
        key = (frozenset(id(leaf) for leaf in leaves), how, dims)
        if first not in (1, count):
            self._batchless.add(key)
        return first != count or (count > 1 and key in self._batchless)

    def apply(self, rule: Rule, x: Tensor) -> Tensor:
        """Run a layer by its rule."""
        # What checkpointing computes again in the backward pass is not booked, and it would mistake what is saved.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint":
            raise self.error("activations are checkpointed, which computes layers again past the book; switch it off")
        return _Booked.apply(self.anchor, rule, x)

    # What a rule says --------------------------------------------------------------------------------------------

    def name(self, part: Part) -> str:
        """The parameter's name."""
        return self.names.get(id(part.root), "a tensor computed from parameters")

    def by_row(self, x: Tensor, part: Part) -> Tensor:
        """A layer's input or output gradient with its rows in front: ``(N, ...)``, N = units * rows."""
        count = self.units * self.rows
        if self.seq_first:
            x = x.unflatten(0, (-1, count)) if x.dim() == 2 and x.shape[0] % count == 0 else x
            x = x.transpose(0, 1)
        if x.shape[0] != count:
            raise self.error(
                f"the layer of {self.name(part)} sees a batch of {x.shape[0]} where the step has {count} rows, so it "
                "is not known which example contributed what; keep the batch dimension first and whole through every "
                "layer, and let the collate function neither drop nor multiply examples"
            )
        return x

    def weighted(self, b: Tensor) -> Tensor:
        """Output gradients ``(N, ...)`` with each row's weight."""
        if self.weights is None:
            return b
        weights = self.weights.to(device=b.device, dtype=b.dtype)
        return b * weights.view(-1, *[1] * (b.dim() - 1))

    def by_unit(self, x: Tensor) -> Tensor:
        """Terms ``(N, T, f)`` or ``(N, f)`` of the rows as terms of the units ``(n, T', f)``."""
        x = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        return x if self.rows == 1 else x.reshape(self.units, -1, x.shape[-1])

    def add(self, part: Part, record: Record) -> None:
        """Book the gradients of one call."""
        if self.muted:
            return
        self.parts[part.key] = part
        mask = self.masks.get(part.root)
        if mask is not None:
            record = record.masked(part.of(mask)) if isinstance(record, Full) else Masked(record, part.of(mask))
        known = self.records.setdefault(part.key, [])
        if known and isinstance(known[-1], Full) and isinstance(record, Full) and known[-1].g.shape == record.g.shape:
            known[-1] = Full(known[-1].g + record.g, record.back)
        else:
            known.append(record)

    def saw(self, dtype: torch.dtype) -> None:
        """Note in which precision something is booked."""
        if MARGIN.get(dtype, 1.0) > MARGIN[self.dtype]:
            if dtype not in MARGIN:
                raise self.error(
                    f"a layer computes in {dtype}, too coarse to bound gradients; use float32 or bf16-mixed"
                )
            self.dtype = dtype

    # What comes of it --------------------------------------------------------------------------------------------

    def unbooked(self) -> list[str]:
        """Names of the parameters that no layer has booked."""
        reached = {id(self.parts[key].root) for key in self.records}
        reached |= {id(p) for p in self._sources()}
        return [name for key, name in self.names.items() if key not in reached]

    @torch.no_grad()
    def squared_norms(self, groups: Sequence[Sequence[nn.Parameter]] | None = None) -> Tensor:
        """Squared norms ``(G, n)`` of the units' gradients over each group of parameters; None is one of all."""
        self._check_parts()
        index = {id(p): g for g, group in enumerate(groups or ()) for p in group}
        device = next(iter(self.parts.values())).root.device
        out = torch.zeros(len(groups) if groups else 1, self.units, dtype=self._wide(), device=device)
        special = {id(p) for p in self._sources()}
        for key, records in self.records.items():
            root = self.parts[key].root
            if id(root) in self.parameters and id(root) not in special:
                out[index.get(id(root), 0)] += squared_norms(records)
        if special:
            self._derived_norms(out, index)
        return out

    @torch.no_grad()
    def add_sums(self, factors: Tensor, out: Mapping[int, Tensor], groups: Mapping[int, int] | None = None) -> None:
        """Add the sums of ``factors[group, i] * gradient[i]`` to the tensors of each parameter.

        Args:
            factors: ``(G, n)``, finite; units that are not are taken out by :meth:`drop` first.
            out: a tensor of the parameter's shape by the parameter's id.
            groups: the group of each parameter by its id; None is the first for all.
        """
        derived: dict[int, Tensor] = {}
        for key, records in self.records.items():
            part = self.parts[key]
            if id(part.root) in self.parameters:
                target, group = out[id(part.root)], (groups or {}).get(id(part.root), 0)
                for record in records:
                    record.add_to(part.of(target), factors[group])
            else:
                derived[id(part.root)] = part.root
        for group in range(len(factors)) if derived else ():
            sums = {key: torch.zeros_like(root, memory_format=torch.contiguous_format) for key, root in derived.items()}
            for key, records in self.records.items():
                part = self.parts[key]
                if id(part.root) in derived:
                    for record in records:
                        record.add_to(part.of(sums[id(part.root)]), factors[group])
            sources = [p for p in self._sources() if (groups or {}).get(id(p), 0) == group]
            if sources:
                roots = list(derived.values())
                grads = torch.autograd.grad(
                    roots, sources, [sums[id(r)] for r in roots], retain_graph=True, allow_unused=True
                )
                for source, grad in zip(sources, grads, strict=True):
                    if grad is not None:
                        out[id(source)].add_(self._masked(source, grad))

    def drop(self, bad: Tensor) -> None:
        """Replace the gradients of some units, a mask ``(n,)``, by zero."""
        self.records = {key: [record.without(bad) for record in records] for key, records in self.records.items()}

    @property
    def margin(self) -> float:
        """How far below its bound to clip, as a fraction, for the precision of what is booked."""
        margin = MARGIN[self.dtype]
        if self.dtype is torch.float32:
            cuda = any(part.root.is_cuda for part in self.parts.values())
            backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
            if not cuda:
                backends = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
            margin = max(margin, *(_ROUNDED.get(backend.fp32_precision, 0.0) for backend in backends))
        return margin

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _check_parts(self) -> None:
        """Parts of one tensor may not overlap, or the norm of their sum would not be the sum of their norms."""
        whole = sum(part.view is part.root for part in self.parts.values())
        for root in (
            {id(part.root): part.root for part in self.parts.values()}.values() if whole < len(self.parts) else ()
        ):
            parts = [part for part in self.parts.values() if part.root is root]
            if not root.is_contiguous() and any(part.view is not root for part in parts):
                raise self.error(f"{self.name(parts[0])} is used in part and is not contiguous; make it contiguous")
            if len(parts) > 1:
                hits = torch.zeros(root.shape, dtype=torch.int32, device=root.device)
                for part in parts:
                    part.of(hits).add_(1)
                if int(hits.max()) > 1:
                    raise self.error(
                        f"{self.name(parts[0])} is used whole and in overlapping parts in one step, which is not "
                        "booked; use it in one form"
                    )

    # Weights computed from parameters: masks, normalised weights, low-rank updates, positions ----------------------

    def _sources(self) -> list[nn.Parameter]:
        """The parameters behind the derived tensors that were used."""
        roots = {id(p.root): p.root for p in self.parts.values() if id(p.root) not in self.parameters}
        found: dict[int, nn.Parameter] = {}
        for root in roots.values():
            for leaf in _leaves(root):
                if leaf is None:
                    raise self.error(
                        "a weight is computed from the batch (a layer's output goes into another layer's weight), so "
                        "examples are not independent; compute weights from parameters alone"
                    )
                if id(leaf) in self.parameters:
                    found[id(leaf)] = self.parameters[id(leaf)]
        return list(found.values())

    def _masked(self, source: nn.Parameter, gradient: Tensor) -> Tensor:
        mask = self.masks.get(source)
        return gradient if mask is None else gradient * mask.to(gradient.dtype)

    def _derived_norms(self, out: Tensor, index: Mapping[int, int]) -> None:
        sources = self._sources()
        keys = [key for key, part in self.parts.items() if id(part.root) not in self.parameters]
        roots = list({id(self.parts[key].root): self.parts[key].root for key in keys}.values())
        each = sum(root.numel() for root in roots) + sum(p.numel() for p in sources)
        step = max(1, (1 << 22) // each)
        for start in range(0, self.units, step):
            stop = min(start + step, self.units)
            given = {id(root): root.new_zeros(stop - start, *root.shape) for root in roots}
            for key in keys:
                part = self.parts[key]
                for record in self.records[key]:
                    for i, g in enumerate(record.full(start, stop)):
                        part.of(given[id(part.root)][i]).add_(g.view(part.key[2]))
            grads = _batched_vjp(roots, sources, [given[id(root)] for root in roots])
            for source, whole in zip(sources, grads, strict=True):
                grad = self._masked(source, whole)
                for key, records in self.records.items():
                    part = self.parts[key]
                    if part.root is source:
                        for record in records:
                            for i, g in enumerate(record.full(start, stop)):
                                part.of(grad[i]).add_(g.view(part.key[2]))
                out[index.get(id(source), 0), start:stop] += Full(grad).squares()


def _batched_vjp(roots: Sequence[Tensor], sources: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Products of each unit's vectors with the Jacobian of ``roots`` by ``sources``."""

    def products(vectors: Sequence[Tensor], batched: bool) -> list[Tensor]:
        grads = torch.autograd.grad(
            roots, sources, list(vectors), retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        shape = (len(given[0]),) if batched else ()
        return [s.new_zeros(*shape, *s.shape) if g is None else g for s, g in zip(sources, grads, strict=True)]

    try:
        return [grad.clone(memory_format=torch.contiguous_format) for grad in products(given, batched=True)]
    except RuntimeError:  # an operation that cannot be batched: one unit after another
        each = [products([vectors[i] for vectors in given], batched=False) for i in range(len(given[0]))]
        return [torch.stack(grads) for grads in zip(*each, strict=True)]


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple | list):
            yield from (one for one in arg if isinstance(one, Tensor))


def _overlaps(x: Tensor) -> bool:
    """Whether two entries may be the same number in memory."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _leaves(x: Tensor) -> Iterator[Tensor | None]:
    """The leaves that a tensor was computed from; None for something that was booked on the way."""
    todo, seen = [x.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "_BookedBackward":
            yield None
        elif hasattr(node, "variable"):
            yield node.variable
        todo += [following for following, _ in node.next_functions]


# torch's attention is Python that hands over to modes before its first line; a copy that does not lets the
# Bookkeeper see the projections inside.
_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__
assert "has_torch_function" in F.multi_head_attention_forward.__code__.co_names
