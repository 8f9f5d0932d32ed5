"""What quantisation-aware training costs a step, beside plain Lightning, in one process, interleaved.

    python benchmarks/quantization_cost.py [--models cnn mlp] [--repeats 9] [--steps 30] [--batch-size 64]

``cnn`` is five convolutions with BatchNorm on 28 x 28 images (279,000 parameters), ``mlp`` is 784-1024-1024-10
(1,864,000). Prints processor time of one thread a step, and ratios to the plain step as median [min, max] over the
repeats; each repeat runs all variants in turn, so a machine whose speed drifts does not decide it.
"""

import argparse
import logging
import statistics
import time
import warnings

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_guard.callbacks import QuantizationAwareTraining

VARIANTS = {
    "plain": list,
    "off": lambda: [QuantizationAwareTraining(bits=None)],
    "weights 8": lambda: [QuantizationAwareTraining(activation_bits=None, start=0, end=10**6, batchnorm="keep")],
    "8/8 observing": lambda: [QuantizationAwareTraining(start=0, end=10**6, batchnorm="keep")],
    "8/8 final": lambda: [QuantizationAwareTraining(start=0, end=1, batchnorm="keep")],
    "4/4 lsq": lambda: [
        QuantizationAwareTraining(4, 4, scheme="lsq", start=0, end=10**6, batchnorm="keep"),
    ],
}


def block(inside, outside, stride):
    return [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


def network(name):
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        )
    convolutions = [*block(1, 32, 1), *block(32, 64, 2), *block(64, 64, 1), *block(64, 128, 2), *block(128, 128, 1)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


class Model(pl.LightningModule):
    def __init__(self, name):
        super().__init__()
        self.net = network(name)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Clock(pl.Callback):
    """Processor time of the training loop after a warm-up of five steps."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 5:
            self.began = time.process_time()

    def on_train_end(self, trainer, module):
        self.per_step = (time.process_time() - self.began) / (trainer.global_step - 5)


def measured(name, guards, data):
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[*guards, clock], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    pl.seed_everything(0, verbose=False)
    trainer.fit(Model(name), data)
    return clock.per_step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cnn", "mlp"], choices=["cnn", "mlp"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    draws = torch.Generator().manual_seed(0)
    rows = options.steps * options.batch_size
    images = torch.rand(rows, 1, 28, 28, generator=draws)
    made = torch.utils.data.TensorDataset(images, torch.randint(10, (rows,), generator=draws))
    data = torch.utils.data.DataLoader(made, options.batch_size)
    for name in options.models:
        times = {variant: [] for variant in VARIANTS}
        for _ in range(options.repeats):
            for variant, guards in VARIANTS.items():
                times[variant].append(measured(name, guards(), data))
        for variant, found in times.items():
            ratios = [one / plain for one, plain in zip(found, times["plain"], strict=True)]
            print(
                f"{name:5} {variant:14} {1e3 * statistics.median(found):8.2f} ms  "
                f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                flush=True,
            )


if __name__ == "__main__":
    main()
