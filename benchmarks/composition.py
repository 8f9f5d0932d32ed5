"""What safeguards cost and gain together: each alone, every pair, the triples with privacy, and all five at once.

    python benchmarks/composition.py --data adult [--seeds 1 --out composition-adult --workers 1]
    python benchmarks/composition.py --data fashion-mnist --data-dir FOLDER

Without a folder Fashion-MNIST is the 7,000 images of the package, which are few for privacy.

Writes a comparison with a matrix a figure. The recipes that it makes lie in the folder, under ``recipes``. What a
safeguard needs beside privacy is one table, ``BESIDE``; everything else is the same alone and together.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from lightning_guard.cli import main

KINDS = ["pairs", "triples:private", "all"]
IN_FEATURES = 104  # of AdultData by sex, which is hidden
MUTABLE = [*range(13), *range(36, 51)]  # not education, marital status, relationship, race and native country


def columns(rest: float, **numeric: float) -> list[float]:
    """A number for each column of Adult: those of the four numeric ones, then one for all others."""
    return [*numeric.values(), *[rest] * (IN_FEATURES - len(numeric))]


# A person may be up to two years older, earn 1,000 dollars more or lose 500, work 5 hours more or less, and change
# either workclass or occupation: the threat of demo/adult-robust, on the columns that are left without sex.
ADULT_THREAT = {
    "eps": 1.0,
    "norm": "linf",
    "unit": columns(1, age=2, gain=0.0397, loss=0.0203, hours=5),
    "mean": columns(0, age=17, gain=0, loss=0, hours=1),
    "std": columns(1, age=73, gain=1, loss=1, hours=98),
    "bounds": [columns(0, age=17, gain=0, loss=0, hours=1), columns(1, age=90, gain=1, loss=1, hours=99)],
    "integer": [0, 3],
    "increasing": [0],
    "one_hot": [list(range(4, 13)), list(range(36, 51))],
    "switches": 1,
    "mutable": MUTABLE,
}


def guard(name: str, cls: str, **options: Any) -> dict[str, Any]:
    """What a recipe says of one guard."""
    return {"guards": {name: {"class_path": f"lightning_guard.callbacks.{cls}", "init_args": options}}}


SMALL = {
    "sparse": guard("magnitude_pruning", "MagnitudePruning", sparsity=0.8, end=0.5),
    "int8": guard("quantization", "QuantizationAwareTraining", bits=8, activation_bits=8, start=0.5, end=0.85),
}

EACH_CLASS = {"target": 1, "group": 1}


BESIDE: dict[str, dict[tuple[str, str], dict[str, Any]]] = {
    "adult": {
        # Noise leaves less room for the attacked rows, and clipping bounds the pull of the bound as well.
        ("private", "robust"): {"guards": {"adversarial_training": {"init_args": {"beta": 0.1, "steps": 1}}}},
        ("private", "fair"): {"guards": {"fairness": {"init_args": {"step_size": 12.0, "margin": 0.015}}}},
    },
    "fashion-mnist": {},
}

DATA: dict[str, dict[str, Any]] = {
    "adult": {
        "parts": {
            "private": guard("dp_sgd", "DPSGD", target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0),
            "robust": guard(
                "adversarial_training",
                "AdversarialTraining",
                objective="trades",
                beta=1.0,
                steps=3,
                warmup=0.3,
                **ADULT_THREAT,
            ),
            "fair": guard("fairness", "FairnessRegularization", max_gap=0.05, groups=[2], steepness=3.0),
            **SMALL,
        },
        "config": {
            "model": {
                "class_path": "lightning_guard.models.MLP",
                "init_args": {"in_features": IN_FEATURES, "hidden": [64, 64], "lr": 1e-2, "schedule": "cosine"},
            },
            "data": {
                "class_path": "lightning_guard.data.AdultData",
                "init_args": {"group": "sex", "batch_size": 1024},
            },
            "trainer": {"max_epochs": 20},
            "evaluate": {
                "robustness": {
                    "class_path": "lightning_guard.evaluation.Robustness",
                    "init_args": {"attack": "pgd", "steps": 10, "examples": 500, "curve": [], **ADULT_THREAT},
                }
            },
        },
    },
    "fashion-mnist": {
        "parts": {
            "private": guard("dp_sgd", "DPSGD", target_epsilon=3.0, delta=1e-5, max_grad_norm=1.0),
            "robust": guard(
                "adversarial_training", "AdversarialTraining", eps=0.1, bounds=[0.0, 1.0], steps=2, warmup=0.3
            ),
            # These images are of nobody, so each class is a group: training looks to the one that is served worst.
            "fair": guard("fairness", "FairnessRegularization", mode="group_dro", groups=[10], batch=EACH_CLASS),
            **SMALL,
        },
        "config": {
            "model": {
                "class_path": "lightning_guard.models.SmallCNN",
                "init_args": {"num_classes": 10, "width": 16, "lr": 3e-3, "schedule": "cosine"},
            },
            "data": {"class_path": "lightning_guard.data.FashionMNISTData", "init_args": {"batch_size": 512}},
            "trainer": {"max_epochs": 5},
            "evaluate": {
                "robustness": {
                    "class_path": "lightning_guard.evaluation.Robustness",
                    "init_args": {"eps": 0.1, "bounds": [0.0, 1.0], "examples": 500},
                }
            },
        },
    },
}


def write(place: Path, name: str, content: dict[str, Any]) -> str:
    """A recipe in the folder; gives its path."""
    place.mkdir(parents=True, exist_ok=True)
    head = f"# {name}, written by benchmarks/composition.py\n# lightning-guard: 1\n"
    (place / f"{name}.yaml").write_text(head + yaml.safe_dump(content, sort_keys=False))
    return str(place / f"{name}.yaml")


def arms(place: Path, given: dict[str, dict[str, Any]], special: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """The arms to state: each part alone, and the combinations that need settings of their own."""
    from lightning_guard.report.combined import subsets

    names = list(given)
    files = {name: write(place, name, content) for name, content in given.items()}
    beside = {pair: write(place, "-beside-".join(reversed(pair)), content) for pair, content in special.items()}
    stated = ["none", *(f"{name}={path}" for name, path in files.items())]
    for combination in subsets(names, KINDS):
        if needed := [path for pair, path in beside.items() if set(pair) <= set(combination)]:
            recipes = [*(files[name] for name in combination), *needed]
            stated.append(f"{'+'.join(combination)}={'+'.join(recipes)}")
    return stated


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=sorted(DATA), default="adult")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data-dir", help="all 70,000 images of Fashion-MNIST, in its own files")
    parser.add_argument("rest", nargs="*", help="further options of compare, after --")
    own = parser.parse_args()
    out = Path(own.out or f"composition-{own.data}")
    if own.data_dir:
        DATA[own.data]["config"]["data"]["init_args"]["data_dir"] = own.data_dir
    config = write(out / "recipes", own.data, DATA[own.data]["config"])
    options = [
        part for arm in arms(out / "recipes", DATA[own.data]["parts"], BESIDE[own.data]) for part in ("--arm", arm)
    ]
    stated = {"combine": ",".join(KINDS), "seeds": own.seeds, "out": out, "workers": own.workers}
    stated |= {"config": config, "title": f"Safeguards together, {own.data}"}
    options += [part for name, value in stated.items() for part in (f"--{name}", str(value))]
    sys.exit(main(["compare", *options, *own.rest]))
