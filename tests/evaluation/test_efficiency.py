"""Sizes and counts against counting by hand, and against torch's own counter."""

import base64
import copy
import gzip
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from lightning_guard.evaluation import Efficiency, Subject
from lightning_guard.evaluation.flips import flips
from lightning_guard.evaluation.layers import layers, table
from lightning_guard.evaluation.sensitivity import rounded, sensitivity
from lightning_guard.export import export, tracing
from lightning_guard.functional import magnitude_masks, stream
from lightning_guard.models import MLP, SmallCNN, SmallTransformer
from tests import toys
from tests.evaluation import test_every_evaluator as every


def evaluated(module, x, latency=False):
    return Efficiency(latency).evaluate(Subject(module, [(x, torch.zeros(len(x)).long())]))


def values(evidence):
    return {key.split("/")[1]: figure.value for key, figure in evidence.figures.items()}


class ConvNet(nn.Module):
    """Every layer that counts, and some that do not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4),
            nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.Flatten(), nn.Linear(4 * 12 * 12, 10, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


def test_multiplications_are_those_of_the_formulas():
    found = values(evaluated(ConvNet(), torch.rand(4, 3, 16, 16)))
    conv = 8 * 8 * 8 * (3 * 9)  # outputs times what each of them sums
    grouped = 8 * 6 * 6 * (2 * 9)
    transposed = 8 * 6 * 6 * (2 * 4)  # inputs times what each of them feeds
    assert found["macs"] == conv + grouped + transposed + 576 * 10


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (MLP(in_features=7, hidden=(5, 3)), torch.rand(3, 7)),
        (SmallCNN(width=8), torch.rand(3, 1, 28, 28)),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(32, 3)), torch.rand(3, 2, 10)),
        (nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(16, 3)), torch.rand(3, 1, 4, 4, 4)),
        (nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.Flatten(), nn.Linear(48, 3)), torch.rand(3, 2, 10)),
    ],
)
def test_multiplications_are_half_of_torchs_operations(module, x):
    with FlopCounterMode(display=False) as counter:
        module.eval()(x)
    assert values(evaluated(module, x))["macs"] == counter.get_total_flops() / 2 / len(x)


def test_a_layer_used_twice_multiplies_twice_and_is_stored_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.layer.weight

        def forward(self, x):
            return self.other(self.layer(self.layer(x)))

    evidence = evaluated(Twice(), torch.rand(2, 4))
    assert values(evidence)["macs"] == 3 * 16
    assert values(evidence)["parameters"] == 16 + 2 * 4
    assert evidence.bars["efficiency/sparsity"].categories == ["layer"]


def test_layers_that_no_hook_sees_are_told():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    evidence = evaluated(Attention(), torch.rand(2, 5, 8))
    assert values(evidence)["macs"] == 8 * 3
    note = "1 of 2 layers were not seen in the forward pass (attention.out_proj)"
    assert any(note in found for found in evidence.notes)
    assert not any("not seen" in found for found in evaluated(SmallTransformer(), torch.rand(2, 1, 28, 28)).notes)


def test_sparsity_is_counted_in_weights_alone():
    module = ConvNet()
    zeros = {"layers.0": 50, "layers.3": 1, "layers.4": 0, "layers.6": 5000}
    with torch.no_grad():
        for name, count in zeros.items():
            module.get_submodule(name).weight.fill_(1.0).flatten()[:count] = 0
        module.layers[0].bias.fill_(0.0)
        module.layers[1].weight.fill_(1.0)
        module.layers[3].bias.fill_(1.0)
        module.layers[4].bias.fill_(1.0)
    sizes = {"layers.0": 8 * 3 * 9, "layers.3": 8 * 2 * 9, "layers.4": 8 * 2 * 4, "layers.6": 5760}
    evidence = evaluated(module, torch.rand(1, 3, 16, 16))
    found = values(evidence)
    assert found["sparsity"] == pytest.approx(sum(zeros.values()) / sum(sizes.values()))
    bars = evidence.bars["efficiency/sparsity"]
    assert bars.categories == list(sizes)
    assert bars.values == pytest.approx([zeros[name] / sizes[name] for name in sizes])
    assert found["parameters"] == sum(sizes.values()) + 8 + 16 + 8 + 4
    assert found["nonzero_parameters"] == found["parameters"] - sum(zeros.values()) - 8 - 8  # two biases of zeros
    assert any("compressible, not the network faster" in note for note in evidence.notes)


def test_a_dense_network_gets_no_word_about_zeros():
    evidence = evaluated(MLP(in_features=7), torch.rand(3, 7))
    assert values(evidence)["sparsity"] == 0.0
    assert evidence.notes == []


def test_without_layers_there_is_no_sparsity():
    evidence = evaluated(nn.Flatten(), torch.rand(3, 7))
    assert values(evidence)["sparsity"] is None
    assert values(evidence)["macs"] == 0
    assert evidence.bars == {}


def test_the_weight_that_acts_is_the_one_that_counts():
    layer = weight_norm(nn.Linear(4, 2))
    with torch.no_grad():
        layer.parametrizations.weight.original1[:, :2] = 0
    assert values(evaluated(nn.Sequential(layer), torch.rand(2, 4)))["sparsity"] == 0.5


def test_the_largest_layers_are_shown():
    module = nn.Sequential(*(nn.Linear(4 + (i % 2), 4 + ((i + 1) % 2)) for i in range(40)), nn.Linear(4, 1))
    evidence = evaluated(module, torch.rand(2, 4))
    assert evidence.bars["efficiency/sparsity"].categories == [str(i) for i in range(30)]
    assert any("30 largest of 41 layers" in note for note in evidence.notes)


def test_bytes_are_those_of_the_file():
    module = MLP(in_features=50, hidden=(40,))
    found = values(evaluated(module, torch.rand(2, 50)))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    assert found["bytes"] == len(file.getvalue())
    assert gzip.decompress(gzip.compress(file.getvalue(), 6)) == file.getvalue()
    assert found["compressed_bytes"] == pytest.approx(len(gzip.compress(file.getvalue(), 6)), abs=4)
    weights = 4 * (50 * 40 + 40 + 40 + 1)
    assert weights < found["bytes"] < weights + 1000 * 4  # four tensors and their names
    assert found == values(evaluated(module, torch.rand(2, 50)))


def test_zeros_compress():
    module = nn.Linear(200, 200)
    dense = values(evaluated(module, torch.rand(2, 200)))
    with torch.no_grad():
        module.weight.flatten()[torch.randperm(40_000)[:36_000]] = 0
    sparse = values(evaluated(module, torch.rand(2, 200)))
    assert sparse["bytes"] == dense["bytes"]
    assert sparse["compressed_bytes"] < 0.3 * dense["compressed_bytes"]
    assert sparse["macs"] == dense["macs"]  # dense kernels multiply by zeros


def test_the_headline_is_the_compressed_file():
    assert next(iter(evaluated(nn.Linear(2, 2), torch.rand(2, 2)).figures)) == "efficiency/compressed_bytes"


def test_latency_is_measured_in_seconds():
    class Slow(nn.Linear):
        def forward(self, x):
            for _ in range(20 if len(x) == 1 else 60):
                x = x @ torch.eye(40) + 0
            return super().forward(x)

    found = values(evaluated(Slow(40, 2), torch.rand(5, 40), latency=True))  # fewer examples than 64
    for size in (1, 64):
        assert 1e-6 < found[f"latency_batch_{size}"] <= found[f"latency_batch_{size}_p95"] < 1
    assert found["latency_batch_64"] > found["latency_batch_1"]
    assert not any("latency" in key for key in values(evaluated(Slow(40, 2), torch.rand(5, 40))))


def test_a_network_that_squeezes_has_no_latency_at_batch_1():
    class Squeezing(nn.Linear):
        def forward(self, x):
            return super().forward(x).squeeze()

    evidence = evaluated(Squeezing(3, 1), torch.rand(5, 3), latency=True)
    found = values(evidence)
    assert found["latency_batch_1"] is None
    assert found["latency_batch_64"] > 0
    assert found["macs"] == 3
    assert any("No latency at batch 1" in note for note in evidence.notes)


def test_inputs_of_any_form_pass():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs):
            return self.layer(inputs["a"]) + inputs["b"]

    batch = {"inputs": {"a": torch.rand(4, 3), "b": torch.rand(4, 2)}, "target": torch.zeros(4).long()}
    found = values(Efficiency(latency=True).evaluate(Subject(Two(), [batch])))
    assert found["macs"] == 6
    assert found["latency_batch_64"] > 0


def test_hooks_of_others_stay():
    module, seen = toys.Net(), []
    module.net[0].register_forward_hook(lambda *_: seen.append(1))
    Efficiency(latency=False).evaluate(Subject(module, toys.loader()))
    assert seen
    assert len(module.net[0]._forward_hooks) == 1


# Layers ------------------------------------------------------------------------------------------------------------


def test_layers_are_counted_by_hand():
    module = ConvNet()
    with torch.no_grad():
        module.layers[0].weight[:4] = 0
        module.layers[6].weight.copy_((torch.rand(10, 576) * 14).floor() - 7)  # whole numbers of 4 bits
    found = layers(Subject(module, [(torch.rand(4, 3, 16, 16), torch.zeros(4).long())]))
    assert [one.name for one in found] == ["layers.0", "layers.3", "layers.4", "layers.6"]
    assert [one.shape for one in found] == [(8, 3, 3, 3), (8, 2, 3, 3), (8, 2, 2, 2), (10, 576)]
    assert [one.parameters for one in found] == [8 * 27 + 8, 8 * 18 + 8, 8 * 8 + 4, 5760]
    assert [one.macs for one in found] == [8 * 8 * 8 * 27, 8 * 36 * 18, 8 * 36 * 8, 5760]
    assert found[0].sparsity == 0.5
    assert [one.bits for one in found] == [32, 32, 32, 4]
    text = table(found)
    assert "| layers.6 | Linear | 10 x 576 | 5,760 | 5,760 |" in text
    assert len(text.splitlines()) == 2 + 4 + 1


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_bits_are_those_of_quantised_weights(bits):
    layer = nn.Linear(200, 30)
    layer.weight.data = rounded(layer.weight.data, bits)  # with negative zeros
    (found,) = layers(Subject(layer, [(torch.rand(2, 200), torch.zeros(2).long())]))
    assert found.bits == bits


def test_a_shared_weight_is_told_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    found = layers(Subject(nn.Sequential(first, second), [(torch.rand(2, 4), torch.zeros(2).long())]))
    assert [one.parameters for one in found] == [20, 0]


def test_layers_are_pictured():
    evidence = Efficiency(layers=True).evaluate(Subject(ConvNet(), [(torch.rand(2, 3, 16, 16), torch.zeros(2).long())]))
    assert base64.b64decode(evidence.pictures["efficiency/layers"].png).startswith(b"\x89PNG")
    assert evaluated(nn.Flatten(), torch.rand(2, 3)).pictures == {}


def test_multiplications_by_layer_sum_to_all():
    evidence = evaluated(ConvNet(), torch.rand(2, 3, 16, 16))
    assert sum(evidence.bars["efficiency/macs"].values) == values(evidence)["macs"]


# Memory ------------------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_largest_moment():
    class Steps(nn.Module):
        def forward(self, x):
            wide = x.repeat(1, 100)  # x and this: 101
            narrow = wide[:, :2] + 1  # and this: 103
            del wide
            return narrow * 2  # x, narrow, result: 5

    assert values(evaluated(Steps(), torch.rand(64, 1)))["peak_bytes"] == 64 * 103 * 4


def test_peak_memory_counts_weights_and_views_once():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(10, 10))

        def forward(self, x):
            return x.view(-1, 10).T.T @ self.weight

    assert values(evaluated(Viewing(), torch.rand(64, 10)))["peak_bytes"] == 4 * (100 + 640 + 640)


# Flips -------------------------------------------------------------------------------------------------------------


def test_flips_are_counted_by_hand():
    draws = stream(3)
    before, after = torch.randn(200, 4, generator=draws), torch.randn(200, 4, generator=draws)
    target, group = (torch.randint(high, (200,), generator=draws) for high in (4, 3))
    group[:20] = -1
    found = flips(before, after, target, group)
    turned = [int(b.argmax() != a.argmax()) for b, a in zip(before, after, strict=True)]
    assert found.share == sum(turned) / 200
    right = [int(b.argmax() == y and a.argmax() != y) for b, a, y in zip(before, after, target, strict=True)]
    assert found.harmed == sum(right) / 200
    for label, by in ((target, found.by_class), (group, found.by_group)):
        assert set(by) == {int(one) for one in label if one >= 0}
        for one, share in by.items():
            own = [t for t, y in zip(turned, label, strict=True) if y == one]
            assert share == pytest.approx(sum(own) / len(own))
    assert flips(before, before, target).share == 0.0
    with pytest.raises(ValueError, match="not of the same examples"):
        flips(before, after[:100])


def test_flips_without_examples_or_targets():
    assert flips(torch.zeros(0, 3), torch.zeros(0, 3)).share is None
    found = flips(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]))
    assert (found.share, found.harmed, found.by_class) == (0.5, None, {})
    nan = torch.tensor([[float("nan"), 0.0]])
    assert flips(nan, nan).share == 0.0
    assert flips(nan, torch.zeros(1, 2)).share == 1.0


def test_flips_against_a_file_of_the_dense_model():
    torch.manual_seed(0)
    dense = toys.Net(norm=False)
    done = export(dense, "dense.onnx", toys.loader(shuffle=False))
    small = copy.deepcopy(dense)
    with torch.no_grad():
        small.net[0].weight[:, :3] = 0
    data, subject = toys.loader(shuffle=False), Subject(small, toys.loader(shuffle=False), group_names=["a", "b"])
    evidence = Efficiency(reference=str(done.path)).evaluate(subject)
    before, after = (Subject(one, data).outputs for one in (dense, small))
    expected = flips(before.logits, after.logits, after.target, after.group)
    assert values(evidence)["flips"] == expected.share > 0
    assert evidence.bars["efficiency/flips_by_class"].values == list(expected.by_class.values())
    assert evidence.bars["efficiency/flips_by_group"].values == list(expected.by_group.values())
    assert evidence.bars["efficiency/flips_by_group"].categories == ["a", "b"]
    assert values(Efficiency(reference=str(done.path)).evaluate(Subject(dense, data)))["flips"] == 0.0


# Files -------------------------------------------------------------------------------------------------------------


def test_files_are_judged_as_files():
    subject = every.finished(shuffle=False)
    before = every.trace(subject.module)
    evidence = Efficiency(export=True).evaluate(subject)
    assert every.trace(subject.module) == before
    found = values(evidence)
    done = export(subject.module, "model.onnx", subject.loader)
    assert found["file_bytes"] == done.bytes
    assert found["file_flips"] == 0.0
    assert found["file_accuracy"] == done.agreement.module_accuracy
    assert found["int8_bytes"] > 0
    for key in ("file", "int8"):
        for size in (1, 64):
            name = f"{key}_latency_batch_{size}"
            assert 0 < found[f"{name}_min"] <= found[name] <= found[f"{name}_p95"]
    ratio = found["file_latency_batch_64_min"] / found["int8_latency_batch_64_min"]
    assert found["int8_speedup_batch_64"] == pytest.approx(ratio)
    slow = [size for size in (1, 64) if found[f"int8_speedup_batch_{size}"] < 1.05]
    assert sum("saves bytes only" in note for note in evidence.notes) == len(slow)


def test_what_has_no_file_is_told():
    class Choosing(toys.Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x[:, :3]

    evidence = Efficiency(export=True).evaluate(Subject(Choosing(), toys.loader()))
    assert values(evidence)["int8_bytes"] is None
    assert values(evidence)["int8_speedup_batch_64"] is None
    assert sum("cannot be traced" in note for note in evidence.notes) == 2
    assert values(evidence)["parameters"] > 0


def test_options_of_files_are_checked_early(monkeypatch):
    with pytest.raises(ValueError, match="linear='both'"):
        Efficiency(linear="both")
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lightning-guard\[export\]'"):
        Efficiency(export=True)


# Sensitivity -------------------------------------------------------------------------------------------------------


def learned():
    """A network in which one layer does nothing that matters, and one everything."""
    torch.manual_seed(0)
    x = torch.rand(300, 6, generator=stream(1))
    y = (x[:, 0] * 3).long()
    module = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    module.zero_grad()
    return module, [(x, y)]


def test_a_scan_is_what_changing_a_layer_by_hand_gives():
    module, data = learned()
    found = sensitivity(Subject(module, data), sparsities=[0.5, 0.9], bits=[4, 2])
    assert len(found.trials) == 3 * 4
    for one in found.trials:
        changed = copy.deepcopy(module)
        weight = changed.get_submodule(one.layer).weight.data
        if one.sparsity:
            order = weight.abs().flatten().argsort()
            weight.view(-1)[order[: round(one.sparsity * weight.numel())]] = 0
        else:
            most = 2 ** (one.bits - 1) - 1
            for row in weight:
                scale = row.abs().max() / most
                row.copy_((row / scale).round() * scale)
        logits = changed(data[0][0])
        assert one.score == pytest.approx((logits.argmax(1) == data[0][1]).double().mean().item(), abs=0.004)
        assert one.loss == pytest.approx(nn.functional.cross_entropy(logits, data[0][1]).item(), rel=1e-3)


def test_the_proposal_keeps_the_stated_loss_and_says_what_it_reaches():
    module, data = learned()
    before = {name: (p, p.clone(), p._version) for name, p in module.named_parameters()}
    drops = []
    for allowed in (0.0, 0.02, 0.2):
        found = sensitivity(Subject(module, data), max_drop=allowed)
        assert found.score - found.reached <= allowed
        changed = copy.deepcopy(module)
        for name in found.sparsity:
            weight = changed.get_submodule(name).weight.data
            weight *= magnitude_masks({"": weight}, found.sparsity[name], "layer")[""]
            if found.bits[name] < 32:
                weight.copy_(rounded(weight, found.bits[name]))
        assert found.reached == (changed(data[0][0]).argmax(1) == data[0][1]).double().mean().item()
        drops.append(sum(found.sparsity.values()))
        assert found == sensitivity(Subject(module, data), max_drop=allowed)
        assert all(f"| {name} |" in found.table() for name in found.sparsity)
    assert drops == sorted(drops)
    assert drops[-1] > 0
    for name, p in module.named_parameters():
        assert p is before[name][0]
        assert p._version == before[name][2]
        assert torch.equal(p, before[name][1])


def test_a_scan_leaves_no_trace_and_judges_the_first_examples():
    subject = every.finished(shuffle=False)
    before = every.trace(subject.module)
    found = sensitivity(subject, sparsities=[0.5], bits=[8], examples=24)
    assert every.trace(subject.module) == before
    logits, target = subject.outputs.logits[:24], subject.outputs.target[:24]
    assert found.score == pytest.approx((logits.argmax(1) == target).double().mean().item())


def test_a_scan_of_a_regression():
    x = torch.rand(100, 4, generator=stream(2))
    module = nn.Sequential(nn.Linear(4, 1))
    y = module(x).detach()[:, 0] + 0.1 * torch.rand(100, generator=stream(4))
    found = sensitivity(Subject(module, [(x, y)]), sparsities=[0.5], bits=[8])
    error = (module(x)[:, 0] - y).square().mean() / y.var(correction=0)
    assert found.score == pytest.approx(1 - error.item(), abs=1e-5)


def test_layers_whose_weight_is_computed_are_left_out():
    module = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    found = sensitivity(Subject(module, [(torch.rand(8, 4), torch.zeros(8).long())]))
    assert list(found.left_out) == ["0"]
    assert list(found.sparsity) == ["1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"max_drop": -1}, "max_drop=-1"), ({"sparsities": [1.0]}, "sparsities="), ({"bits": [1]}, "bits=")],
)
def test_scans_that_make_no_sense_are_refused(options, words):
    module, data = learned()
    with pytest.raises(ValueError, match=words):
        sensitivity(Subject(module, data), **options)
    with pytest.raises(ValueError, match="nothing to judge by"):
        sensitivity(Subject(module, [data[0][0]]))
    with pytest.raises(ValueError, match="nothing to change"):
        sensitivity(Subject(nn.Flatten(), data))
