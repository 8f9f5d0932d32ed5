"""The table of composition: every pair has a verdict, what is refused does harm, what is sound keeps its promises."""

from itertools import combinations, permutations

import pytest
import torch
import yaml

from lightning_guard.check import check
from lightning_guard.composition import findings, told, unnamed
from lightning_guard.functional.fairness import NOTIONS, OF_RATES
from lightning_guard.functional.squeezing import squeezing
from lightning_guard.guard import Guard, GuardConflict, Phase, Query, Run, Trait
from lightning_guard.launch import GuardCLI
from lightning_guard.recipe import RecipeError
from lightning_guard.rules import ANY, ASKS_ONCE, RULES, Rule, Setting, Verdict, beyond, having, rows
from tests import toys
from tests.guards import GUARDS
from tests.toys import PlainNet, fit, loader, same

PAIRS = list(combinations(GUARDS, 2))


def made(*guards):
    return [GUARDS[guard].on() for guard in guards]


def named(*guards):
    return "+".join(guard.name for guard in guards)


def refused(guards):
    return [found.rule for found in findings(guards) if found.rule.verdict is Verdict.REFUSED]


class Other(Guard):
    """A guard of somebody else."""

    name, phase = "other", Phase.LOSS


class Known(Other):
    traits = frozenset()


# The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: named(*pair))
def test_every_pair_of_guards_has_a_verdict(pair):
    guards = made(*pair)
    assert not unnamed(guards)
    assert {row["verdict"] for row in told(guards)} <= {"sound", "sound if", "refused"}


def test_every_row_says_why_what_then_and_from_where():
    for rule, row in zip(RULES, rows(), strict=True):
        assert rule.reason, rule.together
        assert rule.source, rule.together
        assert rule.remedy or rule.verdict is Verdict.SOUND, rule.together
        assert all("|" not in text and "\n" not in text for text in row.values()), rule.together
    assert len({(rule.together, rule.reason) for rule in RULES}) == len(RULES)


def test_every_word_and_setting_of_the_table_is_one_that_there_is():
    names, options = {guard.name for guard in GUARDS}, {}
    for guard in GUARDS:
        options[guard.name] = GUARDS[guard].on()
    words = {*names, *Trait, ANY, ASKS_ONCE, "rewrite", "on_batch", "on_loss", "on_weights"}
    for rule in RULES:
        assert rule.first in words, rule.together
        assert rule.second in words | {"StochasticWeightAveraging", "WeightAveraging"}, rule.together
        for word, settings in ((rule.first, rule.first_has), (rule.second, rule.second_has)):
            for setting in settings if word in names else ():
                assert hasattr(options[word], setting.option), (rule.together, setting)


def test_notions_without_a_bound_are_those_that_rates_are_not():
    (listed,) = {one.values for rule in RULES for one in rule.second_has if one.option == "notion"}
    assert set(listed) == set(NOTIONS) - OF_RATES


def test_undeclared_traits_are_taken_for_the_worst():
    private = next(guard for guard in GUARDS if guard.name == "dp_sgd")
    both = [*made(private), Other()]
    assert {rule.second for rule in refused(both)} == {Trait.COUPLES_EXAMPLES, Trait.REMEMBERS_DATA}
    assert not findings([*made(private), Known()])
    assert told([*made(private), Known()])[0]["verdict"] == "not known"


def test_a_guard_that_is_off_meets_nobody():
    for off in (off for row in GUARDS.values() if (off := row.off()).off):
        others = made(*(other for other in GUARDS if not isinstance(off, other)))
        assert findings(others)
        assert not any(off in found[:2] for found in findings([off, *others]))


def test_no_row_makes_sound_what_another_refuses(monkeypatch):
    class Both(Known):
        traits = frozenset({Trait.COUPLES_EXAMPLES})

    private = next(guard for guard in GUARDS if guard.name == "dp_sgd")
    near = Rule("dp_sgd", "other", Verdict.SOUND, "somebody says so", source="nobody")
    monkeypatch.setattr("lightning_guard.composition.RULES", (*RULES, near))
    assert [rule.verdict for rule in refused([*made(private), Both()])] == [Verdict.REFUSED]
    assert [found.rule for found in findings([*made(private), Known()])] == [near]


def test_the_nearest_row_speaks(monkeypatch):
    general = Rule(Trait.POST_PROCESSING, ANY, Verdict.SOUND_IF, "general", "if", "test")
    own = Rule("other", "known", Verdict.SOUND, "of the pair", source="test")
    setting = Rule("other", "known", Verdict.SOUND, "of an option", source="test", first_has=(having("size", 2),))
    monkeypatch.setattr("lightning_guard.composition.RULES", (general, own, setting))

    class Sized(Other):
        name, traits, size = "other", frozenset({Trait.POST_PROCESSING}), 1

    class Third(Known):
        name = "known"

    small, large = Sized(), Sized()
    large.size = 2
    for order in permutations([small, Third()]):
        assert [found.rule.reason for found in findings(order)] == ["of the pair"]
    assert [found.rule.reason for found in findings([large, Third()])] == ["of an option"]
    assert findings([large, Third()])[0].sides == ["other (size=2)", "known"]
    assert [found.rule.reason for found in findings([small, *made(next(iter(GUARDS)))])] == ["general"]


def test_settings_hold_or_do_not():
    class Sized(Known):
        size = 2
        which = None

    one = Sized()
    assert having("size", 1, 2).holds(one)
    assert not having("size", 1).holds(one)
    assert beyond("size", 1).holds(one)
    assert not beyond("size", 2).holds(one)
    assert having("which", None).holds(one)
    assert not beyond("which", None).holds(one)
    assert having("nothing", 1).holds(one)
    assert beyond("nothing", 1).holds(one)
    one.size = [1]  # not compared element by element
    assert beyond("size", None).holds(one)
    assert str(having("mode", "a", "b")) == "mode is a or b"
    assert str(Setting("phase", (Phase.REWRITE,))) == "phase is rewrite"


def test_a_subclass_is_refused_what_its_base_is_refused():
    pruning = next(guard for guard in GUARDS if guard.name == "adversarial_training")

    class Mine(pruning):
        """Another name for it."""

        name = "mine"

    private = made(next(guard for guard in GUARDS if guard.name == "dp_sgd"))
    assert refused([*private, Mine(0.1, method="free")])
    assert not findings([*private, Mine(0.1)])  # what it adds nobody has looked at


def test_all_problems_of_a_run_are_told_at_once():
    by = {guard.name: guard for guard in GUARDS}
    guards = [
        by["adversarial_training"](0.1, method="fgsm", awp=0.1),
        by["fairness"](mode="penalty"),
        *made(by["dp_sgd"], by["trimmed_loss"], by["quantization"], by["weight_clustering"], by["sample_ledger"]),
    ]
    with pytest.raises(GuardConflict) as error:
        fit(guards)
    text, rules = str(error.value), refused(guards)
    assert len(rules) >= 8
    for rule in rules:
        assert rule.reason in text
        assert rule.remedy in text


def test_who_counts_once_is_known_by_what_it_asks():
    class Counting(Known):
        def queries(self):
            return [Query("count", 1.0, once=True)]

    by = {guard.name: guard for guard in GUARDS}
    people = by["dp_sgd"](1e-3, noise_multiplier=1.0, users="group")
    assert [rule.second for rule in refused([people, Counting()])] == [ASKS_ONCE]
    assert not refused([*made(by["dp_sgd"]), Counting()])


# Together ---------------------------------------------------------------------------------------------------------

BY = {guard.name: guard for guard in GUARDS}
FIVE = ("dp_sgd", "adversarial_training", "fairness", "magnitude_pruning", "quantization")


def together(*names):
    """These guards in the form in which they act, or a private one of it."""
    return made(*(BY[name] for name in names))


def sound(*names):
    return not refused(together(*names))


@pytest.fixture
def private_net(monkeypatch):
    """Networks without BatchNorm, which DP-SGD refuses."""
    monkeypatch.setattr(toys, "BATCH_NORM", False)


QUICK = {*FIVE, "distillation", "weight_clustering"}  # the others of three are slow only because they are many
SOUND_WITH_DP = [
    pytest.param(names, marks=[] if len(names) < 3 or set(names) <= QUICK else pytest.mark.slow, id="+".join(names))
    for size in (1, 2)
    for others in combinations(sorted(set(BY) - {"dp_sgd"}), size)
    if sound(*(names := ("dp_sgd", *others)))
] + [pytest.param(FIVE, id="all five")]


def promised(name, guard, module, others):
    """Whether the finished network is what the guard promises, by a look of our own at its weights."""
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    weights = [layer.weight.detach() for layer in layers]
    if name == "magnitude_pruning":  # an exact number of zeros, of the weights that are left
        zeros, size = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        return zeros == round(0.7 * size) if "quantization" not in others else zeros >= round(0.7 * size)
    if name == "weight_clustering":
        return all(len(w.unique()) <= 4 for w in weights)
    if name == "quantization":  # 255 codes a channel, symmetric
        steps = [w.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127 for w in weights]
        return all(float((w / s - (w / s).round()).abs().max()) < 1e-3 for w, s in zip(weights, steps, strict=True))
    if name == "channel_pruning":
        return module.net[0].weight.shape[0] == 8 if "low_rank" not in others else True
    if name == "low_rank":
        return len(layers) > 2
    if name == "dp_sgd":
        spent = guard._ledger.spent
        return spent == pytest.approx(guard.plan.epsilon(guard.plan.steps)) and guard._ledger.steps == guard.plan.steps
    if name == "sample_ledger":
        return len(guard.aum) == 64
    if name == "privacy_audit":
        return guard.result is not None
    if name == "feature_squeezing":
        return squeezing(module) is not None
    return guard.settled(guard_run(module))  # of the others, schedules have come to their ends


def guard_run(module):
    return Run(module.fitted, module, ())


@pytest.mark.parametrize("names", SOUND_WITH_DP)
def test_beside_dp_examples_stay_apart_and_epsilon_is_the_plans(names, private_net):
    guards = together(*names)
    module = fit(guards, lambda: PlainNet(norm=False), loader())
    private = guards[0]
    found = private._found
    assert found is not None
    assert found.coupling < 1e-3  # of what an example contributes, another one changes nothing
    assert found.influence <= 2 + 1e-4  # and the clipped sum moves by no more than twice the norm
    assert private._ledger.steps == private.plan.steps >= 8
    assert private._ledger.spent == pytest.approx(private.plan.epsilon(private.plan.steps))
    for name, guard in zip(names, guards, strict=True):
        assert promised(name, guard, module, names), name


@pytest.mark.parametrize(
    "names", [pair for pair in combinations(sorted(set(BY) - {"dp_sgd"}), 2) if sound(*pair)], ids="+".join
)
def test_what_each_promises_is_there_after_training_with_both(names):
    guards = together(*names)
    module = fit(guards, PlainNet, loader())
    for name, guard in zip(names, guards, strict=True):
        assert promised(name, guard, module, names), name


TRIPLES = [
    ("adversarial_training", "fairness", "magnitude_pruning"),
    ("adversarial_training", "magnitude_pruning", "quantization"),
    ("distillation", "magnitude_pruning", "quantization"),
    ("fairness", "magnitude_pruning", "quantization"),
    ("dp_sgd", "adversarial_training", "fairness"),
    ("dp_sgd", "fairness", "magnitude_pruning"),
    ("feature_squeezing", "sample_ledger", "trimmed_loss"),
    ("channel_pruning", "distillation", "low_rank"),
    ("privacy_audit", "dp_sgd", "weight_clustering"),
]


@pytest.mark.parametrize("names", TRIPLES, ids="+".join)
def test_any_order_of_three_is_the_same_run(names, private_net):
    first, *others = (fit([together(*names)[i] for i in order]) for order in permutations(range(3)))
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize(
    "shift", [*range(1, 5), pytest.param(None, marks=pytest.mark.slow)], ids=lambda shift: f"shift={shift}"
)
def test_any_order_of_all_five_is_the_same_run(shift, private_net):
    first = fit(together(*FIVE))
    orders = [(*FIVE[shift:], *FIVE[:shift]), (*FIVE[:shift][::-1], *FIVE[shift:])] if shift else permutations(FIVE)
    for order in orders:
        assert same(first, fit(together(*order))), order


RECIPES = {
    "private": {"dp_sgd": ("DPSGD", {"delta": 1e-5, "noise_multiplier": 0.5, "test_seed": 5, "batch_size": 64})},
    "fair": {"fairness": ("FairnessRegularization", {"max_gap": 0.05, "groups": [2]})},
    "sparse": {"magnitude_pruning": ("MagnitudePruning", {"sparsity": 0.5, "every": 1})},
    "sparser": {"magnitude_pruning": ("MagnitudePruning", {"end": 0.25})},  # another option of the same guard
}


def test_any_order_of_recipes_is_the_same_run(tmp_path):
    for name, guards in RECIPES.items():
        body = {
            slot: {"class_path": f"lightning_guard.callbacks.{c}", "init_args": o} for slot, (c, o) in guards.items()
        }
        text = yaml.safe_dump({"guards": body})
        (tmp_path / f"{name}.yaml").write_text(f"# {name}\n# lightning-guard: 1\n{text}")
    shared = ["--config", "demo/adult", "--trainer.max_steps", "4", "--trainer.limit_val_batches", "0"]
    shared += ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    results = []
    for order in permutations(RECIPES):
        cli = GuardCLI("fit", [*shared, *(part for name in order for part in ("--recipe", f"{tmp_path}/{name}.yaml"))])
        cli.build()
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        results.append(cli.model)
    assert all(same(results[0], other) for other in results)


# Told -------------------------------------------------------------------------------------------------------------


def test_check_prints_the_whole_table(capsys):
    assert check(["--rules"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 140
    lines, last = printed.splitlines(), 0
    for row in rows():  # every row, in order; columns are wrapped, so their words are looked for one by one
        begins = row["together"].split()[0]
        found = (i for i, line in enumerate(lines[last:], last) if line.startswith(begins) and row["verdict"] in line)
        last = next(found) + 1
    assert all(word in printed for row in rows() for word in (*row["why"].split(), *row["then"].split()))


def test_check_prints_the_rows_of_the_run_and_no_others(capsys):
    args = ["--config", "demo/adult", "--recipe", "fair-and-small", "--trainer.max_epochs", "1"]
    assert check([*args, "--trainer.limit_train_batches", "4"]) == 0
    printed = capsys.readouterr().out
    (row,) = told(together("fairness", "magnitude_pruning"))
    assert all(word in printed for word in (*row["together"].split(), row["verdict"], *row["why"].split()))
    assert "dp_sgd" not in printed


def test_rules_are_printed_alone():
    with pytest.raises(RecipeError, match="takes nothing else"):
        check(["--rules", "--recipe", "fairness"])
