"""Sizes and counts against counting by hand, and against torch's own counter."""

import gzip
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from lightning_guard.evaluation import Efficiency, Subject
from lightning_guard.models import MLP, SmallCNN, SmallTransformer
from tests import toys


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
