"""What all evaluators have in common: they leave no trace, and what they say is plain."""

import json
import math
import random
from dataclasses import asdict
from typing import Any, Optional

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_guard.evaluation import (
    EVALUATORS,
    Certificate,
    Drift,
    Efficiency,
    Explanation,
    Fairness,
    Privacy,
    Robustness,
    Subject,
    Task,
)
from tests import toys

JUDGES = {
    "task": Task,
    "privacy": Privacy,
    "robustness": lambda: Robustness(eps=0.05, steps=3, examples=40, bounds=(0.0, 1.0)),
    "certificate": lambda: Certificate(sigma=0.1, samples=20, selection=5, examples=8),
    "fairness": lambda: Fairness(replicates=50),
    "explanation": lambda: Explanation(examples=8, steps=4),
    "efficiency": lambda: Efficiency(latency=False),
    "drift": lambda: Drift(most=50),
}
every = pytest.mark.parametrize("name", JUDGES)


class Talkative(toys.Net):
    """Logs and counts in every forward pass."""

    def forward(self, x):
        logits = super().forward(x)
        self.log("mean", logits.mean())
        self.accuracy(logits, logits.argmax(1))
        return logits


def finished(form: str = "triple", **kwargs: Any) -> Subject:
    """A network with BatchNorm, Dropout, a metric in mid-count, gradients and a frozen layer in eval mode."""
    torch.manual_seed(0)
    module = Talkative()
    module.train()
    module.net[1].eval()
    module.net[0].bias.requires_grad_(False)
    module.accuracy(torch.randn(5, toys.CLASSES), torch.randint(toys.CLASSES, (5,)))
    for p in module.parameters():
        p.grad = torch.full_like(p, 3.0)
    others = Subset(toys.Rows(form, 2 * toys.ROWS), range(toys.ROWS, 2 * toys.ROWS))
    return Subject(module, toys.loader(form, **kwargs), train=DataLoader(others, 16))


def trace(module: nn.Module) -> dict[str, Any]:
    """Everything that an evaluation must not change, and copies of what it could change in place."""
    found: dict[str, Any] = {"random": random.getstate(), "grad": torch.is_grad_enabled()}
    found["torch"], found["numpy"] = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    found["inference"] = torch.is_inference_mode_enabled()
    for name, part in module.named_modules():
        hooks = {key: len(value) for key, value in vars(part).items() if "hooks" in key and value is not None}
        found[name] = (part.training, sorted(vars(part)), hooks)
    for name, p in module.named_parameters():
        found[f"{name}, parameter"] = (id(p), p.requires_grad, id(p.grad), p.tolist(), p.grad.tolist())
    for name, buffer in module.named_buffers():
        found[f"{name}, buffer"] = (id(buffer), buffer.tolist())
    metric = module.accuracy
    found["metric"] = (metric._update_count, metric.tp.tolist(), metric._computed is None)
    return found


@every
@pytest.mark.parametrize("inference", [False, True])
def test_nothing_is_left_behind(name, inference):
    subject = finished()
    before = trace(subject.module)
    with torch.inference_mode(inference):
        assert JUDGES[name]().evaluate(subject).figures
    assert trace(subject.module) == before


@every
@pytest.mark.parametrize("calls", [1, 2, 6, 9])
def test_nothing_is_left_behind_after_an_exception(name, calls):
    """The network breaks in its first pass, in a later one, in an attack."""
    subject, seen = finished(), 0
    before = trace(subject.module)

    def breaks(module, args):
        nonlocal seen
        seen += 1
        if seen >= calls:
            raise KeyboardInterrupt

    handle = subject.module.net.register_forward_pre_hook(breaks)
    try:
        JUDGES[name]().evaluate(subject)
    except KeyboardInterrupt:
        pass
    else:
        assert name != "robustness"  # makes many passes
    handle.remove()
    assert trace(subject.module) == before


@every
def test_nothing_is_left_behind_when_the_data_breaks(name):
    class Broken(list):
        def __iter__(self):
            yield next(super().__iter__())
            raise OSError

    subject = finished()
    subject.loader = Broken(toys.loader())
    before = trace(subject.module)
    if name == "efficiency":
        JUDGES[name]().evaluate(subject)  # reads one batch only
    else:
        with pytest.raises(OSError):
            JUDGES[name]().evaluate(subject)
    assert trace(subject.module) == before


@every
def test_repeated_and_in_inference_mode_it_says_the_same(name):
    """The loader shuffles by the global generator, which stands elsewhere each time."""
    first = JUDGES[name]().evaluate(finished())
    torch.manual_seed(99)
    subject = finished()
    torch.rand(7)
    assert JUDGES[name]().evaluate(subject) == first
    assert JUDGES[name]().evaluate(subject) == first
    subject = finished()
    with torch.inference_mode():
        assert JUDGES[name]().evaluate(subject) == first
        batches = [[part.clone() for part in batch] for batch in toys.loader(shuffle=False)]
        assert batches[0][0].is_inference()
        inside = JUDGES[name]().evaluate(Subject(subject.module, batches, train=subject.train))
    assert inside == JUDGES[name]().evaluate(finished(shuffle=False))


@every
def test_what_it_says_is_plain(name):
    evidence = JUDGES[name]().evaluate(finished())
    for found in (evidence.figures, evidence.curves, evidence.bars, evidence.intervals):
        assert all(key.startswith(f"{name}/") for key in found)
    for figure in evidence.figures.values():
        assert figure.value is None or (type(figure.value) is float and math.isfinite(figure.value))
        assert figure.label
        assert figure.about.endswith(".")
        assert figure.better in ("higher", "lower", None)
    for curve in evidence.curves.values():
        assert len(curve.x) == len(curve.y)
    for bars in evidence.bars.values():
        assert len(bars.categories) == len(bars.values) == len(set(bars.categories))
    for key, (low, high) in evidence.intervals.items():
        assert 0 <= low <= high <= (1 if evidence.figures[key].unit in ("fraction", "ratio") else math.inf)
    assert all(note.endswith(".") and (note[0].isupper() or note[0].isdigit()) for note in evidence.notes)
    for part in (*evidence.figures.values(), *evidence.curves.values(), *evidence.bars.values()):
        json.dumps(asdict(part), allow_nan=False)


@every
@pytest.mark.parametrize("form", ["pair", "triple", "named", "dict", "tensor"])
def test_any_form_of_batch_will_do(name, form):
    evidence = JUDGES[name]().evaluate(finished(form))
    lacks = form == "tensor" or (form == "pair" and name == "fairness")
    assert bool(evidence.figures) is (name in ("efficiency", "drift") or not lacks)
    if not evidence.figures:
        assert len(evidence.notes) == 1


@every
def test_an_empty_loader_is_an_error_that_says_so(name):
    with pytest.raises(ValueError, match="loader holds no"):
        JUDGES[name]().evaluate(Subject(finished().module, []))


@every
def test_it_is_made_from_a_file(name):
    cls = EVALUATORS[name]
    assert cls.name == name
    parser = ArgumentParser()
    parser.add_argument("--judge", type=Optional[cls])  # noqa: UP045  # as the command line has it
    judge = parser.instantiate(parser.parse_args([f"--judge=lightning_guard.evaluation.{cls.__name__}"])).judge
    assert type(judge) is cls
    assert vars(judge) == vars(cls())
    json.dumps(vars(judge))  # its options, for the record


def test_there_is_one_an_axis():
    assert (
        list(EVALUATORS)
        == ["task", "privacy", "robustness", "certificate", "fairness", "explanation", "efficiency", "drift"]
        == list(JUDGES)
    )


def test_together_they_read_the_model_once():
    subject, seen = finished(shuffle=False), 0

    def count(*_):
        nonlocal seen
        seen += 1

    subject.module.net.register_forward_pre_hook(count)
    evidence = Task().evaluate(subject) | Fairness(replicates=10).evaluate(subject)
    assert seen == len(subject.loader)
    assert {"task/accuracy", "fairness/demographic_parity"} <= evidence.figures.keys()
