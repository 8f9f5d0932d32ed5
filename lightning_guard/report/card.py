"""A model card in the form of Hugging Face, from the evidence of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lightning_guard.report import view
from lightning_guard.report.document import ReportError
from lightning_guard.report.markdown import plain
from lightning_guard.report.summary import baseline, by_axis
from lightning_guard.report.units import shown

OPEN = "*To be completed by a person.*"
"""What stands where a training run cannot know."""

# What the Hub calls a figure, where it has a name for it; others keep theirs.
_METRICS = {"task/accuracy": "accuracy", "task/auc": "roc_auc", "task/mean_squared_error": "mse"}


def card(report: Mapping[str, Any], arm: str | None = None) -> str:
    """Returns ``README.md`` of the model of an arm: YAML front matter with its results, and the sections of a card.

    Numbers are means over the seeds, each with its standard deviation; a card that accompanies one set of weights says
    so. What training cannot know (use, people, licence, contact) is marked as to be completed by a person.

    Args:
        report: what :func:`lightning_guard.compare` returned or ``load_report`` read.
        arm: whose card it is; None takes the first that is not the baseline.

    Raises:
        ReportError: if there is no such arm.
    """
    names = [one["name"] for one in report["arms"]]
    if arm is None:
        arm = next((one["name"] for one in report["arms"] if not one["baseline"]), names[0])
    if arm not in names:
        raise ReportError(f"arm={arm!r} is not in this comparison; there are {', '.join(names)}")
    chosen = next(one for one in report["arms"] if one["name"] == arm)
    front = yaml.safe_dump(_front(report, chosen), sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{front}---\n\n" + "\n".join(_body(report, chosen)).rstrip() + "\n"


def _front(report: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    results = [
        {"type": _METRICS.get(key, key), "name": report["figures"][key]["label"], "value": mean}
        for key, mean in _means(report, arm["name"])
    ]
    data = report["provenance"]["data"]
    kind = "regression" if "task/mean_squared_error" in report["figures"] else "classification"
    dataset = {"type": data["name"], "name": data["name"], "split": "test"}
    if data["sha256"]:
        dataset["revision"] = data["sha256"]
    return {
        "library_name": "pytorch-lightning",
        "tags": ["lightning-guard", kind, *(guard["name"] for guard in arm["guards"])],
        "model-index": [
            {
                "name": arm["name"],
                "results": [{"task": {"type": kind}, "dataset": dataset, "metrics": results}],
            }
        ],
    }


def _means(report: Mapping[str, Any], arm: str) -> Iterator[tuple[str, float]]:
    for entry in report["summary"]:
        if entry["arm"] == arm and entry["mean"] is not None:
            yield entry["figure"], entry["mean"]


def _body(report: Mapping[str, Any], arm: Mapping[str, Any]) -> Iterator[str]:
    facts, name = report["provenance"], arm["name"]
    seeds = ", ".join(map(str, facts["seeds"]))
    yield f"# Model card: {plain(name)}"
    yield ""
    yield f"{plain(report['title'])}. {plain(view.opening(report))} Numbers below are means over the seeds {seeds}."
    yield "\n## Model details\n"
    yield f"- **Developed by:** {OPEN}"
    yield f"- **Licence:** {OPEN}"
    yield f"- **Model type and purpose:** {OPEN}"
    yield "- **Safeguards in training:**" + ("" if arm["guards"] else " none")
    for guard in arm["guards"]:
        yield f"  - {plain(guard['name'])}: {plain(guard['promise'])}"
    yield "\n## Uses\n"
    yield f"- **Direct use:** {OPEN}"
    yield f"- **Downstream use:** {OPEN}"
    yield f"- **Out-of-scope use:** {OPEN}"
    yield "\n## Bias, risks and limitations\n"
    notes = dict.fromkeys(
        [note for run in report["runs"] if run["arm"] == name for note in run["notes"]]
        + [line for run in report["runs"] if run["arm"] == name for lines in run["doubts"].values() for line in lines]
    )
    for line in [*report["limits"], *report.get("checks", ()), *notes]:
        yield f"- {plain(line)}"
    yield f"- Risks to people in the use that is meant: {OPEN}"
    yield "\n## Training details\n"
    data = facts["data"]
    rows = f", {data['train']:,} rows" if data["train"] is not None else ""
    yield f"- **Training data:** {plain(data['name'])}{rows}" + (
        f", SHA-256 `{data['sha256']}`" if data["sha256"] else ""
    )
    yield f"- **How the data were collected, and from whom:** {OPEN}"
    yield "- **Training hyperparameters:**" + ("" if arm["guards"] else " those of the configuration")
    for guard in arm["guards"]:
        options = ", ".join(f"{key} = {view.option(value)}" for key, value in sorted(guard["options"].items()))
        yield f"  - {plain(guard['name'])}: {plain(options or 'defaults')}"
    yield f"- **Configuration, SHA-256:** `{facts['config_sha256']}`"
    for recipe in arm["recipes"]:
        if recipe in facts["recipes"]:
            yield f"- **Recipe {plain(recipe)}, SHA-256:** `{facts['recipes'][recipe]}`"
    yield "\n## Evaluation\n"
    tested = f", {data['test']:,} rows" if data["test"] is not None else ""
    yield f"Testing data: the test part of {plain(data['name'])}{tested}. {plain(view.reading(report))}"
    for axis, keys in by_axis(report["figures"]).items():
        own = [key for key in keys if _entry(report, key, name) is not None]
        if own:
            yield f"\n### {plain(view.TITLES.get(axis, (axis.capitalize(), ''))[0])}\n"
            yield from _table(report, own, name)
    parts = {key: spec for key, spec in report["bars"].items() if "by_group" in key or "by_class" in key}
    for key, spec in parts.items():
        yield from _bars(report, key, spec, name)
    yield "\n## Environmental impact\n"
    machine = facts["machine"]
    yield f"- **Hardware type:** {plain(machine['processor'])}, {machine['cores']} cores, {plain(machine['system'])}"
    for key, label in (("cost/train_seconds", "Time of one training"), ("cost/energy", "Energy of one training")):
        entry = _entry(report, key, name)
        told = shown(entry["mean"], report["figures"][key]["unit"]) if entry else "not readable here"
        yield f"- **{label}:** {plain(told)}"
    yield "\n## Technical specifications\n"
    yield "- **Software:** " + plain(", ".join(f"{key} {value}" for key, value in sorted(facts["versions"].items())))
    yield f"- **Source revision:** {plain(facts['git'] or 'not recorded')}"
    yield f"- **Command:** {plain(facts['command'] or 'from Python')}"
    yield "\n## Model card contact\n"
    yield OPEN


def _entry(report: Mapping[str, Any], figure: str, arm: str) -> Mapping[str, Any] | None:
    found = (entry for entry in report["summary"] if (entry["figure"], entry["arm"]) == (figure, arm))
    return next((entry for entry in found if entry["mean"] is not None), None)


def _table(report: Mapping[str, Any], keys: list[str], arm: str) -> Iterator[str]:
    reference = baseline(report)
    beside = reference if reference not in (None, arm) else None
    yield "| Figure | Value | Test set, 95% |" + (f" {plain(str(beside))} |" if beside else "")
    yield "|---|---|---|" + "---|" * bool(beside)
    for key in keys:
        entry, unit = _entry(report, key, arm), report["figures"][key]["unit"]
        assert entry is not None
        value = shown(entry["mean"], unit) + (f" \u00b1 {shown(entry['sd'], unit)}" if entry["sd"] else "")
        pairs = [run["intervals"].get(key) for run in report["runs"] if run["arm"] == arm]
        known = [pair for pair in pairs if pair and None not in pair]
        span = f"{shown(min(p[0] for p in known), unit)} to {shown(max(p[1] for p in known), unit)}" if known else ""
        other = _entry(report, key, beside) if beside else None
        cells = [report["figures"][key]["label"], value, span]
        cells += [shown(other["mean"], unit) if other else "n/a"] if beside else []
        yield "| " + " | ".join(map(plain, cells)) + " |"


def _bars(report: Mapping[str, Any], key: str, spec: Mapping[str, Any], arm: str) -> Iterator[str]:
    """The factors of a card: values of each group and class, means over seeds."""
    runs = [run["bars"][key] for run in report["runs"] if run["arm"] == arm and key in run["bars"]]
    if not runs:
        return
    yield f"\n**{plain(spec['label'])}.** {plain(spec['about'])}\n"
    yield f"| Part | {plain(spec['y_label'])} |"
    yield "|---|---|"
    for i, category in enumerate(spec["categories"]):
        seeds = [values[i] for values in runs if values[i] is not None]
        yield f"| {plain(category)} | {shown(sum(seeds) / len(seeds) if seeds else None, spec.get('y_unit', ''))} |"
