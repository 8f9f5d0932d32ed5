"""Robust accuracy and cost of our pair of Auto-PGD attacks beside the standard AutoAttack, on the same models.

    python benchmarks/attack_cost.py [--models digits fashion] [--examples 200] [--square 0] [--fab 0]

Prints, for each network and threat, accuracy under attack and processor time of one thread: of ``apgd_pair`` and of
``pyautoattack``'s ``standard`` in the same process, and their ratio. ``--square`` queries and ``--fab`` steps
add these attacks by themselves. Networks are trained here, the digits within a minute.
"""

import argparse
import time
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from sklearn.datasets import load_digits
from torch import nn

from lightning_guard.data import FashionMNISTData
from lightning_guard.functional import ThreatModel, pgd, stream
from lightning_guard.functional.attacks import apgd_pair, fab, square
from lightning_guard.models import SmallCNN

UNIT = (0.0, 1.0)
THREATS = {
    "digits": {
        None: [("linf", 0.1), ("l2", 0.5), ("l1", 2.0)],
        ("linf", 0.2): [("linf", 0.1), ("linf", 0.2)],
        ("l2", 0.8): [("l2", 0.8)],
    },
    "fashion": {None: [("linf", 0.01)], ("linf", 0.1): [("linf", 0.1), ("l2", 1.0)]},
}
"""By how the network was trained: what it is attacked with."""


def digits():
    data = load_digits()
    order = torch.randperm(len(data.images), generator=stream(0))
    x, y = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]
    return x[:1300], y[:1300], x[1300:], y[1300:]


def fashion():
    data = FashionMNISTData(batch_size=500)
    data.setup("fit")
    data.setup("test")
    sets = (list(loader) for loader in (data.train_dataloader(), data.test_dataloader()))  # once: they shuffle
    return tuple(torch.cat([batch[part] for batch in found]) for found in sets for part in (0, 1))


def digits_network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


MAKERS = {"digits": (digits, digits_network, 15, 7), "fashion": (fashion, SmallCNN, 8, 4)}


def trained(network, x, y, against, epochs, steps):
    threat = ThreatModel(against[1], against[0], UNIT) if against else None
    optimizer, draws = torch.optim.Adam(network.parameters()), stream(0)
    batches = -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draws).split(64):

            def loss(moved, y=y[rows]):
                return F.cross_entropy(network(moved), y, reduction="none")

            moved = pgd(loss, x[rows], threat, steps, generator=draws) if threat else x[rows]
            optimizer.zero_grad()
            loss(moved).mean().backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def timed(attack, network, x, y, threat):
    began = time.process_time()
    moved = attack(network, x, y, threat)
    spent = time.process_time() - began
    with torch.no_grad():
        return (network(moved).argmax(1) == y).double().mean().item(), spent


def standard(network, x, y, threat):
    with torch.random.fork_rng():
        names = {"linf": "Linf", "l2": "L2", "l1": "L1"}
        attack = AutoAttack(network, norm=names[threat.norm], eps=threat.eps, seed=0, device="cpu")
        return attack.run_standard_evaluation(x, y, batch_size=250)[0]


def fab_within(network, x, y, threat, steps):
    """Points beyond the radius do not count."""
    points = fab(network, x, y, threat, steps)
    inside = threat.contains(points, x, threat.rounding(x))
    return torch.where(inside[:, None, None, None], points, x)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["digits"], choices=list(THREATS))
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--square", type=int, default=0, help="queries")
    parser.add_argument("--fab", type=int, default=0, help="steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"{'network':24} {'threat':10} {'attack':10} {'robust':>7} {'seconds':>8}")
    for name in options.models:
        load, make, epochs, steps = MAKERS[name]
        train_x, train_y, x, y = load()
        x, y = x[: options.examples], y[: options.examples]
        for against, threats in THREATS[name].items():
            torch.manual_seed(0)
            network = trained(make(), train_x, train_y, against, epochs, steps)
            for norm, eps in threats:
                threat = ThreatModel(eps, norm, UNIT)
                attacks = {"pair": partial(apgd_pair, generator=stream(0))}
                if options.fab:
                    attacks["fab"] = partial(fab_within, steps=options.fab)
                if options.square:
                    attacks["square"] = partial(square, queries=options.square, generator=stream(0))
                attacks["standard"] = standard
                found = {}
                for attack, run in attacks.items():
                    robust, seconds = found[attack] = timed(run, network, x, y, threat)
                    label = f"{name}, {'plain' if against is None else f'{against[0]} {against[1]}'}"
                    print(f"{label:24} {norm:5}{eps:<5} {attack:10} {robust:7.3f} {seconds:8.2f}", flush=True)
                points, ratio = (
                    100 * (found["pair"][0] - found["standard"][0]),
                    found["pair"][1] / found["standard"][1],
                )
                print(f"{'':24} {'':10} pair: {points:+.1f} points for {ratio:.3f} of the time", flush=True)


if __name__ == "__main__":
    main()
