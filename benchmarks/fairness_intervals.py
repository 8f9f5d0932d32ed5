"""Intervals of group gaps on Adult's test set: tables drawn at once, against fairlearn's bootstrap of rows.

    python benchmarks/fairness_intervals.py [--replicates 10000] [--peer-replicates 50] [--repeats 5]

Prints processor time of one thread (the least of the repeats), the time of a replicate and its ratio, and the
intervals of both side by side. fairlearn's MetricFrame has no interval for equalized odds (fairlearn#1443).
"""

import argparse
import time

import numpy as np
import torch
from fairlearn.metrics import MetricFrame, false_positive_rate, selection_rate, true_positive_rate
from sklearn.metrics import accuracy_score
from torch import nn

from lightning_guard.data import AdultData
from lightning_guard.evaluation import Fairness, Subject
from lightning_guard.evaluation.table import TABLE_NOTIONS, bootstrap, percentiles, tabulate

METRICS = {
    "demographic_parity": selection_rate,
    "equal_opportunity": true_positive_rate,
    "predictive_equality": false_positive_rate,
    "accuracy_parity": accuracy_score,
}


def trained(data):
    """A perceptron of one pass, which is all that intervals need."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(data.in_features, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for x, y, *_ in data.train_dataloader():
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x)[:, 0], y.float()).backward()
        optimizer.step()
    return net


def timed(work, repeats=1):
    times = []
    for _ in range(repeats):
        began = time.process_time()
        result = work()
        times.append(time.process_time() - began)
    return min(times), result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--peer-replicates", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for group in ("sex", "sex+race"):
        data = AdultData(group=group)
        data.setup("fit")
        data.setup("test")
        subject = Subject(trained(data), data.test_dataloader(), group_names=data.group_names)
        logits, target, groups, _ = subject.outputs
        decision, names = (logits > 0).long(), data.group_names

        def ours(groups=groups, target=target, decision=decision, names=names):
            table = tabulate(groups, target, decision, len(names), 2)
            return bootstrap(table, options.replicates, np.random.default_rng(0))

        def peer(groups=groups, target=target, decision=decision):
            return MetricFrame(
                metrics=METRICS, y_true=target.numpy(), y_pred=decision.numpy(), sensitive_features=groups.numpy(),
                n_boot=options.peer_replicates, ci_quantiles=[0.025, 0.975], random_state=0,
            ).difference_ci()  # fmt: skip

        subject.kind  # noqa: B018  # outputs and kind are found once, for all evaluators
        took, drawn = timed(ours, options.repeats)
        whole, _ = timed(lambda subject=subject: Fairness(replicates=options.replicates).evaluate(subject), 2)
        peers, (low, high) = timed(peer)
        each, other = took / options.replicates, peers / options.peer_replicates
        print(f"{group}: {len(target):,} examples, {len(names)} groups")
        print(
            f"  five notions, {options.replicates:>6,} replicates      {took:8.3f} s  {1e6 * each:10.1f} µs a replicate"
        )
        print(f"  the whole Fairness evidence            {whole:8.3f} s")
        print(
            f"  MetricFrame, four metrics, {options.peer_replicates:>6,} of them {peers:8.3f} s  {1e6 * other:10.1f} µs"
        )
        print(f"  ratio of the times of a replicate      {other / each:8.0f}")
        for notion in TABLE_NOTIONS:
            found = percentiles(drawn[notion])
            own = "none, a cell is empty in too many" if found is None else f"[{found[0]:.4f}, {found[1]:.4f}]"
            theirs = f"[{low[notion]:.4f}, {high[notion]:.4f}]" if notion in METRICS else "not offered"
            print(f"    {notion:20} {own:35} fairlearn {theirs}")


if __name__ == "__main__":
    main()
