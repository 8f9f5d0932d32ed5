"""Distances to a teacher against sums written by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_guard.functional.distillation import (
    distillation_losses,
    feature_losses,
    hits_and_counts,
    output_losses,
)


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def softened(row, temperature):
    powers = [math.exp(z / temperature) for z in row]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_softmax_divergence_is_the_sum_by_hand(temperature):
    student, teacher = pair(5, 4)
    found = distillation_losses(student, teacher, temperature)
    for s, t, loss in zip(student.tolist(), teacher.tolist(), found.tolist(), strict=True):
        q, p = softened(s, temperature), softened(t, temperature)
        by_hand = temperature**2 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
        assert loss == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_sigmoid_divergence_is_the_sum_by_hand(shape):
    student, teacher = pair(*shape)
    found = distillation_losses(student, teacher, 2.0)
    for s, t, loss in zip(student.flatten().tolist(), teacher.flatten().tolist(), found.tolist(), strict=True):
        q, p = softened([s, 0.0], 2.0), softened([t, 0.0], 2.0)
        assert loss == pytest.approx(4 * sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)), rel=1e-9)


def test_labels_are_so_many_sigmoids():
    student, teacher = pair(5, 3)
    columns = [distillation_losses(student[:, i], teacher[:, i], 3.0) for i in range(3)]
    torch.testing.assert_close(distillation_losses(student, teacher, 3.0, multilabel=True), sum(columns))


def test_places_are_summed():
    student, teacher = pair(2, 4, 3, 3)
    places = [distillation_losses(student[..., i, j], teacher[..., i, j], 2.0) for i in range(3) for j in range(3)]
    torch.testing.assert_close(distillation_losses(student, teacher, 2.0), sum(places))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_the_paper(temperature):
    student, teacher = pair(6, 5)
    student.requires_grad_(), teacher.requires_grad_()
    distillation_losses(student, teacher, temperature).sum().backward()
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1))
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_a_perfect_student_has_no_loss_and_no_gradient():
    student = pair(4, 3)[0].requires_grad_()
    losses = distillation_losses(student, student.detach().clone(), 4.0)
    losses.sum().backward()
    assert losses.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12


def test_high_temperature_is_the_squared_distance_of_centred_logits():
    student, teacher = pair(4, 3)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = centred.square().sum(1) / (2 * 3)
    torch.testing.assert_close(distillation_losses(student, teacher, 1e4), limit, rtol=1e-3, atol=0)


def test_half_precision_is_computed_wide():
    student, teacher = (one.bfloat16() for one in pair(4, 3))
    found = distillation_losses(student, teacher, 2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distillation_losses(student.float(), teacher.float(), 2.0))


@pytest.mark.parametrize("function", [distillation_losses, feature_losses, output_losses])
def test_other_shapes_are_refused(function):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        function(torch.zeros(2, 3), torch.zeros(2, 4))


def test_no_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature=0"):
        distillation_losses(torch.zeros(2, 3), torch.zeros(2, 3), 0)


def test_features_are_compared_by_their_angle():
    student, teacher = pair(6, 2, 3)
    cosine = F.cosine_similarity(student.flatten(1), teacher.flatten(1))
    torch.testing.assert_close(feature_losses(student, teacher), 2 - 2 * cosine)
    torch.testing.assert_close(feature_losses(5 * student, 0.1 * teacher), 2 - 2 * cosine)
    assert feature_losses(student, 7 * student).abs().max() < 1e-12


def test_outputs_are_compared_as_they_are():
    student, teacher = pair(6, 2)
    by_hand = [
        sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 2
        for s, t in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert output_losses(student, teacher).tolist() == pytest.approx(by_hand)


def test_counting_classes_labels_and_logits():
    logits, target = pair(50, 4)[0], torch.arange(50) % 3
    target[7] = -100
    hits, counts = hits_and_counts(logits, target)
    known = [i for i in range(50) if i != 7]
    assert hits == sum(int(logits[i].argmax() == target[i]) for i in known)
    assert counts.tolist() == [[sum(int(target[i] == c) for i in known) for c in range(4)]]
    single, label = logits[:, 0], (logits[:, 1] > 0).float()
    hits, counts = hits_and_counts(single, label)
    assert hits == sum(int((single[i] > 0) == (label[i] > 0.5)) for i in range(50))
    assert counts.tolist() == [[50 - int(label.sum()), int(label.sum())]]
    labels = (pair(50, 4, seed=1)[0] > 0).double()
    hits, counts = hits_and_counts(logits, labels)
    assert hits == int(((logits > 0) == (labels > 0.5)).sum())
    assert counts[:, 1].tolist() == labels.sum(0).long().tolist()
    assert hits_and_counts(single, 3 * label) is None
    assert hits_and_counts(logits, label) is None
