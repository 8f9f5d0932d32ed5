"""Files of small networks on Fashion-MNIST 7k: bytes, accuracy, flips and processor time, float32 beside int8.

OMP_NUM_THREADS=1 python benchmarks/exported_files.py [cnn mlp residual small_cnn transformer]
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_guard.data import FashionMNISTData
from lightning_guard.evaluation.layers import rows
from lightning_guard.export import export
from lightning_guard.export.timing import interleaved
from lightning_guard.models import MLP, SmallCNN, SmallTransformer
from lightning_guard.models.base import Classifier


def block(fan_in: int, fan_out: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
    return [convolution, nn.BatchNorm2d(fan_out), nn.ReLU()]


class CNN(Classifier):
    """Five convolutions with BatchNorm, 279,000 parameters."""

    def __init__(self, widths: Sequence[int] = (32, 64, 64, 128, 128)) -> None:
        super().__init__(10, 2e-3, 0.01, "constant")
        fans, strides = zip([1, *widths[:-1]], widths, strict=True), (1, 2, 1, 2, 1)
        self.features = nn.Sequential(
            *(layer for (i, o), s in zip(fans, strides, strict=True) for layer in block(i, o, s))
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Residual(Classifier):
    """Three residual blocks of 64 channels with BatchNorm."""

    def __init__(self) -> None:
        super().__init__(10, 2e-3, 0.01, "constant")
        self.stem = nn.Sequential(*block(1, 64, 2))
        self.blocks = nn.ModuleList(nn.Sequential(*block(64, 64), *block(64, 64)[:2]) for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layers in self.blocks:
            x = torch.relu(x + layers(x))
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "cnn": CNN,
    "mlp": lambda: MLP(in_features=784, hidden=(1024, 1024), num_classes=10),
    "residual": Residual,
    "small_cnn": SmallCNN,
    "transformer": SmallTransformer,
}


def main(names: Sequence[str]) -> None:
    print("| network | file | bytes | gzipped | batch 1, ms | batch 64, ms | times as fast | accuracy | flips |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in names:
        pl.seed_everything(0, verbose=False)
        module, data = NETWORKS[name](), FashionMNISTData()
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        pl.Trainer(max_epochs=2, accelerator="cpu", **dict.fromkeys(quiet, False)).fit(module, datamodule=data)
        data.setup("test")
        test, train = data.test_dataloader(), data.train_dataloader()
        with TemporaryDirectory() as folder:
            kinds = {"float32": ("onnx", {}), "int8": ("onnx-int8", {})}
            kinds["int8, dynamic"] = ("onnx-int8", {"linear": "dynamic"})
            done = {
                kind: export(module, Path(folder, kind), test, form, 0.05, train, **options)
                for kind, (form, options) in kinds.items()
            }
            files, times = {kind: one.load() for kind, one in done.items()}, {}
            for size in (1, 64):
                x = rows(next(iter(test))[0], size)
                passes = {kind: (lambda f=file, x=x: f.session.run(None, f.feeds(x))) for kind, file in files.items()}
                times[size] = interleaved(passes, 2.0)
            for kind, one in done.items():
                short, long = times[1][kind].minimum, times[64][kind].minimum
                print(
                    f"| {name} | {kind} | {one.bytes:,} | {one.compressed_bytes:,} | {1e3 * short:.3f} | "
                    f"{1e3 * long:.2f} | {times[64]['float32'].minimum / long:.2f} | "
                    f"{one.agreement.file_accuracy:.1%} | {one.agreement.flips:.1%} |", flush=True
                )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:] or list(NETWORKS))
