"""Models whose exact robustness is known, small trained networks, and checks of what every attack promises."""

import functools

import numpy as np
import torch
from scipy.optimize import linprog
from sklearn.datasets import load_digits
from torch import nn

from lightning_guard.functional import ThreatModel, pgd

NORMS = ["linf", "l2", "l1"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear:
    """Two classes, told apart by the sign of ``w x + b``; as one logit or as two."""

    def __init__(self, features: int = 12, seed: int = 0, one_logit: bool = False, scale: float = 1.0):
        self.w = torch.randn(features, generator=seeded(seed), dtype=torch.float64)
        self.b, self.one_logit, self.scale = 0.1, one_logit, scale

    def score(self, x):
        return x.double().flatten(1) @ self.w + self.b

    def __call__(self, x):
        z = self.scale * (x.flatten(1) @ self.w.to(x) + self.b)
        return z if self.one_logit else torch.stack([-z / 2, z / 2], 1)

    def radius(self, x, norm: str, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
        """The exact distance to the other class, an example at a time: dual norms, bisection or a linear program."""
        found = []
        for row, score in zip(x.double().flatten(1).numpy(), self.score(x).numpy(), strict=True):
            w = -np.sign(score) * self.w.numpy()
            room = np.where(w > 0, high - row, row - low)
            found.append(_radius(np.abs(w), abs(score), room, norm))
        return np.array(found)


def _radius(w, gap, room, norm):
    if not np.isfinite(room).any():
        return gap / np.linalg.norm(w, {"linf": 1, "l2": 2, "l1": np.inf}[norm])
    if w @ room < gap:
        return np.inf
    if norm == "l1":
        return linprog(np.ones_like(w), A_ub=[-w], b_ub=[-gap], bounds=list(zip(0 * w, room, strict=True))).fun
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        step = np.minimum(middle * (w if norm == "l2" else 1), room)
        low, high = (middle, high) if w @ step < gap else (low, middle)
    return np.linalg.norm(np.minimum(high * w, room)) if norm == "l2" else high


def inputs(n: int = 8, features: int = 12, seed: int = 1):
    return torch.rand(n, features, generator=seeded(seed), dtype=torch.float64)


@functools.cache
def digits():
    """Images ``(N, 1, 8, 8)`` in [0, 1] and classes, 1400 to train on and 60 others."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=seeded())
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(data.target)[order]
    return x[:1400], y[:1400], x[1400:1460], y[1400:1460]


@functools.cache
def network(robust: float = 0.0, norm: str = "linf", classes: int = 10):
    """A small convolutional network on digits of the first ``classes`` classes, trained within seconds."""
    x, y, *_ = digits()
    x, y = x[y < classes], y[y < classes]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 48), nn.ReLU(),
            nn.Linear(48, classes),
        )  # fmt: skip
    optimizer, draws = torch.optim.Adam(net.parameters(), 5e-3), seeded()
    threat = ThreatModel(robust, norm, (0.0, 1.0))
    for _ in range(6):
        for rows in torch.randperm(len(x), generator=draws).split(64):

            def loss(moved, y=y[rows]):
                return nn.functional.cross_entropy(net(moved), y, reduction="none")

            moved = pgd(loss, x[rows], threat, 3, generator=draws) if robust else x[rows]
            optimizer.zero_grad()
            loss(moved).mean().backward()
            optimizer.step()
    net.zero_grad()
    return net.eval()


def samples(classes: int = 10):
    *_, x, y = digits()
    return x[y < classes], y[y < classes]


def standing(forward, points, y):
    logits = forward(points)
    wrong = (logits > 0).long() if logits.dim() == 1 else logits.argmax(1)
    return (wrong == y).double().mean().item()


class Watched:
    """A model that notes whether it is shown an example again after it got it wrong.

    Examples are told apart by a mark in the first feature, which the threat leaves as it is.
    """

    def __init__(self, model, y):
        self.model, self.y, self.wrong, self.again, self.rows = model, y, set(), set(), 0

    def __call__(self, x):
        logits = self.model(x)
        marks = [round(mark * 1000) for mark in x.detach().flatten(1)[:, 0].tolist()]
        self.rows += len(marks)
        self.again |= self.wrong & set(marks)
        answers = ((logits > 0).long() if logits.dim() == 1 else logits.argmax(1)).tolist()
        self.wrong |= {mark for mark, answer in zip(marks, answers, strict=True) if answer != self.y[mark]}
        return logits
