"""Losses, margins and features against what one would write by hand, and against scikit-learn."""

import dataclasses
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from lightning_guard.functional.poison import (
    activation_clusters,
    area_under_margin,
    margins,
    spectral_scores,
    suspects,
    take_rows,
    trimmed,
)

Pair = namedtuple("Pair", ["x", "y"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Which rows stay


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.99])
def test_the_lowest_losses_stay_in_their_order(count, share):
    losses = torch.rand(count, generator=generator(count))
    kept = trimmed(losses, share).tolist()
    assert len(kept) == max(1, count - round(share * count))
    by_hand = sorted(range(count), key=lambda i: losses[i].item())[: len(kept)]
    assert kept == sorted(by_hand)


def test_edge_cases_of_trimming():
    assert trimmed(torch.zeros(0), 0.5).tolist() == []
    assert trimmed(torch.tensor([torch.nan]), 0.9).tolist() == [0]
    assert trimmed(torch.tensor([torch.nan, 5.0, torch.inf, 1.0]), 0.25).tolist() == [1, 2, 3]  # NaN goes first
    assert trimmed(torch.ones(8), 0.5).tolist() == [0, 1, 2, 3]  # of equals the first stay


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="share="):
        trimmed(torch.zeros(3), share)


def test_losses_must_be_one_an_example():
    with pytest.raises(ValueError, match="one number an example"):
        trimmed(torch.zeros(3, 2), 0.1)


# Rows of a batch


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "kept"


X, Y, ROWS = torch.arange(12.0).reshape(4, 3), torch.arange(4), torch.tensor([0, 3])


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, Y], Pair(X, Y), {"x": X, "y": Y}, UserDict(x=X, y=Y), Record(X, Y), ({"ids": X, "mask": X}, Y)],
)
def test_every_form_of_batch_gives_its_rows_and_stays_as_it_was(batch):
    def tensors(part):
        if isinstance(part, torch.Tensor):
            return [part]
        values = part.values() if hasattr(part, "values") else vars(part).values() if hasattr(part, "note") else part
        return [tensor for value in values if not isinstance(value, str) for tensor in tensors(value)]

    before = [tensor.clone() for tensor in tensors(batch)]
    taken = take_rows(batch, ROWS, 4)
    assert type(taken) is type(batch)
    assert len(tensors(taken)) == len(before)
    for got, was, now in zip(tensors(taken), before, tensors(batch), strict=True):
        assert torch.equal(now, was)
        assert torch.equal(got, torch.stack([was[0], was[3]]))


def test_two_examples_in_a_batch_of_two_parts():
    x, y = take_rows([X[:2], Y[:2]], torch.tensor([1]), 2)  # the list counts parts, not examples
    assert (x.tolist(), y.tolist()) == ([X[1].tolist()], [1])


def test_texts_go_with_their_rows_and_what_belongs_to_all_stays():
    batch = {"x": X, "text": list("abcd"), "ids": (5, 6, 7, 8), "scale": torch.tensor(2.0), "source": "web", "n": 4}
    taken = take_rows({**batch, "nothing": None}, ROWS, 4)
    assert taken["text"] == ["a", "d"]
    assert taken["ids"] == (5, 8)
    assert (taken["scale"], taken["source"], taken["n"], taken["nothing"]) == (2.0, "web", 4, None)


@pytest.mark.parametrize(
    ("part", "message"), [(torch.zeros(3), r"shape \(3,\)"), (torch.zeros(1, 4), r"shape \(1, 4\)"), ({1, 2}, "a set")]
)
def test_parts_that_do_not_fall_into_examples_are_refused(part, message):
    with pytest.raises(ValueError, match=message):
        take_rows((X, Y, part), ROWS, 4)


# Margins


def test_margins_by_hand():
    logits = torch.randn(50, 7, generator=generator())
    target = torch.randint(7, (50,), generator=generator(1))
    for i, margin in enumerate(margins(logits, target).tolist()):
        others = [logits[i, c].item() for c in range(7) if c != target[i]]
        assert margin == pytest.approx(logits[i, target[i]].item() - max(others), abs=1e-6)
        assert (margin > 0) == (logits[i].argmax() == target[i]).item()


def test_one_logit_is_two_of_which_one_is_zero():
    logit, target = torch.randn(20, generator=generator()), torch.randint(2, (20,), generator=generator(1))
    two = torch.stack([torch.zeros(20), logit], 1)
    for shaped in (logit, logit.unsqueeze(1)):
        for said in (target, target.float().unsqueeze(1)):
            torch.testing.assert_close(margins(shaped, said), margins(two, target))


def test_a_target_that_is_no_class_has_no_margin():
    found = margins(torch.eye(3), torch.tensor([-100, 1, 3]))
    assert found.isnan().tolist() == [True, False, True]
    assert margins(torch.ones(2), torch.tensor([0.5, 1.0])).isnan().tolist() == [True, False]
    assert torch.equal(
        area_under_margin(torch.tensor([[1.0, torch.nan], [2.0, torch.nan]])).isnan(), torch.tensor([False, True])
    )


@pytest.mark.parametrize(
    ("logits", "target"), [((4, 3), (4, 3)), ((4, 3, 2), (4, 2)), ((4, 1), (3,)), ((4, 2), (4, 2))]
)
def test_what_has_no_margin_is_refused(logits, target):
    with pytest.raises(ValueError, match="no margin"):
        margins(torch.zeros(logits), torch.zeros(target, dtype=torch.long))


# Suspects


def areas_with_wrong(rate, seed=0, count=2000, classes=4):
    draw = generator(seed)
    label = torch.randint(classes, (count,), generator=draw)
    wrong = torch.rand(count, generator=draw) < rate
    areas = torch.randn(count, generator=draw) + torch.where(wrong, -5.0, 5.0 + label)  # classes differ in height
    return areas, label, wrong


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.4])
def test_separate_areas_are_found_whatever_the_rate(rate):
    areas, label, wrong = areas_with_wrong(rate)
    assert set(suspects(areas, label).tolist()) == set(wrong.nonzero().squeeze(1).tolist())


def test_nobody_is_suspicious_where_all_agree():
    areas, label, _ = areas_with_wrong(0.0)
    assert len(suspects(areas, label)) == 0
    assert len(suspects(-torch.rand(100), torch.zeros(100))) == 0  # all negative, and none low among its class


def test_a_known_share_is_taken_worst_first():
    areas = torch.tensor([3.0, -1.0, torch.nan, -2.0, 5.0])
    assert suspects(areas, torch.zeros(5), share=0.4).tolist() == [3, 1]
    assert suspects(areas, torch.zeros(5), share=0.99).tolist() == [3, 1, 0, 4]  # NaN never


# Features


def two_groups(seed=0, classes=3, count=120, width=15, rare=0.15):
    draw = generator(seed)
    label = torch.randint(classes, (count * classes,), generator=draw)
    odd = (torch.rand(len(label), generator=draw) < rare) & (label == 1)
    features = torch.randn(len(label), width, generator=draw)
    features[odd] += 6 * torch.randn(width, generator=draw).sign() / width**0.5
    return features, label, odd


def test_clusters_are_those_of_scikit_learn():
    features, label, odd = two_groups()
    found = activation_clusters(features, label, dimensions=10)
    assert torch.equal(found.smaller & (label == 1), odd)
    for one in range(3):
        points = PCA(10).fit_transform(features[label == one].double().numpy())
        best = KMeans(2, n_init=50, random_state=0).fit(points)
        second = found.smaller[label == one].numpy()
        centres = [points[second].mean(0), points[~second].mean(0)]
        inertia = sum(((points[part] - c) ** 2).sum() for part, c in zip((second, ~second), centres, strict=True))
        assert inertia <= 1.02 * best.inertia_  # a class of one group has many halves that are almost as good
        assert found.silhouette[one].item() == pytest.approx(silhouette_score(points, second), abs=1e-6)
        assert found.share[one].item() == pytest.approx(second.mean())
        assert found.share[one] <= 0.5


def test_images_of_features_are_flattened_and_many_features_cost_little():
    features, label, _ = two_groups(width=400, count=40, rare=0.2)
    flat = activation_clusters(features, label)
    shaped = activation_clusters(features.reshape(len(label), 4, 10, 10), label)
    assert torch.equal(flat.smaller, shaped.smaller)
    torch.testing.assert_close(spectral_scores(features, label), spectral_scores(features.reshape(-1, 20, 20), label))


def test_small_classes_and_absent_ones():
    found = activation_clusters(torch.tensor([[0.0], [1.0], [0.0], [0.0], [7.0]]), torch.tensor([0, 0, 3, 3, 3]))
    assert found.smaller.tolist() == [False] * 4 + [True]
    assert found.share.isnan().tolist() == [True, True, True, False]
    equal = activation_clusters(torch.ones(6, 2), torch.zeros(6, dtype=torch.long))
    assert not equal.smaller.any()


@pytest.mark.parametrize("width", [5, 300])
def test_spectral_scores_are_those_of_the_singular_value_decomposition(width):
    features, label, _ = two_groups(width=width)
    scores = spectral_scores(features, label)
    for one in range(3):
        rows = features[label == one].double().numpy()
        rows = rows - rows.mean(0)
        direction = np.linalg.svd(rows, full_matrices=False)[2][0]
        np.testing.assert_allclose(scores[label == one].numpy(), (rows @ direction) ** 2, rtol=1e-6, atol=1e-9)


def test_poison_scores_high():
    features, label, odd = two_groups()
    scores = spectral_scores(features, label)
    assert scores[odd].median() > 3 * scores[(label == 1) & ~odd].median()


def test_features_and_labels_must_fit():
    with pytest.raises(ValueError, match="one label an example"):
        spectral_scores(torch.zeros(4, 2), torch.zeros(3))
