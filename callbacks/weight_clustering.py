"""Weight sharing as a guard."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_guard.compression.scheduled import ScheduledWeights
from lightning_guard.functional import cluster_means, kmeans, nearest
from lightning_guard.guard import GuardConflict, Phase, Trait


class WeightClustering(ScheduledWeights):
    r"""Trains with at most ``clusters`` distinct values in each layer's weights (Han et al., 2016).

    At ``start`` the weights of each layer are clustered by k-means, and from then on every weight is the mean of its
    cluster. Until ``end`` each weight keeps a value of its own beside the shared one, which takes the optimizer's steps
    straight through (as in BinaryConnect), and every so many steps it joins the cluster that is nearest by then. From
    ``end`` on clusters are final, and weights move as their clusters do, by the mean of their steps, which is the
    optimizer's step projected onto shared weights. What a checkpoint stores and what is left after training is shared
    too, averaged weights included. Codebooks live outside the module: ``state_dict`` keys do not change.

    Few distinct values make a model compressible, not small or fast by themselves: measure the file that you ship.

    Logs ``guard/weight_clustering/values``, the most distinct values that any of the layers has.

    Args:
        clusters: most distinct values of a layer, at least 2; 0 switches the guard off.
        start: when weights begin to be shared, as a fraction of training (float) or in optimizer steps (int).
        end: when clusters are final, as a fraction of training (float) or in optimizer steps (int).
        every: optimizer steps between two looks for the nearest cluster.
        targets: names or patterns (``*``) of modules; None is every Linear, convolution and attention projection.
        ignore: names or patterns (``*``) of modules to leave alone.

    | case                                    | result                                              |
    |-----------------------------------------|-----------------------------------------------------|
    | ``clusters=0``                          | training is bit-identical to training without the guard |
    | weights that are exactly zero           | stay zero, one of the values; so pruned weights stay pruned |
    | no more distinct weights than clusters  | kept as they are, but equal ones move together      |
    | a layer all of whose weights are zero   | stays so                                            |
    | training ends before ``end``            | refused if it can be known, else a warning at the end |
    | weights that are not finite             | refused when clusters are formed                    |
    | a weight shared by two modules          | clustered once, and left alone if one of them is ignored |
    | weight_norm and other parametrisations, lazy weights | refused                                |

    Raises:
        GuardConflict: before training, if the promise cannot be kept.

    Reference:
        Han, Mao and Dally, Deep Compression, ICLR 2016, arXiv:1510.00149. Straight through: Courbariaux et al.,
        NeurIPS 2015, arXiv:1511.00363.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[WeightClustering(clusters=16, ignore=["head"])], logger=False)
    """

    name: ClassVar[str] = "weight_clustering"
    verb: ClassVar[str] = "cluster"
    # After the optimizer's step guards act in reverse: masks, which are of a later phase, come before the sharing.
    phase: ClassVar[Phase] = Phase.GRADIENTS
    traits: frozenset[Trait] | None = frozenset({Trait.POST_PROCESSING})

    def __init__(
        self,
        clusters: int = 16,
        start: int | float = 0.5,
        end: int | float = 0.8,
        every: int = 10,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
    ):
        if clusters and not 2 <= clusters <= 2**15:
            raise ValueError(
                f"clusters={clusters} is no number of shared values; give 2 to {2**15}, or 0 to switch off"
            )
        super().__init__(start, end, every, targets, ignore)
        self.clusters = clusters
        self._codebooks: dict[str, Tensor] = {}  # sorted values, and behind them the zero of those that are zero
        self._labels: dict[str, Tensor] = {}
        self._offsets: dict[
            str, Tensor
        ] = {}  # of each weight's own value from the shared one, until clusters are final

    @property
    def off(self) -> bool:
        return not self.clusters

    @property
    def asked(self) -> str:
        return f"clusters={self.clusters}"

    @property
    def short(self) -> str:
        return "clusters were not final yet" if self._labels else "weights are not shared"

    @property
    def figures(self) -> dict[str, float]:
        return {"values": max(map(len, self._codebooks.values()))} if self._codebooks else {}

    def take_up(self, state: Mapping[str, Any] | None) -> None:
        kept = {"codebooks": {}, "labels": {}, "offsets": {}} if state is None else state

        def here(part: str) -> dict[str, Tensor]:
            return {name: value.to(self._weights[name].device, copy=True) for name, value in kept[part].items()}

        self._codebooks, self._offsets = here("codebooks"), here("offsets")
        self._labels = {name: labels.int() for name, labels in here("labels").items()}

    def advance(self, step: int) -> None:
        start, end = self.window
        begin = max(start, 1)
        if step in (begin, end) or (begin < step < end and (step - start) % self.every == 0):
            self.present()
            for name, weight in self._weights.items():
                values = self._join(name)
                self._share(name, values)
                self._offsets.pop(name, None)
                if step < end:
                    self._offsets[name] = values - weight

    def _join(self, name: str) -> Tensor:
        """Give each weight the cluster that is nearest to its own value, or form the first clusters; its own values."""
        weight = self._weights[name].detach()
        if name not in self._labels:
            values = weight.clone()
            self._form_clusters(name, values)
            return values
        if name not in self._offsets:  # final before, in a training that goes on
            return weight
        values, zero = weight + self._offsets[name], len(self._codebooks[name]) - 1
        if zero:
            gone = self._labels[name] == zero
            self._labels[name] = nearest(values, self._codebooks[name][:-1]).int().masked_fill_(gone, zero)
        return values

    def _form_clusters(self, name: str, values: Tensor) -> None:
        """New clusters, one of them of zeros if there are some."""
        if not bool(values.isfinite().all()):
            raise GuardConflict(
                f"{self.name}: {name} holds infinite weights or NaN at optimizer step {self._steps}, so training has "
                "diverged and there are no clusters; lower the learning rate, or clip gradients"
            )
        zero = values == 0
        codebook, labels = kmeans(values[~zero], self.clusters - int(zero.any()))
        self._codebooks[name] = torch.cat([codebook, codebook.new_zeros(1)])
        self._labels[name] = torch.full(values.shape, len(codebook), dtype=torch.int32, device=values.device)
        self._labels[name][~zero] = labels.int()

    def _share(self, name: str, values: Tensor) -> None:
        """Set a weight to the means of its clusters."""
        self._codebooks[name] = _means(values, self._labels[name], self._codebooks[name])
        self._weights[name].copy_(_spread(self._codebooks[name], self._labels[name]))

    def hold(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._labels:
                continue
            weight, zero = self._weights[name], len(self._codebooks[name]) - 1
            gone = weight == 0  # masks have acted before
            values = weight + self._offsets[name] if name in self._offsets else weight.detach()
            if bool(gone.any()):
                values = values.masked_fill(gone, 0)
                self._labels[name].masked_fill_(gone, zero)
                if zero == self.clusters:  # no room for zeros yet
                    self._form_clusters(name, values)
            self._share(name, values)
            if name in self._offsets:
                torch.sub(values, weight, out=self._offsets[name])

    def formed(self, name: str, values: Tensor) -> Tensor:
        if name not in self._labels:
            return values
        labels, codebook = self._labels[name].to(values.device), self._codebooks[name].to(values.device, values.dtype)
        return _spread(_means(values, labels, codebook), labels)

    def kept(self) -> dict[str, Any]:
        small = torch.uint8 if self.clusters < 256 else torch.int16  # the zero may be one more
        return {
            "codebooks": {name: codebook.clone() for name, codebook in self._codebooks.items()},
            "labels": {name: labels.to(small) for name, labels in self._labels.items()},
            "offsets": {name: offset.clone() for name, offset in self._offsets.items()},
        }


def _means(values: Tensor, labels: Tensor, codebook: Tensor) -> Tensor:
    means = cluster_means(values, labels, codebook)
    means[-1] = 0
    return means


def _spread(codebook: Tensor, labels: Tensor) -> Tensor:
    return codebook.index_select(0, labels.flatten()).reshape(labels.shape)  # codebook[labels] takes ten times as long
