"""The small models learn, count right, and come back from their checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_guard.data import AdultData, FashionMNISTData
from lightning_guard.models import MLP, SmallCNN, SmallTransformer, StridedCNN
from lightning_guard.models.base import Classifier
from lightning_guard.models.mlp import hats

IMAGES = {"cnn": SmallCNN, "strided": StridedCNN, "transformer": SmallTransformer}


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", **({"enable_checkpointing": False} | quiet | options))


def make(name: str, **options: Any) -> Classifier:
    return MLP(784, hidden=[32], **options) if name == "mlp" else IMAGES[name](**options)


@pytest.mark.parametrize("name", ["cnn", "strided", "transformer", "mlp"])
@pytest.mark.parametrize(("num_classes", "shape"), [(2, (3,)), (10, (3, 10))])
def test_logits(name: str, num_classes: int, shape: tuple[int, ...]) -> None:
    assert make(name, num_classes=num_classes)(torch.rand(3, 1, 28, 28)).shape == shape


@pytest.mark.parametrize(
    ("model", "parameters"), [(SmallCNN, 111_274), (SmallTransformer, 114_570), (StridedCNN, 839_018)]
)
def test_sizes_are_as_documented(model: type[Classifier], parameters: int) -> None:
    assert sum(p.numel() for p in model().parameters()) == parameters


@pytest.mark.parametrize("name", ["cnn", "strided", "transformer", "mlp"])
def test_examples_do_not_see_each_other(name: str) -> None:
    model, x = make(name, num_classes=10).train(), torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))


@pytest.mark.parametrize("make_cnn", [SmallCNN, StridedCNN])
@pytest.mark.parametrize(("image_size", "in_channels"), [(32, 3), (29, 1), (31, 1), (4, 1)])
def test_cnn_takes_other_images(make_cnn: type[Any], image_size: int, in_channels: int) -> None:
    model = make_cnn(image_size=image_size, in_channels=in_channels, width=8)
    assert model(torch.rand(2, in_channels, image_size, image_size)).shape == (2, 10)


@pytest.mark.parametrize("model", [SmallCNN, SmallTransformer, StridedCNN])
def test_images_are_learnt(model: type[Classifier]) -> None:
    pl.seed_everything(0)
    data, net = FashionMNISTData(), model()
    run = trainer(max_steps=50, limit_val_batches=0, limit_test_batches=1)
    before = run.test(net, data, verbose=False)[0]
    run.fit(net, data)
    after = run.test(net, data, verbose=False)[0]
    assert after["test_loss"] < before["test_loss"] / 1.4
    assert after["test_accuracy"] > 0.5


@pytest.mark.parametrize("group", [None, "sex"])
def test_tables_are_learnt_whether_or_not_there_are_groups(group: Any) -> None:
    pl.seed_everything(0)
    data = AdultData(group)
    net = MLP(data.in_features, schedule="cosine")
    run = trainer(max_epochs=1)
    run.fit(net, data)
    assert run.callback_metrics["train_loss"] < 0.5
    assert {"val_loss", "val_accuracy"} <= set(run.callback_metrics)
    assert run.test(net, data, verbose=False)[0]["test_accuracy"] > 0.83
    assert net.optimizers().param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # where a cosine ends
    probabilities = torch.cat(run.predict(net, data)).sigmoid()  # type: ignore[arg-type]
    assert probabilities.shape == (16_281,)


def test_accuracy_counts_logits_by_their_sign() -> None:
    """Logits within [0, 1] all say the second class; taken for probabilities some would say the first."""

    class Fixed(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0]

    x, y = torch.tensor([[0.1], [0.4], [0.9]]), torch.ones(3, dtype=torch.int64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    result = trainer().test(Fixed(in_features=1), loader, verbose=False)[0]
    assert result["test_accuracy"] == 1
    expected = torch.nn.functional.softplus(-x.double()).mean()
    assert result["test_loss"] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "net",
    [
        SmallCNN(width=8, dropout=0.1),
        SmallTransformer(dim=16, heads=2),
        StridedCNN(width=4, hidden=8, dropout=0.1),
        MLP(784, hidden=[16], num_classes=10, optimizer="sgd", knots=3, spread=(400, 401)),
    ],
    ids=["cnn", "transformer", "strided", "mlp"],
)
def test_checkpoints_come_back_without_pickles(net: Classifier, tmp_path: Path) -> None:
    run = trainer(max_steps=2, limit_val_batches=0, default_root_dir=tmp_path, enable_checkpointing=True)
    run.fit(net, FashionMNISTData())
    path = tmp_path / "model.ckpt"
    run.save_checkpoint(path)
    back = type(net).load_from_checkpoint(path, weights_only=True, map_location="cpu").eval()
    assert dict(back.hparams) == dict(net.hparams)
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(back(x), net.eval()(x))


def test_hyperparameters_are_those_of_the_model() -> None:
    assert dict(MLP(4, hidden=[3]).hparams) == {
        "in_features": 4, "hidden": [3], "num_classes": 2, "dropout": 0.0, "lr": 2e-3, "weight_decay": 0.01,
        "schedule": "constant", "optimizer": "adamw", "knots": 0, "spread": (),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["cnn", "transformer", "mlp"])
def test_the_optimizer_is_the_stated_one(name: str) -> None:
    adam = make(name, lr=0.3, weight_decay=0.2).configure_optimizers()
    assert type(adam) is torch.optim.AdamW
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.3, 0.2)
    sgd = make(name, lr=0.3, weight_decay=0.2, optimizer="sgd").configure_optimizers()
    assert type(sgd) is torch.optim.SGD
    stated = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.2, "nesterov": False}
    assert {option: sgd.defaults[option] for option in stated} == stated


def test_sgd_steps_are_the_formula() -> None:
    """``v = 0.9 v + g``, ``w = w - lr v``, and half the first step size at the middle of a cosine."""
    net = MLP(2, hidden=[], lr=0.5, weight_decay=0.0, schedule="cosine", optimizer="sgd")
    before, data = net.layers[0].weight.detach().double(), (torch.tensor([[1.0, 2.0]]), torch.tensor([1]))
    bias = net.layers[0].bias.detach().double()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data))
    trainer(max_steps=2, limit_val_batches=0).fit(net, loader)
    x, velocity = data[0][0].double(), 0.0
    for lr in (0.5, 0.25):
        slope = torch.sigmoid(before[0] @ x + bias[0]) - 1
        velocity = 0.9 * velocity + slope
        before, bias = before - lr * velocity * x, bias - lr * velocity
    torch.testing.assert_close(net.layers[0].weight.detach().double(), before, rtol=1e-5, atol=0)


def test_hats_are_an_interpolation() -> None:
    x, heights = torch.rand(200), torch.randn(7)
    values = hats(x, 7)
    assert values.shape == (200, 7)
    assert ((values > 0).sum(dim=1) <= 2).all()
    torch.testing.assert_close(values.sum(dim=1), torch.ones(200))
    expected = np.interp(x.numpy(), np.linspace(0, 1, 7), heights.numpy())
    torch.testing.assert_close(values @ heights, torch.from_numpy(expected).float(), atol=1e-5, rtol=0)
    assert torch.equal(hats(torch.linspace(0, 1, 7), 7).round(decimals=5), torch.eye(7))


def test_knots_bend_a_linear_model_and_leave_the_rest_alone() -> None:
    net = MLP(3, hidden=[], knots=5, spread=[2])
    assert net.layers[0].weight.shape == (1, 8)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]]))  # a roof over column 2
        net.layers[0].bias.zero_()
    x = torch.tensor([[7.0, 5.0, 0.25], [7.0, 5.0, 0.5], [7.0, 5.0, 0.625]])
    assert net(x).tolist() == [7.0, 8.0, 7.5]
    assert set(MLP(3, hidden=[4], knots=5, spread=[0, 1]).state_dict()) == set(MLP(3, hidden=[4]).state_dict())


def test_rows_with_knots_do_not_see_each_other() -> None:
    net, x = MLP(4, knots=6, spread=[1, 3]), torch.rand(5, 4)
    torch.testing.assert_close(net(x)[1:2], net(x[1:2]))
    assert net(x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: SmallCNN(width=12), "width=12 must be a positive multiple of 8"),
        (lambda: SmallCNN(image_size=3), "image_size=3 must be at least 4"),
        (lambda: StridedCNN(image_size=3), "image_size=3 must be at least 4"),
        (lambda: SmallCNN(num_classes=1), "num_classes=1 must be at least 2"),
        (lambda: SmallCNN(schedule="linear"), "schedule='linear' must be one of"),  # type: ignore[arg-type]
        (lambda: MLP(4, optimizer="adam"), "optimizer='adam' must be one of"),  # type: ignore[arg-type]
        (lambda: MLP(4, knots=4), r"knots=4 must be at least 2 where spread=\[\] names columns"),
        (lambda: MLP(4, spread=[1]), r"knots=0 must be at least 2 where spread=\[1\]"),
        (lambda: MLP(4, knots=1, spread=[1]), "knots=1 must be at least 2"),
        (lambda: MLP(4, knots=4, spread=[1, 4]), r"spread=\[1, 4\] must be different columns from 0 to 3"),
        (lambda: MLP(4, knots=4, spread=[1, 1]), r"spread=\[1, 1\] must be different columns"),
        (lambda: SmallTransformer(patch_size=5), "patch_size=5 must divide image_size=28"),
        (lambda: SmallTransformer(heads=3), "heads=3 must divide dim=64"),
        (lambda: MLP(106)(torch.zeros(2, 104)), "in_features=106 must be 104"),
    ],
)
def test_wrong_options_say_what_would_be_right(wrong: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()


def test_cosine_without_an_end_is_refused() -> None:
    run = trainer(max_epochs=-1, limit_val_batches=0)
    with pytest.raises(ValueError, match="schedule='cosine' needs the end of the training; set max_epochs"):
        run.fit(MLP(104, schedule="cosine"), AdultData())
