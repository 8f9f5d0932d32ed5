"""What a finished model looks at."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_guard.evaluation.attributions import maps_of, rows_of
from lightning_guard.evaluation.base import Bars, Evidence, Figure
from lightning_guard.evaluation.subject import Subject
from lightning_guard.functional.random import stream

_MOST_COLUMNS = 20
_PERTURBED = 4  # perturbations an example of sensitivity, each a full explanation
_STEPS_THERE = 16  # of their integrals


class Explanation:
    r"""Says which inputs move the score of the right class, by integrated gradients, and how far that is to be trusted.

    An attribution :math:`(x_i - b_i) \int_0^1 \partial_i f(b + t (x - b))\, dt` is a share of the difference between
    the score at the example and at ``baseline`` (Sundararajan et al., 2017). Of the score of the right class, so that
    two models are asked the same question: what a comparison says of agreement between arms is by these.

    Needs captum (``pip install 'lightning-guard[explain]'``), and some ten forward and backward passes an example and
    step: off unless asked for, ``--evaluate.explanation Explanation``.

    Args:
        examples: how many are explained, drawn from the loader.
        steps: of the integral.
        baseline: the value of an input that says nothing, the same for all inputs.
        radius: how far inputs are moved to see whether the explanation stays, in input units, each input.

    | case                                            | result                                              |
    |-------------------------------------------------|-----------------------------------------------------|
    | inputs that are no single floating tensor       | a note (words have no gradient)                     |
    | outputs of several dimensions, several labels   | a note                                              |
    | columns named ``name=value``                    | one-hot parts, added up as ``name``                 |
    | a table without names                           | columns by number                                   |

    Raises:
        ValueError: if captum is missing or an option is out of range.

    Reference:
        Sundararajan, Taly and Yan, Axiomatic Attribution for Deep Networks, 2017, arXiv:1703.01365.
        Yeh et al., On the (In)fidelity and Sensitivity of Explanations, 2019, arXiv:1901.09392.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> subject = Subject(model, [(torch.ones(4, 2), torch.ones(4).long())], feature_names=["age", "hours"])
        >>> [round(share, 2) for share in Explanation(steps=8).evaluate(subject).bars["explanation/importance"].values]
        [0.75, 0.25]
    """

    name: ClassVar[str] = "explanation"
    optional: ClassVar[bool] = True

    def __init__(self, examples: int = 64, steps: int = 32, baseline: float = 0.0, radius: float = 0.02):
        for option, value, least in (("examples", examples, 1), ("steps", steps, 2)):
            if value < least:
                raise ValueError(f"{option}={value} explains nothing; give at least {least}")
        if not radius > 0:
            raise ValueError(f"radius={radius} moves nothing; give a number above 0, in input units")
        if find_spec("captum") is None:
            raise ValueError("explanations need captum; pip install 'lightning-guard[explain]'")
        self.examples, self.steps, self.baseline, self.radius = examples, steps, baseline, radius

    def evaluate(self, subject: Subject) -> Evidence:
        """Figures, the importance of the inputs, and pictures."""
        target, logits = subject.outputs.target, subject.outputs.logits
        if subject.kind == "unknown" or target is None:
            return Evidence(notes=[subject.problem])
        if logits.dim() > 2 or (logits.dim() == 2 and target.dim() != 1):
            return Evidence(notes=["Nothing is explained: the model has more than one answer an example."])
        count = min(self.examples, len(logits))
        chosen = torch.randperm(len(logits), generator=stream(0, len(logits)))[:count].sort().values
        with subject.still():
            found = rows_of(subject, chosen)
            if isinstance(found, str):
                return Evidence(notes=[found])
            x, y = found
            which = y.long() if logits.dim() == 2 else None
            with torch.enable_grad():
                attributions = self._attributed(subject, x, which, self.steps)
                faith, steady = self._trusted(subject, x, which, attributions)
        about = f"Of {count} test examples, by integrated gradients of {self.steps} steps from {self.baseline:g}."
        evidence = Evidence()
        for key, label, value, told in (
            (
                "sensitivity",
                "Largest change of explanations",
                steady,
                f"How much of its length an explanation changes at most, when inputs move by {self.radius:g}. {about}",
            ),
            (
                "infidelity",
                "Infidelity of explanations",
                faith,
                "Squared error in foretelling how the score changes when inputs are taken away, scaled by the best "
                f"factor. {about}",
            ),
        ):
            number = float(value.mean()) if value.isfinite().all() else None
            evidence.figures[f"explanation/{key}"] = Figure(number, label, "ratio", "lower", told)
        evidence.tensors = {
            "explanation/attributions": attributions.reshape(count, -1).float(),
            "explanation/examples": chosen,
            "explanation/target": y.float(),
        }
        if x.dim() == 2:
            evidence.bars["explanation/importance"] = _columns(attributions, subject.feature_names, about)
        evidence.pictures |= maps_of(subject, x, y, attributions, about)
        return evidence

    def _attributed(self, subject: Subject, x: Tensor, which: Tensor | None, steps: int) -> Tensor:
        from captum.attr import IntegratedGradients  # type: ignore[import-untyped]

        explain = IntegratedGradients(subject.forward, multiply_by_inputs=True)
        size = max(len(x), 512)
        found: Tensor = explain.attribute(
            x, baselines=self.baseline, target=which, n_steps=steps, internal_batch_size=size
        )
        return found.detach().cpu()

    def _trusted(
        self, subject: Subject, x: Tensor, which: Tensor | None, attributions: Tensor
    ) -> tuple[Tensor, Tensor]:
        from captum.metrics import infidelity, sensitivity_max  # type: ignore[import-untyped]

        draws = stream(0, len(x))  # on the CPU, so that the figures are the same on every device

        def taken(inputs: Tensor, baselines: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
            """A half of the inputs replaced by the baseline, and the difference."""
            removed = (torch.rand(inputs.shape, generator=draws) < 0.5).to(inputs)
            change = removed * (inputs - self.baseline)
            return change, inputs - change

        def moved(inputs: Tensor, radius: float) -> Tensor:
            way = 2 * torch.rand(inputs.shape, generator=draws) - 1
            return inputs + radius * way.to(inputs)

        scaled = attributions.to(x)
        # captum multiplies the change with the attribution; integrated gradients hold the change of everything.
        per_unit = scaled / torch.where((x - self.baseline).abs() > 1e-9, x - self.baseline, torch.ones_like(x))
        faith = infidelity(subject.forward, taken, x, per_unit, target=which, normalize=True)
        explain = self._explainer(subject)
        steady = sensitivity_max(explain, x, moved, self.radius, _PERTURBED, target=which)
        return faith.detach().cpu(), steady.detach().cpu()

    def _explainer(self, subject: Subject) -> Callable[..., tuple[Tensor]]:
        def explain(inputs: Tensor | tuple[Tensor], target: Any = None) -> tuple[Tensor]:
            x = inputs[0] if isinstance(inputs, tuple) else inputs
            return (self._attributed(subject, x, target, _STEPS_THERE).to(x),)

        return explain


def _columns(attributions: Tensor, names: Sequence[str] | None, about: str) -> Bars:
    """The share of each column in all that was attributed; one-hot columns of one name are added up first."""
    width = attributions.shape[1]
    given = list(names) if names is not None and len(names) == width else [f"column {i}" for i in range(width)]
    sources = [name.partition("=")[0] for name in given]
    order = list(dict.fromkeys(sources))
    total = torch.zeros(len(attributions), len(order), dtype=torch.float64)
    total.index_add_(1, torch.tensor([order.index(source) for source in sources]), attributions.double())
    mean = total.abs().mean(0)
    share = mean / mean.sum().clamp_min(1e-300)
    largest = share.argsort(descending=True, stable=True)[:_MOST_COLUMNS].tolist()
    said = f"Mean absolute attribution, as a share of all. {about}"
    label = "What the model looks at"
    return Bars(
        [order[i] for i in largest], [float(share[i]) for i in largest], label, "Share", said, y_unit="fraction"
    )
