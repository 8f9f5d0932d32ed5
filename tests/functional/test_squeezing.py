"""Feature squeezing against scipy and counting, and hooks that go where the module goes."""

import copy
import pickle

import pytest
import torch
from scipy import ndimage
from torch import nn

from lightning_guard.functional import Squeeze, ThreatModel, pgd, squeeze_inputs, squeezing, unsqueeze
from lightning_guard.functional.squeezing import median


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(2, 1, 7, 9), (1, 3, 5, 5), (2, 2, 1, 3)])
def test_the_median_is_that_of_scipy(window, shape):
    x = images(*shape)
    wanted = ndimage.median_filter(x.numpy(), size=(1, 1, window, window), mode="nearest")
    assert torch.equal(median(x, window), torch.tensor(wanted))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_bits_are_the_nearest_levels(bits):
    levels = torch.linspace(-1, 3, 2**bits, dtype=torch.float64)
    x = 5 * images(300) - 1.5  # some outside the bounds
    wanted = levels[(x[:, None] - levels).abs().argmin(1)]
    found = Squeeze(bits, bounds=(-1.0, 3.0))(x[:, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    assert found.unique().numel() <= 2**bits
    torch.testing.assert_close(Squeeze(bits, bounds=(-1.0, 3.0))(found[:, None])[:, 0], found)


def test_normalised_inputs_are_squeezed_as_what_they_are():
    raw, mean, std = images(2, 3, 6, 6), [0.1, 0.5, 0.9], [0.2, 1.0, 3.0]
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    found = Squeeze(3, 3, mean=mean, std=std)((raw - shift) / scale)
    torch.testing.assert_close(found * scale + shift, Squeeze(3, 3)(raw))


def test_neutral_is_the_same_object():
    x = images(2, 3)
    assert Squeeze()(x) is x
    assert not Squeeze().acts


@pytest.mark.parametrize("window", [2, 3])
def test_the_median_keeps_its_own_gradient(window):
    x, weights = images(2, 1, 5, 5).requires_grad_(), images(2, 1, 5, 5, seed=3)
    (own,) = torch.autograd.grad((Squeeze(None, window)(x) * weights).sum(), x)
    (wanted,) = torch.autograd.grad((median(x, window) * weights).sum(), x)
    assert torch.equal(own, wanted)
    rounded = Squeeze(3)(x.detach()).requires_grad_()
    (both,) = torch.autograd.grad((Squeeze(3, window)(x) * weights).sum(), x)
    (wanted,) = torch.autograd.grad((median(rounded, window) * weights).sum(), rounded)
    assert torch.equal(both, wanted)
    assert torch.autograd.gradcheck(lambda z: median(z, window), (images(1, 1, 4, 4).requires_grad_(),))


def test_the_gradient_of_rounding_is_that_of_the_identity():
    squeeze, x = Squeeze(2), images(2, 1, 5, 5).requires_grad_()
    weights = images(2, 1, 5, 5, seed=3)
    (found,) = torch.autograd.grad((squeeze(x) * weights).sum(), x)
    assert torch.equal(found, weights)
    (second,) = torch.autograd.grad((squeeze(x).square() * weights).sum(), x)
    torch.testing.assert_close(second, 2 * squeeze(x.detach()) * weights)


def test_an_attack_sees_through_rounding_and_not_without_the_gradient():
    """The positive control is the same rounding with its own gradient, which is zero."""
    x, threat = images(200, 4).float(), ThreatModel(0.2, bounds=(0.0, 1.0))
    weight = torch.tensor([1.0, -2.0, 0.5, 1.5])
    bias = (x @ weight).median()
    right = torch.sign(Squeeze(2)(x) @ weight - bias)

    def left(see) -> float:
        moved = pgd(lambda z: -right * (see(z) @ weight - bias), x, threat, 10, random_start=False)
        return (torch.sign(Squeeze(2)(moved) @ weight - bias) == right).float().mean().item()

    assert left(lambda z: (z * 3).round() / 3) == 1.0
    assert left(Squeeze(2)) < 0.7


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 17}, "bits=17"),
        ({"window": 0}, "window=0"),
        ({"bounds": (1.0, 0.0)}, "bounds="),
        ({"std": 0.0}, "std="),
    ],
)
def test_what_is_no_squeezing(options, match):
    with pytest.raises(ValueError, match=match):
        Squeeze(**options)


def test_inputs_that_cannot_be_squeezed():
    with pytest.raises(ValueError, match="int64"):
        Squeeze(2).check(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="outside bounds"):
        Squeeze(2).check(torch.full((2, 3), 1.5))
    with pytest.raises(ValueError, match="needs images"):
        Squeeze(window=3).check(torch.zeros(2, 3))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_module_squeezes_and_so_do_its_copies():
    module, x = network(), images(6, 4).float()
    plain, wanted, keys = module(x), module(Squeeze(1)(x)), list(module.state_dict())
    squeeze_inputs(module, Squeeze(3))
    squeeze_inputs(module, Squeeze(1))  # replaces the first
    assert squeezing(module) == Squeeze(1)
    assert len(module._forward_pre_hooks) == 1
    again = pickle.loads(pickle.dumps(module))  # noqa: S301  our own bytes
    for one in (module, copy.deepcopy(module), again):
        assert torch.equal(one(x), wanted)
        assert list(one.state_dict()) == keys
        assert unsqueeze(one) == Squeeze(1)
        assert torch.equal(one(x), plain)
        assert unsqueeze(one) is None


def test_other_hooks_stay():
    module, seen = network(), []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    squeeze_inputs(module, Squeeze(1))
    unsqueeze(module)
    module(torch.rand(1, 4))
    assert len(seen) == 1


@pytest.mark.parametrize("call", [lambda m: m(input=torch.rand(1, 4)), lambda m: m(torch.zeros(1, 4).long())])
def test_a_call_that_cannot_be_squeezed_is_refused(call):
    module = network()
    squeeze_inputs(module, Squeeze(1))
    with pytest.raises(ValueError, match="squeezes its inputs"):
        call(module)


def test_it_exports_with_the_module():
    module, x = network().eval(), images(2, 4).float()
    squeeze_inputs(module, Squeeze(1))
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), module(x))
    assert not torch.equal(exported(x), network()(x))
