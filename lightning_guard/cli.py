"""The command line: ``lightning-guard fit|validate|test|predict|check|compare|verify|sign|export|list|show|schema``.

What needs no torch is done before it is imported, so that recipes are listed and shown at once.
"""

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from lightning_guard import __version__
from lightning_guard.recipe import FORMAT, Recipe, RecipeError, find, merged, nearest, plain, read, recipes, refused

_CONFIGURED = """
Files and options, any number of them; what stands further right counts:
  --config FILE          a configuration: model, data, trainer, guards (-c)
  --recipe NAME          the same, found by name too: `lightning-guard list`
  --model CLASS          my_module.MyModel, or SmallCNN, MLP, SmallTransformer; --model.OPTION VALUE
  --data CLASS           my_module.MyData, or FashionMNISTData, AdultData; --data.OPTION VALUE
  --data-dir FOLDER      short for --data.data_dir FOLDER
  --trainer.OPTION VALUE any option of the Trainer: --trainer.max_epochs 5
  --seed_everything N    seed of weights and data order (0)
  --guards.batch.OPTION  how a batch is read: inputs, target, group, logits

Guards, each with its options as --guards.NAME.OPTION VALUE; --guards.NAME null switches it off:
{guards}
  `lightning-guard show NAME` explains one of them."""

_EVERY_OPTION = """
--print_config prints the resulting configuration. --help all prints every option that there is."""

_VERBS = {
    "fit": ("Train a model with the guards that are switched on.", "--config demo/adult --recipe fairness", """
  --ckpt_path FILE       resume a training; the guards that it was trained with must be there"""),
    "validate": ("Run the validation of a model.", "--config config.yaml --ckpt_path last.ckpt", ""),
    "test": ("Run the test of a model.", "--config config.yaml --ckpt_path last.ckpt", ""),
    "predict": ("Run the prediction of a model.", "--config config.yaml --ckpt_path last.ckpt", ""),
    "check": ("Do everything of a fit but the training: parse, build, compose, one step, undo.",
              "--config demo/adult --recipe fairness", """
  --rules                alone: print the whole table of which safeguards go together, and why"""),
    "compare": ("Train guarded and unguarded models on the same seeds and report what each gained and cost.",
                "--config demo/adult --arm none --arm fairness --arm fairness+pruning --out adult", """
  --arm ARM              none, or recipes as RECIPE+RECIPE, or NAME=RECIPE+RECIPE; the first is the baseline;
                         NAME=model.ckpt is judged without training, {seed} in it stands for the seed
  --sweep KEY=V,V        an arm for each value: guards.fairness.max_gap=0.02,0.05,0.1; several sweeps multiply
  --combine WHAT,WHAT    an arm for each combination of those given: pairs, triples, all; pairs:ARM of those with it
  --reference NAME,NAME  beside a sweep of fairness, fairlearn's threshold_optimizer, exponentiated_gradient
  --seeds N              runs of every arm (3)
  --out FOLDER           where report and runs go; finished runs are found there and kept (comparison)
  --title TEXT           of the report
  --workers N            processes that share the runs (1)
  --resplit              split train and validation by seed, where the data module has `split_seed`
  --lira N               also train N models of every arm on halves of the rows, and attack them by offline LiRA
  --inconclusive WHAT    whether gates (`accept:` in a file) that cannot be decided fail or pass (fail)
  --publishable          write public/ too: the report without pictures of data, and what publishing would leak
  --runs FOLDER FOLDER   instead of training: folders of finished comparisons, or of `fit` with its checkpoint
  --evaluate.NAME.OPTION what is measured: task, robustness, fairness, efficiency; all of them unless stated"""),
    "verify": ("Make again what a finished comparison says, from predictions, checkpoints and data, and compare.",
               "comparison", """
  --full                 make again what takes long too: attacks, certificates, audits
  --hash HASH            of a signature or of the folder, kept elsewhere: the folder must be the one that has it"""),
    "sign": ("Sign a finished comparison: a name and a note, bound to the hash of every file.",
             "comparison --name 'Ada Lovelace' --note 'Reviewed for release 2'", """
  --name NAME            of who signs
  --note TEXT            what they have to say"""),
    "export": ("Write a trained model as a file for use, checked against the model on real data before it is there.",
               "--config run/config.yaml --ckpt_path last.ckpt --out model.onnx --format onnx-int8", """
  --ckpt_path FILE       the trained model
  --out FILE             the file to write
  --format FORMAT        onnx, onnx-int8, torch, pt2e or sparse (onnx)
  --tolerance SHARE      of the examples that the file may predict otherwise (0.01 in int8, else 0)
  --check DATA           what the file is checked on: test, validate or train (test)
  --calibrate DATA       what ranges of int8 activations are read from: train, validate or test (train)
  --batches N            how many batches of it (16)
  --linear HOW           ranges of the inputs of linear layers: static, or dynamic, for transformers (static)
  --threads N            of onnxruntime, while latency is measured (1)"""),
    "list": ("List the recipes: yours in ./recipes, then the shipped ones.", "", ""),
    "show": ("Show what recipes say, several merged; or what a guard promises and which options it has.",
             "adversarial-training pruning", ""),
    "schema": ("Print the JSON schema of recipes, for editors.", "> guards.schema.json", ""),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code: 0, 1 if gates fail or a folder differs, or 2 if something is refused."""
    args = list(sys.argv[1:] if argv is None else argv)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # for `--model my_module.MyModel`, as with `python -m`
    try:
        return _main(args)
    except BrokenPipeError:  # `lightning-guard list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130  # what shells expect; whoever was interrupted has said what is kept
    except Exception as error:
        if not refused(error):
            raise
        print(error, file=sys.stderr)
        return 2


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    verb, *rest = args
    if verb == "--version":
        print(f"lightning-guard {__version__}")
        return 0
    if verb.startswith("-"):
        raise RecipeError(f"write the verb first: lightning-guard fit {' '.join(args)}")
    if verb not in _VERBS:
        raise RecipeError(f"unknown verb {verb!r}{nearest(verb, _VERBS) or '; there are ' + ', '.join(_VERBS)}")
    if {"-h", "--help"} & set(rest) and rest[-1] != "all":
        print(_help(verb))
        return 0
    return _run(verb, rest)


def _run(verb: str, args: list[str]) -> int:
    if verb == "list":
        _refuse_options(verb, args)
        print(_list())
    elif verb == "show":
        if not args:
            raise RecipeError("show needs the name of a recipe or of a guard; `lightning-guard list` shows the recipes")
        print(_show(args))
    elif verb == "schema":
        from lightning_guard.launch import schema

        _refuse_options(verb, args)
        print(schema())
    elif verb == "check":
        from lightning_guard.check import check

        return check(args)
    elif verb == "compare":
        from lightning_guard.arms import compare

        return compare(args)
    elif verb in ("verify", "sign"):
        from lightning_guard import review

        return review.verify(args) if verb == "verify" else review.sign(args)
    elif verb == "export":
        from lightning_guard.export.command import command

        return command(args)
    else:
        from lightning_guard.launch import run

        run(verb, args)
    return 0


def _refuse_options(verb: str, args: Sequence[str]) -> None:
    if args:
        raise RecipeError(f"{verb} takes no {args[0]!r}; write lightning-guard {verb}")


def _list() -> str:
    found = recipes()
    width = max(len(recipe.name) for recipe in found)
    return "\n".join(f"{recipe.name:<{width}}  {recipe.title}" for recipe in found)


# Show ---------------------------------------------------------------------------------------------------------


def _show(names: Sequence[str]) -> str:
    guards = {name: node for slot, node in _guards() for name in (slot, node.name)}
    if len(names) == 1 and names[0] in guards and names[0] not in [recipe.name for recipe in recipes()]:
        return _explain(guards[names[0]])
    found = [_found(name, guards) for name in names]
    nodes = [read(recipe) for recipe in found]
    if len(found) == 1:
        if names[0] in guards:
            hint = f"a guard has this name too: lightning-guard show {guards[names[0]].name}"
            print(hint, file=sys.stderr)
        return found[0].text.rstrip("\n")
    lines = [f"# {' + '.join(recipe.name for recipe in found)}", f"# lightning-guard: {FORMAT}"]
    body = yaml.safe_dump(merged(plain(node) for node in nodes), sort_keys=False, allow_unicode=True)
    return "\n".join(lines) + "\n" + body.rstrip("\n")


def _found(name: str, guards: dict[str, ast.ClassDef]) -> Recipe:
    try:
        return find(name)
    except RecipeError as error:
        hint = nearest(name, guards) if "did you mean" not in str(error) else ""
        raise RecipeError(f"{error}{hint}") from None


def _guards() -> Iterator[tuple[str, ast.ClassDef]]:
    """Our guards as their sources say, since importing them would import torch."""
    for path in sorted((Path(__file__).parent / "callbacks").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for line in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == "name" and line.value is not None:
                    yield ast.literal_eval(line.value), node  # type: ignore[misc]


def _explain(guard: ast.ClassDef) -> str:
    """Signature and docstring."""
    init = next(node for node in guard.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    options = init.args.args[1:]
    defaults = [None] * (len(options) - len(init.args.defaults)) + list(init.args.defaults)
    lines = [f"{guard.name}("]
    for argument, default in zip(options, defaults, strict=True):
        kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        lines.append(f"    {argument.arg}{kind}{f' = {ast.unparse(default)}' if default is not None else ''},")
    return "\n".join([*lines, ")", "", ast.get_docstring(guard) or ""]).rstrip()


# Help ---------------------------------------------------------------------------------------------------------


def _overview() -> str:
    width = max(map(len, _VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, (what, _, _) in _VERBS.items())
    return (
        "Safeguards for the training of PyTorch Lightning models.\n\n"
        f"usage: lightning-guard VERB ...\n\n{verbs}\n\n`lightning-guard VERB --help` explains a verb."
    )


def _help(verb: str) -> str:
    what, example, options = _VERBS[verb]
    text = f"{what}\n\nexample: lightning-guard {verb} {example}".rstrip() + "\n"
    if options:
        text += f"\nOptions of {verb}:{options}\n"
    if verb in ("list", "show", "schema", "verify", "sign"):
        return text.rstrip()
    promises = [(name, (ast.get_docstring(node) or "").split("\n")[0]) for name, node in _guards()]
    width = max(len(name) for name, _ in promises)
    return (
        text + _CONFIGURED.format(guards="\n".join(f"  {n:<{width}}  {p}" for n, p in promises)) + "\n" + _EVERY_OPTION
    )
