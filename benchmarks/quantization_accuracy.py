"""Accuracy after quantisation: of a trained network as it is (post-training) and of quantisation-aware training.

    python benchmarks/quantization_accuracy.py [--seeds 3] [--epochs 8] [--models cnn resnet]

Fashion-MNIST, the packaged 6,000 + 1,000 images; ``cnn`` is SmallCNN(width=16), ``resnet`` three convolutions with
BatchNorm, one of them residual. Bits are those of weights / inputs of layers; ranges of inputs after training come from
8 training batches. Prints accuracy on the test images in percent, mean over the seeds and each seed's.
"""

import argparse
import logging
import warnings

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_guard.callbacks import QuantizationAwareTraining
from lightning_guard.data import FashionMNISTData
from lightning_guard.functional.quantization import FakeQuantization, fake_quantized, quantizable
from lightning_guard.models import SmallCNN

WIDTHS = {
    "8/8": [{}, {"batchnorm": "keep"}],
    "8/none": [{}],
    "4/4": [{}, {"scheme": "lsq"}],
    "3/3": [{}, {"scheme": "lsq"}],
    "2/4": [{}, {"scheme": "lsq"}],
}


class Residual(SmallCNN):
    """Three convolutions with BatchNorm, the third around a shortcut."""

    def __init__(self):
        super().__init__(schedule="cosine")
        del self.features, self.head

        def block(inside, outside, stride):
            return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside))

        self.stem, self.middle, self.rest = block(1, 16, 2), block(16, 32, 2), block(32, 32, 1)
        self.head = nn.Linear(32 * 49, 10)

    def forward(self, x):
        x = torch.relu(self.middle(torch.relu(self.stem(x))))
        return self.head(torch.relu(x + self.rest(x)).flatten(1))


MODELS = {"cnn": lambda: SmallCNN(width=16, schedule="cosine"), "resnet": Residual}


def accuracy(module, x, y):
    with torch.no_grad():
        return 100 * (module.eval()(x).argmax(1) == y).double().mean().item()


def trained(name, guard, seed, epochs, data):
    pl.seed_everything(seed, verbose=False)
    module = MODELS[name]()
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=guard, logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    return module


def observed(module, data, bits):
    """Ranges as 8 training batches have them."""
    layers = list(quantizable(module).values())
    seen = FakeQuantization(layers, 8, bits)
    seen.on = seen.observing = True
    for layer in layers:
        layer.module.forward = seen.around(layer, layer.module.forward)
    with torch.no_grad(), torch.random.fork_rng():
        for _, (x, *_) in zip(range(8), data.train_dataloader(), strict=False):
            module(x)
    for layer in layers:
        del layer.module.forward
    seen.take_observations(1.0)
    return seen.ranges


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for logger in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    data = FashionMNISTData(batch_size=128)
    data.setup("fit")
    data.setup("test")
    x, y = (torch.cat(part) for part in zip(*((b[0], b[1]) for b in data.test_dataloader()), strict=True))
    for name in options.models:
        found = {}
        for seed in range(options.seeds):
            plain = trained(name, [], seed, options.epochs, data)
            found.setdefault("float", []).append(accuracy(plain, x, y))
            for widths, forms in WIDTHS.items():
                bits, inputs = (None if part == "none" else int(part) for part in widths.split("/"))
                with fake_quantized(
                    plain.eval(), observed(plain, data, inputs or 8) if inputs else None, bits, inputs or 8
                ):
                    found.setdefault(f"{widths} post-training", []).append(accuracy(plain, x, y))
                for form in forms:
                    guard = QuantizationAwareTraining(bits, inputs, **form)
                    module = trained(name, [guard], seed, options.epochs, data)
                    with fake_quantized(module, guard.activation_ranges, None, inputs or 8):
                        label = " ".join([widths, "trained", *form.values()])
                        found.setdefault(label, []).append(accuracy(module, x, y))
        for label, values in found.items():
            each = ", ".join(f"{value:.1f}" for value in values)
            print(f"{name:7} {label:22} {sum(values) / len(values):5.1f}  ({each})", flush=True)


if __name__ == "__main__":
    main()
