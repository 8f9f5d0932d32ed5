"""Steps are counted as they are paid for, over resumes too."""

from dataclasses import replace

import pytest

from lightning_guard.functional.privacy import Deal, Ledger, PrivacyPlan

PLAN = PrivacyPlan.solve(64, 16, 4, 1e-3, 1.0, noise_multiplier=2.0, epochs=3)
FIRST, LATER = Deal(16, 1, None, True, False, 0), Deal(16, 1, None, False, True, 2)


def ledger(plan=PLAN, steps=0, **options):
    made = Ledger(plan, **options)
    made.steps = steps
    return made


def test_the_budget_pays_for_the_planned_steps_and_no_more():
    for steps in range(12):
        ledger(steps=steps).admit(FIRST, batch=0, chunks=2)
    with pytest.raises(ValueError, match=r"12 steps are epsilon = "):
        ledger(steps=12).admit(FIRST, batch=0, chunks=2)
    assert ledger(steps=12).done
    assert not ledger(steps=11).done
    assert ledger(steps=7).spent == PLAN.epsilon(7)


def test_batches_that_come_otherwise_than_they_are_counted_are_refused():
    with pytest.raises(ValueError, match="middle of 2 accumulated"):
        ledger().admit(FIRST, batch=3, chunks=2)
    ledger().admit(LATER, batch=3, chunks=2)
    unstepped = ledger(steps=1)
    unstepped.pending = True
    with pytest.raises(ValueError, match="no optimizer took"):
        unstepped.admit(FIRST, batch=2, chunks=2)


def test_an_order_that_is_used_up_in_part_is_not_begun_anew():
    shuffled = replace(PLAN, sampling="shuffle")
    ledger(shuffled, steps=4).admit(FIRST, batch=0, chunks=1)
    ledger(shuffled, steps=5).admit(LATER, batch=1, chunks=1)
    ledger(steps=5).admit(FIRST, batch=0, chunks=1)  # Poisson draws know no order
    with pytest.raises(ValueError, match="cut short"):
        ledger(shuffled, steps=5).admit(FIRST, batch=0, chunks=1)
    with pytest.raises(ValueError, match="end of an epoch"):
        ledger(shuffled).resume(ledger(shuffled, steps=5).state())


def test_a_resume_takes_up_steps_and_bound():
    before = ledger(steps=5)
    before.max_grad_norm = 0.7
    after = ledger()
    after.resume(before.state())
    assert (after.steps, after.max_grad_norm) == (5, 0.7)
    assert after.state() == before.state()
    assert before.state()["fingerprint"] == PLAN.fingerprint


def test_another_promise_is_refused():
    for changed in ({"delta": 1e-4}, {"batch_size": 8}, {"steps": 16}):
        with pytest.raises(ValueError, match=f"{next(iter(changed))} .* became"):
            ledger(replace(PLAN, **changed)).resume(ledger().state())
    with pytest.raises(ValueError, match="not private"):
        ledger().resume(ledger(private=False).state())
    again = ledger(private=False)
    again.resume(ledger(steps=3, private=False).state())
    assert again.steps == 3


def test_a_length_that_is_no_part_of_the_promise_may_grow():
    short = ledger(steps=5, fixed=False)
    assert short.state()["plan"]["steps"] == 5
    longer = ledger(replace(PLAN, steps=40), fixed=False)
    longer.resume(short.state())
    assert (longer.steps, longer.plan.steps) == (5, 40)
