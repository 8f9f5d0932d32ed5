"""Which units a private step takes."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lightning_guard.functional.random import stream


class Deal(NamedTuple):
    """What a batch is, told beside it.

    Args:
        units: examples or people in the batch; 0 in a batch of padding, which must be counted nowhere.
        rows: rows that each of them has in the batch, consecutive. The batch has ``units * rows`` rows, and ``rows``
            if it is padding.
        weights: of every row, such that those of a unit add up to one and its gradient is their weighted sum; 0 for
            padding. None if all are 1.
        first: whether the batch begins a step.
        last: whether it ends one.
        step: the step in the epoch, from 0.
    """

    units: int
    rows: int
    weights: Tensor | None
    first: bool
    last: bool
    step: int


class Draws(Sampler[list[int]]):
    """Batches of Poisson draws: each unit is in each step with the same probability, whatever the others do.

    A draw is dealt into ``world`` shares and ``chunks`` batches each, at random and as evenly as can be, so that
    accumulating gradients over the chunks of all ranks is one step on one draw. (Independent draws a chunk could
    contain a unit several times, and its sensitivity with it.)

    Args:
        units: number of examples; or, where people are protected, for each person the indices of their rows.
        sample_rate: probability of each unit in each step, in (0, 1].
        steps: steps an epoch.
        chunks: batches a step on each rank, always exactly so many.
        views: how often each row is repeated, consecutively, for random augmentation (De et al., 2022).
        rows: rows that each person gives: a random choice of their own, anew each time, or all of them and weight 0
            on repetitions that fill up. Only with people.
        rank: of this process.
        world: number of processes; each computes the same draw and takes its share.
        secret: the seed, the same on all ranks, 16 bytes from ``os.urandom``. Amplification by sampling counts on
            nobody knowing who was drawn: the secret must be new in every run, also in a resumed one, and must never
            be stored or logged.
        sampling: ``"poisson"``, or ``"shuffle"``: each epoch anew a random order, cut into batches of exactly
            ``round(sample_rate * units)``; what is over after ``steps`` of them waits for the next epoch's order, so
            each unit is in at most one step an epoch.
        turn: for tests: what iterators with the same number draw is the same. None numbers them.

    Raises:
        ValueError: if a number is impossible, a person has no rows, or shuffled steps need more units than there are.

    Iterating yields ``steps * chunks`` lists of row indices; beside each list a :class:`Deal` waits for
    :meth:`next_deal`. The iterators of one sampler draw differently, each the same for the same secret. The global
    generators are not touched.

    | case                               | result                                                              |
    |------------------------------------|---------------------------------------------------------------------|
    | nobody drawn, or fewer than chunks | batches of padding: rows of unit 0, all of weight 0, ``units=0``    |
    | a new iterator                     | the deals of earlier ones are forgotten, even if they go on         |
    | workers that fetch ahead           | right, as long as the loader keeps the order (``in_order=True``)    |
    | a person without rows              | an error: drop them, and from the number of units                   |

    Reference:
        De et al., Unlocking High-Accuracy Differentially Private Image Classification through Scale, 2022,
        arXiv:2204.13650.

    Example:
        >>> draws = Draws(5, sample_rate=0.5, steps=2, chunks=2, secret=3)
        >>> for batch in draws:
        ...     deal = draws.next_deal()
        ...     print(deal.step, deal.first, deal.last, deal.units, batch)
        0 True False 2 [3, 1]
        0 False True 1 [0]
        1 True False 2 [4, 0]
        1 False True 1 [1]
    """

    def __init__(
        self,
        units: int | Sequence[Sequence[int]],
        sample_rate: float,
        steps: int,
        *,
        secret: int,
        chunks: int = 1,
        views: int = 1,
        rows: int = 1,
        rank: int = 0,
        world: int = 1,
        sampling: Literal["poisson", "shuffle"] = "poisson",
        turn: Callable[[], int] | None = None,
    ) -> None:
        self.people = None if isinstance(units, int) else units
        self.units = units if isinstance(units, int) else len(units)
        self.sample_rate, self.steps, self.chunks = sample_rate, steps, chunks
        self.views, self.rows, self.rank, self.world = views, rows, rank, world
        self.sampling, self.turn = sampling, turn
        self.batch = round(sample_rate * self.units)
        self._secret = secret
        self._begun = 0
        self._deals: deque[Deal] = deque()
        for name in ("units", "steps", "chunks", "views", "rows", "world"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} draws nothing; give 1 or more")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate={sample_rate} is no probability of being drawn; give a number in (0, 1]")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} is not one of world={world}; give 0 to {world - 1}")
        if sampling not in ("poisson", "shuffle"):
            raise ValueError(f"sampling={sampling!r} is not known; give 'poisson' or 'shuffle'")
        if sampling == "shuffle" and not 1 <= steps * self.batch <= self.units:
            raise ValueError(
                f"steps={steps} batches of {self.batch} are not 1 to {self.units} units; "
                f"give at most {self.units // max(self.batch, 1)} steps with sampling='shuffle'"
            )
        if self.people is None and rows != 1:
            raise ValueError(f"rows={rows} of an example make no sense; give people's rows as units, or views")
        if self.people is not None and (empty := [i for i, own in enumerate(self.people) if len(own) == 0]):
            raise ValueError(f"people {empty[:5]} have no rows; leave them out of units")

    def __len__(self) -> int:
        return self.steps * self.chunks

    def next_deal(self) -> Deal:
        """What the next batch of the latest iterator is; to be called once for each batch that arrives.

        Raises:
            RuntimeError: if no batch was fetched that has not been told about.
        """
        if not self._deals:
            raise RuntimeError("no batch of the latest iterator is left; call next_deal once for each batch")
        return self._deals.popleft()

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator: earlier deals are forgotten at once, not with the first batch.
        self._deals = deque()
        return self._batches(self._deals)

    def _batches(self, deals: deque[Deal]) -> Iterator[list[int]]:
        self._begun += 1  # with the first batch, because a loader with workers asks for an iterator too many
        turn = self._begun if self.turn is None else self.turn()
        order = torch.randperm(self.units, generator=stream(self._secret, turn)) if self.sampling == "shuffle" else None
        for step in range(self.steps):
            generator = stream(self._secret, turn, step)
            if order is None:
                drawn = _poisson(self.units, self.sample_rate, generator)
                drawn = drawn[torch.randperm(len(drawn), generator=generator)]
            else:
                drawn = order[step * self.batch : (step + 1) * self.batch]
            rows, weights = self._rows(drawn, generator)
            # Two cuts in the same direction: shares differ by at most one unit, and so do the chunks of a share.
            rows, weights = rows[self.rank :: self.world], weights[self.rank :: self.world]
            for chunk in range(self.chunks):
                batch, own = rows[chunk :: self.chunks], weights[chunk :: self.chunks]
                count = len(batch)
                if not count:
                    batch, own = self._rows(torch.tensor([0]), generator)
                    own = torch.zeros_like(own)
                told = None if count and self.views * self.rows == 1 else own.flatten()
                last = chunk == self.chunks - 1
                deals.append(Deal(count, self.views * self.rows, told, chunk == 0, last, step))
                yield batch.flatten().tolist()

    def _rows(self, drawn: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The rows that units give and their weights, both of shape (units, rows * views)."""
        if self.people is None:
            rows, counts = drawn.unsqueeze(1), torch.ones(len(drawn), 1)
        else:
            hands = [self._hand(self.people[unit], generator) for unit in drawn.tolist()]
            rows = torch.tensor(hands, dtype=torch.long).reshape(-1, self.rows)
            counts = (
                torch.tensor([len(self.people[unit]) for unit in drawn.tolist()]).reshape(-1, 1).clamp(max=self.rows)
            )
        weights = (torch.arange(self.rows) < counts) / (counts * self.views)
        return rows.repeat_interleave(self.views, 1), weights.repeat_interleave(self.views, 1)

    def _hand(self, own: Sequence[int], generator: torch.Generator) -> list[int]:
        if len(own) > self.rows:
            return [own[i] for i in torch.randperm(len(own), generator=generator)[: self.rows].tolist()]
        return [own[i % len(own)] for i in range(self.rows)]


def chunks_within(most: int, size: int, rows: int = 1, world: int = 1) -> int:
    """Into how many batches to deal a draw, so that hardly ever one has more than ``most`` rows.

    Args:
        most: rows of a batch.
        size: expected units of a draw.
        rows: rows of a unit.
        world: number of processes.

    Example:
        >>> chunks_within(64, size=256)
        6
    """
    # Six standard deviations above the expected size: a larger draw comes once in a billion steps.
    return math.ceil(math.ceil((size + 6 * math.sqrt(size)) * rows / world) / most)


def _poisson(units: int, rate: float, generator: torch.Generator) -> Tensor:
    """Which of so many units are drawn, ascending, each with probability ``rate``.

    The gaps between them are geometric, so the time grows with the draw and not with the data. In float64: with
    float32 a small rate would be off by whole percents.
    """
    expected = units * rate
    some = int(expected + 6 * expected**0.5) + 16  # rarely too few; then there is another round
    drawn = torch.tensor([-1.0], dtype=torch.float64)
    while drawn[-1] < units:
        uniform = 1 - torch.rand(some, generator=generator, dtype=torch.float64)  # in (0, 1]
        gaps = (uniform.log() / torch.tensor(-rate, dtype=torch.float64).log1p()).floor() + 1
        drawn = torch.cat([drawn, drawn[-1] + gaps.cumsum(0)])
    return drawn[1:][drawn[1:] < units].long()
