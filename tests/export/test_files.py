"""Files against the modules they were made of, on the same batches; the module stays as it was."""

import copy
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_guard import export as shipping
from lightning_guard.batch import Batch
from lightning_guard.evaluation import Efficiency, Fairness, Robustness, Subject, Task
from lightning_guard.export import ExportError, agreement, export, graph, judged, load, tracing
from lightning_guard.functional import stream
from lightning_guard.mixins import GuardMixin
from tests import toys
from tests.evaluation.test_every_evaluator import Talkative, finished, trace

FORMATS = ["onnx", "onnx-int8", "torch", "sparse"]


class ConvNet(pl.LightningModule):
    """Convolutions with BatchNorm, a residual connection, pooling and a linear layer."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.pool(torch.relu(x + self.block(x))).mean((2, 3)))


def images(n=96, size=8, seed=0):
    """Classes that a threshold on brightness would tell apart."""
    x = torch.rand(n, 1, size, size, generator=stream(seed)) * torch.linspace(0.2, 1, n)[:, None, None, None]
    y = (x.mean((1, 2, 3)) * 6).long().clamp_max(2)
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, n, 16)]


@pytest.fixture(scope="module")
def convnet():
    """Trained for some steps, so that BatchNorm has statistics and logits lie apart."""
    torch.manual_seed(0)
    module = ConvNet()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(25):
        for x, y in images():
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    return module


@pytest.fixture(scope="module")
def files(convnet, tmp_path_factory):
    """Every format once, for those tests that only look."""
    folder = tmp_path_factory.mktemp("files")
    found = {name: export(convnet, folder / name, images(), name, tolerance=0.1) for name in FORMATS[:3]}
    found["dynamic"] = export(convnet, folder / "dynamic", images(), "onnx-int8", linear="dynamic", tolerance=0.1)
    return found


def logits(module, x):
    with torch.no_grad():
        return copy.deepcopy(module).eval()(x)


# Agreement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 16, 41])
def test_files_compute_what_the_module_computes_at_any_batch_size(convnet, files, size):
    x = images(seed=5)[0][0].repeat(3, 1, 1, 1)[:size]
    expected = logits(convnet, x)
    for name in ("onnx", "torch"):
        assert torch.allclose(files[name].load()(x), expected, atol=1e-4, rtol=1e-4)
    spread = expected.std() + 1
    for name in ("onnx-int8", "dynamic"):
        assert (files[name].load()(x) - expected).abs().max() < 0.1 * spread


def test_the_file_is_run_without_us(convnet, files):
    """onnxruntime alone, as whoever gets the file has it."""
    x = images(seed=6)[0][0]
    session = onnxruntime.InferenceSession(str(files["onnx"].path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"input": x.numpy()})
    assert np.allclose(found, logits(convnet, x), atol=1e-4)
    onnx.checker.check_model(onnx.load(files["onnx"].path), full_check=True)


def test_agreement_is_counted_by_hand(convnet, files):
    found = agreement(Subject(convnet, images()), files["onnx-int8"].load())
    x, y = (torch.cat(parts) for parts in zip(*images(), strict=True))
    ours, theirs = logits(convnet, x), files["onnx-int8"].load()(x)
    assert found.examples == 96
    assert found.flips == (ours.argmax(1) != theirs.argmax(1)).double().mean().item()
    assert found.max_difference == pytest.approx(float((ours - theirs).abs().max()), abs=1e-5)
    assert found.module_accuracy == (ours.argmax(1) == y).double().mean().item()
    assert found.file_accuracy == (theirs.argmax(1) == y).double().mean().item()
    assert found == files["onnx-int8"].agreement


class Shifted(nn.Module):
    """A 'file' whose logits are known."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x.clone())


def table(rows):
    return [(torch.tensor(rows), torch.zeros(len(rows)).long())]


def test_rounding_ties_are_no_difference_and_more_is():
    data = table([[1.0, 1.0], [10.0, 0.0], [0.0, 3.0]])

    def tie(x):
        x[0, 1] += 1e-5
        return x

    found = agreement(Subject(nn.Identity(), data), Shifted(tie))
    assert (found.flips, found.beyond_rounding) == (pytest.approx(1 / 3), 0.0)
    found = agreement(Subject(nn.Identity(), data), Shifted(lambda x: x + 0.1))
    assert (found.flips, found.beyond_rounding) == (0.0, 1.0)


def test_what_is_no_number_in_one_alone_is_a_difference():
    nan = float("nan")
    found = agreement(Subject(nn.Identity(), table([[nan, 1.0], [1.0, 0.0]])), Shifted(lambda x: x))
    assert (found.flips, found.beyond_rounding, found.max_difference) == (0.0, 0.0, 0.0)
    found = agreement(Subject(nn.Identity(), table([[0.0, 1.0], [1.0, 0.0]])), Shifted(lambda x: x / x))
    assert (found.flips, found.beyond_rounding) == (1.0, 1.0)


def test_a_regression_flips_by_the_spread_of_its_outputs():
    data = [(torch.linspace(-1, 1, 50), torch.linspace(-1, 1, 50) * 2.5)]
    subject = Subject(nn.Identity(), data)
    assert agreement(subject, Shifted(lambda x: x + 0.02)).flips == 0.0  # the standard deviation is 0.59
    assert agreement(subject, Shifted(lambda x: x + 0.04)).flips == 1.0
    assert agreement(subject, Shifted(lambda x: x)).file_accuracy is None


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong(monkeypatch):
    """An exporter with a fault: the file adds to one logit."""
    right = graph.to_onnx

    def faulty(program, signature):
        model, layers = right(program, signature)
        bias = next(one for one in model.graph.initializer if one.name.endswith("head.bias"))
        value = onnx.numpy_helper.to_array(bias) + np.float32([9, 0, 0])
        bias.CopyFrom(onnx.numpy_helper.from_array(value, bias.name))
        return model, layers

    monkeypatch.setattr("lightning_guard.export.files.to_onnx", faulty)


@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_a_file_that_predicts_otherwise_is_not_left(convnet, wrong, name):
    with open("model.onnx", "w") as file:
        file.write("what was there")
    with pytest.raises(ExportError, match=r"of 96 examples .*tolerance=0.*nothing was written"):
        export(convnet, "model.onnx", images(), name)
    assert os.listdir() == ["model.onnx"]
    assert Path("model.onnx").read_text() == "what was there"


def test_a_stated_tolerance_takes_it(convnet, wrong):
    done = export(convnet, "model.onnx", images(), tolerance=1.0)
    assert done.agreement.beyond_rounding == 1.0
    assert done.agreement.max_difference == pytest.approx(9, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "onx"}, "format='onx' is not known; there are onnx"),
        ({"tolerance": 2}, r"tolerance=2 is no share"),
        ({"tolerance": float("nan")}, r"tolerance=nan is no share"),
        ({"calibration_batches": 0}, "calibration_batches=0"),
        ({"linear": "both"}, "linear='both' is not known"),
        ({"ranges": {"head": (-1, 1)}}, "ranges are those of int8"),
        (
            {"format": "onnx-int8", "ranges": {"haed": (-1, 1)}},
            "no convolution or linear layer 'haed'; there are stem.0",
        ),
        ({"format": "onnx-int8", "ranges": {"head": (1, 2)}}, "no range around 0"),
        ({"format": "onnx-int8", "calibration": []}, "calibration holds no batch"),
        ({"batches": []}, "batches holds no batch"),
        ({"path": "no/folder.onnx"}, "no folder that exists"),
    ],
)
def test_options_that_make_no_sense_are_refused(convnet, options, words):
    with pytest.raises(ValueError, match=words):
        export(**{"module": convnet, "path": "model.onnx", "batches": images(), **options})
    assert os.listdir() == []


def test_a_missing_extra_is_one_clear_line(convnet, monkeypatch):
    there = tracing.find_spec
    monkeypatch.setattr(tracing, "find_spec", lambda name: None if name == "onnxruntime" else there(name))
    with pytest.raises(ExportError, match=r"^this needs onnxruntime; pip install 'lightning-guard\[export\]'$"):
        export(convnet, "model.onnx", images())
    assert os.listdir() == []


def test_other_numbers_than_float32_are_refused(convnet):
    with pytest.raises(ExportError, match=r"in bfloat16, .* call module.float\(\) first"):
        export(copy.deepcopy(convnet).bfloat16(), "model.onnx", images())


def test_a_forward_that_looks_at_values_is_refused_in_words():
    class Choosing(toys.Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x[:, :3]

    with pytest.raises(ExportError, match="Choosing cannot be traced for any batch size"):
        export(Choosing(), "model.onnx", toys.loader())


def test_inputs_that_are_no_tensors_are_refused():
    with pytest.raises(ExportError, match="the inputs are a dict of list"):
        export(nn.Identity(), "model.onnx", [({"a": [1, 2]}, torch.zeros(2))])


def test_a_graph_without_weights_has_nothing_in_int8():
    with pytest.raises(ExportError, match="no convolution or linear layer to quantise"):
        export(nn.ReLU(), "model.onnx", [(torch.rand(4, 3), torch.zeros(4).long())], "onnx-int8")


# The module --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_module_is_left_as_it_was(name):
    """With metrics that count in every pass, hooks, gradients, a frozen layer, logging in forward."""
    subject, seen = finished(), []
    subject.module.net[0].register_forward_hook(lambda *_: seen.append(1))
    before = trace(subject.module)
    export(subject.module, "model", toys.loader(), name, tolerance=0.2)
    assert trace(subject.module) == before
    assert seen


def test_the_module_is_left_as_it_was_after_a_failure(monkeypatch):
    subject = finished()
    before = trace(subject.module)
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: 1 / 0)
    with pytest.raises(ExportError, match="ONNX has no form for this module"):
        export(subject.module, "model.onnx", toys.loader())
    assert trace(subject.module) == before
    assert os.listdir() == []


def test_metrics_are_no_part_of_the_file():
    export(Talkative(), "model.onnx", toys.loader())
    assert {node.op_type for node in onnx.load("model.onnx").graph.node} <= {"Gemm", "Relu", "Reshape"}


def test_a_mixin_that_says_what_the_logits_are_is_heard():
    class Described(GuardMixin, toys.Net):
        guard_batch = Batch(inputs="pixels", target="label")

        def forward(self, x):
            return self.net(x).softmax(1)

        def guard_forward(self, x):
            return self.net(x)

    torch.manual_seed(0)
    module = Described()
    x, y, _ = toys.rows()
    done = export(module, "model.onnx", [{"pixels": x, "label": y}], batch=module.guard_batch)
    assert torch.allclose(done.load()(x), copy.deepcopy(module).eval().net(x), atol=1e-5)


def test_the_submodule_that_gives_the_logits_is_exported():
    done = export(toys.Net(), "model.onnx", toys.loader(), batch=Batch(logits="net"))
    assert done.agreement.beyond_rounding == 0.0


def test_several_inputs_keep_their_names():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs):
            return self.layer(inputs["a"]) + inputs["b"]

    torch.manual_seed(0)
    module, inputs = Two(), {"a": torch.rand(5, 3), "b": torch.rand(5, 2)}
    batches = [{"inputs": inputs, "target": torch.zeros(5).long()}]
    done = export(module, "two.onnx", batches)
    assert [one.name for one in done.load().session.get_inputs()] == ["a", "b"]
    turned = {"b": inputs["b"][:2], "a": inputs["a"][:2]}  # by name, whatever their order
    assert torch.allclose(done.load()(turned), module(turned), atol=1e-6)
    with pytest.raises(ExportError, match="lack b"):
        done.load()({"a": inputs["a"]})
    done = export(module, "two.pt2", batches, "torch")
    assert torch.allclose(done.load()(turned), module(turned), atol=1e-6)


def test_batches_of_one_example_are_no_constant():
    torch.manual_seed(0)
    done = export(nn.Linear(3, 2), "model.onnx", [(torch.rand(1, 3), torch.zeros(1).long())] * 3)
    assert done.load()(torch.rand(7, 3)).shape == (7, 2)


def test_one_logit_and_regression_are_exported():
    torch.manual_seed(0)
    x = torch.rand(64, 6)
    done = export(nn.Linear(6, 1), "binary.onnx", [(x, (x[:, 0] > 0.5).long())], "onnx-int8", tolerance=0.2)
    assert done.agreement.module_accuracy is not None
    done = export(nn.Linear(6, 1), "regression.onnx", [(x, x.sum(1))], "onnx-int8")
    assert done.agreement.module_accuracy is None
    assert done.agreement.flips <= 0.01


# Contents ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_int8_files_are_small_and_fold_the_normalisation(convnet, files):
    model = onnx.load(files["onnx"].path)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    wide = ConvNet(64).eval()
    sizes = [export(wide, "wide", images(), name, tolerance=1.0).bytes for name in ("onnx", "onnx-int8")]
    assert sizes[1] < 0.3 * sizes[0]


def test_zeros_stay_zeros_and_weights_on_a_grid_stay_on_it(convnet):
    """Pruned, and as quantisation-aware training leaves weights: on the grid whose largest code is 127."""
    module = copy.deepcopy(convnet)
    with torch.no_grad():
        for layer in (module.block[0], module.head):
            weight = layer.weight
            weight[weight.abs() < weight.abs().median()] = 0.0
            scale = weight.flatten(1).abs().amax(1) / 127
            wide = scale.reshape(-1, *[1] * (weight.dim() - 1))
            weight.copy_((weight / wide).round() * wide)
    export(module, "model.onnx", images(), "onnx-int8", tolerance=0.1)
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load("model.onnx").graph.initializer}
    norm = module.block[1]
    folded = module.block[0].weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    for weight in (module.head.weight, folded):
        scale = weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (weight.dim() - 1)) / 127
        codes = (weight / scale).round().to(torch.int8).detach().numpy()
        assert any(
            one.dtype == np.int8 and one.shape == codes.shape and (one == codes).all() for one in stored.values()
        )
        assert (codes == 0).mean() > 0.4


def test_fixed_ranges_are_those_of_the_file(convnet):
    export(convnet, "model.onnx", images(), "onnx-int8", ranges={"block.0": (0.0, 51.0)}, tolerance=1.0)
    model = onnx.load("model.onnx")
    scales = [onnx.numpy_helper.to_array(one) for one in model.graph.initializer if one.name.endswith("_scale")]
    assert any(scale.shape == () and scale == pytest.approx(51 / 255) for scale in scales)
    export(convnet, "model.onnx", images(), "onnx-int8", tolerance=1.0)
    scales = [onnx.numpy_helper.to_array(one) for one in onnx.load("model.onnx").graph.initializer]
    assert not any(scale.shape == () and float(scale) == pytest.approx(51 / 255) for scale in scales)


@pytest.mark.slow
def test_ranges_come_from_the_calibration(convnet):
    """Logits of the file saturate where its calibration saw darker images only."""
    dark = [(x * 0.05, y) for x, y in images()]
    right = export(convnet, "right.onnx", images(), "onnx-int8", tolerance=1.0)
    wrong = export(convnet, "wrong.onnx", images(), "onnx-int8", tolerance=1.0, calibration=dark)
    assert wrong.agreement.max_difference > 3 * right.agreement.max_difference


@pytest.mark.slow
def test_the_same_module_is_the_same_file(convnet, files):
    again = export(convnet, "again.onnx", images(), "onnx-int8", tolerance=0.1)
    assert again.path.read_bytes() == files["onnx-int8"].path.read_bytes()


def test_a_file_tells_neither_data_nor_folders(files):
    here = os.path.dirname(os.path.dirname(__file__)).encode()
    example = images()[0][0][:1].numpy().tobytes()
    for name in ("onnx", "onnx-int8", "torch"):
        content = files[name].path.read_bytes()
        if name == "torch":
            with zipfile.ZipFile(files[name].path) as archive:
                content = b"".join(archive.read(part) for part in archive.namelist())
        assert here not in content
        assert b".py" not in content
        assert example[:64] not in content


# Files as modules --------------------------------------------------------------------------------------------------


def test_evaluators_judge_the_file(convnet, files):
    subject = Subject(convnet, images(), class_names=["dark", "grey", "light"])
    found = Task().evaluate(judged(subject, files["onnx-int8"].load()))
    assert found.figures["task/accuracy"].value == files["onnx-int8"].agreement.file_accuracy
    own, theirs = (Task().evaluate(one) for one in (subject, judged(subject, files["onnx"].load())))
    for key, figure in own.figures.items():
        assert theirs.figures[key].value == pytest.approx(figure.value, abs=1e-4)
    assert judged(subject, files["onnx"].load()).class_name(1) == "grey"


def test_groups_and_the_modules_own_preparation_are_kept():
    class Scaling(toys.PlainNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 100 - 7, *batch[1:]

    torch.manual_seed(0)
    module = Scaling()
    subject = Subject(module, toys.loader(n=256))
    done = export(module, "model.onnx", toys.loader(n=256))
    own, theirs = (Fairness(replicates=20).evaluate(one) for one in (subject, judged(subject, done.load())))
    for key, figure in own.figures.items():
        assert theirs.figures[key].value == pytest.approx(figure.value, abs=1e-5)
    assert own.figures["fairness/demographic_parity"].value is not None


def test_a_torch_file_can_be_attacked_and_an_onnx_file_says_that_it_cannot(convnet, files):
    subject = Subject(convnet, images())
    judge = Robustness(eps=0.05, steps=2, examples=6, bounds=(0.0, 1.0))
    own, theirs = (judge.evaluate(one) for one in (subject, judged(subject, files["torch"].load())))
    assert own.figures["robustness/accuracy"].value == theirs.figures["robustness/accuracy"].value
    with pytest.raises(ExportError, match="no gradients"):
        judge.evaluate(judged(subject, files["onnx"].load()))


def test_copies_of_a_loaded_file_run(files):
    x = images()[0][0]
    loaded = files["onnx-int8"].load(threads=2)
    for copied in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):  # noqa: S301  # our own
        assert torch.equal(copied(x), loaded(x))


def test_foreign_and_broken_files(files, convnet):
    model = onnx.load(files["onnx"].path)
    del model.metadata_props[:]
    onnx.save(model, "foreign.onnx")
    assert torch.equal(load("foreign.onnx")(images()[0][0]), files["onnx"].load()(images()[0][0]))
    with open("broken.onnx", "wb") as file:
        file.write(b"no model")
    with pytest.raises(ExportError, match="onnxruntime cannot run this file"):
        load("broken.onnx")
    shipping.save_compressed(convnet, "weights.lgw")
    with pytest.raises(ExportError, match="holds weights alone"):
        load("weights.lgw")
    with pytest.raises(FileNotFoundError):
        load("nothing.onnx")


def test_efficiency_of_a_file_has_no_parameters_to_count(files, convnet):
    evidence = Efficiency().evaluate(judged(Subject(convnet, images()), files["onnx"].load()))
    assert evidence.figures["efficiency/parameters"].value == 0


@pytest.mark.slow
def test_pt2e_is_int8_in_torch(convnet, files):
    pytest.importorskip("torchao")
    done = export(convnet, "model.pt2", images(), "pt2e", tolerance=0.1)
    assert done.bytes != files["torch"].bytes
    assert done.load()(images()[0][0][:1]).shape == (1, 3)
    with zipfile.ZipFile("model.pt2") as archive:
        assert not any(b".py" in archive.read(part) for part in archive.namelist())


@pytest.mark.slow
def test_transformers_keep_attention_in_float(tmp_path):
    from lightning_guard.models import SmallTransformer

    torch.manual_seed(0)
    module, data = SmallTransformer(dim=32, depth=1), [(torch.rand(8, 1, 28, 28), torch.zeros(8).long())]
    done = export(module, "tr.onnx", data, "onnx-int8", linear="dynamic", tolerance=1.0)
    kinds = [node.op_type for node in onnx.load(done.path).graph.node]
    assert kinds.count("MatMulInteger") == 6  # patches, query-key-value, mix, two of the perceptron, head
    assert kinds.count("MatMul") == 2  # of attention


# Placement ---------------------------------------------------------------------------------------------------------


def chain(*nodes, weights):
    """A graph of one path, from node to node: (kind, inputs, output)."""
    made = [onnx.helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in nodes]
    constants = [onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(made, "graph", [], [], constants))


def test_what_is_quantised_in_a_convolutional_network():
    model = chain(
        ("Conv", ["x", "narrow"], "first"), ("Relu", ["first"], "relu"), ("Conv", ["relu", "wide"], "second"),
        ("Add", ["second", "relu"], "residual"), ("MaxPool", ["residual"], "pool"), ("Add", ["pool", "bias"], "shift"),
        ("Gemm", ["shift", "head"], "hidden"), ("Relu", ["hidden"], "active"), ("Gemm", ["active", "head"], "logits"),
        weights={"narrow": (8, 1, 3, 3), "wide": (8, 8, 3, 3), "bias": (8,), "head": (8, 8)},
    )  # fmt: skip
    assert graph.chosen(model) == (["first", "relu", "second", "residual", "pool"], ["hidden", "active", "logits"])


def test_what_stays_in_float_beside_normalisation_and_attention():
    model = chain(
        ("Conv", ["x", "narrow"], "first"), ("Reshape", ["first", "shape"], "grouped"), ("Relu", ["grouped"], "relu"),
        ("MaxPool", ["relu"], "pool"), ("MatMul", ["pool", "weight"], "query"), ("MatMul", ["query", "pool"], "scores"),
        ("Softmax", ["scores"], "attention"), ("Add", ["attention", "pool"], "sum"),
        weights={"narrow": (8, 1, 3, 3), "shape": (3,), "weight": (8, 8)},
    )  # fmt: skip
    assert graph.chosen(model) == ([], ["query"])
    wide = chain(("Conv", ["x", "w"], "a"), ("Reshape", ["a", "s"], "b"), weights={"w": (8, 4, 3, 3), "s": (2,)})
    assert graph.chosen(wide) == (["a"], [])
