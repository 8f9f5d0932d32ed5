"""Adult: features, groups and labels, and that both ways to the data agree."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_guard.data import AdultData
from lightning_guard.data.adult import CATEGORIES, COLUMNS, INCOMES, NUMERIC, scale
from lightning_guard.data.base import Arrays

WIDTHS = {None: 106, "sex": 104, "race": 101, "sex+race": 99}
PERSON = "39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family"
LINE = f"{PERSON}, White, Male, 2174, 0, 40, Cuba, "


def lines(arrays: Arrays, part: str, dot: str) -> str:
    """The rows as the published files spell them."""
    numbers, codes = arrays[f"{part}_numbers"], arrays[f"{part}_codes"]
    columns = {name: numbers[:, i].astype(str) for i, name in enumerate(NUMERIC)}
    columns |= {name: np.array(CATEGORIES[name])[codes[:, i]] for i, name in enumerate(CATEGORIES)}
    columns["fnlwgt"] = np.full(len(numbers), "12345")
    columns["education-num"] = (codes[:, list(CATEGORIES).index("education")] + 1).astype(str)
    columns["income"] = np.array([f"{income}{dot}" for income in INCOMES])[arrays[f"{part}_labels"]]
    return "\n".join(map(", ".join, zip(*(columns[name] for name in COLUMNS), strict=True))) + "\n\n"


def test_published_files_give_the_packaged_data(tmp_path: Path) -> None:
    packaged = AdultData()
    (tmp_path / "adult.data").write_text(lines(packaged.arrays, "train", ""))
    (tmp_path / "adult.test").write_text("|1x3 Cross validator\n" + lines(packaged.arrays, "test", "."))
    raw = AdultData(data_dir=str(tmp_path))
    assert raw.provenance() == packaged.provenance()
    for part in ("train_set", "val_set", "test_set"):
        for ours, theirs in zip(getattr(packaged, part).columns, getattr(raw, part).columns, strict=True):
            assert torch.equal(ours, theirs)


def test_published_counts() -> None:
    """Counts that UCI publishes with the data, or that one command on the raw files gives."""
    data = AdultData("sex", val_fraction=0)
    (_, y, sex), (_, test_y, test_sex) = data.train_set.columns, data.test_set.columns
    assert data.provenance()["rows"] == {"train": 32_561, "val": 0, "test": 16_281}
    assert (y.sum(), test_y.sum()) == (7_841, 3_846)
    assert data.group_names == ("Female", "Male")
    assert (sex.bincount().tolist(), test_sex.bincount().tolist()) == ([10_771, 21_790], [5_421, 10_860])
    missing = data.train_set.columns[0][:, data.feature_names.index("occupation=?")]
    assert missing.sum() == 1_843


@pytest.mark.parametrize("group", WIDTHS)
@pytest.mark.parametrize("see_group", [False, True])
def test_features(group: str | None, see_group: bool) -> None:
    data = AdultData(group, see_group)
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == (2 if group is None else 3)
    x = data.test_set.columns[0]
    assert data.in_features == len(data.feature_names) == batch[0].shape[1]
    assert data.in_features == (106 if see_group else WIDTHS[group])
    assert x.dtype == torch.float32
    assert all(column.dtype == torch.int64 for column in batch[1:])
    assert (x.min(), x.max()) == data.bounds
    assert [data.feature_names[i] for i in data.continuous] == list(NUMERIC)
    # Everything behind the numbers is one-hot: as many ones as there are columns.
    hidden = group.split("+") if group and not see_group else []
    one_hot = x[:, len(data.continuous) :]
    assert ((one_hot == 0) | (one_hot == 1)).all()
    assert (one_hot.sum(1) == len(CATEGORIES) - len(hidden)).all()
    for column in ("sex", "race"):
        assert any(name.startswith(f"{column}=") for name in data.feature_names) == (column not in hidden)


def test_groups_are_the_columns_that_define_them() -> None:
    seen = AdultData("sex+race", see_group=True)
    x, _, group = seen.test_set.columns
    assert len(seen.group_names) == 10
    for code, name in enumerate(seen.group_names):
        sex, race = name.split(", ")
        members = [x[:, seen.feature_names.index(name)] for name in (f"sex={sex}", f"race={race}")]
        assert torch.equal((members[0] * members[1]).bool(), group == code)
    assert torch.equal(AdultData("race").test_set.columns[2], group % 5)
    assert AdultData(None).group_names == ()


def test_hidden_groups_leave_proxies_behind() -> None:
    """What the docstring admits: relationship says almost everything about the sex of the married."""
    data = AdultData("sex")
    x, _, sex = data.test_set.columns
    husbands = x[:, data.feature_names.index("relationship=Husband")].bool()
    assert sex[husbands].float().mean() > 0.999


def test_scale_is_fixed_and_reaches_the_bounds() -> None:
    low, high = zip(*NUMERIC.values(), strict=True)
    assert scale(np.array([low, high])).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
    row = scale(np.array([[39, 7_688, 1_902, 40]]))[0].tolist()
    assert row == pytest.approx(
        [22 / 73, np.log1p(0.7688) / np.log1p(9.9999), np.log1p(0.1902) / np.log1p(9.9999), 39 / 98]
    )
    # A row's features do not change with the rows around it.
    many = AdultData().arrays["test_numbers"]
    assert torch.equal(scale(many)[:5], scale(many[:5]))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (LINE + ">50K, surplus", r"line 2 is no Adult row \(16 fields instead of 15\)"),
        (LINE + ">60K", "line 2 .*income='>60K' is not in the published vocabulary"),
        (LINE.replace("Never-married", "Engaged") + ">50K", "line 2 .*marital-status='Engaged'"),
        (LINE.replace("39", "12") + ">50K", r"age=12 lies outside 17\.\.90"),
    ],
)
def test_other_rows_are_refused(line: str, says: str, tmp_path: Path) -> None:
    for name in ("adult.data", "adult.test"):
        (tmp_path / name).write_text(f"{LINE}<=50K\n{line}\n")
    with pytest.raises(ValueError, match=says):
        AdultData(data_dir=str(tmp_path)).read()


def test_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group='age' must be 'sex', 'race', 'sex\\+race' or None"):
        AdultData("age")  # type: ignore[arg-type]
