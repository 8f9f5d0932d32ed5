"""Divergences, margins and moved weights against brute force."""

import pytest
import torch
from torch import nn

from lightning_guard.functional.collapse import Collapse
from lightning_guard.functional.embeddings import embedded, shifted
from lightning_guard.functional.replays import ascended, carried
from lightning_guard.functional.robust_losses import divergence, hits, mart_terms
from lightning_guard.functional.weight_perturbation import Elsewhere, buffers_kept, worst_weights


def brute(clean, moved):
    """KL of two categorical laws, term by term in double."""
    p, q = clean.double().softmax(1), moved.double().softmax(1)
    return (p * (p / q).log()).sum(1)


def pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 3, torch.randn(shape, generator=generator) * 3


def test_divergence_is_kl():
    clean, moved = pair(8, 5)
    y = torch.arange(8) % 5
    torch.testing.assert_close(divergence(clean, moved, y).double(), brute(clean, moved), rtol=1e-5, atol=1e-6)
    assert torch.equal(divergence(clean, clean, y), torch.zeros(8))
    assert not torch.allclose(divergence(clean, moved, y), divergence(moved, clean, y))  # the order matters


def test_one_logit_is_two_classes_and_labels_add_up():
    clean, moved = pair(8)
    y = torch.arange(8) % 2
    two = brute(torch.stack([0 * clean, clean], 1), torch.stack([0 * moved, moved], 1)).float()
    torch.testing.assert_close(divergence(clean, moved, y), two)
    torch.testing.assert_close(divergence(clean[:, None], moved[:, None], y), two)
    labels = divergence(clean.reshape(4, 2), moved.reshape(4, 2), torch.ones(4, 2))
    torch.testing.assert_close(labels, two.reshape(4, 2).sum(1))


def test_places_add_up():
    clean, moved = pair(2, 3, 4)
    y = torch.zeros(2, 4, dtype=torch.long)
    torch.testing.assert_close(divergence(clean, moved, y), brute(clean, moved).sum(1).float())
    assert hits(clean, clean.argmax(1)).tolist() == [1.0, 1.0]


def test_sure_predictions_stay_finite():
    clean, moved = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]])
    for logits, other, y in ((clean, moved, torch.tensor([0])), (clean[:, 0], moved[:, 0], torch.tensor([1]))):
        other = other.clone().requires_grad_()
        apart = divergence(logits, other, y)
        apart.sum().backward()
        assert apart.item() == pytest.approx(400 if logits.dim() == 2 else 200)
        assert other.grad.isfinite().all()
        margin, weighted = mart_terms(logits, other, y)
        assert margin.isfinite().all()
        assert weighted.isfinite().all()
    assert divergence(clean.half(), moved.half(), torch.tensor([0])).dtype == torch.float32


def test_mart_terms_are_the_papers():
    clean, moved = pair(16, 4)
    y = torch.arange(16) % 4
    p, natural, rows = moved.double().softmax(1), clean.double().softmax(1), torch.arange(16)
    others = torch.stack([p[:, k].where(y != k, torch.zeros(16).double()) for k in range(4)], 1)
    margin, weighted = mart_terms(clean, moved, y)
    torch.testing.assert_close(margin.double(), -(1 - others.amax(1)).log(), rtol=1e-4, atol=1e-5)
    expected = brute(clean, moved) * (1 - natural[rows, y])
    torch.testing.assert_close(weighted.double(), expected, rtol=1e-4, atol=1e-5)
    one, two = mart_terms(clean[:, 0], moved[:, 0], y % 2)
    signs = 2.0 * (y % 2) - 1
    torch.testing.assert_close(one, nn.functional.softplus(-signs * moved[:, 0]))
    assert (two >= 0).all()


@pytest.mark.parametrize(
    ("clean", "target", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), "no divergence"),
        (torch.zeros(4, 1), torch.arange(4.0), r"range over \[0, 3\]"),
        (torch.zeros(4, 3), None, "cannot be compared"),
    ],
)
def test_what_has_no_divergence_is_refused(clean, target, message):
    other = clean if target is not None else clean[:, :2]
    with pytest.raises(ValueError, match=message):
        divergence(clean, other, torch.zeros(4) if target is None else target)


def test_squares_need_no_target():
    clean, moved = pair(4, 2)
    expected = ((clean - moved) ** 2).sum(1)
    torch.testing.assert_close(divergence(clean, moved, torch.full((4,), 7.0), "squared"), expected)


def test_hits_count_decisions():
    assert hits(torch.tensor([1.0, -1.0, 2.0]), torch.tensor([1, 1, 0])).tolist() == [1.0, 0.0, 0.0]
    assert hits(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 1.0]])).tolist() == [0.5]
    with pytest.raises(ValueError, match="no classification"):
        hits(torch.zeros(3), torch.arange(3.0))


def test_moves_are_shares_of_their_layer():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 3, generator=generator), torch.randn(2, 2, generator=generator) * 100]
    gradients = [torch.randn(4, 3, generator=generator) * 1e-30, torch.randn(2, 2, generator=generator)]
    for weight, gradient, move in zip(weights, gradients, worst_weights(weights, gradients, 0.1), strict=True):
        torch.testing.assert_close(move.norm(), 0.1 * weight.norm())
        torch.testing.assert_close(move / move.norm(), (gradient.double() / gradient.double().norm()).float())
    still = worst_weights(weights, [None, torch.zeros(2, 2)], 0.1)
    assert all(not move.any() for move in still)


def test_moved_weights_come_back_bit_for_bit():
    weight = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    was, away = weight.clone(), Elsewhere()
    away.move([weight], [torch.full_like(weight, 1e-3)])
    away.move([weight], [torch.full_like(weight, 1e-3)])  # a second move starts from the original
    torch.testing.assert_close(weight, was + 1e-3)
    stored = {"weight": weight.detach(), "other": torch.ones(1)}
    away.originals(stored)
    assert torch.equal(stored["weight"], was)
    away.back()
    assert torch.equal(weight, was)
    assert not torch.equal((was + 1e-3) - 1e-3, was)  # subtracting would not have done


def test_buffers_are_kept_through_training_passes():
    norm = nn.BatchNorm1d(3)
    with buffers_kept(norm):
        norm(torch.rand(4, 3))
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))


def test_perturbations_are_carried_by_rows_and_shapes():
    delta = torch.ones(4, 2)
    assert carried(delta, torch.zeros(2, 2)).sum() == 4
    assert carried(delta, torch.zeros(6, 2)).sum() == 8
    assert carried(delta, torch.zeros(4, 3)).sum() == 0
    assert carried(None, torch.zeros(4, 3)).sum() == 0


def test_an_overflown_gradient_is_no_nan():
    from lightning_guard.functional import ThreatModel

    x, gradient = torch.zeros(1, 3), torch.tensor([[torch.nan, torch.inf, -torch.inf]])
    assert ascended(x, x, gradient, ThreatModel(0.5)).tolist() == [[0.0, 0.5, -0.5]]


def test_collapse_is_told_from_getting_worse():
    rule = Collapse()
    assert not rule.sees(0.8, 0.7)
    assert not rule.sees(0.5, 0.4)  # both fell
    assert rule.sees(0.7, 0.45)
    assert Collapse().sees(0.6, 0.1)  # a gap needs no best
    growing = Collapse()
    assert not growing.sees(0.9, 0.8, settled=False)
    assert not growing.sees(0.8, 0.5, settled=False)  # the radius has grown


def test_embeddings_are_shifted_once_and_padding_is_known():
    layer = nn.Embedding(4, 2, padding_idx=0)
    tokens = torch.tensor([[1, 0]])
    output, free = embedded(layer, lambda: layer(tokens))
    assert free.tolist() == [[[True], [False]]]
    assert not output.requires_grad
    with shifted(layer, torch.ones(1, 2, 2)):
        moved = layer(tokens)
    assert torch.equal(moved, output + 1)
    moved.sum().backward()
    assert layer.weight.grad.any()
    with pytest.raises(ValueError, match="was not called"), shifted(layer, torch.ones(1, 2, 2)):
        pass
    with pytest.raises(ValueError, match="in call 2"), shifted(layer, torch.ones(1, 2, 2)):
        _ = [layer(tokens) for _ in range(2)]
    with pytest.raises(ValueError, match="called the embedding 0 times"):
        embedded(layer, lambda: None)
    assert not layer._forward_hooks
