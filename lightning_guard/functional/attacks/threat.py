"""What an attacker may do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_guard.functional.attacks.balls import Norm, draw_l1, lengths, project_l1, steepest_l1, unit
from lightning_guard.functional.attacks.columns import best_switches, hottest, put, slack, whole_steps
from lightning_guard.functional.attacks.validate import validate

Edge = float | Sequence[float]


@dataclass(frozen=True)
class ThreatModel:
    r"""What an attacker may do to an input: move it by at most ``eps`` in ``norm`` and stay within ``bounds``.

    All lengths are in the user's units, before normalisation: with ``mean`` and ``std`` the network sees
    :math:`x = (r - \mu) / \sigma` and the attacker moves :math:`r`, so 8/255 stays 8/255. Tables may say more: what
    a move of 1 is worth in each column, which columns hold categories or whole numbers, and which only grow or fall.

    Args:
        eps: radius, in input units before normalisation (times ``unit``).
        norm: ``"linf"`` (each feature by at most ``eps``), ``"l2"`` (Euclidean over all features of an example) or
            ``"l1"`` (sum of all absolute changes).
        bounds: lowest and highest valid value, in input units before normalisation, each one number or one an index
            of dimension 1; None leaves the range open, and so do infinite values.
        mean: subtracted before the network, one number or one a channel (dimension 1).
        std: divided by before the network, one number or one a channel (dimension 1).
        mutable: indices along dimension 1 that the attacker may change; None is all of them.
        immutable: indices along dimension 1 that the attacker may not change, also if they are ``mutable``.
        unit: what 1 of ``eps`` is worth in input units, one number or one an index of dimension 1. With the range of
            each column, ``eps=0.1`` is a tenth of it.
        per: what has a ball of its own: the ``"example"``, or each ``"position"`` of it, e.g. each token of
            embeddings ``(N, T, E)``, where the norm is over the last dimension.
        one_hot: groups of columns of which exactly one is 1 and the others are 0, before normalisation. A change of
            category is not measured by ``eps`` but counted by ``switches``.
        switches: how many groups the attacker may switch to another category. A group with an immutable index
            stays.
        integer: columns whose value before normalisation stays whole.
        increasing: indices along dimension 1 that may only grow, e.g. age.
        decreasing: indices along dimension 1 that may only fall.

    Raises:
        ValueError: for values that describe no threat, naming the option.

    | case                            | result                                                       |
    |---------------------------------|--------------------------------------------------------------|
    | ``eps=0``                       | only the input itself, and other categories with ``one_hot`` |
    | an input outside ``bounds``     | ``check`` raises and says by how much                        |
    | a row that is not one-hot, or not whole, where that is claimed | ``check`` raises and names the columns |
    | ``mutable=()``                  | only the input itself                                        |
    | ``eps`` below 1 in an integer column | that column stays                                       |

    Example:
        >>> threat = ThreatModel(eps=0.5, bounds=(0.0, 1.0))
        >>> threat.project(torch.tensor([[2.0, 0.2]]), torch.tensor([[0.7, 0.9]]))
        tensor([[1.0000, 0.4000]])

        Age may grow by up to 2.5 years but stays whole, and one category may change:

        >>> person = ThreatModel(eps=2.5, one_hot=[(1, 2)], integer=(0,), increasing=(0,))
        >>> person.project(torch.tensor([[60.0, 0.2, 0.8]]), torch.tensor([[39.0, 1.0, 0.0]]))
        tensor([[41.,  0.,  1.]])
    """

    eps: float
    norm: Norm = "linf"
    bounds: tuple[Edge, Edge] | None = None
    mean: float | Sequence[float] | None = None
    std: float | Sequence[float] | None = None
    mutable: Sequence[int] | None = None
    immutable: Sequence[int] | None = None
    unit: float | Sequence[float] | None = None
    per: Literal["example", "position"] = "example"
    one_hot: Sequence[Sequence[int]] | None = None
    switches: int = 1
    integer: Sequence[int] | None = None
    increasing: Sequence[int] | None = None
    decreasing: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for field in _SEQUENCES:  # lists from YAML become tuples, so that threats compare and hash
            object.__setattr__(self, field, _frozen(getattr(self, field)))
        validate(self)

    @property
    def discrete(self) -> bool:
        """Whether there are points in between that the attacker may not reach: categories or whole numbers."""
        return bool(self.one_hot or self.integer)

    def scale(self, x: Tensor, free: Tensor | None = None) -> Tensor:
        """How far the network's input moves for 1 of ``eps``: ``unit / std``, 0 where it may not move.

        Args:
            x: inputs ``(N, ...)``.
            free: where the attacker may act, truth values that broadcast to ``x`` (e.g. not on padding).
        """
        self._fits(x)
        scale = 1 / self._std(x)
        if self.unit is not None:
            scale = scale * _per_channel(self.unit, x, 1.0, "unit")
        if free is not None:
            scale = scale * free.to(dtype=x.dtype, device=x.device)
        still = [*(self.immutable or ()), *self._hot]
        if self.mutable is None and not still:
            return scale
        return scale * _along(self._allowed(x, still), x)

    def limits(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Lowest and highest values within reach of ``x``, as the network sees them: ``bounds`` and monotony."""
        low, high = self._bounds(x)
        if not self.increasing and not self.decreasing:
            return low, high
        low = torch.full_like(x, -torch.inf) if low is None else low.expand_as(x).clone()
        high = torch.full_like(x, torch.inf) if high is None else high.expand_as(x).clone()
        for edge, columns, tighter in ((low, self.increasing, torch.maximum), (high, self.decreasing, torch.minimum)):
            columns = list(columns or ())
            edge[:, columns] = tighter(edge[:, columns], x[:, columns])
        return low, high

    def check(self, x: Tensor, tolerance: float = 1e-4) -> None:
        """Raise if ``x`` itself is no valid input: then ``bounds``, ``mean``, ``std`` or the columns are wrong."""
        self._fits(x)
        low, high = self._bounds(x)
        if low is not None and high is not None and len(x):
            excess = torch.maximum((low - x).max(), (x - high).max()).item()
            if not excess <= tolerance:
                raise ValueError(
                    f"inputs range over [{x.min().item():.4g}, {x.max().item():.4g}], outside bounds={self.bounds}"
                    f"{'' if self.mean is None and self.std is None else ' after normalisation'}; "
                    "give the bounds of the inputs, and mean and std if they are normalised"
                )
        if not self.discrete:
            return
        raw = self._raw(x)
        far = torch.maximum(self._slack(x), raw.new_tensor(1e-3))
        remedy = "give the columns before normalisation, and mean and std if the inputs are normalised"
        for group in self.one_hot or ():
            part, columns = raw[:, list(group)], list(group)
            bad = ~_is_one_hot(part, far[:, columns])
            if bad.any():
                row = [round(value, 4) for value in part[bad][0].tolist()]
                raise ValueError(f"one_hot={columns} holds {row} in {int(bad.sum())} of {len(x)} rows; {remedy}")
        for column in self.integer or ():
            bad = ~((raw[:, column] - raw[:, column].round()).abs() <= far[:, column])
            if bad.any():
                value = raw[bad, column][0].item()
                raise ValueError(
                    f"integer column {column} holds {value:.6g}, in {int(bad.sum())} of {len(x)} rows no whole number; "
                    f"{remedy}"
                )

    def project(self, moved: Tensor, x: Tensor, free: Tensor | None = None) -> Tensor:
        """``moved`` brought back into the threat model around ``x``; both ``(N, ...)`` as the network sees them.

        It is the nearest point for ``linf`` and ``l1``. For ``l2`` it is the nearest point of the ball, then of the
        bounds, which leaves it in both. Categories and whole numbers are settled after that.
        """
        near = self._nearest(moved, x, free)
        if not self.discrete:
            return near
        near[:, self._hot] = moved[:, self._hot]
        return self.settle(near, x, free)

    def _nearest(self, moved: Tensor, x: Tensor, free: Tensor | None) -> Tensor:
        if self.norm == "linf":
            return moved.clamp(*self._box(x, free))
        scale = self.scale(x, free)
        delta = _divide(moved - x, scale)
        if self.norm == "l2":
            factor = (self.eps / self._rows(delta).norm(dim=1).clamp_min(1e-30)).clamp_max(1)
            return self._within_bounds(x + delta * self._spread(factor, x) * scale, x)
        low, high = self._room(x, x, scale)
        near = project_l1(self._rows(delta), low, high, self.eps).reshape(x.shape)
        return self._within_bounds(x + near * scale, x)

    def contains(self, moved: Tensor, x: Tensor, tolerance: float = 1e-5, free: Tensor | None = None) -> Tensor:
        """Which of the ``(N,)`` moved examples lie inside the threat model around ``x``, up to ``tolerance``.

        All of it is checked: the norm over what ``eps`` measures, bounds, immutable and monotone features, switched
        groups, and that categories stay one-hot and whole numbers whole.
        """
        scale = self.scale(x, free)
        length = self._spread(lengths(self._rows(_divide(moved - x, scale)), self.norm), x).flatten(1).amax(1)
        stuck = (scale == 0).expand_as(x)
        inside = length <= self.eps + tolerance
        if self.discrete:
            inside &= self._contains_columns(moved, x, tolerance, free)
            stuck = stuck.index_fill(1, torch.tensor(self._hot, dtype=torch.long, device=x.device), False)
        inside &= torch.where(stuck, moved - x, 0).flatten(1).abs().amax(1) == 0
        low, high = self._reach(x)
        if low is not None and high is not None:
            inside &= ((moved >= low - tolerance) & (moved <= high + tolerance)).flatten(1).all(1)
        return inside

    def _contains_columns(self, moved: Tensor, x: Tensor, tolerance: float, free: Tensor | None) -> Tensor:
        raw, was = self._raw(moved), self._raw(x)
        far = torch.maximum(torch.maximum(self._slack(moved), self._slack(x)), raw.new_tensor(min(tolerance, 0.01)))
        inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
        whole = list(self.integer or ())
        steps = ((moved - x) * self._std(x))[:, whole]
        inside &= ((steps - steps.round()).abs() <= 2 * far[:, whole]).all(1)
        for group in self.one_hot or ():
            columns = list(group)
            same = (moved[:, columns] == x[:, columns]).all(1)  # an input that is one-hot but for rounding may stay
            inside &= same | _is_one_hot(raw[:, columns], far[:, columns])
        if self.one_hot:
            switched = hottest(raw, self.one_hot) != hottest(was, self.one_hot)
            inside &= (switched.sum(1) <= self.switches) & ~(switched & self.frozen(x, free)).any(1)
        return inside

    def rounding(self, x: Tensor) -> float:
        """How far outside rounding alone may carry an input of these magnitudes: a tolerance for :meth:`contains`."""
        scale = self.scale(x)
        magnitude = _divide(x, scale).abs().amax() if len(x) else 0.0
        features = x[0].numel() if len(x) and self.norm != "linf" else 1
        errors = features if self.norm == "l1" else features**0.5
        return 8 * torch.finfo(x.dtype).eps * (1 + float(magnitude) + self.eps) * errors

    def draw(self, x: Tensor, generator: torch.Generator | None = None, free: Tensor | None = None) -> Tensor:
        """A point drawn uniformly from the ball around ``x``, then brought within the bounds.

        With ``one_hot``, random groups take random categories, up to ``switches``.
        """
        start = self._draw(x, generator, free)
        if self.one_hot:
            score = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
            start = self._switched(start, x, score, free)
        return self.settle(start, x, free)

    def _draw(self, x: Tensor, generator: torch.Generator | None, free: Tensor | None) -> Tensor:
        scale = self.scale(x, free)
        if self.norm == "linf":
            noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator).mul_(2).sub_(1)
            return self._nearest(x + noise * (self.eps * scale), x, free)
        if self.norm == "l1":
            allowed = self._rows((scale > 0).expand_as(x))
            noise = draw_l1(self._rows(x), allowed, generator).reshape(x.shape)
            return self._nearest(x + noise * (self.eps * scale), x, free)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) * (scale > 0)
        rows = self._rows(noise)
        if free is None:
            power: float | Tensor = 1 / max(int(self._rows((scale > 0).expand_as(x[:1]))[:1].sum()), 1)
        else:
            power = 1 / self._rows((scale > 0).expand_as(x)).sum(1).clamp_min(1)
        radius = torch.rand(len(rows), dtype=x.dtype, device=x.device, generator=generator) ** power
        factor = self.eps * radius / rows.norm(dim=1).clamp_min(1e-30)
        return self._nearest(x + noise * self._spread(factor, x) * scale, x, free)

    def steepest(
        self,
        gradient: Tensor,
        x: Tensor,
        moved: Tensor | None = None,
        *,
        length: float = 1.0,
        share: float = 0.01,
        free: Tensor | None = None,
    ) -> Tensor:
        """The step of this ``length`` along which a loss of this gradient rises fastest, as the network sees it.

        Signs for ``linf``, the gradient at unit length for ``l2``. For ``l1`` a single feature would be steepest; the
        step is shared by the features of largest gradient that have room to the bounds left, and is shorter where
        none have (:func:`~lightning_guard.functional.attacks.balls.steepest_l1`). 0 for immutable features, and for
        categories, see :meth:`switch`.

        Args:
            gradient: of the loss, with respect to the network's input ``(N, ...)``.
            x: the inputs that the attack began from.
            moved: where the gradient was taken; None is ``x``.
            length: of the step, in units of ``eps``.
            share: fraction of features that an ``l1`` step is spread over, at least one.
            free: where the attacker may act, truth values that broadcast to ``x``.

        Example:
            >>> gradient = torch.tensor([[3.0, -4.0]])
            >>> [ThreatModel(1.0, norm).steepest(gradient, torch.zeros(1, 2)) for norm in ("linf", "l2", "l1")]
            [tensor([[ 1., -1.]]), tensor([[ 0.6000, -0.8000]]), tensor([[ 0., -1.]])]
        """
        scale = self.scale(x, free)
        if self.norm == "linf":
            return gradient.sign() * (length * scale)
        if self.norm == "l2":
            return unit(self._rows(gradient * scale)).reshape(x.shape) * (length * scale)
        low, high = self._room(x if moved is None else moved, x, scale)
        step = steepest_l1(self._rows(gradient * scale), low, high, length, share)
        return step.reshape(x.shape) * scale

    def relaxed(self) -> "ThreatModel":
        """What gradients can climb: whole numbers become continuous and categories stand still.

        It is the threat model itself if it has neither. Its points, :meth:`settle`-d, lie in the threat model, also
        around an ``x`` of switched categories.
        """
        if not self.discrete:
            return self
        still = (*(self.immutable or ()), *self._hot)
        return replace(self, one_hot=None, switches=1, integer=None, immutable=still or None)

    def settle(self, moved: Tensor, x: Tensor, free: Tensor | None = None) -> Tensor:
        """A point of the relaxed threat model brought to valid categories and whole numbers; else ``moved``.

        Whole numbers are rounded toward ``x``, which never leaves the ball, the bounds or the direction. Categories
        go to the largest of their group; if more than ``switches`` changed, the clearest changes stay.
        """
        if self.integer:
            columns, std = list(self.integer), self._std(x).expand_as(x)
            moved = moved.clone()
            moved[:, columns] = whole_steps(moved[:, columns], x[:, columns], std[:, columns])
        return self._switched(moved, x, self._raw(moved), free) if self.one_hot else moved

    def switch(self, gradient: Tensor, x: Tensor, moved: Tensor | None = None, free: Tensor | None = None) -> Tensor:
        """``moved`` with the categories of ``x``, except up to ``switches`` groups that gain most to first order.

        A change of category gains the difference of the gradient's two entries, per raw unit.

        Args:
            gradient: of the loss, with respect to the network's input ``(N, D)``.
            x: the inputs that the attack began from.
            moved: where numbers are taken from; None is ``x``.
            free: where the attacker may act, truth values that broadcast to ``x``.

        Example:
            >>> threat = ThreatModel(0.0, one_hot=[(0, 1), (2, 3, 4)])
            >>> threat.switch(torch.tensor([[0.0, 1.0, 5.0, 5.5, 8.0]]), torch.tensor([[1.0, 0, 0, 1, 0]]))
            tensor([[1., 0., 0., 0., 1.]])
        """
        moved = x if moved is None else moved
        return self._switched(moved, x, gradient / self._std(x), free) if self.one_hot else moved

    def categories(self, x: Tensor) -> Tensor:
        """The category of each group ``(N, G)``, counted within the group."""
        return hottest(self._raw(x), self.one_hot or ())

    def with_categories(self, x: Tensor, categories: Tensor, moved: Tensor | None = None) -> Tensor:
        """``moved`` in these categories ``(N, G)``; where they are those of ``x``, bit for bit as in ``x``.

        Args:
            x: the inputs that the attack began from ``(N, D)``.
            categories: of each group, counted within the group.
            moved: where all else is taken from; None is ``x``.
        """
        moved = (x if moved is None else moved).clone()
        hot, no, yes = (
            self._hot,
            *(((value - self._mean(x)) / self._std(x)).expand(1, x.shape[1])[0] for value in (0, 1)),
        )
        moved[:, hot] = put(x, self.one_hot or (), self.categories(x), categories, no, yes)[:, hot]
        return moved

    def _switched(self, moved: Tensor, x: Tensor, score: Tensor, free: Tensor | None) -> Tensor:
        """``moved`` with the categories of ``x``, except where ``score`` is higher, within ``switches``."""
        frozen = self.frozen(x, free)
        best = best_switches(score, self.categories(x), self.one_hot or (), self.switches, frozen)
        return self.with_categories(x, best, moved)

    @property
    def _hot(self) -> list[int]:
        return [index for group in self.one_hot or () for index in group]

    def frozen(self, x: Tensor, free: Tensor | None = None) -> Tensor:
        """Which groups hold a column that the attacker may not touch, ``(N, G)``."""
        free = torch.ones_like(x, dtype=torch.bool) if free is None else free.to(x.device).expand_as(x)
        free = free & self._allowed(x, self.immutable or ()).bool()
        return torch.stack([~free[:, list(group)].all(1) for group in self.one_hot or ()], dim=1)

    def _allowed(self, x: Tensor, still: Iterable[int]) -> Tensor:
        """1 for each index of dimension 1 that may change, else 0."""
        allowed = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
        if self.mutable is not None:
            allowed.zero_()[list(self.mutable)] = 1
        allowed[list(still)] = 0
        return allowed

    def _fits(self, x: Tensor) -> None:
        """Raise if a named index is none of dimension 1, or if tables are no tables."""
        if self.discrete and x.dim() != 2:
            option = "one_hot" if self.one_hot else "integer"
            raise ValueError(f"{option} is for rows of a table (N, D), and the inputs have shape {tuple(x.shape)}")
        for option in ("mutable", "immutable", "integer", "increasing", "decreasing", "one_hot"):
            named = getattr(self, option) or ()
            columns = [index for group in named for index in group] if option == "one_hot" else list(named)
            if columns and (x.dim() < 2 or any(not -x.shape[1] <= index < x.shape[1] for index in columns)):
                raise ValueError(
                    f"{option}={columns} for inputs of shape {tuple(x.shape)}; give indices along dimension 1"
                )

    def _bounds(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.bounds is None:
            return None, None
        mean, std = self._mean(x), self._std(x)
        low, high = (
            edge if isinstance(edge, float | int) else _per_channel(edge, x, 0.0, "bounds") for edge in self.bounds
        )
        return (low - mean) / std, (high - mean) / std

    def _reach(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The limits, widened to hold ``x``."""
        low, high = self.limits(x)
        if low is None or high is None:
            return None, None
        # An input beyond a bound by rounding stays where it is: pulled back, an immutable feature would have moved.
        return torch.minimum(low, x), torch.maximum(high, x)

    def _room(self, moved: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """How far each feature may still move from ``moved``, down and up, in rows and units of ``eps``."""
        low, high = self._reach(x)
        if low is None or high is None:
            end = self._rows(torch.full_like(x, torch.inf))
            return -end, end
        return self._rows(_divide(low - moved, scale)), self._rows(_divide(high - moved, scale))

    def _box(self, x: Tensor, free: Tensor | None = None) -> tuple[Tensor, Tensor]:
        radius = self.eps * self.scale(x, free)
        return self._within_bounds(x - radius, x), self._within_bounds(x + radius, x)

    def _within_bounds(self, moved: Tensor, x: Tensor) -> Tensor:
        low, high = self._reach(x)
        return moved if low is None else moved.clamp(low, high)

    def _rows(self, values: Tensor) -> Tensor:
        """One row a ball."""
        return values.flatten(1) if self.per == "example" else values.reshape(-1, values.shape[-1])

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        """One value a ball, in a shape that broadcasts over ``x``."""
        return values.reshape(-1, *[1] * (x.dim() - 1)) if self.per == "example" else values.reshape(*x.shape[:-1], 1)

    def _mean(self, x: Tensor) -> Tensor:
        return _per_channel(self.mean, x, 0.0, "mean")

    def _std(self, x: Tensor) -> Tensor:
        return _per_channel(self.std, x, 1.0, "std")

    def _slack(self, x: Tensor) -> Tensor:
        return slack((x * self._std(x)).abs() + self._mean(x).abs())

    def _raw(self, x: Tensor) -> Tensor:
        return x * self._std(x) + self._mean(x)


_SEQUENCES = ("bounds", "mean", "std", "mutable", "immutable", "unit", "one_hot", "integer", "increasing", "decreasing")


def _frozen(value: object) -> object:
    return (
        tuple(_frozen(part) for part in value) if isinstance(value, Iterable) and not isinstance(value, str) else value
    )


def _divide(delta: Tensor, scale: Tensor) -> Tensor:
    """In units of ``eps``; 0 where nothing may move."""
    return torch.where(scale > 0, delta / scale.clamp_min(1e-30), 0)


def _is_one_hot(raw: Tensor, far: Tensor) -> Tensor:
    """Which rows hold one 1 and else 0, up to ``far``."""
    return ((raw - raw.round()).abs() <= far).all(1) & (raw.round().abs().sum(1) == 1) & (raw.round().amax(1) == 1)


def _along(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (x.dim() - 2))


def _per_channel(value: float | Sequence[float] | None, x: Tensor, default: float, option: str) -> Tensor:
    values = torch.as_tensor(default if value is None else value, dtype=x.dtype, device=x.device)
    if values.dim() == 0:
        return values
    if x.dim() < 2 or len(values) != x.shape[1]:
        shape = tuple(x.shape)
        raise ValueError(f"{len(values)} values of {option} for inputs of shape {shape}; give one a channel")
    return _along(values, x)
