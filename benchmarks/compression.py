"""Really smaller and faster: files of pruned, quantised and distilled networks beside the dense one, in one runtime.

python benchmarks/compression.py [--nets cnn mlp residual transformer] [--seeds 3] [--epochs 8] [--out FOLDER]

Digits of scikit-learn at 28 x 28, moved by up to four pixels, with noise, so that accuracy is not saturated: 3,612
training and 1,186 test images (1,152 are judged: 18 batches of 64). Every arm is one training of the same length on
the same seed; pruned arms, and those of fewer channels and low rank, begin with the weights of the dense arm, which is
the teacher where there is one. All files run in onnxruntime with one
thread; times are the least CPU times of interleaved runs, so that other work on the machine counts little.
"""

import argparse
import gzip
import json
import logging
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_guard.callbacks import (
    ChannelPruning,
    KnowledgeDistillation,
    LowRankFactorization,
    MagnitudePruning,
    QuantizationAwareTraining,
)
from lightning_guard.export import export
from lightning_guard.functional import stream
from lightning_guard.models import SmallTransformer


def digits(train: bool) -> TensorDataset:
    """Each digit several times, moved and noisy, the same on every machine."""
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    part = slice(0, 1204) if train else slice(1204, None)
    images, labels = images[part].float().reshape(-1, 1, 8, 8) / 16, labels[part]
    copies = 3 if train else 2
    images, labels = images.repeat(copies, 1, 1, 1), labels.repeat(copies)
    images = F.pad(F.interpolate(images, size=28, mode="bilinear"), [4, 4, 4, 4])
    generator = stream(17, int(train))
    at = torch.randint(0, 9, (len(images), 2), generator=generator).tolist()
    moved = torch.stack([image[:, i : i + 28, j : j + 28] for image, (i, j) in zip(images, at, strict=True)])
    return TensorDataset(moved + 0.35 * torch.randn(moved.shape, generator=generator), labels)


def conv(i: int, o: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = conv(width, width), conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(self.one(x)))


def network(name: str) -> nn.Module:
    """The networks by name; 278,890 weights of ``cnn`` and 1,863,690 of ``mlp``."""
    if name == "cnn":
        body = [conv(1, 32), conv(32, 64, 2), conv(64, 64), conv(64, 128, 2), conv(128, 128)]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    if name == "residual":
        body = [conv(1, 64, 2), Residual(64), Residual(64), Residual(64)]
        return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    if name == "mlp":
        wide = [nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)]
        return nn.Sequential(nn.Flatten(), *wide)
    return SmallTransformer()


class Classifier(pl.LightningModule):
    def __init__(self, net: str, steps: int):
        super().__init__()
        self.save_hyperparameters()
        self.net = network(net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, self.hparams["steps"], pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def arms(net: str, teacher: str) -> dict[str, list[pl.Callback]]:
    def distilled(**options):
        return KnowledgeDistillation(teacher, temperature=4.0, alpha=0.5, **options)

    found = {
        "dense": [],
        "int8": [QuantizationAwareTraining(start=0.5)],
        "90 % pruned, int8": [MagnitudePruning(0.9, end=0.5), QuantizationAwareTraining(start=0.5)],
        "90 % pruned, int8, distilled": [
            MagnitudePruning(0.9, end=0.5), QuantizationAwareTraining(start=0.5), distilled(),
        ],
    }  # fmt: skip
    if net in ("cnn", "mlp", "residual"):
        found["75 % of channels, int8"] = [
            ChannelPruning(0.75, checkpoint=teacher), QuantizationAwareTraining(start=0.5),
        ]  # fmt: skip
        found["75 % of channels, int8, distilled"] = [
            ChannelPruning(0.75, checkpoint=teacher), QuantizationAwareTraining(start=0.5), distilled(),
        ]  # fmt: skip
    if net in ("mlp", "transformer"):
        found["low rank, int8, distilled"] = [
            LowRankFactorization(rank=32, checkpoint=teacher), QuantizationAwareTraining(start=0.5), distilled(),
        ]  # fmt: skip
    return found


def train(
    net: str, seed: int, epochs: int, guards: list[pl.Callback], begin: str = ""
) -> tuple[Classifier, pl.Trainer, float]:
    """Train, from the weights of the checkpoint ``begin`` if there is one."""
    pl.seed_everything(seed, verbose=False)
    rows = DataLoader(digits(train=True), 64, shuffle=True, drop_last=True)
    module = Classifier(net, epochs * len(rows))
    if begin:
        module.load_state_dict(torch.load(begin, weights_only=True)["state_dict"])
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=guards, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    begun = time.process_time()
    trainer.fit(module, rows)
    return module.eval(), trainer, time.process_time() - begun


def accuracy(module: nn.Module, batches: list) -> float:
    with torch.no_grad():
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


def least_times(files: dict[str, nn.Module], x: Tensor, rounds: int = 60) -> dict[str, float]:
    """The least CPU time of each file, a round of all of them at a time."""
    best = dict.fromkeys(files, float("inf"))
    for _ in range(rounds):
        for name, file in files.items():
            begun = time.thread_time()
            file(x)
            best[name] = min(best[name], time.thread_time() - begun)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["cnn", "mlp", "residual", "transformer"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("compression"))
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    batches = list(DataLoader(digits(train=False), 64, drop_last=True))
    calibration = list(DataLoader(digits(train=True), 64))[:16]
    for net in options.nets:
        rows = []
        for seed in range(options.seeds):
            folder = options.out / net / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            teacher, files, found = str(folder / "dense.ckpt"), {}, []
            for arm in arms(net, teacher):
                # Made anew: a guard belongs to one training.
                begin = teacher if "% pruned" in arm else ""  # as the arms without channels do
                module, trainer, seconds = train(net, seed, options.epochs, arms(net, teacher)[arm], begin)
                if arm == "dense":
                    trainer.save_checkpoint(teacher)
                name = arm.replace(" ", "-").replace(",", "").replace("%", "")
                wanted = {"onnx-int8": ".int8.onnx"} | ({} if "pruned" in arm else {"onnx": ".onnx"})
                packed = export(module, folder / f"{name}.lgw", batches, "sparse")
                for format, suffix in wanted.items():
                    linear = "dynamic" if net == "transformer" and format == "onnx-int8" else "static"
                    allowed = 1.0 if "int8" in format else None  # measured, not judged
                    file = export(
                        module, folder / f"{name}{suffix}", batches, format, allowed, calibration, linear=linear
                    )
                    label = f"{arm}, quantised after training" if "int8" not in arm and "int8" in format else arm
                    label = arm.replace("int8", "int8, its file in float32") if format == "onnx" else label
                    files[label] = file.load()
                    found.append({
                        "net": net, "seed": seed, "arm": label, "seconds": seconds, "bytes": file.bytes,
                        "gz": len(gzip.compress(file.path.read_bytes(), 9)), "lgw": packed.bytes,
                        "module": accuracy(module, batches), "file": accuracy(files[label], batches),
                        "flips": file.agreement.flips,
                    })  # fmt: skip
            times = {size: least_times(files, batches[0][0][:size]) for size in (1, 64)}
            for row in found:
                row |= {f"b{size}": times[size][row["arm"]] for size in times}
            rows += found
            (options.out / f"{net}.json").write_text(json.dumps(rows, indent=1))
        table(net, rows)


def table(net: str, rows: list[dict]) -> None:
    print(f"\n{net}: mean of {len({row['seed'] for row in rows})} seeds; ratios to the dense file in float32")
    print(
        "| arm | accuracy of the file | points lost (worst) | file | gzip | weights | batch 1 | batch 64 | training |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    dense = {row["seed"]: row for row in rows if row["arm"] == "dense"}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]

        def ratio(key: str, to: str | None = None, own: list[dict] = own) -> float:
            return sum(dense[row["seed"]][to or key] / row[key] for row in own) / len(own)

        lost = [100 * (dense[row["seed"]]["file"] - row["file"]) for row in own]
        print(
            f"| {arm} | {100 * sum(row['file'] for row in own) / len(own):.2f} % | {sum(lost) / len(lost):.2f} "
            f"({max(lost):.2f}) | 1/{ratio('bytes'):.1f} | 1/{ratio('gz', 'bytes'):.1f} | "
            f"1/{ratio('lgw', 'bytes'):.1f} | {ratio('b1'):.1f}x | {ratio('b64'):.1f}x | {1 / ratio('seconds'):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
