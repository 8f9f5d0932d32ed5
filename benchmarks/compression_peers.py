"""Quantisation-aware training and channel removal beside torchao and torch-pruning alone.

    python benchmarks/compression_peers.py quantization [--nets cnn mlp] [--seeds 2] [--epochs 8]
    python benchmarks/compression_peers.py channels [--nets cnn] [--ratio 0.75]
    python benchmarks/compression_peers.py prune-then-quantize

Networks and digits of ``compression.py``, the same epochs for all. torchao (``pip install torchao``) is asked for by
the first and the last alone: PT2E with ``X86InductorQuantizer``, and ``quantize_`` with ``QATConfig``. Peers train in a
loop written by hand without Lightning; each time is processor time a step over that of the same loop without them.
"""

import argparse
import copy
import logging
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from compression import Classifier, accuracy, digits, train
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from lightning_guard.callbacks import ChannelPruning, MagnitudePruning, QuantizationAwareTraining

CHECKED = 64  # rows of a batch


def loop(net: nn.Module, epochs: int, start: float = 0.0, begin=None, seed: int = 0) -> tuple[nn.Module, float]:
    """Train by hand as ``compression.py`` does; ``begin(net)`` gives the network of the steps from ``start`` on."""
    pl.seed_everything(seed, verbose=False)
    rows = DataLoader(digits(train=True), CHECKED, shuffle=True, drop_last=True)
    steps = epochs * len(rows)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.2)
    done, begun = 0, time.process_time()
    for _ in range(epochs):
        for x, y in rows:
            if begin is not None and done >= start * steps:
                net, begin = begin(net), None
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
            done += 1
    return net, (time.process_time() - begun) / steps


def fresh(net: str, seed: int) -> nn.Module:
    """The network as :func:`compression.train` makes it."""
    pl.seed_everything(seed, verbose=False)
    return Classifier(net, 1).net


def pt2e(net: nn.Module) -> nn.Module:
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    x = torch.zeros(CHECKED, 1, 28, 28)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    allow_exported_model_train_eval(prepared)
    prepared.train()
    return prepared


def eager(step: str):
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_
    from torchao.quantization.qat import QATConfig

    def apply(net: nn.Module) -> nn.Module:
        base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
        quantize_(net, QATConfig(base, step=step))
        return net

    return apply


def converted(net: nn.Module) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    net.eval()
    return convert_pt2e(net)


def quantization(options: argparse.Namespace) -> None:
    test = list(DataLoader(digits(train=False), CHECKED, drop_last=True))
    print("| network | seed | arm | accuracy | a step, of the same loop without |")
    print("|---|---|---|---|---|")
    for net in options.nets:
        for seed in range(options.seeds):
            rows = []
            ours, _, plain_seconds = train(net, seed, options.epochs, [])
            rows.append(("plain, Lightning", accuracy(ours, test), 1.0))
            guarded, _, seconds = train(net, seed, options.epochs, [QuantizationAwareTraining(start=0.0)])
            rows.append(("QuantizationAwareTraining", accuracy(guarded, test), seconds / plain_seconds))
            by_hand, plain = loop(fresh(net, seed), options.epochs, seed=seed)
            rows.append(("plain, by hand", accuracy(by_hand.eval(), test), 1.0))
            quantized, step = loop(fresh(net, seed), options.epochs, 0.0, pt2e, seed)
            rows.append(("torchao PT2E", accuracy(converted(quantized), test), step / plain))
            if net == "mlp":  # Linear alone
                quantized, step = loop(fresh(net, seed), options.epochs, 0.0, eager("prepare"), seed)
                rows.append(("torchao quantize_", accuracy(eager("convert")(quantized.eval()), test), step / plain))
            for arm, right, ratio in rows:
                print(f"| {net} | {seed} | {arm} | {100 * right:.2f} % | {ratio:.2f} |", flush=True)


def channels(options: argparse.Namespace) -> None:
    """Both begin with the same trained network, train as long again, and end with about as many parameters."""
    import torch_pruning

    test = list(DataLoader(digits(train=False), CHECKED, drop_last=True))
    print("| network | seed | arm | parameters | accuracy |")
    print("|---|---|---|---|---|")
    for net in options.nets:
        for seed in range(options.seeds):
            dense, trainer, _ = train(net, seed, options.epochs, [])
            path = str(options.folder / f"{net}-{seed}.ckpt")
            trainer.save_checkpoint(path)
            print(f"| {net} | {seed} | dense | {size(dense.net):,} | {100 * accuracy(dense, test):.2f} % |", flush=True)
            guard = ChannelPruning(options.ratio, checkpoint=path)
            thin, _, _ = train(net, seed, options.epochs, [guard])
            report = f"{size(thin.net):,} | {100 * accuracy(thin, test):.2f} %"
            print(f"| {net} | {seed} | ChannelPruning | {report} |", flush=True)
            alone = copy.deepcopy(dense.net).eval()
            last = [m for m in alone.modules() if isinstance(m, nn.Linear)][-1:]
            pruner = torch_pruning.pruner.MetaPruner(
                alone, torch.zeros(1, 1, 28, 28), torch_pruning.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=options.ratio, ignored_layers=last,
            )  # fmt: skip
            pruner.step()
            alone, _ = loop(alone.train(), options.epochs, seed=seed)
            report = f"{size(alone):,} | {100 * accuracy(alone.eval(), test):.2f} %"
            print(f"| {net} | {seed} | torch-pruning alone | {report} |", flush=True)


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def zeros(net: nn.Module) -> float:
    found = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


def prune_then_quantize(options: argparse.Namespace) -> None:
    """Pruned to 90 %, then quantisation-aware training: what is left of the zeros."""
    net = fresh("mlp", 0)
    for layer in [m for m in net.modules() if isinstance(m, nn.Linear)]:
        prune.l1_unstructured(layer, "weight", 0.9)  # as ModelPruning does
    net, _ = loop(net, 1)
    print(f"torch.nn.utils.prune, one epoch: {zeros(net):.3f} of the weights are zero")
    try:
        net, _ = loop(net, 1, begin=eager("prepare"))
        print(f"then torchao quantize_, one epoch: {zeros(net):.3f}")
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        print(f"then torchao quantize_: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
    for layer in [m for m in net.modules() if isinstance(m, nn.Linear) and prune.is_pruned(m)]:
        prune.remove(layer, "weight")
    net, _ = loop(net, 1, begin=pt2e)
    found = [p for name, p in net.named_parameters() if p.dim() == 2]
    share = sum(int((p == 0).sum()) for p in found) / sum(p.numel() for p in found)
    print(f"masks made permanent, then torchao PT2E, one epoch: {share:.3f}")
    guards = [MagnitudePruning(0.9, end=0.5), QuantizationAwareTraining(start=0.5)]
    module, _, _ = train("mlp", 0, 2, guards)
    print(f"MagnitudePruning and QuantizationAwareTraining: {zeros(module.net):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quantization", "channels", "prune-then-quantize"])
    parser.add_argument("--nets", nargs="+", default=["cnn", "mlp"], choices=["cnn", "mlp", "residual"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.75)
    parser.add_argument("--folder", type=Path, default=Path("compression"), help="where dense checkpoints go")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    {"quantization": quantization, "channels": channels, "prune-then-quantize": prune_then_quantize}[options.what](
        options
    )


if __name__ == "__main__":
    main()
