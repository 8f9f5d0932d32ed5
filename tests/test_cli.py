"""The command line: what it refuses and how, what it builds, and what a saved run repeats."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

import lightning_guard
from lightning_guard import arms, launch
from lightning_guard.callbacks import AdversarialTraining, FairnessRegularization, MagnitudePruning, slots
from lightning_guard.check import Rehearsal
from lightning_guard.cli import main
from lightning_guard.guard import Guard, Phase
from lightning_guard.launch import GuardCLI
from lightning_guard.recipe import recipes

ROOT = Path(__file__).parents[1]
SHIPPED = [recipe.name for recipe in recipes()]
QUIET = [f"--trainer.{o}=false" for o in ("enable_progress_bar", "enable_model_summary", "enable_checkpointing")]
TOY = ["--model", "tests.toys.PlainNet", "--data", "tests.toys.Data", "--trainer.accelerator", "cpu"]
SHORT = [*TOY, *QUIET, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]


def write(text, name="mine.yaml"):
    Path(name).write_text(text, encoding="utf-8")
    return name


def said(capsys, *args):
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    code = main(list(args))
    found = capsys.readouterr()
    return code, found.out.strip(), found.err.strip()


def guards(*args):
    """The guards that these arguments switch on, with their options."""
    cli = GuardCLI("fit", [*TOY, *args])
    cli.build()
    return {guard.name: guard.options() for guard in cli.guards}


class Leaver(Guard):
    """Leaves something behind."""

    name = "leaver"
    phase = Phase.LOSS
    traits = frozenset()

    def begin(self, run):
        run.module.net.forward = run.module.net.forward


class Unpicklable(Guard):
    """Has state that no safe load takes."""

    name = "unpicklable"
    traits = frozenset()

    def state(self):
        return {"state": Path("x")}


# Mistakes ---------------------------------------------------------------------------------------------------------

CLASS = "guards:\n  fairness:\n    class_path: lightning_guard.callbacks.FairnessRegularization\n"
FAIRNESS = CLASS + "    init_args:\n      "

MISTAKES = [
    # options
    (FAIRNESS + "wieght: 1", "5: unknown option 'wieght' of guards.fairness; did you mean 'weight'?"),
    ("guards:\n  fairness:\n    wieght: 1", "3: unknown option 'wieght' of guards.fairness; did you mean 'weight'?"),
    ("guards:\n  fairness:\n    wieght: {}", "3: unknown option 'wieght' of guards.fairness; did you mean 'weight'?"),
    (
        "guards:\n  fairness:\n    init_arg: {}",
        "3: unknown option 'init_arg' of guards.fairness; did you mean 'init_args'?",
    ),
    ("guards:\n  batch:\n    inptus: 1", "3: unknown option 'inptus' of guards.batch; did you mean 'inputs'?"),
    (
        CLASS + "    weight: 1",
        "4: unknown option 'weight' of guards.fairness; it belongs under init_args",
    ),
    ("trainer:\n  max_epoch: 3", "2: unknown option 'max_epoch' of trainer; did you mean 'max_epochs'?"),
    (
        "trainer:\n  callbacks:\n  - class_path: pytorch_lightning.callbacks.EarlyStopping\n    init_args: {monitr: x}",
        "4: unknown option 'monitr' of trainer.callbacks; did you mean 'monitor'?",
    ),
    ("model:\n  class_path: tests.toys.PlainNet\n  init_args:\n    hidden: 3", "4: unknown option 'hidden' of model"),
    # sections, which the parser takes in silence
    ("guards:\n  fairnes: {}", "2: unknown option 'fairnes' of guards; did you mean 'fairness'?"),
    ("gaurds: {}", "1: unknown section or option 'gaurds'; did you mean 'guards'?"),
    (
        "guards.fairness.steepness: 1",
        "1: unknown section or option 'guards.fairness.steepness'; write nested sections instead of dots",
    ),
    ("guards: null", "1: guards is a section of options, not null; to switch a guard off, give null to that guard"),
    (
        "guards: [fairness]",
        "1: guards is a section of options, not a list; to switch a guard off, give null to that guard",
    ),
    ("evaluate:\n  robustnes: null", "2: unknown option 'robustnes' of evaluate; did you mean 'robustness'?"),
    # types
    (FAIRNESS + "steepness: heavy", "5: steepness='heavy' of guards.fairness must be a number"),
    (FAIRNESS + "steepness: null", "5: steepness=null of guards.fairness must be a number"),
    (FAIRNESS + "notion: parity", "5: notion='parity' of guards.fairness must be 'demographic_parity' or"),
    ("guards:\n  fairness: true", "2: guards.fairness takes a class or its options, or null, not true"),
    ("guards:\n  magnitude_pruning:\n    ignore: head", "3: ignore='head' of guards.magnitude_pruning must be a list"),
    ("trainer:\n  max_epochs: three", "2: max_epochs='three' of trainer must be a whole number or null"),
    ("trainer:\n  precision: 16-mixd", "2: precision='16-mixd' of trainer must be 64 or 32"),
    ("seed_everything: one", "1: seed_everything='one' must be true or false or a whole number"),
    # classes
    (
        "guards:\n  fairness:\n    class_path: lightning_guard.callbacks.FairnessRegularisation",
        "3: no class 'FairnessRegularisation' in lightning_guard.callbacks; did you mean 'FairnessRegularization'?",
    ),
    (
        "guards:\n  fairness:\n    class_path: lightning_guard.callbacks.MagnitudePruning",
        "3: guards.fairness takes FairnessRegularization, and MagnitudePruning is none",
    ),
    ("model: my_model.Net", "1: cannot import my_model for model: No module named 'my_model'"),
    ("data: AdultDat", "1: no class 'AdultDat' for data; did you mean 'AdultData'?"),
    ("optimizer:\n  lr: 1", "2: optimizer has options but no class; say which with class_path"),
    # values that a constructor refuses, and options without a default
    (
        "guards:\n  magnitude_pruning:\n    sparsity: 1.5",
        "3: guards.magnitude_pruning: sparsity=1.5 is no fraction of weights to drop; give a number in [0, 1)",
    ),
    ("guards:\n  adversarial_training:\n    eps: -1", "3: guards.adversarial_training: eps=-1.0 is no radius;"),
    (
        "guards:\n  adversarial_training: {}",
        "2: guards.adversarial_training needs the option 'eps', which has no default",
    ),
    (
        "model:\n  class_path: SmallCNN\n  init_args:\n    width: 30",
        "4: model: width=30 must be a positive multiple of 8",
    ),
    ("trainer:\n  gradient_clip_algorithm: foo", "2: trainer: `gradient_clip_algorithm` foo is invalid."),
    ("evaluate:\n  robustness:\n    eps: 0", "3: evaluate.robustness: eps=0"),
    # the file
    (FAIRNESS + "steepness: 1\n      steepness: 2", "6: 'steepness' is there already in line 5; keep one of them"),
    ("guards: {fairness: [}", "1: no valid YAML: expected the node content, but found '}'"),
    ("# a\n# lightning-guard: 9\nguards: {}", "2: recipe format 9 is not known to"),
]


@pytest.mark.parametrize(("text", "answer"), MISTAKES, ids=[answer[:40] for _, answer in MISTAKES])
def test_a_mistake_in_a_file_is_answered_in_one_line(text, answer, capsys):
    own = [part for part in ("model", "data") if text.startswith(part)]
    toy = [] if own else TOY[:4]
    toy = [*TOY[2:4]] if own == ["model"] else [*TOY[:2]] if own == ["data"] else toy
    code, out, err = said(capsys, "fit", *toy, "--recipe", "pruning", "-c", write(text))
    assert (code, out) == (2, "")
    assert err.startswith(f"mine.yaml:{answer}")
    assert "\n" not in err


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (["--recipe", "fairnes"], "no recipe named 'fairnes'; did you mean 'fairness'?"),
        (["-c", "nowhere.yaml"], "no file 'nowhere.yaml'; a recipe is named without suffix"),
        (["--config"], "--config needs the name of a recipe or of a file"),
        (["junk"], "unexpected argument 'junk'; options begin with --"),
        (["--modle", "x"], "--modle: unknown section or option 'modle'; did you mean 'model'?"),
        (
            ["--trainer.max_epoch", "3"],
            "--trainer.max_epoch: unknown option 'max_epoch' of trainer; did you mean 'max_epochs'?",
        ),
        (["--guards.fairness.wieght=1"], "--guards.fairness.wieght: unknown option 'wieght' of guards.fairness; did"),
        (
            ["--guards.fairness.steepness", "heavy"],
            "--guards.fairness.steepness: steepness='heavy' of guards.fairness must be a number",
        ),
        (
            ["--guards.fairness.steepness", "-1"],
            "--guards.fairness.steepness: guards.fairness: steepness=-1.0 moves nothing",
        ),
        (["--guards.fairness.steepness"], "argument --guards.fairness: expected one argument"),
        (["--model", "tests.toys.PlainNett"], "--model: no class 'PlainNett' in tests.toys; did you mean 'PlainNet'?"),
        (["--data-dir", "x"], "--data.data_dir: unknown option 'data_dir' of data"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_in_one_line(args, answer, capsys):
    code, out, err = said(capsys, "fit", *TOY, *args)
    assert (code, out) == (2, "")
    assert err.startswith(answer)
    assert "\n" not in err


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (["fitt"], "unknown verb 'fitt'; did you mean 'fit'?"),
        (["--recipe", "fairness", "fit"], "write the verb first: lightning-guard fit --recipe fairness fit"),
        (["list", "all"], "list takes no 'all'; write lightning-guard list"),
        (["show"], "show needs the name of a recipe or of a guard; `lightning-guard list` shows the recipes"),
        (["show", "prunning"], "no recipe named 'prunning'; did you mean 'pruning'?"),
        (["fit"], "no model; name its class with --model my_module.MyModel, or in a file given by --config"),
    ],
)
def test_a_verb_is_answered_in_one_line(args, answer, capsys):
    assert said(capsys, *args) == (2, "", answer)


def test_faults_keep_their_traceback():
    with pytest.raises(ValueError, match="too many values to unpack"):
        main(["fit", "--model", "tests.toys.Net", *SHORT[2:]])  # takes pairs, and the batches are triples


def test_a_conflict_is_told_without_traceback(capsys):
    args = ["--recipe", "pruning", "--guards.magnitude_pruning.targets", "[nothing]"]
    code, _, err = said(capsys, "fit", *SHORT, *args)
    assert code == 2
    reason = "the guards cannot keep their promises here, for one reason:\n  - magnitude_pruning: targets="
    assert err.startswith(reason)


# Merging ----------------------------------------------------------------------------------------------------------


def test_files_merge_by_key_in_any_order():
    write("guards: {fairness: {init_args: {steepness: 7}}, magnitude_pruning: {every: 3}}", "partial.yaml")
    orders = [["partial.yaml", "fairness", "pruning"], ["fairness", "pruning", "partial.yaml"]]
    first, second = (guards(*(part for name in order for part in ("--recipe", name))) for order in orders)
    assert set(first) == set(second) == {"fairness", "magnitude_pruning"}
    assert (first["fairness"]["steepness"], second["fairness"]["steepness"]) == (3.0, 7.0)  # what is said later counts
    assert (first["magnitude_pruning"]["every"], second["magnitude_pruning"]["every"]) == (10, 3)
    assert guards("-c", "fairness", "-c", "pruning") == guards("-c", "pruning", "-c", "fairness")


def test_null_switches_off_and_options_override():
    assert set(guards("--recipe", "fair-and-small", "--guards.fairness", "null")) == {"magnitude_pruning"}
    assert set(guards("--recipe", "fair-and-small", "-c", write("guards: {fairness: null}"))) == {"magnitude_pruning"}
    assert guards("--recipe", "fairness", "--guards.fairness.steepness", "3")["fairness"]["steepness"] == 3
    assert guards("--recipe", "fairness", "--guards.fairness.init_args.steepness=3")["fairness"]["steepness"] == 3
    assert guards("-c", write("guards: {fairness: {steepness: 1e-3}}"))["fairness"]["steepness"] == 0.001


def test_every_spelling_of_on_is_on():
    for text in ("{}", "{init_args: {}}", "FairnessRegularization", "{class_path: FairnessRegularization}"):
        assert guards("-c", write(f"guards: {{fairness: {text}}}")) == {"fairness": FairnessRegularization().options()}


def test_a_required_option_may_come_from_another_file():
    write("guards: {adversarial_training: {init_args: {steps: 3}}}", "steps.yaml")
    write("guards: {adversarial_training: {init_args: {eps: 0.2}}}", "eps.yaml")
    for order in (["steps.yaml", "eps.yaml"], ["eps.yaml", "steps.yaml"]):
        found = guards("-c", order[0], "-c", order[1])["adversarial_training"]
        assert found == AdversarialTraining(eps=0.2, steps=3).options()


def test_the_batch_is_given_to_guards_that_state_none():
    cli = GuardCLI("fit", [*TOY, "--recipe", "fair-and-small", "--guards.batch.group", "2"])
    cli.build()
    assert [guard.batch and guard.batch.group for guard in cli.guards] == [2, 2]
    assert cli.model.guard_batch.group == 2


def test_data_dir_is_short_for_the_option_of_the_data():
    cli = GuardCLI("fit", ["--data-dir", "/somewhere", "--config", "demo/adult"])
    assert cli.config.data.init_args.data_dir == "/somewhere"


def test_building_twice_makes_everything_anew():
    cli = GuardCLI("fit", [*TOY, "--recipe", "fairness"])
    cli.build()
    first = [cli.model, cli.datamodule, cli.trainer, *cli.guards]
    cli.build()
    assert not any(a is b for a, b in zip(first, [cli.model, cli.datamodule, cli.trainer, *cli.guards], strict=True))


def test_classes_are_found_in_the_working_directory(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    write("from tests.toys import PlainNet\nclass Mine(PlainNet): ...\n", "my_own_model.py")
    assert said(capsys, "check", "--model", "my_own_model.Mine", *TOY[2:])[0] == 0


def test_a_slot_of_another_package_works_like_ours(monkeypatch):
    monkeypatch.setattr(launch, "slots", lambda: {"leaver": Leaver})
    cli = GuardCLI("fit", [*TOY, "-c", write("guards: {leaver: {}}")])
    cli.build()
    assert [type(guard) for guard in cli.guards] == [Leaver]


# Runs -------------------------------------------------------------------------------------------------------------


def fitted(*args):
    """The weights after a fit."""
    assert main(["fit", *args, "--trainer.callbacks=tests.test_cli.Keep"]) == 0
    return Keep.weights


class Keep(launch.pl.Callback):
    """Keeps the weights of the last training."""

    weights: dict = {}

    def on_train_end(self, trainer, pl_module):
        Keep.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_saved_configuration_repeats_the_run_bit_for_bit():
    first = fitted(*SHORT, "--recipe", "adversarial-training", "--recipe", "pruning", "--trainer.logger", "false")
    text = Path("config.yaml").read_text()
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[1] == "# lightning-guard: 1"
    assert f"torch=={torch.__version__}" in head[2]
    used = [recipe for recipe in recipes() if recipe.name in ("adversarial-training", "pruning")]
    assert head[3:5] == [f"# from lightning_guard/recipes/{r.name}.yaml sha256:{r.sha256}" for r in used]
    assert head[5] == "# guards, in the order in which they act: adversarial_training, magnitude_pruning"
    torch.rand(3)
    assert main(["fit", "-c", "config.yaml"]) == 0
    assert same(first, Keep.weights)
    assert not same(first, fitted("-c", "config.yaml", "--seed_everything", "1"))


def test_a_second_run_in_the_same_folder_overwrites_nothing():
    args = [*SHORT, "--trainer.logger", "false"]
    assert main(["fit", *args]) == main(["fit", *args]) == 0
    assert [path.name for path in Path().glob("*.yaml")] == ["config.yaml"]  # said the same
    first = Path("config.yaml").read_bytes()
    assert main(["fit", *args, "--recipe", "pruning"]) == main(["fit", "-c", "config.yaml"]) == 0
    assert sorted(path.name for path in Path().glob("*.yaml")) == ["config-2.yaml", "config-3.yaml", "config.yaml"]
    assert Path("config.yaml").read_bytes() == first


def test_resuming_without_a_guard_is_refused(capsys):
    args = [arg for arg in SHORT if "checkpointing" not in arg]
    both = ["--recipe", "fairness", "--recipe", "pruning"]
    assert main(["fit", *args, *both]) == 0
    (checkpoint,) = Path().glob("lightning_logs/*/checkpoints/*.ckpt")
    more = ["--trainer.max_epochs", "2", "--ckpt_path"]
    missing = "the checkpoint was trained with {}, which is not here"
    for recipe, absent in ([], ["fairness", "magnitude_pruning"]), (["--recipe", "pruning"], ["fairness"]):
        for verb in ("fit", "check"):
            code, _, err = said(capsys, verb, *args, *recipe, *more, str(checkpoint))
            assert code == 2
            assert [missing.format(name) in err for name in ("fairness", "magnitude_pruning")] == [
                name in absent for name in ("fairness", "magnitude_pruning")
            ]
    assert main(["fit", *args, *both, *more, str(checkpoint)]) == 0
    Path("run/checkpoints").mkdir(parents=True)
    checkpoint.rename("run/checkpoints/last.ckpt")
    folder = ["--trainer.default_root_dir", "run", "--trainer.logger", "false"]
    code, _, err = said(capsys, "fit", *args, *folder, *more, "last")
    assert code == 2
    assert missing.format("fairness") in err
    code, _, err = said(capsys, "fit", *args, *more, "nowhere.ckpt")
    assert code == 2
    assert "nowhere.ckpt" in err


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_other_verbs_take_the_same_configuration(verb):
    assert main(["fit", *SHORT, "--recipe", "fair-and-small", "--trainer.logger", "false"]) == 0
    assert main([verb, "-c", "config.yaml"]) == 0


# Check ------------------------------------------------------------------------------------------------------------


def test_check_tells_each_step_and_leaves_nothing(capsys):
    code, out, err = said(capsys, "check", *TOY, "--recipe", "adversarial-training", "--recipe", "fair-and-small")
    assert (code, err) == (0, "")
    steps = [line.split()[:3] for line in out.splitlines() if line[0] != " "]
    assert steps == [[str(i), "✓", name] for i, name in enumerate(["parse", "build", "compose", "step", "undo"], 1)]
    assert re.search(r"adversarial_training \+.* sound ", out)
    order = r"adversarial_training +batch +Trains on .*\n +fairness +loss .*\n +magnitude_pruning +weights"
    assert re.search(order, out)
    assert "on_batch: adversarial_training" in out
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("args", "step"),
    [
        (["--trainer.max_epoch", "1"], "1 ✗ parse    --trainer.max_epoch: unknown option"),
        (
            ["--recipe", "pruning", "--guards.magnitude_pruning.sparsity", "2"],
            "2 ✗ build    --guards.magnitude_pruning.spars",
        ),
        (["--recipe", "pruning", "--trainer.max_epochs", "-1"], "3 ✗ compose  the guards cannot keep"),
        (["--recipe", "pruning", "--guards.magnitude_pruning.targets", "[x]"], "3 ✗ compose  the guards cannot keep"),
        (
            ["--recipe", "adversarial-training", "--guards.adversarial_training.bounds", "[5, 6]"],
            "4 ✗ step     the guards",
        ),
        (["--trainer.limit_train_batches", "0"], "4 ✗ step     the training ends before its first step; look at"),
        (["--guards.unpicklable.class_path", "tests.test_cli.Unpicklable"], "4 ✗ step     the guards"),
        (["--guards.leaver.class_path", "tests.test_cli.Leaver"], "5 ✗ undo     the guards cannot keep"),
    ],
)
def test_check_says_which_step_fails(args, step, capsys, monkeypatch):
    ours = launch.slots()
    monkeypatch.setattr(launch, "slots", lambda: {**ours, "leaver": Leaver, "unpicklable": Unpicklable})
    code, out, err = said(capsys, "check", *TOY, "--trainer.max_epochs", "1", *args)
    assert code == 2
    assert err.startswith(step)
    assert len([line for line in out.splitlines() if line[0] != " "]) == int(step[0]) - 1


def test_check_takes_a_saved_configuration_and_trains_nothing(capsys):
    assert main(["fit", *SHORT, "--recipe", "fairness", "--trainer.logger", "false"]) == 0
    assert said(capsys, "check", "-c", "config.yaml", "--trainer.min_epochs", "5", "--trainer.max_epochs", "9")[0] == 0


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.accumulate_grad_batches", "3", "--recipe", "robust-and-small"],
        ["--trainer.logger", "false", "--trainer.limit_val_batches", "0", "--recipe", "fairness"],
        ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks+=LearningRateMonitor", "--recipe", "pruning"],
        ["--model", "tests.toys.ManualNet", "--data.form", "pair", "--recipe", "pruning"],
    ],
)
def test_check_takes_what_fit_takes(args, capsys):
    code, _, err = said(capsys, "check", *TOY, *args)
    assert (code, err) == (0, "")
    assert list(Path().iterdir()) == []


def test_check_of_a_fault_keeps_its_traceback(capsys):
    with pytest.raises(ValueError, match="too many values to unpack"):
        main(["check", "--model", "tests.toys.Net", *TOY[2:], "--recipe", "pruning"])
    assert "4 ✗ step     ValueError: too many values" in capsys.readouterr().err


# Recipes ----------------------------------------------------------------------------------------------------------


FITTING = {  # what recipes for real networks need on one of six inputs, trained for two steps
    "low-rank": ["--guards.low_rank.rank", "2", "--guards.low_rank.min_rank", "1"],
    # noise of 50 would drown the counts of 64 rows
    "private-and-fair": ["--trainer.max_epochs", "1", "--guards.fairness.count_noise", "2"],
    # of images, so without groups of their own; ranges of inputs want larger draws than 16
    "trustworthy": [
        *("--data.form", "pair", "--trainer.max_epochs", "1", "--guards.fairness.count_noise", "2"),
        *("--guards.quantization.activation_bits", "null"),
    ],
    "pruning-2-4": ["--guards.magnitude_pruning.ignore", "[net.0]"],
    "pruning-lottery": ["--guards.magnitude_pruning.rewind", "0", "--guards.magnitude_pruning.rounds", "1"],
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_checked_and_fits(name, capsys):
    toy = ["--model.norm", "false", "--recipe", name, *FITTING.get(name, [])]  # DP-SGD refuses BatchNorm
    assert said(capsys, "check", *TOY, *toy)[0] == 0
    assert main(["fit", *SHORT, *toy, "--trainer.logger", "false"]) == 0
    order = Path("config.yaml").read_text().splitlines()[4]
    acting = order.removeprefix("# guards, in the order in which they act: ").split(", ")
    assert sorted(acting) == sorted(guards("--recipe", name))


@pytest.mark.parametrize(
    ("demo", "recipe"), [("demo/adult", "fair-and-small"), ("demo/fashion-mnist", "robust-and-small")]
)
def test_a_demo_configuration_is_checked(demo, recipe, capsys):
    code, out, _ = said(capsys, "check", "--config", demo, "--recipe", recipe, "--trainer.accelerator", "cpu")
    assert code == 0, out


def test_a_private_demo_configuration_is_checked(capsys):
    code, out, err = said(capsys, "check", "--config", "demo/adult-private", "--trainer.accelerator", "cpu")
    assert (code, err) == (0, "")
    assert "dp_sgd: 1 noisy steps spent epsilon" in out


@pytest.mark.parametrize("demo", ["demo/mnist-private", "demo/fashion-mnist-private"])
def test_a_demo_of_features_finds_its_images(demo, capsys):
    code, out, err = said(capsys, "check", "--config", demo, "--data-dir", "/nowhere", "--trainer.accelerator", "cpu")
    assert code == 2
    assert "ScatteringClassifier, ScatteredData, DPSGD" in out
    assert "data_dir='/nowhere' is not a folder. Point it at" in err


def test_entry_points_add_slots_under_their_own_name(monkeypatch):
    def point(name, cls):
        return type("Point", (), {"name": name, "value": "m:C", "load": lambda self: cls})()

    monkeypatch.setattr(slots, "entry_points", lambda group: [point("leaver", Leaver)])
    ours = [cls.name for cls in slots.OURS]
    assert ours == sorted(ours)
    assert list(slots.slots()) == [*ours, "leaver"]
    batch = type("BatchGuard", (Guard,), {"name": "batch", "traits": frozenset()})
    for wrong in (point("other", Leaver), point("leaver", int), point("batch", batch)):
        monkeypatch.setattr(slots, "entry_points", lambda group, wrong=wrong: [wrong])
        with pytest.raises(TypeError, match=f"^entry point {wrong.name} = m:C of group lightning_guard.guards"):
            slots.slots()


def test_the_schema_takes_the_recipes_and_refuses_mistakes(capsys):
    schema = json.loads(said(capsys, "schema")[1])
    jsonschema.Draft202012Validator.check_schema(schema)
    for recipe in [*recipes(), *recipes("demo/*.yaml")]:
        jsonschema.validate(yaml.safe_load(recipe.text), schema)
    for text, _ in MISTAKES[:1]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(text), schema)


# Without torch ----------------------------------------------------------------------------------------------------


def test_list_show_and_help_start_without_torch():
    script = (
        "import sys\n"
        "import lightning_guard; from lightning_guard.cli import main\n"
        "for args in [[], ['list'], ['show', 'fairness'], ['show', 'pruning', 'fgsm'], ['show', 'magnitude_pruning'],\n"
        "             ['fit', '--help'], ['compare', '--help'], ['list', '-h'], ['--version']]:\n"
        "    assert main(args) == 0, args\n"
        "assert main(['show', 'fairnes']) == 2\n"
        "heavy = {'torch', 'pytorch_lightning', 'jsonargparse', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    module = [sys.executable, "-m", "lightning_guard", "list"]
    done = subprocess.run(module, capture_output=True, text=True, cwd=ROOT, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == SHIPPED


def test_show_prints_one_recipe_as_it_is_and_several_merged(capsys):
    text = recipes("fairness.yaml")[0].text
    assert said(capsys, "show", "fairness")[1] == text.strip()
    merged = said(capsys, "show", "fairness", "pruning")[1]
    assert merged.startswith("# fairness + pruning\n# lightning-guard: 1\n")
    assert set(yaml.safe_load(merged)["guards"]) == {"fairness", "magnitude_pruning"}
    assert guards("-c", write(merged)) == guards("--recipe", "fairness", "--recipe", "pruning")


@pytest.mark.parametrize("guard", [AdversarialTraining, FairnessRegularization, MagnitudePruning])
def test_show_explains_a_guard_as_its_class_does(guard, capsys):
    text = said(capsys, "show", guard.__name__)[1]
    assert text.startswith(f"{guard.__name__}(\n")
    assert guard.__doc__.splitlines()[0].strip() in text


@pytest.mark.parametrize(
    "verb", ["fit", "validate", "test", "predict", "check", "compare", "export", "list", "show", "schema"]
)
def test_help_begins_with_one_line_and_an_example(verb, capsys):
    lines = said(capsys, verb, "--help")[1].splitlines()
    assert lines[0].endswith(".")
    assert lines[1] == ""
    assert lines[2].startswith(f"example: lightning-guard {verb}")
    assert len(lines) < 50


def test_every_option_is_told_on_request(capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "--help", "all"])
    assert done.value.code in (0, None)
    assert "--trainer.max_epochs" in capsys.readouterr().out


def test_the_package_exports_lazily_what_it_says():
    assert lightning_guard.Guard is Guard
    assert set(lightning_guard.__all__) <= set(dir(lightning_guard))
    assert all(getattr(lightning_guard, name) is not None for name in lightning_guard.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Gard'"):
        _ = lightning_guard.Gard


# Compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """What `compare` hands to the runner."""
    seen = {}

    def stand_in(arms, **options):
        seen.update(options, arms={arm.name: arm for arm in arms})
        return Path("comparison/report.html")

    def ended(place):
        print(f"The report is {place}")
        return 0

    monkeypatch.setattr(arms, "compare_arms", stand_in)
    monkeypatch.setattr(arms, "ended", ended)
    return seen


def own_guards(parts):
    return {callback.name for callback in parts[0].callbacks if isinstance(callback, Guard)}


def test_arms_are_the_shared_configuration_and_their_recipes(compared, capsys):
    write("guards: {batch: {target: 1}}\ntrainer: {max_epochs: 3}\nevaluate: {robustness: {eps: 0.1}}")
    args = [*TOY[:4], "-c", "mine.yaml", "--trainer.accelerator", "cpu", "--arm", "none", "--arm", "pruning+fairness"]
    args += ["--arm=small=pruning", "--guards.magnitude_pruning.sparsity", "0.3"]
    args += ["--seeds", "2", "--out", "here", "--title", "T"]
    code, out, _ = said(capsys, "compare", *args)
    assert (code, out) == (0, "The report is comparison/report.html")
    assert list(compared["arms"]) == ["none", "pruning+fairness", "small"]
    assert [compared[key] for key in ("seeds", "folder", "title", "workers")] == [range(2), "here", "T", 1]
    assert compared["worker"] is False
    assert compared["command"].startswith("lightning-guard compare --model tests.toys.PlainNet")
    assert [judge.name for judge in compared["evaluators"]] == [
        "task",
        "privacy",
        "robustness",
        "certificate",
        "fairness",
        "efficiency",
    ]
    assert compared["evaluators"][2].eps == 0.1
    none, both, small = compared["arms"].values()
    assert list(none.recipes) == []
    assert both.recipes == {r.name: r.sha256 for r in recipes() if r.name in ("fairness", "pruning")}
    extra = Keep()
    built = {arm.name: arm.build([extra]) for arm in (none, both, small)}
    assert {name: own_guards(parts) for name, parts in built.items()} == {
        "none": set(), "pruning+fairness": {"magnitude_pruning", "fairness"}, "small": {"magnitude_pruning"}
    }  # fmt: skip
    trainer, module, data = built["small"]
    assert extra in trainer.callbacks
    assert trainer.logger is None
    assert trainer.checkpoint_callback is None
    assert trainer.max_epochs == 3
    assert next(c for c in trainer.callbacks if isinstance(c, MagnitudePruning)).sparsity == 0.3
    assert not any(a is b for a, b in zip((trainer, module, data), small.build([]), strict=True))
    assert none.config != small.config != both.config
    assert "seed" not in yaml.safe_load(none.config)
    assert not Path("here").exists()


def test_what_decides_a_run_is_in_its_arm_and_nothing_else(compared, monkeypatch):
    monkeypatch.setattr(arms, "rehearse", lambda *_, **__: Rehearsal())

    def configs(*args):
        assert main(["compare", *TOY, "--arm", "none", "--arm", "pruning", *args]) == 0
        return [arm.config for arm in compared["arms"].values()]

    first = configs()
    assert configs("--seed_everything", "5", "--evaluate.robustness.eps", "0.2", "--title", "T") == first
    changed = configs("--guards.magnitude_pruning.every", "7")
    assert (changed[0] == first[0], changed[1] == first[1]) == (True, False)
    assert all(a != b for a, b in zip(first, configs("--trainer.max_epochs", "2"), strict=True))


TWO = ["--arm", "none", "--arm", "pruning"]
THREE = [*TWO, "--arm", "fairness"]
SWEPT = ["--arm", "none", "--arm", "fairness", "--sweep"]


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (["--arm", "none"], "compare needs at least two arms, the baseline first: --arm none --arm fairness"),
        (["--arm", "none", "--arm", "none"], "two of the arms none, none have one name; use --arm NAME=recipe+recipe"),
        (["--arm", "none", "--arm", "prunin"], "no recipe named 'prunin'; did you mean 'pruning'?"),
        ([*TWO, "--seeds", "0"], "--seeds: 0 is too few; give at least 1"),
        ([*TWO, "--seeds", "x"], "--seeds: invalid int value: 'x'"),
        ([*TWO, "--seds", "1"], "--seds: unknown option of compare; did you mean '--seeds'?"),
        (
            [*TWO, "--recipe", "fairness"],
            "lightning_guard/recipes/fairness.yaml:4: fairness is switched on for every arm",
        ),
        ([*TWO, "--guards.fairness.steepness", "1"], "--guards.fairness.steepness: no arm switches fairness on"),
        (
            [*TWO, "--trainer.callbacks=lightning_guard.callbacks.MagnitudePruning"],
            "--trainer.callbacks: magnitude_pruning is among the callbacks of every arm",
        ),
        ([*TWO, "--ckpt_path", "x"], "--ckpt_path: compare trains every arm from the start"),
        (
            [*TWO, "--reference", "fairret"],
            "--reference: nothing is named 'fairret'; there are threshold_optimizer",
        ),
        (
            [*TWO, "--reference", "threshold_optimzer"],
            "--reference: nothing is named 'threshold_optimzer'; did you mean 'threshold_optimizer'?",
        ),
        ([*TWO, "--reference", "threshold_optimizer"], "--reference: there is no sweep of fairness to draw it beside"),
        ([*TWO, "--combine", "pairs"], "--combine: 'pairs' needs more arms to combine than pruning; add --arm"),
        ([*THREE, "--combine", "fours"], "--combine: 'fours' is no way to combine; give pairs, triples or all"),
        ([*THREE, "--combine", "pairs:none"], "--combine: 'pairs:none' names no arm with safeguards; there are pru"),
        (
            [*THREE, "--combine", "pairs", "--sweep", "guards.fairness.steepness=1,2"],
            "--combine and --sweep together multiply",
        ),
    ],
)
def test_what_makes_no_comparison_is_refused(args, answer, compared, capsys):
    code, out, err = said(capsys, "compare", *TOY, *args)
    assert (code, out, compared) == (2, "", {})
    assert err.startswith(answer)


@pytest.mark.parametrize(
    ("sweep", "answer"),
    [
        ("fairness.weigth=1,2", "fairness.weigth: unknown option 'weigth' of guards.fairness; did you mean 'weight'?"),
        ("fairness.steepness=1,x", "fairness.steepness: steepness='x' of guards.fairness must be a number"),
        ("fairness.steepness=1,-2", "fairness.steepness: guards.fairness: steepness=-2.0 moves"),
        ("fairnes.weight=1", "fairnes.weight: no arm switches fairnes on; name a recipe that does in --arm; did you"),
        ("dp_sgd.delta=1,2", "dp_sgd.delta: no arm switches dp_sgd on; name a recipe that does in --arm"),
        ("batch.target=1,2", "batch.target: sweeps an option of one guard; write --sweep guards.NAME.OPTION=VALUE"),
        ("fairness=1", "fairness: sweeps an option of one guard"),
        ("fairness.steepness", "fairness.steepness: has no values"),
        ("fairness.steepness=1,,2", "fairness.steepness: lacks a value"),
        ("fairness.steepness=1,2,1", "fairness.steepness: 1,2,1 has a value twice"),
    ],
)
def test_what_makes_no_sweep_is_refused(sweep, answer, compared, capsys):
    code, out, err = said(capsys, "compare", *TOY, *SWEPT, f"guards.{sweep}")
    assert (code, out, compared, err.count("\n")) == (2, "", {}, 0)
    assert err.startswith(f"--sweep guards.{answer}")


@pytest.mark.parametrize(
    ("more", "answer"),
    [
        (["--sweep", "guards.fairness.steepness=3"], "is swept twice; give all its values to one --sweep"),
        (
            ["--guards.fairness.steepness", "3"],
            "--guards.fairness.steepness states it for every arm; leave out one of them",
        ),
    ],
)
def test_a_sweep_is_stated_once(more, answer, compared, capsys):
    code, _, err = said(capsys, "compare", *TOY, *SWEPT, "guards.fairness.steepness=1,2", *more)
    assert (code, compared) == (2, {})
    assert err == f"--sweep guards.fairness.steepness: {answer}"


def test_arms_are_combined_and_what_is_refused_is_told_and_not_trained(compared):
    args = [*TWO, "--arm=shared=weight-clustering", "--arm=rounded=quantization", "--combine", "pairs"]
    args += ["--arm", "rounded+pruning=small", "--guards.quantization.start", "0.1"]
    main(["compare", *TOY, *args])
    told, argv = compared["combinations"], compared["argv"]
    assert told["parts"] == ["pruning", "shared", "rounded"]
    assert [one["parts"] for one in told["refused"]] == [["shared", "rounded"]]
    assert "values that a layer shares part again" in told["refused"][0]["reasons"][0]
    assert {tuple(one["parts"]): one["arm"] for one in told["arms"]} == {
        ("pruning", "rounded"): "rounded+pruning",  # the arm that is named so
        ("pruning", "shared"): "pruning+shared",
    }
    names = ["none", "pruning", "shared", "rounded", "rounded+pruning", "pruning+shared"]
    assert list(compared["arms"]) == names
    assert "distillation" in own_guards(compared["arms"]["rounded+pruning"].build([]))
    assert own_guards(compared["arms"]["pruning+shared"].build([])) == {"magnitude_pruning", "weight_clustering"}
    assert argv[-2:] == ["--worker", "--refused=shared+rounded"]
    main(["compare", *TOY, *args, *argv[-2:]])  # a worker takes the same arms, and rehearses none
    assert list(compared["arms"]) == names


def test_an_arm_that_is_no_combination_and_refused_ends_the_comparison(compared, capsys):
    args = ["--arm", "none", "--arm", "quantization+weight-clustering", "--arm", "pruning", "--arm", "fairness"]
    code, _, err = said(capsys, "compare", *TOY, *args, "--combine", "pairs")
    assert (code, compared) == (2, {})
    assert err.startswith("arm quantization+weight-clustering: the guards cannot keep their promises here")


def test_a_baseline_is_not_swept_and_names_differ(compared, capsys):
    _, _, err = said(capsys, "compare", *TOY, "--arm", "fairness", *SWEPT, "guards.fairness.steepness=1,2")
    assert err.startswith("--sweep guards.fairness.steepness: the first arm, fairness, switches fairness on")
    assert err.endswith("put --arm none before it")
    _, _, err = said(
        capsys, "compare", *TOY, *SWEPT, "guards.fairness.steepness=1", "--arm", "fairness steepness=1=pruning"
    )
    assert err.startswith("two of the arms none, fairness steepness=1, fairness steepness=1 have one name")
    _, _, err = said(capsys, "compare", *TOY, *SWEPT, "trainer.max_epochs=1,2")
    assert err.startswith("--sweep trainer.max_epochs: sweeps an option of one guard")
    assert compared == {}


def test_a_mistake_in_a_sweep_is_told_once(compared, capsys):
    args = [*SWEPT, "guards.fairness.notoin=equalized_odds,demographic_parity"]
    code, _, err = said(capsys, "compare", *TOY, *args)
    assert (code, compared, err.count("\n")) == (2, {}, 0)
    assert err.endswith("unknown option 'notoin' of guards.fairness; did you mean 'notion'?")


def test_a_sweep_makes_an_arm_of_each_value(compared, monkeypatch):
    monkeypatch.setattr(arms, "rehearse", lambda *_, **__: Rehearsal())
    args = [*TWO, "--arm", "both=fairness+pruning"]
    sweeps = [
        "--sweep",
        "guards.fairness.init_args.steepness=0.5,2",
        "--sweep=guards.magnitude_pruning.sparsity=3e-1,0.6",
    ]
    assert main(["compare", *TOY, *args, *sweeps, "--reference", "exponentiated_gradient"]) == 0
    assert compared["references"] == ["exponentiated_gradient"]
    found = {
        name: {c.name: c for c in arm.build([])[0].callbacks if isinstance(c, Guard)}
        for name, arm in compared["arms"].items()
    }
    assert {
        name: [getattr(own.get(guard), option, None) for guard, option in
               (("fairness", "steepness"), ("magnitude_pruning", "sparsity"))]
        for name, own in found.items()
    } == {
        "none": [None, None],
        "pruning sparsity=3e-1": [None, 0.3], "pruning sparsity=0.6": [None, 0.6],
        "both steepness=0.5 sparsity=3e-1": [0.5, 0.3], "both steepness=0.5 sparsity=0.6": [0.5, 0.6],
        "both steepness=2 sparsity=3e-1": [2.0, 0.3], "both steepness=2 sparsity=0.6": [2.0, 0.6],
    }  # fmt: skip
    assert compared["arms"]["none"].sweep is None
    assert compared["arms"]["both steepness=2 sparsity=0.6"].sweep == {
        "of": "both", "key": "guards.fairness.steepness", "value": 2,
        "also": [{"key": "guards.magnitude_pruning.sparsity", "value": 0.6}],
    }  # fmt: skip
    assert compared["arms"]["pruning sparsity=3e-1"].sweep["value"] == 0.3
    assert len({arm.config for arm in compared["arms"].values()}) == len(compared["arms"])
    assert set(compared["arms"]["both steepness=2 sparsity=0.6"].recipes) == {"fairness", "pruning"}


def test_a_sweep_of_one_name_in_two_guards_says_which(compared):
    write("guards: {fairness: {weight: 1}, magnitude_pruning: {sparsity: 0.5}, trimmed_loss: {}}", "much.yaml")
    names = [name for name, _ in arms._swept([("none", []), ("much", [arms.find("much.yaml")])], [
        arms.Sweep("fairness", "start", ("1",)), arms.Sweep("trimmed_loss", "start", ("2",)),
    ])]  # fmt: skip
    assert names == ["none", "much fairness.start=1 trimmed_loss.start=2"]


def test_the_problems_of_all_arms_are_told_before_anything_is_trained(compared, capsys):
    write("guards: {magnitude_pruning: {sparsity: 2}}", "much.yaml")
    write("guards: {magnitude_pruning: {targets: [x]}}", "lost.yaml")
    write("guards: {fairness: {}}\nevaluate: {task: null}", "judge.yaml")
    arms = [part for arm in ("none", "a=much.yaml", "b=judge.yaml", "c=lost.yaml") for part in ("--arm", arm)]
    code, _, err = said(capsys, "compare", *TOY, *arms)
    assert (code, compared) == (2, {})
    first, second = err.splitlines()
    assert first.startswith("arm a: much.yaml:1: guards.magnitude_pruning: sparsity=2.0 is no fraction")
    assert second.startswith("arm b: its recipes say how it is judged (evaluate)")
    code, _, err = said(capsys, "compare", *TOY, "--arm", "none", "--arm", "c=lost.yaml")
    assert (code, compared) == (2, {})
    assert err.startswith("arm c: the guards cannot keep their promises here")


def test_a_comparison_runs_for_real(capsys):
    args = [*TOY, "--trainer.max_epochs", "1", "--arm", "none", "--arm", "pruning", "--seeds", "1", "--out", "here"]
    args += ["--evaluate.efficiency", "null", "--evaluate.robustness", "null"]
    assert said(capsys, "compare", *args)[:2] == (0, "The report is here/report.html")
    report = json.loads(Path("here/report.json").read_text())
    assert [arm["name"] for arm in report["arms"]] == ["none", "pruning"]
    assert report["provenance"]["command"] == "lightning-guard compare " + " ".join(args)
    assert {run["initial_weights_sha256"] for run in report["runs"]} == {report["runs"][0]["initial_weights_sha256"]}
    assert not {path.name for path in Path().iterdir()} - {"here"}


def test_an_arm_without_guards_is_rehearsed_as_it_will_run(compared):
    # Net takes pairs: where one arm uses the group, the runner withholds it from every arm.
    assert main(["compare", "--model", "tests.toys.Net", *TOY[2:], "--arm", "none", "--arm", "fairness"]) == 0
    assert set(compared["arms"]) == {"none", "fairness"}


def test_a_worker_gets_the_same_comparison_and_says_nothing(compared, capsys):
    args = [*TOY, "--arm", "none", "--arm", "pruning", "--workers", "2"]
    assert main(["compare", *args]) == 0
    argv = compared["argv"]
    assert argv[1:4] == ["-m", "lightning_guard", "compare"]
    capsys.readouterr()
    assert said(capsys, *argv[3:]) == (0, "", "")
    assert compared["worker"] is True
