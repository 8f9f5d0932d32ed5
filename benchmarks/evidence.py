"""The evidence run: an unguarded baseline, each safeguard alone and all at once, six seeds, on Adult and Fashion-MNIST.

    python benchmarks/evidence.py [--data adult fashion-mnist --seeds 6 --workers 2 --out evidence]

Guards and data are those of ``composition.py``; Fashion-MNIST is the 7,000 images of the package, trained longer. An
interrupted run is taken up where it stopped. Prints the minutes it took, and of each folder how it was verified.
"""

import argparse
import sys
import time
from copy import deepcopy
from pathlib import Path

from composition import BESIDE, DATA, write

from lightning_guard.cli import main


def settings(name: str) -> tuple[dict, dict]:
    """The configuration and the guards of each part."""
    config, parts = deepcopy(DATA[name]["config"]), deepcopy(DATA[name]["parts"])
    if name == "fashion-mnist":  # 6,000 images are few for privacy: larger draws for it alone
        config["data"]["init_args"]["batch_size"] = 64
        config["trainer"]["max_epochs"] = 10
        parts["private"]["guards"]["dp_sgd"]["init_args"]["batch_size"] = 512
    return config, parts


def compare(name: str, out: Path, seeds: int, workers: int) -> int:
    config, parts = settings(name)
    place = out / "recipes"
    files = {part: write(place, part, content) for part, content in parts.items()}
    beside = [write(place, "-beside-".join(reversed(pair)), content) for pair, content in BESIDE[name].items()]
    arms = ["none", *(f"{part}={file}" for part, file in files.items())]
    arms.append(f"all five={'+'.join([*files.values(), *beside])}")
    options = [word for arm in arms for word in ("--arm", arm)]
    options += ["--config", write(place, name, config), "--out", str(out), "--title", f"Evidence, {name}"]
    return main(["compare", *options, "--seeds", str(seeds), "--workers", str(workers)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=sorted(DATA), default=sorted(DATA))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    own = parser.parse_args()
    start, failed = time.perf_counter(), 0
    for name in own.data:
        folder = own.out / name
        failed |= compare(name, folder, own.seeds, own.workers) or main(["verify", str(folder)])
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
    sys.exit(failed)
