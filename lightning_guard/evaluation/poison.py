"""Whether some training examples were put there to teach a backdoor."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_guard.evaluation.base import Bars, Evidence, Figure
from lightning_guard.evaluation.subject import Subject
from lightning_guard.functional.poison import Clusters, activation_clusters, spectral_scores


def _in_order(loader: DataLoader[Any]) -> bool:
    """Whether positions are rows: no sampler and no batch sampler of another kind than torch's own in order."""
    own = loader.batch_sampler
    sampler = loader.sampler if own is None else getattr(own, "sampler", None)
    return type(sampler) is SequentialSampler and type(own) in (BatchSampler, type(None))


class Suspicion(NamedTuple):
    """What an audit suspects, by the place of an example in the loader.

    Args:
        clustering: positions of the examples in a class's small, separate cluster, ascending.
        spectral: positions of the examples with a class's highest spectral scores, the highest first.
        label: the class that each example is said to have ``(N,)``.
        clusters: what clustering found in each class.
        scores: spectral scores ``(N,)``.
    """

    clustering: Tensor
    spectral: Tensor
    label: Tensor
    clusters: Clusters
    scores: Tensor


class PoisonAudit:
    """Looks for backdoors in the training data, by how the trained network represents them.

    Activation clustering (Chen et al., 2018) splits each class in two and suspects the smaller cluster where it is
    small and stands apart. Spectral signatures (Tran et al., 2018) suspect the highest ``1.5 * share`` of each class,
    in clean data too: a ranking of whom to look at first, never a finding.

    Both accuse innocents. ``clean`` says how many, on this network: data that are known to be clean go through the
    same procedure, and all that is suspected there is a false alarm. Nothing is ever removed.

    The subject's loader is the training data's, unlike for other evaluators, and in the order of the data set if
    positions are asked for. Features are what the last linear layer takes in.

    Args:
        layer: submodule whose output are the features instead, flattened.
        share: of a class that could be poison, in (0, 0.5); spectral signatures suspect half as much again.
        small: share of a class, in (0, 0.5], up to which its smaller cluster is suspicious.
        apart: mean silhouette from which the two clusters stand apart, in [-1, 1].
        clean: batches that are known to be clean, as often as they are asked for; at least some 100 a class.

    | case                                   | result                                                         |
    |----------------------------------------|----------------------------------------------------------------|
    | a class of fewer than 3 examples       | clustering suspects none of it                                 |
    | targets that are no class              | no evidence but a note                                         |
    | a model without a linear layer         | ``layer`` is asked for                                         |
    | no ``clean`` data                      | a note that the false alarms are unknown                       |

    Reference:
        Chen et al., Detecting backdoor attacks on deep neural networks by activation clustering, 2018,
        arXiv:1811.03728. Tran, Li and Madry, Spectral signatures in backdoor attacks, NeurIPS 2018, arXiv:1811.00636.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.cat([torch.randn(95, 2), torch.randn(5, 2) + 9])
        >>> audit = PoisonAudit(share=0.05)
        >>> found = audit.inspect(Subject(nn.Linear(2, 2), [(x, torch.zeros(100, dtype=torch.long))]))
        >>> found.clustering.tolist(), 95 <= found.spectral[0] < 100
        ([95, 96, 97, 98, 99], tensor(True))
    """

    name: ClassVar[str] = "poison"

    def __init__(
        self,
        layer: str | None = None,
        share: float = 0.05,
        small: float = 0.35,
        apart: float = 0.15,
        clean: Iterable[Any] | None = None,
    ):
        if not 0 < share < 0.5:
            raise ValueError(f"share={share} is no share of a class that could be poison; give a fraction in (0, 0.5)")
        if not 0 < small <= 0.5:
            raise ValueError(f"small={small} is no share of a class's smaller cluster; give a fraction in (0, 0.5]")
        if not -1 <= apart <= 1:
            raise ValueError(f"apart={apart} is no silhouette; give a number in [-1, 1]")
        if isinstance(clean, Iterator):
            raise ValueError(f"clean={type(clean).__name__} can be read only once; give a DataLoader or a list")
        self.layer, self.share, self.small, self.apart, self.clean = layer, share, small, apart, clean

    def inspect(self, subject: Subject) -> Suspicion:
        """Whom the audit suspects.

        Raises:
            ValueError: if the loader shuffles, targets are no classes, or there are no features.
        """
        if isinstance(subject.loader, DataLoader) and not _in_order(subject.loader):
            raise ValueError("the loader shuffles, so a position names no row; give a DataLoader with shuffle=False")
        if subject.kind not in ("binary", "multiclass"):
            raise ValueError(subject.problem or f"there is no class to compare with: this is a {subject.kind}")
        return self._inspect(subject)

    def _inspect(self, subject: Subject) -> Suspicion:
        features, label = self._features(subject)
        clusters, scores = activation_clusters(features, label), spectral_scores(features, label)
        guilty = (clusters.share <= self.small) & (clusters.silhouette >= self.apart)
        clustering = (clusters.smaller & guilty[label]).nonzero().squeeze(1)
        highest = torch.zeros(len(label), dtype=torch.bool)
        for one in label.unique():
            members = (label == one).nonzero().squeeze(1)
            highest[members[scores[members].topk(round(1.5 * self.share * len(members))).indices]] = True
        order = torch.argsort(scores, descending=True, stable=True)
        return Suspicion(clustering, order[highest[order]], label, clusters, scores)

    def evaluate(self, subject: Subject) -> Evidence:
        """How many of each class are suspected, and how many of clean data would be."""
        if subject.kind not in ("binary", "multiclass"):
            problem = subject.problem or f"There is no class to compare with: this is a {subject.kind}."
            return Evidence(notes=[f"Poison was not looked for. {problem}"])
        found, evidence = self._inspect(subject), Evidence()
        ways = {"clustering": "activation clustering", "spectral": "spectral signatures"}
        about = {
            "clustering": f"In a class's smaller cluster of at most {self.small:.0%}, with a silhouette of at least "
            f"{self.apart:g}.",
            "spectral": f"The highest {1.5 * self.share:.1%} of each class by construction, in clean data too.",
        }
        for key, way in ways.items():
            flagged = getattr(found, key)
            evidence.figures[f"poison/{key}"] = Figure(
                len(flagged) / len(found.label), f"Suspected by {way}", "fraction", None, about[key]
            )
            counts = torch.bincount(found.label)
            shares = (torch.bincount(found.label[flagged], minlength=len(counts)) / counts).tolist()
            evidence.bars[f"poison/{key}_by_class"] = Bars(
                [subject.class_name(i) for i in range(len(counts))],
                [share if count else None for share, count in zip(shares, counts.tolist(), strict=True)],
                f"Suspected by {way}", "share of the class", about[key], "fraction",
            )  # fmt: skip
        if self.clean is None:
            evidence.notes.append(
                "How many innocents the search for poison accuses is unknown: no clean data were given (clean=...)."
            )
            return evidence
        reference = self._inspect(Subject(subject.module, self.clean, subject._run.batch))
        for key, way in ways.items():
            evidence.figures[f"poison/{key}_false_alarms"] = Figure(
                len(getattr(reference, key)) / len(reference.label), f"False alarms of {way}", "fraction", "lower",
                f"Share of {len(reference.label)} examples known to be clean that the same procedure suspects.",
            )  # fmt: skip
        return evidence

    def _features(self, subject: Subject) -> tuple[Tensor, Tensor]:
        features, labels = [], []
        with subject.still(), self._watching(subject.module) as seen:
            for step in subject.batches():
                seen.clear()
                subject.forward(step.inputs)
                target = step.target.reshape(-1).cpu()
                if not seen or len(seen[-1]) != len(target):
                    got = f"features of shape {tuple(seen[-1].shape)}" if seen else "no features"
                    raise ValueError(
                        f"layer={self.layer!r} gives {got} for a batch of {len(target)}; name a submodule that the "
                        "forward pass calls and whose output has one row an example"
                    )
                features.append(seen[-1].flatten(1).float().cpu())
                labels.append(target.long())
        return torch.cat(features), torch.cat(labels)

    @contextmanager
    def _watching(self, module: nn.Module) -> Iterator[list[Tensor]]:
        """The features of the latest forward pass, last in a list."""
        seen: list[Tensor] = []
        names = dict(module.named_modules())
        if self.layer is not None and self.layer not in names:
            raise ValueError(f"layer={self.layer!r} names no submodule; there are {', '.join(filter(None, names))}")
        linear = [part for part in names.values() if isinstance(part, nn.Linear)]
        if self.layer is None and not linear:
            raise ValueError("the model has no linear layer whose input could be the features; name one with layer=...")
        # By the order of the calls, not of the definitions: the head may well be defined first.
        if self.layer is None:
            hooks = [part.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for part in linear]
        else:
            hooks = [names[self.layer].register_forward_hook(lambda _, __, output: seen.append(output))]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
