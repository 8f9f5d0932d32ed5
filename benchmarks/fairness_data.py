"""The tables of the fairness benchmark: Adult with other groups than the package's, and COMPAS."""

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import torch

from lightning_guard.data import AdultData
from lightning_guard.data.base import Table, TableData

AGES = (18, 96)
COUNTS = ("priors_count", "juv_fel_count", "juv_misd_count", "juv_other_count")
MOST = 50  # counts are scaled by log1p to this one
RACES = ("African-American", "Caucasian")


class AdultBySex(AdultData):
    """Adult with sex and race hidden, and groups by sex, or by sex and white or not."""

    def __init__(self, batch_size, crossed=False):
        super().__init__(group="sex+race", batch_size=batch_size)
        self.crossed = crossed

    @property
    def group_names(self):
        return ("Female, other", "Female, White", "Male, other", "Male, White") if self.crossed else ("Female", "Male")

    def table(self, part):
        x, y, code = super().table(part).columns
        sex, white = code // 5, (code % 5 == 4).long()
        return Table(x, y, 2 * sex + white if self.crossed else sex)


def kept(row):
    """ProPublica's filter: the score belongs to the arrest, the outcome is known, no ordinary traffic offence."""
    days = row["days_b_screening_arrest"]
    return (
        days != ""
        and -30 <= int(days) <= 30
        and row["is_recid"] != "-1"
        and row["c_charge_degree"] != "O"
        and row["score_text"] != "N/A"
    )


class CompasData(TableData):
    """Is a person arrested again within two years? ProPublica, 2016, https://github.com/propublica/compas-analysis

    A batch is ``(x, y, group)``: ``x`` float32 of shape ``(N, 6)`` in [0, 1] (age, counts of earlier offences, a
    felony or not), ``y`` int64 with 1 for arrested again, ``group`` int64, 0 African-American and 1 Caucasian. Race
    and sex are hidden. ProPublica's filter keeps 6,172 of 7,214 rows; the 894 of other races are dropped, since
    most peers take no missing groups, which leaves 5,278.

    Args:
        path: ``compas-scores-two-years.csv``, plain or ``.gz``.
        seed: Draws the 70 % of the rows that are the training part.
        batch_size: Examples in a training batch.

    Raises:
        ValueError: The filter does not leave the 6,172 rows that it should.
    """

    source = "compas"
    license = "none stated (public records)"
    bounds = (0.0, 1.0)
    num_classes = 2
    class_names = ("not arrested again", "arrested again")
    group_names = RACES
    in_features = 6

    def __init__(self, path, seed=0, batch_size=256):
        super().__init__(batch_size, eval_batch_size=2048, data_dir=None, val_fraction=0.1, num_workers=0)
        self.path, self.seed = path, seed

    def read(self):
        raw = Path(self.path).read_bytes()
        text = gzip.decompress(raw) if self.path.endswith(".gz") else raw
        rows = [row for row in csv.DictReader(io.StringIO(text.decode())) if kept(row)]
        if len(rows) != 6172:
            raise ValueError(f"{self.path}: ProPublica's filter leaves {len(rows)} rows instead of 6,172")
        rows = [row for row in rows if row["race"] in RACES]
        columns = {
            "age": [(int(row["age"]) - AGES[0]) / (AGES[1] - AGES[0]) for row in rows],
            **{name: [np.log1p(int(row[name])) / np.log1p(MOST) for row in rows] for name in COUNTS},
            "felony": [row["c_charge_degree"] == "F" for row in rows],
        }
        whole = {
            "x": np.array(list(columns.values()), np.float32).T,
            "y": np.array([int(row["two_year_recid"]) for row in rows]),
            "group": np.array([RACES.index(row["race"]) for row in rows]),
        }
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).numpy()
        parts = dict(zip(("train", "test"), np.split(order, [round(0.7 * len(rows))]), strict=True))
        return {f"{part}_{name}": array[at] for part, at in parts.items() for name, array in whole.items()}

    def table(self, part):
        return Table(*(torch.from_numpy(self.arrays[f"{part}_{name}"]) for name in ("x", "y", "group")))
