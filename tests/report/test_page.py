import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from lightning_guard.report import document as documents
from lightning_guard.report import drawing, html, marks
from lightning_guard.report.computed import computed
from tests.report.example import HOSTILE, comparison

VOID = {"meta", "wbr"}
ALLOWED = VOID | {
    *("html", "head", "title", "style", "body", "header", "nav", "main", "section", "article", "footer", "div", "p"),
    *("span", "strong", "small", "bdi", "time", "h1", "h2", "h3", "h4", "ul", "li", "dl", "dt", "dd", "a", "code"),
    *("table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
    *("svg", "g", "path", "defs", "clippath", "rect", "use", "text"),
}


class Page(HTMLParser):
    """Reads a page, insists that tags balance, and keeps what was found."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.styles = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), len(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), len(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.words).append(data)

    def having(self, tag):
        return [attributes for name, attributes, _ in self.tags if name == tag]


def page(results):
    return html.page(computed(documents.prepare(results)))


def check(text):
    """Holds for every page, whatever the names in it."""
    read = Page(text)
    assert {tag for tag, _, _ in read.tags} <= ALLOWED
    for tag, attributes, count in read.tags:
        assert len(attributes) == count, f"<{tag}> has an attribute twice"
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
        assert "http" not in attributes.get("style", "")
    (style,) = read.styles
    assert not re.search(r"url\(|@import|http", style)
    assert read.having("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes, _ in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#|labelledby=")([^")]+)', text)
    assert set(references) <= set(ids)
    assert len(text.encode()) < 3_000_000
    return read


@pytest.mark.parametrize(
    "shape",
    [
        {"arms": 1, "seeds": 1, "curves": False, "bars": False},
        {"arms": 1, "seeds": 3},
        {"arms": 2, "seeds": 1},
        {"arms": 6, "seeds": 2, "bars": False},
        {"arms": 8, "seeds": 1, "curves": False},
    ],
)
def test_pages_of_every_shape(shape):
    read = check(page(comparison(**shape)))
    words = " ".join(read.words)
    assert ("Distance from the baseline" in words) == (shape["arms"] > 1)
    assert ("Under attack" in words) == shape.get("curves", True)
    assert len([cell for cell in read.having("td") if "data-arm" in cell]) == 5 * shape["arms"]


def test_hostile_names_are_shown_and_do_nothing():
    results = comparison(arms=HOSTILE, seeds=1)
    results["title"] = HOSTILE[0] + "</title>"
    results["limits"] += HOSTILE
    results["provenance"]["command"] = HOSTILE[1]
    results["provenance"]["recipes"] = dict.fromkeys(HOSTILE, "0" * 64)
    for key, name in zip(results["figures"], HOSTILE, strict=False):
        results["figures"][key] |= {"label": name, "about": name, "unit": name, "headline": True}
    results["figures"]["odd/one"] = {"axis": HOSTILE[1], "label": "x", "unit": "", "better": None, "about": ""}
    results["bars"]["fairness/rates"] |= {"categories": list(HOSTILE[:2]), "label": HOSTILE[2], "y_label": HOSTILE[8]}
    results["curves"]["robustness/eps"] |= {"x_label": HOSTILE[5], "y_label": HOSTILE[6], "y_unit": HOSTILE[1]}
    results["arms"][1]["guards"] = [{"name": name, "promise": name, "options": {name: name}} for name in HOSTILE]
    for run in results["runs"]:
        run["notes"] = list(HOSTILE)
    read = check(page(results))
    words = "".join(read.words)
    for name in HOSTILE[:6]:
        assert name in words
    assert "49" not in re.findall(r"\$x\^2\$ (\S+)", words)
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x1b]", words)


def test_values_that_cannot_be_estimated():
    results = comparison(arms=3, seeds=2)
    for run in results["runs"]:
        run["values"]["cost/time"] = None
        if run["arm"] == "arm-0":
            run["values"]["efficiency/bytes"] = None
        if run["seed"] == 1:
            del run["values"]["robustness/pgd"]
        run["curves"]["robustness/eps"]["y"][1] = None
        run["bars"]["fairness/rates"][0] = None
    words = " ".join(check(page(results)).words)
    assert "n/a" in words
    assert "1 of 2 seeds" in words
    assert "Without a value in arm-0" in words
    assert not re.search(r"\b(nan|None)\b", words)


def test_curves_and_bars_without_any_value_are_not_drawn():
    results = comparison(arms=2)
    for run in results["runs"]:
        run["curves"]["robustness/eps"]["y"] = [None] * 3
        run["bars"]["fairness/rates"] = [None, None]
    words = " ".join(check(page(results)).words)
    assert "Under attack" not in words
    assert "Rates" not in words


def test_seeds_measured_at_different_places_have_no_mean_but_are_drawn():
    results = comparison(arms=2, seeds=2)
    results["runs"][0]["curves"]["robustness/eps"] = {"x": [0.05], "y": [0.5]}
    assert "Under attack" in " ".join(check(page(results)).words)


def test_figures_say_what_they_show():
    results = comparison(arms=2, seeds=2)
    for run in results["runs"]:
        guarded = run["arm"] == "arm-1"
        run["values"]["task/accuracy"] = 0.75 if guarded else 0.5
        run["curves"]["robustness/eps"]["y"] = [0.875, 0.5, 0.125]
        run["bars"]["fairness/rates"] = [0.25, 0.5]
    results["curves"]["robustness/eps"]["y_unit"] = results["bars"]["fairness/rates"]["y_unit"] = "fraction"
    labels = [svg["aria-label"] for svg in check(page(results)).having("svg") if "aria-label" in svg]
    assert (
        "Accuracy, mean over seeds and difference from arm-0: arm-0 50.0%; arm-1 75.0% (+25.0 pts, better)." in labels
    )
    curve = "Under attack. arm-0 from 87.5% at 0 to 12.5% at 0.200; arm-1 from 87.5% at 0 to 12.5% at 0.200."
    assert curve in labels
    assert "Rates. Female: arm-0 25.0%, arm-1 25.0%; Male: arm-0 50.0%, arm-1 50.0%." in labels
    assert sum("against" in label for label in labels) == 4


def test_the_verdict_tells_gain_from_cost():
    results = comparison(arms=2, seeds=3)
    for run in results["runs"]:
        guarded = run["arm"] == "arm-1"
        run["values"] = {
            "task/accuracy": 0.841 if guarded else 0.872,
            "robustness/pgd": 0.71 if guarded else 0.02,
            "fairness/rate": 0.3,
            "efficiency/bytes": 4e5 + (run["seed"] - 1) * guarded,
            "cost/time": 73.2 if guarded else 12.0,
        }
    words = " ".join(" ".join(check(page(results)).words).split())
    assert "Inconclusive, better in every seed Accuracy under PGD 2.0% → 71.0% +69.0 pts (+69.0 pts), about 6" in words
    assert "Inconclusive, worse in every seed Accuracy 87.2% → 84.1% −3.1 pts (−3.1 pts), about 6 seeds" in words
    assert "Training time 12.0 s → 1 min 13 s 6.1 times" in words
    said = "1 better in every seed, 2 worse in every seed, 1 unchanged, 1 undecided."
    assert f"All 5 figures, described and not claimed: {said}" in words
    assert "cannot give a p-value below 0.25" in words


def test_broken_pairing_is_at_the_top():
    results = comparison(arms=2, seeds=2)
    results["runs"][-1]["data_order_sha256"] = "0" * 64
    words = " ".join(check(page(results)).words)
    line = "The arms were not trained on the same data order for seed 1: arm-1 differs from arm-0."
    assert words.index(line) < words.index("Verdict")


def test_intervals_over_the_test_set_are_kept_apart_from_seeds():
    results = comparison(arms=2, seeds=2)
    for run, pair in zip(results["runs"], ([0.2, 0.4], [0.1, 0.3], None, [None, 1.0]), strict=True):
        run["intervals"] = {"task/accuracy": pair}
    words = " ".join(check(page(results)).words)
    assert words.count("test set 10.0 to 40.0%") == 1
    assert "Test set: what 95%" in words


def test_the_user_s_matplotlib_settings_neither_matter_nor_change():
    import matplotlib

    plain = page(comparison(arms=1, seeds=1))
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert page(comparison(arms=1, seeds=1)) == plain
        assert dict(matplotlib.rcParams) == before


def test_large_curves_stay_small():
    results = comparison(arms=1, seeds=2, bars=False)
    x = [i / 2_000 for i in range(2_000)]
    for run in results["runs"]:
        run["curves"]["robustness/eps"] = {"x": x, "y": [(i * 7919 % 1000) / 1000 for i in range(2_000)]}
    text = page(results)
    check(text)
    assert len(text.encode()) < 60_000


def test_labels_keep_their_distance_and_order():
    placed = drawing.spread([50.0, 50.0, 49.0, 10.0], 12.0, 0.0, 55.0)
    ordered = sorted(placed)
    assert all(b - a >= 12.0 for a, b in pairwise(ordered))
    assert placed[3] == 10.0
    assert max(placed) <= 55.0


def test_boxes_share_what_they_share():
    assert marks.Box(0, 0, 2, 2).shared(marks.Box(1, 1, 5, 5)) == 1.0
    assert marks.Box(0, 0, 2, 2).shared(marks.Box(3, 0, 5, 5)) == 0.0
    assert marks.Box(-1, 0, 2, 7).outside(marks.Box(0, 0, 5, 5)) == 3.0


@pytest.mark.parametrize("colour", [look.colour for look in (drawing.BASELINE, *drawing.GUARDED)])
def test_marks_can_be_seen(colour):
    assert contrast(colour) >= 3.0


@pytest.mark.parametrize("colour", ["#1d2433", "#596273", "#17693c", "#a5321b"])
def test_letters_can_be_read(colour):
    assert contrast(colour) >= 4.5


def contrast(colour):
    """Contrast with white, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 1.05 / (0.05 + sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)))
