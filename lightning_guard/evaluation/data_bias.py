"""What the groups of a data set are like, before any model is trained."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_guard.batch import Batch
from lightning_guard.evaluation.base import Bars, Evidence, Figure, spread, wilson
from lightning_guard.evaluation.families import Family, Names, families, some
from lightning_guard.evaluation.subject import column, part_of
from lightning_guard.evaluation.table import Panel, percentiles
from lightning_guard.guard import Run, Step

_MOST_GROUPS = 50  # more are identifiers
_MOST_CLASSES = 50  # more are no classes
_REPLICATES = 10_000


def describe_groups(
    batches: Iterable[Any],
    batch: Batch | None = None,
    group_names: Names | None = None,
    class_names: Sequence[str] | None = None,
    min_support: int = 30,
    population: Mapping[str, float] | None = None,
    attribute_names: Sequence[str] | None = None,
) -> Evidence:
    """Says how many examples each group has, what is missing, how labels differ between groups, and who is missing.

    What a model may learn of bias is in its data first: groups that are too small to be judged, labels that differ
    between groups (base rates), values that are missing more often in one of them, and groups that were selected less
    often than they are in the population.

    Args:
        batches: of the training data, read once.
        batch: how a batch is read, if the defaults do not fit.
        group_names: names of the groups, by their number; for several attributes a sequence for each.
        class_names: names of the classes, or of several labels, by their number.
        min_support: groups, and classes within them, of fewer examples are named as too small to judge.
        population: the share of each group in the population that the data should stand for, by name; all groups of
            one attribute, adding up to 1.
        attribute_names: names of the attributes.

    Returns:
        Figures, bars and notes with keys like ``data/base_rate_gap``.

    | case                                         | result                                                  |
    |----------------------------------------------|---------------------------------------------------------|
    | no group in the batches                      | a note                                                  |
    | group unknown (negative or NaN)              | counted as missing, part of nothing else                |
    | targets of more than two classes             | the base rate of each, the class that differs most      |
    | several labels                               | the label that differs most                             |
    | floating targets, not just 0 and 1           | mean targets instead of base rates                      |
    | inputs that cannot be NaN, or are no tensors | they count as complete                                  |

    Raises:
        ValueError: if ``population`` does not add up to 1, has shares that are not positive, or names other groups
            than the data; if ``min_support`` is less than 1; if there is no batch.

    Example:
        >>> x, y, group = torch.zeros(90, 2), torch.arange(90) < 30, (torch.arange(90) < 60).long()
        >>> found = describe_groups([(x, y, group)], group_names=["f", "m"], population={"f": 0.5, "m": 0.5})
        >>> found.figures["data/base_rate_gap"].value, found.figures["data/representation_gap"].value
        (0.5, 0.16666666666666669)
    """
    if min_support < 1:
        raise ValueError(f"min_support={min_support} is no number of examples; give at least 1")
    group, target, broken, lacking = _read(batches, batch or Batch())
    if group is None:
        return Evidence(notes=[f"Nothing is said of groups in the data: {lacking['group']}."])
    every = families(group, group_names, attribute_names)
    kin = [family for family in every if 0 < len(family.names) <= _MOST_GROUPS]
    evidence = Evidence(
        notes=[
            f"{len(f.names)} groups of {f.name} look like identifiers and are not described."
            for f in every
            if len(f.names) > _MOST_GROUPS
        ]
    )
    names = [f.names if len(every) == 1 else [f"{f.name}: {name}" for name in f.names] for f in kin]
    evidence |= _sizes(every, kin, names, broken, min_support)
    if target is not None and kin:
        evidence |= _labels(kin, names, target, class_names, min_support)
    elif target is None:
        evidence.notes.append(f"Nothing is said of labels: {lacking['target']}.")
    if population is not None:
        evidence |= _representation(kin, population)
    return evidence


def _read(batches: Iterable[Any], batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor, dict[str, str]]:
    """Groups, targets and whether an input is missing, over all batches; and why there are none."""
    run = Run(None, nn.Identity(), (), batch)  # type: ignore[arg-type]  # nobody trains here
    parts: dict[str, list[Tensor]] = {"group": [], "target": [], "broken": []}
    lacking: dict[str, str] = {}
    for one in batches:
        step, size = Step(run, one), 0
        for name in ("group", "target"):
            part = part_of(step, name) if name not in lacking else lacking[name]
            if isinstance(part, str):
                lacking[name] = part
            else:
                parts[name].append(column(part).cpu())
                size = len(part)
        broken = torch.zeros(size, dtype=torch.bool)

        def count(tensor: Tensor, broken: Tensor = broken) -> None:
            if tensor.is_floating_point() and tensor.dim() and len(tensor) == len(broken):
                broken |= tensor.isnan().reshape(len(tensor), -1).any(1).cpu()

        apply_to_collection(step.inputs, Tensor, count)
        parts["broken"].append(broken)
    if not parts["broken"]:
        raise ValueError("batches hold nothing to be described; give the training data")
    group, target = (None if name in lacking else torch.cat(parts[name]) for name in ("group", "target"))
    return group, target, torch.cat(parts["broken"]), lacking


def _sizes(
    every: Sequence[Family], kin: Sequence[Family], names: Sequence[Sequence[str]], broken: Tensor, least: int
) -> Evidence:
    n = len(broken)
    counts = [torch.bincount(family.group[family.group >= 0], minlength=len(family.names)) for family in kin]
    flat = [(int(k), name) for own, part in zip(counts, names, strict=True) for k, name in zip(own, part, strict=True)]
    unknown = max(int((family.group < 0).sum()) for family in every)
    evidence = Evidence(
        {
            "data/smallest_group": Figure(
                float(min(flat)[0]) if flat else None,
                "Smallest group",
                "count",
                "higher",
                f"Examples of the smallest group, of {n} for training.",
            ),
            "data/unknown_group": Figure(
                unknown / n if n else None, "Unknown group", "fraction", "lower", "Examples whose group is not known."
            ),
            "data/missing_values": Figure(
                float(broken.double().mean()) if n else None,
                "Missing values",
                "fraction",
                "lower",
                "Examples of which an input is not a number.",
            ),
        }
    )
    if flat:
        everyone, about = [name for _, name in flat], "Examples of each group."
        heights: list[float | None] = [float(count) for count, _ in flat]
        evidence.bars["data/group_size"] = Bars(everyone, heights, "Size by group", "Examples", about, "count")
        small = [f"{name} has {count}" for count, name in flat if count < least]
        if small:
            evidence.notes.append(f"Groups of fewer than {least} examples, too small to judge: {some(small)}.")
    if bool(broken.any()):
        shares: list[float | None] = [
            float(broken[family.group == g].double().mean()) for family in kin for g in range(len(family.names))
        ]
        evidence.bars["data/missing_values"] = Bars(
            [name for _, name in flat], shares, "Missing values by group", "Missing values",
            "Examples of each group of which an input is not a number.", "fraction",
        )  # fmt: skip
    return evidence


def _labels(
    kin: Sequence[Family],
    names: Sequence[Sequence[str]],
    target: Tensor,
    class_names: Sequence[str] | None,
    least: int,
) -> Evidence:
    several = target.dim() == 2 and bool(((target == 0) | (target == 1)).all())
    whole = not target.is_floating_point() or bool(((target == 0) | (target == 1)).all())
    if target.dim() > 1 and not several:
        return Evidence(
            notes=[f"Nothing is said of labels: targets of shape (N, {target.shape[1]}, ...) are no labels."]
        )
    everyone = [name for own in names for name in own]
    if not several and (not whole or int(target.min()) < 0 or int(target.max()) >= _MOST_CLASSES):
        heights: list[float | None] = [
            float(target[family.group == g].double().mean()) for family in kin for g in range(len(family.names))
        ]
        about, unit = "Mean of the targets of each group.", "target units"
        return Evidence(bars={"data/mean_target": Bars(everyone, heights, "Mean target by group", unit, about, unit)})

    def class_name(number: int) -> str:
        return class_names[number] if class_names is not None and number < len(class_names) else f"class {number}"

    target = target.long()
    classes = 2 if several else 1 + max(1, int(target.max()))
    panel = Panel(kin, target, target, least, classes)  # of a perfect model, selection rates are base rates
    gap = panel.values()["demographic_parity"]
    about = "Largest minus smallest of the groups' frequencies of class 1."
    if several or classes > 2:
        about = f"Largest minus smallest of the groups' frequencies of a {'label' if several else 'class'}, the worst."
    known = gap == gap
    figure = Figure(gap if known else None, "Base rate gap", "fraction", "lower", about)
    evidence = Evidence({"data/base_rate_gap": figure})
    drawn = panel.bootstrap(_REPLICATES, np.random.default_rng(0))["demographic_parity"]
    interval = percentiles(drawn) if known else None
    if interval is not None:
        evidence.intervals["data/base_rate_gap"] = interval
    worst = panel.worst("demographic_parity")
    if worst is None:
        return evidence
    label = panel.sheets[worst[0]].label if several else 1
    if classes > 2:
        share = panel.sums[worst[0]].actual / panel.sums[worst[0]].actual.sum(1, keepdim=True)
        label = int((share.amax(0) - share.amin(0)).argmax())
    named, said, few, heights = class_name(label), [], [], []
    for sheet, found in zip(panel.sheets, panel.sums, strict=True):
        own = names[sheet.family]
        shown = not several or sheet.label == label
        for name, counts in zip(own, found.actual.long().tolist(), strict=True):
            total, hits = sum(counts), counts[1 if several else label]
            if shown:
                heights.append(hits / total)
                said.append(f"{name} {hits / total:.1%} ({spread(wilson(hits, total))})")
            few += [
                f"{name} has {count} of {class_name(sheet.label) if several else class_name(k)}"
                for k, count in enumerate(counts)
                if count < least <= total and (not several or k == 1)
            ]
    about = f"Frequency of {named} in each group."
    evidence.bars["data/base_rate"] = Bars(everyone, heights, "Base rate by group", "Base rate", about, "fraction")
    evidence.notes.append(f"Base rates of {named} with 95% intervals: {some(said)}.")
    if few:
        evidence.notes.append(f"Fewer than {least} examples, too few to judge rates among them: {some(few)}.")
    return evidence


def _representation(kin: Sequence[Family], population: Mapping[str, float]) -> Evidence:
    shares = torch.tensor(list(population.values()), dtype=torch.float64)
    if not bool((shares > 0).all()) or abs(float(shares.sum()) - 1) > 1e-3:
        raise ValueError(f"population={dict(population)} is no distribution; give positive shares that add up to 1")
    family = next((family for family in kin if set(family.names) <= population.keys()), None)
    if family is None:
        known = "; ".join(", ".join(family.names) for family in kin)
        raise ValueError(f"population names {', '.join(population)}, and the groups are {known}; name them all")
    shares, size = shares / shares.sum(), int((family.group >= 0).sum())
    seen = {name: int((family.group == number).sum()) for number, name in enumerate(family.names)}
    counts = torch.tensor([seen.get(name, 0) for name in population], dtype=torch.float64)
    away, p = counts / size - shares, _goodness_of_fit(counts, shares)
    figure = Figure(
        float(away.abs().max()),
        "Distance from the population",
        "fraction",
        "lower",
        "Largest difference between the share of a group here and in the stated population.",
    )
    ratio = Bars(
        list(population), (counts / size / shares).tolist(), "Representation by group",
        "Share here / share in the population", "1 is the stated population; below 1 a group is missing.", "ratio",
    )  # fmt: skip
    listed = [f"{name} {seen.get(name, 0) / size:.1%} for {share:.1%}" for name, share in population.items()]
    word = "differ from" if p < 0.05 else "are compatible with"
    sure = f"p {'< 0.0001' if p < 1e-4 else f'= {p:.2g}'}"
    note = f"Group shares {word} the stated population (goodness of fit, {sure}): {some(listed)}."
    return Evidence({"data/representation_gap": figure}, bars={"data/representation": ratio}, notes=[note])


def _goodness_of_fit(counts: Tensor, shares: Tensor) -> float:
    """p of Pearson's chi-square; of drawn counts where fewer than 5 examples of a group are expected."""
    expected = counts.sum() * shares
    statistic = ((counts - expected).square() / expected).sum()
    if float(expected.min()) >= 5:
        return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))
    drawn = np.random.default_rng(0).multinomial(int(counts.sum()), shares.numpy(), size=_REPLICATES)
    shown = ((torch.from_numpy(drawn) - expected).square() / expected).sum(1)
    return (1 + int((shown >= statistic - 1e-9).sum())) / (1 + _REPLICATES)
