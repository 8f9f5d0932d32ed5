"""Grids, learned steps and quantised layers, against loops by hand, autograd and torch's own kernels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_guard.functional.quantization import (
    FakeQuantization,
    StepLearner,
    activation_grid,
    anew,
    batch_norms,
    chosen_layers,
    fake_quantize,
    fake_quantize_input,
    fake_quantized,
    fitted_range,
    fitted_step,
    lsq,
    quantizable,
    ranges_by_layer,
    snapped,
    weight_grid,
    weight_scale,
)

SHAPES = [(7, 40), (5, 3, 3, 3), (4, 2, 5), (6, 2, 2, 2, 2)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Grids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_weight_grid_is_the_loop_by_hand(bits, shape, axis):
    weight = drawn(*shape)
    codes, scale = weight_grid(weight, bits, axis)
    largest = 2 ** (bits - 1) - 1
    for channel in range(shape[axis]):
        values = weight.select(axis, channel).double()
        step = values.abs().max() / largest
        assert scale[channel].double() == pytest.approx(step.item(), rel=2**-17)
        expected = [round(v) for v in (values / scale[channel].double()).flatten().tolist()]
        assert codes.select(axis, channel).flatten().tolist() == expected
        assert codes.select(axis, channel).abs().max() == largest  # so the largest weight tells the step
    assert (snapped(weight, scale, bits, axis) - weight).abs().max() <= 0.51 * scale.max()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_on_a_grid_give_back_step_and_codes_to_the_bit(bits):
    for seed in range(50):
        weight = drawn(64, 30, seed=seed) * 10.0 ** (seed % 13 - 6)
        codes, scale = weight_grid(weight, bits)
        on = fake_quantize(weight, bits)
        assert torch.equal(on, codes * scale[:, None])
        assert torch.equal(on.double(), codes.double() * scale.double()[:, None])  # the product is exact
        again, same = weight_grid(on, bits)
        assert torch.equal(again, codes)
        assert torch.equal(same, scale)
        largest = 2 ** (bits - 1) - 1
        assert torch.equal(on.abs().amax(1) / largest, scale)  # as an exporter computes it
        assert torch.equal((on / (on.abs().amax(1, keepdim=True) / largest)).round().to(torch.int8), codes)


def test_steps_without_rounding_would_not_come_back():
    """A positive control: why steps have 17 bits."""
    lost = 0
    for seed in range(50):
        weight = drawn(64, 30, seed=seed)
        step = weight.abs().amax(1, keepdim=True) / 127
        on = (weight / step).round() * step
        lost += int((on.double() != (weight / step).round().double() * step.double()).sum())
    assert lost > 0


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[1e-42, 0.0]], [[1e-38, -1e-38]], [[3e38, -1e38]]])
def test_extreme_channels(values):
    weight = torch.tensor(values)
    on = fake_quantize(weight)
    assert torch.isfinite(on).all()
    assert (on - weight).abs().max() <= 0.01 * weight.abs().max() + 1e-38
    assert (on[weight == 0] == 0).all()


def test_a_vector_is_quantised_number_by_number():
    assert weight_grid(torch.tensor([1.0, -2.0]))[0].tolist() == [127, -127]


@pytest.mark.parametrize("bits", [1, 9, 0])
def test_bits_that_are_none_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits={bits}"):
        weight_scale(torch.ones(2, 2), bits)
    with pytest.raises(ValueError, match=f"bits={bits}"):
        activation_grid(torch.tensor(0.0), torch.tensor(1.0), bits)


def test_zeros_stay_zeros():
    weight = drawn(9, 50) * (drawn(9, 50, seed=1) > 0)
    assert torch.equal(weight_grid(weight)[0][weight == 0], torch.zeros(int((weight == 0).sum()), dtype=torch.int8))
    step = fitted_step(weight, -7, 7)
    assert (lsq(weight, step, -7, 7, axis=0)[weight == 0] == 0).all()


def test_weights_agree_with_torchs_kernel():
    weight = drawn(16, 3, 5, 5)
    scale = weight_scale(weight)
    theirs = torch.fake_quantize_per_channel_affine(weight, scale, torch.zeros(16, dtype=torch.int32), 0, -127, 127)
    torch.testing.assert_close(fake_quantize(weight), theirs)


@pytest.mark.parametrize("bits", [3, 8])
def test_inputs_agree_with_torchs_kernel(bits):
    x = (drawn(1000) * 3).requires_grad_()
    scale, zero = activation_grid(torch.tensor(-1.0), torch.tensor(2.0), bits)
    ours = fake_quantize_input(x, scale, zero, bits)
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), 0, 2**bits - 1)
    torch.testing.assert_close(ours, theirs)
    assert ours.detach().unique().numel() <= 2**bits


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 3.0), (0.5, 3.0), (-2.0, -1.0), (0.0, 0.0)])
def test_zero_is_a_point_of_every_range(low, high):
    scale, zero = activation_grid(torch.tensor(low), torch.tensor(high))
    assert zero == zero.round()
    assert 0 <= zero <= 255
    assert fake_quantize_input(torch.zeros(3), scale, zero).eq(0).all()
    for end in (min(low, 0.0), max(high, 0.0)):
        assert fake_quantize_input(torch.tensor(end), scale, zero).item() == pytest.approx(end, abs=0.51 * scale.item())


# Gradients --------------------------------------------------------------------------------------------------------


def test_the_gradient_of_weights_is_straight_through():
    weight, out = drawn(5, 9).requires_grad_(), drawn(5, 9, seed=1)
    (ours,) = torch.autograd.grad(fake_quantize(weight, 4), weight, out)
    by_hand = weight + (weight.detach().div(weight_scale(weight, 4)[:, None]).round() * weight_scale(weight, 4)[:, None]
                        - weight.detach())  # fmt: skip
    (theirs,) = torch.autograd.grad(by_hand, weight, out)
    assert torch.equal(ours, theirs)


def test_the_gradient_of_inputs_stops_where_they_are_clipped():
    x, out = (drawn(500) * 2).requires_grad_(), drawn(500, seed=1)
    scale, zero = activation_grid(torch.tensor(-1.0), torch.tensor(2.0), 4)
    (ours,) = torch.autograd.grad(fake_quantize_input(x, scale, zero, 4), x, out)
    clipped = x.clamp(-zero * scale, (15 - zero) * scale)
    by_hand = clipped + (fake_quantize_input(x.detach(), scale, zero, 4) - clipped.detach())
    (theirs,) = torch.autograd.grad(by_hand, x, out)
    assert torch.equal(ours, theirs)
    assert 0 < (ours == 0).sum() < 500


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("unsigned", [False, True])
def test_lsq_has_the_gradients_of_the_paper(axis, unsigned):
    x = (drawn(6, 30).double() * 2).requires_grad_()
    count = 1 if axis is None else x.shape[axis]
    step = (0.1 + 0.3 * torch.rand(count, dtype=torch.double, generator=torch.Generator().manual_seed(0))).squeeze()
    step.requires_grad_()
    low, high, zero = (0, 15, torch.tensor(4.0, dtype=torch.double)) if unsigned else (-7, 7, None)
    out = drawn(6, 30, seed=1).double()
    by_value, by_step = torch.autograd.grad(lsq(x, step, low, high, zero, axis), (x, step), out)
    bottom, top = (low - 4, high - 4) if unsigned else (low, high)
    expected_step, expected_value = [0.0] * count, torch.zeros_like(x)
    for i in range(6):
        for j in range(30):
            channel = 0 if axis is None else (i, j)[axis]
            v = (x[i, j] / step.reshape(-1)[channel]).item()
            if v <= bottom:
                slope = bottom
            elif v >= top:
                slope = top
            else:
                slope = round(v) - v
                expected_value[i, j] = out[i, j]
            expected_step[channel] += out[i, j].item() * slope
    scale = (x.numel() / count * high) ** -0.5
    assert torch.equal(by_value, expected_value)
    torch.testing.assert_close(by_step.reshape(-1), scale * torch.tensor(expected_step, dtype=torch.double))


def test_a_fitted_step_loses_least():
    weight = drawn(8, 200)
    step = fitted_step(weight, -7, 7)

    def loss(steps):
        return ((weight / steps[:, None]).round().clamp(-7, 7) * steps[:, None] - weight).square().sum(1)

    assert (loss(step) < loss(weight.abs().amax(1) / 7)).all()
    tried = torch.stack([loss(weight.abs().amax(1) / 7 * f) for f in torch.linspace(0.05, 1, 400)])
    assert (loss(step) <= 1.1 * tried.amin(0)).all()
    transposed = fitted_step(weight.T.contiguous(), -7, 7, axis=1)
    assert torch.equal(step, transposed)
    assert fitted_step(torch.zeros(2, 3), -7, 7).tolist() == [1.0, 1.0]


def test_a_fitted_range_clips_rare_values():
    x = torch.cat([drawn(10000), torch.tensor([40.0])])
    low, high = fitted_range(x, 4)
    assert high < 20
    assert low < 0
    low, high = fitted_range(x.clamp(0, 3), 8)
    assert low == 0
    assert high == pytest.approx(3.0, rel=0.06)


def test_learning_steps_goes_downhill():
    weight = drawn(4, 500)
    logs = [(weight.abs().amax(1) / 3).log().requires_grad_()]  # 3 bits: the range of all is far too wide
    learner = StepLearner(logs, 0.02)
    losses = []
    for i in range(200):
        loss = (lsq(weight, logs[0].exp(), -3, 3, axis=0) - weight).square().sum()
        loss.backward()
        losses.append(loss.item())
        learner.update(1 - i / 200)
    best = fitted_step(weight, -3, 3)
    least = (lsq(weight, best, -3, 3, axis=0) - weight).square().sum().item()
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] < 1.05 * least
    assert logs[0].grad is None


# Layers -----------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), lambda: (drawn(3, 6),)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="circular"), lambda: (drawn(2, 4, 8),)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding="valid"), lambda: (drawn(2, 3, 8, 8),)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), lambda: (drawn(2, 2, 4, 4, 4),)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3), lambda: (drawn(2, 3, 5),)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        lambda: (drawn(2, 4, 5, 5),),
    ),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: (drawn(2, 2, 3, 3, 3),)),
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=0), lambda: (torch.tensor([[0, 3], [6, 2]]),)),
    "bag": (lambda: nn.EmbeddingBag(7, 5, mode="mean"), lambda: (torch.tensor([[1, 3], [6, 2]]),)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_compute_with_rounded_weights_and_inputs(kind):
    make, given = LAYERS[kind]
    torch.manual_seed(0)
    layer, args = make(), given()
    by_hand = copy.deepcopy(layer)
    axis = 1 if "transposed" in kind else 0
    with torch.no_grad():
        by_hand.weight.copy_(fake_quantize(layer.weight, 4, axis))
    embeds = kind in ("embedding", "bag")
    rounded = args if embeds else (fake_quantize_input(*args, *activation_grid(torch.tensor(-1.5), torch.tensor(1.0))),)
    expected = by_hand(*rounded)
    before, parameter = layer(*args), layer.weight
    with fake_quantized(layer, {"": (-1.5, 1.0)}, bits=4):
        out = layer(*args)
        named = layer(input=args[0])
        assert "weight" not in vars(layer)
    assert torch.equal(out, expected)
    assert torch.equal(named, expected)
    assert torch.equal(layer(*args), before)
    assert not torch.equal(out, before)
    assert layer.weight is parameter
    assert "forward" not in vars(layer)
    probe = drawn(*out.shape, seed=3)
    (ours,) = torch.autograd.grad(out, layer.weight, probe)
    (theirs,) = torch.autograd.grad(expected, by_hand.weight, probe)
    torch.testing.assert_close(ours, theirs)  # straight through


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}])
def test_attention_computes_with_rounded_projections(sizes):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **sizes).eval()
    q, k, v = drawn(2, 3, 8), drawn(2, 5, sizes.get("kdim", 8), seed=1), drawn(2, 5, sizes.get("vdim", 8), seed=2)
    found = quantizable(nn.ModuleDict({"a": layer, "b": nn.Linear(2, 2)}))
    assert list(found) == ["a", "b"]
    by_hand = copy.deepcopy(layer)
    with torch.no_grad():
        for slot in quantizable(by_hand)[""].slots:
            slot.weight.copy_(fake_quantize(slot.weight, 3))
    grid = activation_grid(torch.tensor(-1.0), torch.tensor(2.0))
    expected = by_hand(*(fake_quantize_input(x, *grid) for x in (q, k, v)), need_weights=False)[0]
    with torch.no_grad(), fake_quantized(layer, {"": (-1.0, 2.0)}, bits=3):
        torch.testing.assert_close(layer(q, k, value=v, need_weights=False)[0], expected)
    names = [slot.name for slot in quantizable(layer)[""].slots]
    assert names[-1] == "out_proj.weight"
    assert all(layer.get_parameter(name) is not None for name in names)


def test_the_fast_path_of_a_transformer_does_not_go_around():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    by_hand, x = copy.deepcopy(net), drawn(2, 5, 8)
    for layer in quantizable(by_hand).values():
        for slot in layer.slots:
            slot.weight.data.copy_(fake_quantize(slot.weight, 3))
    with torch.no_grad():
        expected, before = by_hand(x), net(x)
        with fake_quantized(net, bits=3):
            out = net(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.1
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_keeps_knowing_that_its_arguments_are_one():
    layer, seen = nn.MultiheadAttention(4, 1), []
    quantization = FakeQuantization(list(quantizable(layer).values()))
    quantization.on = True
    quantization._take({0: (-1.0, 1.0)})
    around = quantization.around(quantization.layers[0], lambda q, k, v: seen.append((q is k, k is v)))
    x = drawn(3, 2, 4)
    around(x, x, x)
    around(x, x, drawn(3, 2, 4, seed=1))
    assert seen == [(True, True), (True, False)]


def test_an_exception_leaves_the_layer_as_it_was():
    layer = nn.Linear(3, 2)
    before = set(vars(layer))
    with pytest.raises(RuntimeError), fake_quantized(layer, {"": (0.0, 1.0)}):
        layer(torch.zeros(1, 5))
    assert set(vars(layer)) == before


def test_observation_is_a_moving_average_of_steps_not_of_batches():
    layer = nn.Linear(2, 2)
    quantization = FakeQuantization(list(quantizable(layer).values()))
    quantization.on = quantization.observing = True
    run = quantization.around(quantization.layers[0], layer.forward)
    for x in (-1.0, 3.0):  # two micro-batches of one step
        given = torch.full((1, 2), x)
        assert torch.equal(run(given), F.linear(given, fake_quantize(layer.weight), layer.bias))
    assert quantization.ranges == {}
    quantization.take_observations(0.25)
    assert quantization.ranges == {"": (-1.0, 3.0)}
    run(torch.tensor([[1.0, 7.0]]))
    quantization.take_observations(0.25)
    assert quantization.ranges == {"": (-0.5, 4.0)}
    quantization.observing = False
    run(torch.tensor([[100.0, 7.0]]))
    quantization.take_observations(0.25)  # nothing was seen
    assert quantization.ranges == {"": (-0.5, 4.0)}
    quantization.observing = True
    run(torch.tensor([[float("inf"), 7.0]]))
    quantization.take_observations(0.25)
    assert quantization.ranges == {"": (-0.5, 4.0)}


def test_a_layer_with_no_rows_is_not_observed():
    layer = nn.Linear(2, 2)
    quantization = FakeQuantization(list(quantizable(layer).values()))
    quantization.on = quantization.observing = True
    assert quantization.around(quantization.layers[0], layer.forward)(torch.zeros(0, 2)).shape == (0, 2)
    quantization.take_observations(0.1)
    assert quantization.ranges == {}


@pytest.mark.parametrize(("backend", "learned"), [("eager", True), ("aot_eager", False)])
def test_compiled_layers_compute_the_same(backend, learned):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    x = drawn(5, 1, 4, 4)
    quantization = FakeQuantization(list(quantizable(net).values()), learned=learned)
    quantization.on = quantization.observing = True
    if learned:
        quantization.begin_learning()
    for layer in quantization.layers:
        layer.module.forward = quantization.around(layer, layer.module.forward)
    net(x)
    quantization.take_observations(1.0)
    outs = []
    for call in (net, torch.compile(net, backend=backend, fullgraph=True)):
        out = call(x)
        outs.append([out, *torch.autograd.grad(out.sum(), list(net.parameters()))])
    for ours, theirs in zip(*outs, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_inputs_and_double_weights():
    layer = nn.Linear(4, 2)
    with fake_quantized(layer, {"": (0.0, 1.0)}), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.rand(3, 4)).dtype == torch.bfloat16
    layer = layer.double()
    with fake_quantized(layer, {"": (0.0, 1.0)}):
        assert layer(torch.rand(3, 4, dtype=torch.double)).dtype == torch.double


def test_choices_by_name_and_pattern():
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Conv1d(2, 2, 1), "d": nn.Embedding(2, 2)})
    for targets, ignore, names in [(None, (), "abcd"), (["a", "c"], (), "ac"), (["[a-c]"], ["b"], "ac")]:
        assert "".join(layer.name for layer in chosen_layers(net, targets, ignore)) == names
    with pytest.raises(ValueError, match="no layer is left"):
        chosen_layers(net, ignore=["*"])
    assert [layer.name for layer in chosen_layers(net, without=[net["a"], net["c"]])] == ["b", "d"]
    with pytest.raises(ValueError, match=r"ignore='x\*' matches nothing.*there are a, b, c, d"):
        chosen_layers(net, ignore=["x*"])
    layers = chosen_layers(net)
    assert ranges_by_layer(layers, (0.0, 1.0)) == dict.fromkeys("abc", (0.0, 1.0))
    with pytest.raises(ValueError, match="no pair for the inputs of b, c"):
        ranges_by_layer(layers, {"a": (0.0, 1.0)})
    with pytest.raises(ValueError, match="'d' names no layer whose inputs are rounded"):
        ranges_by_layer(layers, {"*": (0.0, 1.0), "d": (0.0, 1.0)})


def test_a_weight_that_others_hold_is_left_alone():
    net = nn.ModuleDict({"a": nn.Embedding(3, 2), "b": nn.Linear(2, 3, bias=False), "c": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    assert [layer.name for layer in chosen_layers(net)] == ["a", "b", "c"]
    assert [layer.name for layer in chosen_layers(net, ignore=["b"])] == ["c"]
    net["other"] = nn.LSTM(2, 1)
    net["other"].weight_ih_l0 = nn.Parameter(net["c"].weight.data)
    net["c"].weight = net["other"].weight_ih_l0
    assert [layer.name for layer in chosen_layers(net)] == ["a", "b"]


# BatchNorm --------------------------------------------------------------------------------------------------------


def test_statistics_anew_are_the_average_over_the_passes():
    norm, idle = nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm1d(2)
    idle(drawn(8, 2))
    kept = idle.running_mean.clone()
    norm(drawn(4, 3, 5, 5))
    batches = [drawn(4, 3, 5, 5, seed=s) * (s + 1) for s in range(3)]
    norm.eval()
    with anew([norm, idle]), torch.no_grad():
        for x in batches:
            norm(x)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert (norm.momentum, norm.training, int(norm.num_batches_tracked)) == (0.3, False, 1)
    assert torch.equal(idle.running_mean, kept)
    assert batch_norms(nn.ModuleList([norm, idle, nn.BatchNorm1d(2, track_running_stats=False)])) == [idle]


def test_folding_batch_norm_keeps_the_codes():
    """So BatchNorm is trained unfolded: quantising then folding is folding then quantising."""
    conv, norm = nn.Conv2d(4, 16, 3, bias=False), nn.BatchNorm2d(16)
    with torch.no_grad():
        norm.weight.copy_(drawn(16))  # negative ones too
        norm.running_var.copy_(drawn(16, seed=1).abs() + 0.1)
        conv.weight.copy_(fake_quantize(drawn(16, 4, 3, 3, seed=2)))
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    codes, scale = weight_grid(conv.weight)
    folded, folded_scale = weight_grid(conv.weight * factor[:, None, None, None])
    assert torch.equal(folded.int(), codes.int() * factor.sign().int()[:, None, None, None])
    torch.testing.assert_close(folded_scale, scale * factor.abs(), rtol=2**-16, atol=0)
    per_tensor = (conv.weight / conv.weight.abs().max() * 127).round()  # a positive control
    other = conv.weight * factor[:, None, None, None]
    assert not torch.equal((other / other.abs().max() * 127).round().abs(), per_tensor.abs())
