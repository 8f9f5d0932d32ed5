"""What betrays wrongly labelled and poisoned training examples: their losses, margins and hidden features."""

import copy
import dataclasses
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


def trimmed(losses: Tensor, share: float) -> Tensor:
    """The rows that stay when the ``share`` of the highest losses goes: positions, ascending, never none.

    Args:
        losses: of each example ``(N,)``; those that are not a number go first.
        share: of the examples that go, in [0, 1); ``round(share * N)`` of them do.

    | case                | result                          |
    |---------------------|---------------------------------|
    | ``share=0``         | all rows                        |
    | no row              | no row                          |
    | one row             | it stays, whatever ``share``    |
    | equal losses        | of equals the first ones stay   |

    Raises:
        ValueError: if ``share`` lies outside [0, 1), or ``losses`` is no vector.

    Reference:
        Shen and Sanghavi, Learning with bad training data via iterative trimmed loss minimization, ICML 2019,
        arXiv:1810.11874.

    Example:
        >>> trimmed(torch.tensor([0.1, 9.0, 0.3, 0.2]), share=0.25)
        tensor([0, 2, 3])
    """
    _check_share(share)
    if losses.dim() != 1:
        raise ValueError(f"losses have shape {tuple(losses.shape)}; give one number an example")
    count = len(losses)
    kept = min(count, max(1, count - round(share * count)))
    return torch.sort(losses, stable=True).indices[:kept].sort().values  # sort puts NaN last


def take_rows(batch: Any, rows: Tensor, count: int) -> Any:
    """Some examples of a batch, as a new batch of the same form; the batch itself is left as it is.

    Args:
        batch: a tensor, or tuples, lists, named tuples, dicts and dataclasses of tensors, nested as one likes.
        rows: positions of the examples to take, whole numbers ``(K,)``.
        count: how many examples the batch has.

    | part                                                | result                           |
    |-----------------------------------------------------|----------------------------------|
    | a tensor ``(count, ...)``                           | ``part[rows]``                   |
    | a list or tuple of ``count`` values without tensors, inside the batch | these values   |
    | a number, a text, None, a tensor without dimensions | stays: it is of the whole batch  |
    | a tensor of another length, an object of another kind | refused                        |

    Raises:
        ValueError: if a part cannot be told apart into examples.

    Example:
        >>> batch = {"x": torch.tensor([[1.0], [2.0], [3.0]]), "text": ["a", "b", "c"], "epoch": 4}
        >>> take_rows(batch, torch.tensor([0, 2]), count=3)
        {'x': tensor([[1.],
                [3.]]), 'text': ['a', 'c'], 'epoch': 4}
    """
    return _take(batch, rows, count, outermost=True)


def _take(part: Any, rows: Tensor, count: int, outermost: bool = False) -> Any:
    if isinstance(part, Tensor):
        if part.dim() and len(part) != count:
            raise ValueError(
                f"a part of the batch has shape {tuple(part.shape)} and the batch {count} examples, so it is not known "
                "which of it belongs to which example; give parts whose first dimension counts the examples"
            )
        return part[rows.to(part.device)] if part.dim() else part
    if part is None or isinstance(part, str | bytes | int | float | complex):
        return part
    if isinstance(part, MutableMapping):
        taken = copy.copy(part)
        for key, value in part.items():
            taken[key] = _take(value, rows, count)
        return taken
    if isinstance(part, list | tuple):
        values = list(part)
        if not outermost and len(values) == count and not any(isinstance(value, Tensor) for value in values):
            values = [values[row] for row in rows.tolist()]
        else:
            values = [_take(value, rows, count) for value in values]
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        names = [field.name for field in dataclasses.fields(part)]
        return dataclasses.replace(part, **{name: _take(getattr(part, name), rows, count) for name in names})
    raise ValueError(
        f"a part of the batch is a {type(part).__name__}, from which no examples can be taken; give tensors, or "
        "tuples, lists, dicts or dataclasses of them"
    )


def margins(logits: Tensor, target: Tensor) -> Tensor:
    """By how much each example's own class is preferred to the best other one, in logits, ``(N,)``.

    | ``logits``              | ``target``            | margin                                       |
    |-------------------------|-----------------------|----------------------------------------------|
    | ``(N, C)``, C >= 2      | whole ``(N,)``        | logit of the target less the largest other   |
    | ``(N,)`` or ``(N, 1)``  | 0 or 1, ``(N,)`` or ``(N, 1)`` | the logit, with its sign turned where the target is 0 |

    A target that is no class, -100 for instance, has the margin NaN.

    Raises:
        ValueError: if the shapes fit no row of the table.

    Example:
        >>> margins(torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]]), torch.tensor([0, 1]))
        tensor([ 2., -2.])
        >>> margins(torch.tensor([3.0, 3.0]), torch.tensor([1, 0]))
        tensor([ 3., -3.])
    """
    target = target.reshape(-1) if target.dim() == 2 and target.shape[1] == 1 else target
    count = len(logits)
    logits = logits if logits.dtype.itemsize > 2 else logits.float()
    if target.shape == (count,) and (logits.dim() == 1 or logits.shape[1:] == (1,)):
        logits = logits.reshape(-1)
        signed = torch.where(target == 1, logits, -logits)
        return torch.where((target == 0) | (target == 1), signed, torch.nan)
    if target.shape == (count,) and logits.dim() == 2 and not target.is_floating_point():
        known = (target >= 0) & (target < logits.shape[1])
        own = torch.where(known, target, 0).long().unsqueeze(1)
        others = logits.scatter(1, own, -torch.inf).amax(1)
        return torch.where(known, logits.gather(1, own).squeeze(1) - others, torch.nan)
    raise ValueError(
        f"no margin for logits of shape {tuple(logits.shape)} and targets of shape {tuple(target.shape)} and type "
        f"{target.dtype}; margins are of one class an example"
    )


def area_under_margin(passes: Tensor) -> Tensor:
    """The mean margin of each example over the passes of a training, ``(N,)``; low where the label looks wrong.

    Args:
        passes: margins ``(E, N)``, a row a pass, as :func:`margins` gives them; NaN where a pass did not see an
            example. One that no pass has seen has the area NaN.

    Reference:
        Pleiss, Zhang, Elenberg and Weinberger, Identifying mislabeled data using the area under the margin ranking,
        NeurIPS 2020, arXiv:2001.10528.

    Example:
        >>> area_under_margin(torch.tensor([[1.0, -1.0], [3.0, -2.0]]))
        tensor([ 2.0000, -1.5000])
    """
    return passes.nanmean(0)


def suspects(areas: Tensor, label: Tensor, share: float | None = None, outlying: float = 2.0) -> Tensor:
    """Positions of the examples whose label looks wrong, the worst first.

    With ``share`` they are the lowest ``round(share * N)`` areas. Without, they are those below 0, for which training
    has on average preferred another class, and besides low among their class: below its median by more than
    ``outlying`` times its spread. The spread is the upper one, of the half of the class that lies above the median,
    so that wrong labels, of which a class may have up to a half, do not widen it.

    Args:
        areas: as :func:`area_under_margin` gives them ``(N,)``; NaN is never suspicious.
        label: the class that each example is said to have, whole numbers ``(N,)``.
        share: of the examples that are known to be wrong, in [0, 1).
        outlying: spreads below the median of its class.

    Example:
        >>> areas = torch.tensor([5.0, 4.0, 6.0, -9.0, 5.5])
        >>> suspects(areas, torch.zeros(5, dtype=torch.long)).tolist()
        [3]
    """
    order = torch.argsort(areas.nan_to_num(nan=torch.inf), stable=True)
    order = order[~areas[order].isnan()]
    if share is not None:
        _check_share(share)
        return order[: round(share * len(areas))]
    low = areas < 0
    for one in label.unique():
        among = (label == one) & ~areas.isnan()
        if among.any():
            middle = areas[among].median()
            above = areas[among & (areas >= middle)]
            spread = 1.4826 * (above - middle).median()  # of a normal distribution, its standard deviation
            low &= (label != one) | (areas < middle - outlying * spread)
    return order[low[order]]


class Clusters(NamedTuple):
    """How each class falls into two clusters.

    Args:
        smaller: whether an example is in the smaller cluster of its class ``(N,)``.
        share: of the class in its smaller cluster ``(C,)``, NaN for a class of fewer than 3 examples.
        silhouette: mean silhouette of the two clusters in [-1, 1] ``(C,)``; near 0 there is only one.
    """

    smaller: Tensor
    share: Tensor
    silhouette: Tensor


def activation_clusters(features: Tensor, label: Tensor, dimensions: int = 10) -> Clusters:
    """Splits each class in two by what the network makes of its examples; poison stands apart (Chen et al., 2018).

    Features are centred, projected on their first principal components and clustered by two means. The search starts
    from the halves on both sides of each component, so it draws nothing. Chen et al. take independent components.

    Args:
        features: of each example ``(N, ...)``, flattened; usually what the last layer takes in.
        label: the class that each example is said to have, whole numbers from 0 ``(N,)``.
        dimensions: components to keep.

    Reference:
        Chen et al., Detecting backdoor attacks on deep neural networks by activation clustering, 2018,
        arXiv:1811.03728.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.2], [0.1], [9.0]])
        >>> found = activation_clusters(features, torch.zeros(5, dtype=torch.long))
        >>> found.smaller.tolist(), round(found.share.item(), 3)
        ([False, False, False, False, True], 0.2)
    """
    features, classes = _rows(features, label), int(label.max()) + 1 if len(label) else 0
    smaller = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    share, silhouette = torch.full((2, classes), torch.nan, dtype=torch.float64, device=features.device)
    for one in range(classes):
        members = (label == one).nonzero().squeeze(1)
        if len(members) < 3:
            continue
        points = _principal(features[members], dimensions)
        second = _two_means(points)
        if second.sum() * 2 > len(second):
            second = ~second
        smaller[members], share[one] = second, second.double().mean()
        silhouette[one] = _silhouette(points, second)
    return Clusters(smaller, share, silhouette)


def spectral_scores(features: Tensor, label: Tensor) -> Tensor:
    """How far each example lies along the direction in which its class spreads most, squared ``(N,)``.

    Poison that a class learnt by another way adds a direction of its own, so it scores high. Tran et al. drop the
    highest ``1.5 * share`` of each class, where ``share`` is how much poison one expects: the scores themselves do not
    say whether there is any.

    Args:
        features: of each example ``(N, ...)``, flattened; usually what the last layer takes in.
        label: the class that each example is said to have, whole numbers ``(N,)``.

    Reference:
        Tran, Li and Madry, Spectral signatures in backdoor attacks, NeurIPS 2018, arXiv:1811.00636.

    Example:
        >>> features = torch.tensor([[0.0, 0.0], [0.2, 0.0], [-0.2, 0.0], [0.0, 8.0]])
        >>> spectral_scores(features, torch.zeros(4, dtype=torch.long)).argmax().item()
        3
    """
    features = _rows(features, label)
    scores = torch.zeros(len(features), dtype=torch.float64, device=features.device)
    for one in label.unique():
        members = (label == one).nonzero().squeeze(1)
        scores[members] = _principal(features[members], 1).square().sum(1)
    return scores


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is no share of examples that can go; give a fraction in [0, 1)")


def _rows(features: Tensor, label: Tensor) -> Tensor:
    """Features as ``(N, D)``."""
    if label.shape != features.shape[:1]:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and labels {tuple(label.shape)}; give one label an example"
        )
    return features.reshape(len(features), -1)


def _principal(points: Tensor, dimensions: int) -> Tensor:
    """Coordinates along the first principal components, ``(N, at most dimensions)``."""
    centred = points.double() - points.double().mean(0)
    # Of the smaller of the two Gram matrices: a convolution has more features than a class has examples.
    if points.shape[0] < points.shape[1]:
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        scale = values.clamp_min(0).sqrt()
        return (vectors * scale).flip(1)[:, :dimensions]
    return centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :dimensions]


def _two_means(points: Tensor, rounds: int = 100) -> Tensor:
    """Which of two clusters each point belongs to, the best of the starts along the axes."""
    best, found = torch.inf, torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for axis in range(points.shape[1]):
        second = points[:, axis] > 0
        for _ in range(rounds):
            if second.all() or not second.any():
                break
            centres = torch.stack([points[~second].mean(0), points[second].mean(0)])
            distances = torch.cdist(points, centres)
            moved = distances[:, 1] < distances[:, 0]
            if torch.equal(moved, second):
                break
            second = moved
        if second.all() or not second.any():
            continue
        inertia = sum(((p - p.mean(0)) ** 2).sum().item() for p in (points[second], points[~second]))
        if inertia < best:
            best, found = inertia, second
    return found


def _silhouette(points: Tensor, second: Tensor, most: int = 4096) -> float:
    """Mean silhouette of two clusters (Rousseeuw, 1987); of evenly spaced points where there are more than ``most``."""
    if len(points) > most:
        some = torch.linspace(0, len(points) - 1, most, device=points.device).long()
        points, second = points[some], second[some]
    if second.all() or not second.any():
        return 0.0
    distances = torch.cdist(points, points)
    sums = torch.stack([distances[:, ~second].sum(1), distances[:, second].sum(1)], 1)
    sizes = torch.stack([(~second).sum(), second.sum()]).to(sums)
    own = second.long().unsqueeze(1)
    size = sizes[own.squeeze(1)]
    within = sums.gather(1, own).squeeze(1) / (size - 1).clamp_min(1)
    between = (sums / sizes).gather(1, 1 - own).squeeze(1)
    score = torch.where(size > 1, (between - within) / torch.maximum(within, between).clamp_min(1e-30), 0.0)
    return float(score.mean())
