"""Reference models find what was memorised, a private training hides it, and the halves are halves."""

import numpy as np
import pytest

from lightning_guard.callbacks import DPSGD
from lightning_guard.report.lira import halves, reference_attack
from tests.evaluation.test_privacy import Noise, Wide

OPTIONS = {"accelerator": "cpu"}


def test_halves_share_out_the_rows():
    inside = np.stack([halves(101, 7, number) for number in range(8)])
    assert (inside[::2] ^ inside[1::2]).all()
    assert (inside.sum(0) == 4).all()
    assert len({tuple(row) for row in inside.tolist()}) == 8
    assert not (halves(101, 8, 0) == inside[0]).all()


@pytest.fixture(scope="module")
def found():
    return reference_attack(Wide, Noise, [], {"max_epochs": 40, **OPTIONS}, models=6)


def test_what_was_memorised_is_found_at_few_false_alarms(found):
    figures = {key: figure.value for key, figure in found.figures.items()}
    assert found.intervals["privacy/lira_auc"][0] > 0.8
    assert figures["privacy/lira_at_1"] > 5 * 0.01
    assert "1050 trained examples" in found.figures["privacy/lira_auc"].about  # 175 rows in each of 6 models


def test_intervals_are_those_of_one_model(found):
    low, high = found.intervals["privacy/lira_at_1"]
    share = found.figures["privacy/lira_at_1"].value
    assert high - low > 1.9 * 1.96 * (share * (1 - share) / 175) ** 0.5 * 0.9


def test_a_private_training_hides_its_rows():
    guard = DPSGD(target_epsilon=0.1, delta=1e-4)
    found = reference_attack(Wide, Noise, [guard], {"max_epochs": 4, **OPTIONS}, models=6)
    assert abs(found.figures["privacy/lira_auc"].value - 0.5) < 0.09
    assert found.curves["privacy/allowed"].y[0] < 0.2
    assert guard.plan is None  # the models are trained with copies


@pytest.mark.parametrize("models", [4, 7])
def test_too_few_models_are_refused(models):
    with pytest.raises(ValueError, match=f"models={models} must be even and at least 6"):
        reference_attack(Wide, Noise, models=models)
