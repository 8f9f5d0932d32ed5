"""The standard AutoAttack, through the package pyautoattack, so that it leaves no trace and attacks what is meant."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from importlib.util import find_spec
from math import isfinite
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_guard.functional import ThreatModel
from lightning_guard.undo import swap_value

_NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
_KNOWN = {"eps", "norm", "bounds", "mean", "std"}  # what the standard can express of a threat model


class AutoAttacked(NamedTuple):
    """What AutoAttack left.

    Args:
        moved: attacked inputs ``(N, ...)`` as the network sees them, within the threat model.
        attacks: the attacks that were asked for, in order, by the names of the literature.
        warnings: what the package itself warned of, in its own words.
    """

    moved: Tensor
    attacks: tuple[str, ...]
    warnings: tuple[str, ...]


def autoattack(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    seed: int = 0,
    version: Literal["standard", "rand"] = "standard",
    parameters: Iterable[nn.Parameter] = (),
    batch_size: int = 250,
) -> AutoAttacked:
    """The standard AutoAttack (Croce and Hein, 2020), of any input range, shape and number of classes.

    The package attacks images in [0, 1] with at least ten classes. Inputs are therefore given to it in units in which
    the bounds are 0 and 1, tables and sequences as images of one pixel, and one logit as two. Its results are brought
    back and into the threat model; judge the model on them anew, as on those of any attack.

    Args:
        forward: maps inputs ``(N, ...)`` to logits ``(N, C)`` or ``(N,)``, in evaluation mode.
        x: inputs ``(N, ...)`` as the network sees them.
        y: classes ``(N,)``.
        threat: what the attacker may do; it must have bounds.
        seed: of all that is drawn.
        version: ``standard``; ``rand``, which averages gradients over 20 passes, is for models that draw numbers.
        parameters: of the model; they get no gradients while the attack runs, for the package would leave some.
        batch_size: examples that are attacked together.

    | classes      | attacks                                    |
    |--------------|--------------------------------------------|
    | 4 and more   | APGD-CE, APGD-T, FAB-T, Square             |
    | 3            | APGD-CE, APGD-DLR, FAB-T, Square           |
    | 2, one logit | APGD-CE, FAB-T, Square                     |
    | any, "rand"  | APGD-CE, and APGD-DLR from 3 classes on    |

    ``l2`` and ``l1`` on anything but images of at least 5 by 5 pixels go without Square, which fails there.

    Raises:
        ValueError: if the standard does not know this threat (:func:`refusal`), with the reason.

    Reference:
        Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
        attacks, ICML 2020, arXiv:2003.01690.

    Example:
        >>> x, y = torch.tensor([[0.6], [0.9]]), torch.tensor([1, 1])
        >>> found = autoattack(lambda x: x[:, 0] - 0.5, x, y, ThreatModel(0.2, bounds=(0.0, 1.0)))
        >>> (found.moved[:, 0] > 0.5).tolist(), found.attacks
        ([False, True], ('APGD-CE', 'FAB-T', 'Square'))
    """
    if reason := refusal(threat):
        raise ValueError(reason)
    from pyautoattack import AutoAttack  # type: ignore[import-untyped]

    threat.check(x)
    edges = _edges(threat)
    assert edges is not None  # else it was refused
    low, width = edges[0], edges[1] - edges[0]
    scale, mean = threat.scale(x), _mean(threat, x)
    image = x.dim() == 4

    def unit(x: Tensor) -> Tensor:
        raw = ((x / scale + mean) - low) / width
        return (raw if image else raw.flatten(1)[:, :, None, None]).float().clamp(0, 1)

    def seen(unit: Tensor) -> Tensor:
        raw = unit.to(x.dtype).reshape(-1, *x.shape[1:]) * width + low
        return (raw - mean) * scale

    def logits(moved: Tensor) -> Tensor:
        out = forward(seen(moved))
        columns = torch.stack([torch.zeros_like(out), out], 1) if out.dim() == 1 else out
        # Tied to the input, because a model that detaches it has no gradient at all, and torch would raise.
        return columns.float() + 0 * moved.flatten(1).sum(1, keepdim=True)

    with _traceless(parameters) as warnings:
        with torch.no_grad():
            classes = logits(unit(x[:2])).shape[1]
        attack = AutoAttack(
            _Model(logits),
            norm=_NORMS[threat.norm],
            eps=threat.eps / width,
            seed=seed,
            version=version,
            device=x.device,
        )
        if version == "rand":
            attack.attacks_to_run = ["apgd-ce", *["apgd-dlr"] * (classes > 2)]
        elif classes < 4:
            attack.attacks_to_run = ["apgd-ce", *["apgd-dlr"] * (classes == 3), "fab-t", "square"]
        if threat.norm != "linf" and (not image or min(x.shape[2:]) < 5):
            # Its windows for these norms are fifths of an image; the package divides by zero.
            attack.attacks_to_run = [name for name in attack.attacks_to_run if name != "square"]
        targets = min(attack.apgd_targeted.n_target_classes, classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        moved, _ = attack.run_standard_evaluation(unit(x), y.long(), batch_size=batch_size)
    named = {"apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "fab-t": "FAB-T", "square": "Square"}
    # What no attack moved is the input itself, without the rounding of two changes of units.
    found = torch.where((moved == unit(x)).reshape(x.shape), x, seen(moved))
    attacks = tuple(named[name] for name in attack.attacks_to_run)
    return AutoAttacked(threat.project(found, x), attacks, tuple(dict.fromkeys(warnings)))


def refusal(threat: ThreatModel) -> str:
    """Why the standard cannot attack this threat, with the remedy; nothing if it can.

    Example:
        >>> refusal(ThreatModel(0.1))
        "attack='autoattack' needs the bounds of the inputs; give bounds, e.g. (0.0, 1.0), or take attack='apgd'"
    """
    if find_spec("pyautoattack") is None:
        return (
            "attack='autoattack' needs the package pyautoattack, which is not installed; "
            "pip install lightning-guard[robustness], or take attack='apgd'"
        )
    if threat.bounds is None:
        return "attack='autoattack' needs the bounds of the inputs; give bounds, e.g. (0.0, 1.0), or take attack='apgd'"
    if _edges(threat) is None:
        return (
            f"attack='autoattack' needs the same finite bounds for all features, because it knows one eps for all, and "
            f"bounds={threat.bounds}; take attack='apgd', which knows more"
        )
    if threat.norm not in _NORMS:
        return f"attack='autoattack' does not know norm={threat.norm!r}; give one of {sorted(_NORMS)}"
    stated = [f for f in fields(threat) if f.name not in _KNOWN and getattr(threat, f.name) != f.default]
    if stated:
        told = ", ".join(f"{f.name}={getattr(threat, f.name)!r}" for f in stated)
        return (
            "attack='autoattack' moves every feature freely within the bounds and knows nothing of "
            f"{told}; take attack='apgd', which does"
        )
    return ""


class _Model:
    """What the package calls the model: it may be called, and nothing else is asked of it."""

    def __init__(self, logits: Callable[[Tensor], Tensor]):
        self._logits = logits

    def __call__(self, moved: Tensor) -> Tensor:
        return self._logits(moved)


@contextmanager
def _traceless(parameters: Iterable[nn.Parameter]) -> Iterator[list[str]]:
    """The package seeds the global generators, fills ``.grad``, switches off debuggers, and logs; here it does not."""
    log, said = logging.getLogger("auto-attack"), list[str]()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    with ExitStack() as undo:
        undo.enter_context(
            torch.random.fork_rng(range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0))
        )
        undo.enter_context(torch.inference_mode(False))
        undo.callback(sys.settrace, sys.gettrace())
        for parameter in parameters:
            if parameter.requires_grad:
                undo.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        for name, value in (("handlers", [Keep(logging.WARNING)]), ("propagate", False), ("disabled", False)):
            swap_value(undo, log, name, value)
        undo.callback(log.setLevel, log.level)
        log.setLevel(logging.WARNING)
        yield said


def _edges(threat: ThreatModel) -> tuple[float, float] | None:
    """The bounds that hold for every feature, if they do."""
    edges = [set([edge] if isinstance(edge, float | int) else edge) for edge in threat.bounds or ()]
    if [len(edge) for edge in edges] != [1, 1]:
        return None
    low, high = (float(edge.pop()) for edge in edges)
    return (low, high) if isfinite(low) and isfinite(high) else None


def _mean(threat: ThreatModel, x: Tensor) -> Tensor:
    mean = torch.as_tensor(0.0 if threat.mean is None else threat.mean, dtype=x.dtype, device=x.device)
    return mean.reshape(1, -1, *[1] * (x.dim() - 2)) if mean.dim() else mean
