"""Recipes are found by name, read strictly, and located to the line."""

import hashlib
import re
from pathlib import Path

import pytest
import yaml

from lightning_guard.recipe import RecipeError, find, items, locate, merged, option, place, plain, read, recipes

SHIPPED = [recipe.name for recipe in recipes()]


def write(text, name="mine.yaml"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return find(name)


def test_a_path_stands_before_the_folder_and_the_folder_before_the_package():
    assert find("fairness").shown == "lightning_guard/recipes/fairness.yaml"
    write("# mine\nguards: {}\n", "recipes/fairness.yaml")
    assert find("fairness").shown == "recipes/fairness.yaml"
    assert find("fairness").title == "mine"
    write("# a file without a suffix\nguards: {}\n", "fairness")
    assert find("fairness").path == Path("fairness")


def test_demo_configurations_are_found_but_not_listed():
    assert find("demo/adult").path.name == "adult.yaml"
    assert not any(name.startswith("demo") for name in SHIPPED)


def test_recipes_of_the_folder_are_listed_once_and_first():
    write("# mine\nguards: {}\n", "recipes/fairness.yaml")
    write("# new\nguards: {}\n", "recipes/a-new-one.yaml")
    found = {recipe.name: recipe.title for recipe in recipes()}
    assert list(found) == sorted([*SHIPPED, "a-new-one"])
    assert found["fairness"] == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fairnes", "no recipe named 'fairnes'; did you mean 'fairness'?"),
        ("demo/adlt", "no recipe named 'demo/adlt'; did you mean 'demo/adult'?"),
        ("xyz", "no recipe named 'xyz'; `lightning-guard list` shows the recipes, and a file needs its suffix"),
        ("here.yml", "no file 'here.yml'; did you mean 'here.yaml'?"),
        ("no/where.yaml", "no file 'no/where.yaml'; a recipe is named without suffix"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    write("guards: {}\n", "here.yaml")
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        find(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "mine.yaml:5: 'c' is there already in line 3; keep one of them"),
        ("a:\n- b: 1\n  b: 2\n", "mine.yaml:3: 'b' is there already in line 2; keep one of them"),
        ("a: [1\nb: 2\n", "mine.yaml:2: no valid YAML: expected ',' or ']', but got ':'"),
        ("a:\n\tb: 1\n", "mine.yaml:2: no valid YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 1\n", "mine.yaml:2: no valid YAML: but found another document"),
        ("[a]: 1\n", "mine.yaml:1: a key must be a word, not a list or a mapping"),
        ("", "mine.yaml: says nothing; a configuration has sections such as `guards:`"),
        ("- a\n", "mine.yaml: holds no mapping; a configuration has sections such as `guards:`"),
        ("a: \x07\n", "mine.yaml: no valid YAML: unacceptable character #x0007"),
    ],
)
def test_what_parsers_let_pass_is_refused_with_its_line(text, message):
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}"):
        read(write(text))


def test_an_unknown_format_is_refused_and_none_is_taken():
    assert plain(read(write("# one\n# lightning-guard: 1\na: 1\n"))) == {"a": 1}
    assert plain(read(write("a: 1\n# lightning-guard: 7\n"))) == {"a": 1}
    with pytest.raises(RecipeError, match=r"^mine.yaml:2: recipe format 2 is not known to lightning-guard \S+, which"):
        read(write("# one\n# lightning-guard: 2\na: 1\n"))


def test_text_that_is_not_utf8_is_refused():
    Path("mine.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(RecipeError, match=r"^mine.yaml: is not UTF-8 text"):
        read(find("mine.yaml"))


def test_a_key_is_located_with_and_without_init_args():
    node = read(write("guards:\n  fairness:\n    init_args:\n      weight: 2.0\ntrainer:\n  callbacks+: x\n"))
    at, value = locate(node, ["guards", "fairness", "weight"])
    assert (place(at), plain(value)) == ("mine.yaml:4", 2.0)
    assert place(locate(node, ["guards", "fairness", "init_args", "weight"])[0]) == "mine.yaml:4"
    assert locate(node, ["guards", "fairness", "steepness"]) == (None, None)
    assert locate(node, ["guards", "fairness", "weight", "deeper"]) == (None, None)


def test_merged_mappings_read_as_if_written_out():
    node = read(write("base: &base {a: 1}\nnext:\n  <<: *base\n  b: 2\nboth: {<<: [*base, {c: 3}]}\n"))
    inner = {name: [key for key, _, _ in items(value)] for name, _, value in items(node)}
    assert inner == {"base": ["a"], "next": ["a", "b"], "both": ["a", "c"]}


@pytest.mark.parametrize(
    ("text", "value"), [("2", 2), ("0.5", 0.5), ("null", None), ("true", True), ("a: b", "a: b"), ("", "")]
)
def test_an_option_of_the_command_line_reads_like_a_file(text, value):
    at, found = locate(option("guards.fairness.weight", text), ["guards", "fairness", "weight"])
    assert (plain(found), place(at), place(found)) == (value, *["--guards.fairness.weight"] * 2)


def test_merging_is_by_key_and_later_wins():
    first, second = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": None, "e": {}}
    assert merged([first, second]) == {"a": {"b": 1, "c": [2]}, "d": None, "e": {}}
    assert first == {"a": {"b": 1, "c": [1]}, "d": 1}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_written_for_people(name):
    recipe = find(name)
    first, second, *body = recipe.text.splitlines()
    assert first.startswith("# ")
    assert len(recipe.title) > 20
    assert second == "# lightning-guard: 1"
    assert all("#" in line for line in body if re.search(r":\s+[\d\[]", line)), "every number says its unit or source"
    assert recipe.sha256 == hashlib.sha256(recipe.path.read_bytes()).hexdigest()
    stated = yaml.safe_load(recipe.text)
    assert list(stated) == ["guards"]
    assert all(set(guard) == {"class_path", "init_args"} for guard in stated["guards"].values())
