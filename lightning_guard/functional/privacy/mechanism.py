"""The gradients of a private training, from what backward passes book to what optimizers take."""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_guard.functional.privacy.book import Bookkeeper
from lightning_guard.functional.privacy.clipping import Clipping, adapted
from lightning_guard.functional.privacy.noise import Noise
from lightning_guard.functional.privacy.plan import PrivacyPlan
from lightning_guard.functional.privacy.sampling import Deal
from lightning_guard.functional.privacy.sums import NoisySum


class Mechanism:
    r"""Clips the gradient of each unit, adds all of a step to its noise, and hands the sum to the parameters.

    For each step :meth:`begin`; then for each batch of its draw a forward pass inside ``book.step(...)``, a backward
    pass, and :meth:`take`, which with the last batch leaves :math:`\frac{1}{B} (\sum_i c_i g_i + \sigma C z)` in
    ``.grad``. Between, parameters have no gradient.

    Args:
        parameters: what is trained, by name.
        clip: by how much each unit's gradient is scaled.
        noise: where noise comes from.
        loss_reduction: what the losses of a batch were made one by.
        clip_rate: learning rate of an adaptive bound.
        rank: of this process; the noise is that of the first.
        world: number of processes.
        error: makes the exception for what cannot be booked.
        masks: of parameters that are partly held at zero, 1 where not and 0 where so. They are read anew in every step.
            Gradients where a mask is 0 use none of the norm, and no noise is handed over there.

    Reference:
        Abadi et al., Deep learning with differential privacy, CCS 2016, arXiv:1607.00133.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> private = Mechanism(layer.named_parameters(), Clipping(), Noise(seed=0))
        >>> plan = PrivacyPlan.solve(100, 4, 25, 1e-3, 1.0, noise_multiplier=1.0, epochs=1)
        >>> private.begin(plan, step=0, max_grad_norm=1.0)
        >>> with private.book.step(units=4):
        ...     loss = layer(torch.ones(4, 3)).square().mean(1).mean()
        >>> loss.backward()
        >>> layer.weight.grad is None
        True
        >>> private.take(Deal(units=4, rows=1, weights=None, first=True, last=True, step=0))
        >>> layer.weight.grad.shape
        torch.Size([2, 3])
        >>> private.close()
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        clip: Clipping,
        noise: Noise,
        loss_reduction: Literal["mean", "sum"] = "mean",
        clip_rate: float = 0.2,
        rank: int = 0,
        world: int = 1,
        error: Callable[[str], Exception] | None = None,
        masks: Mapping[Tensor, Tensor] | None = None,
    ):
        self.masks = masks
        self.clip, self.noise, self.loss_reduction, self.clip_rate = clip, noise, loss_reduction, clip_rate
        self.rank, self.world, self.error = rank, world, error
        self.dropped = 0  # units whose gradient was not finite
        self.released = 0  # sums of this step that were handed over
        self._reached: dict[tuple[int, frozenset[int]], set[int]] = {}  # by release and what is trained: whom it is for
        self._undo: Callable[[], None] = lambda: None
        self.follow(parameters)

    def follow(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Book these parameters instead of those so far."""
        trained = list(parameters)
        self.close()
        self.book = Bookkeeper(trained, self.error, self.masks)
        self._undo = self.book.forbid_raw()
        layers: dict[str, list[nn.Parameter]] = {}
        for name, p in trained:
            layers.setdefault(name.rpartition(".")[0] if self.clip.kind == "per_layer" else "", []).append(p)
        self.groups = list(layers.values())  # clipped together
        self._group = {id(p): g for g, group in enumerate(self.groups) for p in group}
        self.sum = NoisySum([p for _, p in trained], self.noise, self.masks)

    def close(self) -> None:
        """Let raw gradients reach the parameters again."""
        self._undo()

    def begin(self, plan: PrivacyPlan, step: int, max_grad_norm: float, accumulated: int = 1) -> None:
        """Begin a step.

        Args:
            plan: what it is part of.
            step: how many steps were made before it.
            max_grad_norm: C of this step.
            accumulated: what the loss of each of its batches is divided by.
        """
        self.plan, self.step, self.max_grad_norm, self.accumulated = plan, step, max_grad_norm, accumulated
        self.next_norm: float | None = None  # C of the next step, where it adapts
        self.released, self._unclipped, self.sum.begun = 0, 0.0, False

    @property
    def std(self) -> float:
        """Standard deviation of the noise on each number of the gradient."""
        return self.plan.noise_at(self.step) * self.max_grad_norm / self.plan.batch_size

    def factors(self, norms: Tensor, units: int) -> Tensor:
        """By what to scale booked gradients of ``units`` with these norms ``(G, n)``; their own losses' norms count."""
        scale = self._scale(units)
        return self.clip.factors(norms * scale, self.max_grad_norm, self.book.margin) * scale

    def _scale(self, units: int) -> float:
        """What makes gradients of the loss that is differentiated gradients of each unit's own loss."""
        rows = self.book.rows
        own = 1.0 if self.book.weights is not None else 1.0 / rows  # weights average over a person's rows already
        return own * self.accumulated * (units * rows if self.loss_reduction == "mean" else 1)

    def take(self, deal: Deal, every: bool = True) -> None:
        """Clip and add what a backward pass has booked; after the last batch of a draw, hand the sum over.

        Args:
            deal: what the batch is.
            every: whether each trained parameter must have taken part.

        Raises:
            ValueError: if that would release what is not bounded or not paid for.
        """
        book, plan = self.book, self.plan
        if self.released >= plan.releases:
            raise ValueError(
                f"more than releases={plan.releases} backward passes on one batch, and each is noised and paid for; "
                "set releases to their number"
            )
        unbooked = set(book.unbooked())
        missing = {key for key, p in book.parameters.items() if p.requires_grad and book.names[key] in unbooked}
        if missing and every:
            names = [name for key, name in book.names.items() if key in missing]
            raise ValueError(
                f"{', '.join(names[:5])} took no part in this step, so nothing bounds what examples do to it; freeze "
                "it with requires_grad_(False), or use it in every step"
            )
        if not self.sum.begun:
            self.noise.at(self.step * plan.releases + self.released)
            self.sum.begin(self.std if self.rank == 0 else 0.0)
        self._add(deal.units)
        if deal.last:
            trained = frozenset(key for key, p in book.parameters.items() if p.requires_grad)
            reached = set(trained) - missing
            if self._reached.setdefault((self.released, trained), reached) != reached:
                raise ValueError(
                    f"backward pass {self.released + 1} of a batch reaches other parameters than before, which tells "
                    "of its examples; let the same layers take part in every batch"
                )
            self._release(reached)
        book.clear()

    def _add(self, units: int) -> None:
        book = self.book
        norms = book.squared_norms(self.groups).sqrt_()
        if not units:  # padding
            return
        factors = self.factors(norms, book.units)
        if self.plan.target_quantile is not None:
            below = norms[0] * self._scale(book.units) <= self.max_grad_norm
            self._unclipped += float(below.sum()) - units / 2
        bad = ~norms.isfinite().all(0)
        if bool(bad.any()):
            self.dropped += int(bad.sum())
            book.drop(bad)
        self.sum.add(book, factors / self.plan.batch_size, self._group)

    def _release(self, reached: set[int]) -> None:
        plan = self.plan
        for flat in self.sum.flat.values() if self.world > 1 else ():
            torch.distributed.all_reduce(flat)
        self.sum.end(reached)
        self.released += 1
        if self.released > 1 or plan.target_quantile is None:
            return
        device = next(iter(self.book.parameters.values())).device
        count = torch.tensor(self._unclipped, dtype=torch.float64, device=device)
        if self.rank == 0 and plan.count_noise is not None:
            count += self.noise.number(plan.count_noise)
        if self.world > 1:
            torch.distributed.all_reduce(count)
        fraction = float(count) / plan.batch_size + 0.5
        self.next_norm = adapted(self.max_grad_norm, fraction, plan.target_quantile, self.clip_rate)
