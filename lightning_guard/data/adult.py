"""Adult, also called Census Income (Becker and Kohavi, 1996, https://doi.org/10.24432/C5XW20)."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_guard.data.base import Arrays, Table, TableData, read_files, read_packaged

FILES = {"train": "adult.data", "test": "adult.test"}
"""The published files, by the part that each one holds."""

COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation",
    "relationship", "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country",
    "income",
)  # fmt: skip
"""The columns of the published files, in their order."""

NUMERIC: dict[str, tuple[int, int]] = {
    "age": (17, 90),
    "capital-gain": (0, 99_999),
    "capital-loss": (0, 99_999),
    "hours-per-week": (1, 99),
}
"""Bounds of the numeric columns, in years, dollars, dollars and hours.

They come from the survey and not from the rows: the extraction kept ages above 16, and the survey says 90 for
everybody older; hours are positive and have two digits, amounts of dollars have five.
"""

LOGARITHMIC: dict[str, float] = {"capital-gain": 10_000.0, "capital-loss": 10_000.0}
"""Columns that go through ``log1p`` before they are scaled, and the dollars that count as one there.

Most amounts are zero, the others spread over three decades. Counted in single dollars, the logarithm would
press the amounts that tell incomes apart into a tenth of the range, which costs an MLP half a point.
"""

CATEGORIES: dict[str, tuple[str, ...]] = {
    "workclass": (
        "?", "Federal-gov", "Local-gov", "Never-worked", "Private", "Self-emp-inc", "Self-emp-not-inc",
        "State-gov", "Without-pay",
    ),
    # In order of years: the code plus one is the column education-num, which is therefore left out.
    "education": (
        "Preschool", "1st-4th", "5th-6th", "7th-8th", "9th", "10th", "11th", "12th", "HS-grad",
        "Some-college", "Assoc-voc", "Assoc-acdm", "Bachelors", "Masters", "Prof-school", "Doctorate",
    ),
    "marital-status": (
        "Divorced", "Married-AF-spouse", "Married-civ-spouse", "Married-spouse-absent", "Never-married",
        "Separated", "Widowed",
    ),
    "occupation": (
        "?", "Adm-clerical", "Armed-Forces", "Craft-repair", "Exec-managerial", "Farming-fishing",
        "Handlers-cleaners", "Machine-op-inspct", "Other-service", "Priv-house-serv", "Prof-specialty",
        "Protective-serv", "Sales", "Tech-support", "Transport-moving",
    ),
    "relationship": ("Husband", "Not-in-family", "Other-relative", "Own-child", "Unmarried", "Wife"),
    "race": ("Amer-Indian-Eskimo", "Asian-Pac-Islander", "Black", "Other", "White"),
    "sex": ("Female", "Male"),
    "native-country": (
        "?", "Cambodia", "Canada", "China", "Columbia", "Cuba", "Dominican-Republic", "Ecuador",
        "El-Salvador", "England", "France", "Germany", "Greece", "Guatemala", "Haiti", "Holand-Netherlands",
        "Honduras", "Hong", "Hungary", "India", "Iran", "Ireland", "Italy", "Jamaica", "Japan", "Laos",
        "Mexico", "Nicaragua", "Outlying-US(Guam-USVI-etc)", "Peru", "Philippines", "Poland", "Portugal",
        "Puerto-Rico", "Scotland", "South", "Taiwan", "Thailand", "Trinadad&Tobago", "United-States",
        "Vietnam", "Yugoslavia",
    ),
}  # fmt: skip
"""The published vocabulary of the categorical columns, spelt as in the files; the position is the code.

A missing value is a category of its own, ``?``, in the three columns that have any.
"""

INCOMES = ("<=50K", ">50K")

REMEDY = (
    "Point it at the folder of the published adult.data and adult.test, or leave it out to use the packaged "
    "copy of all their rows."
)


class AdultData(TableData):
    """Does a person of the 1994 US census survey earn more than 50,000 dollars a year?

    A batch is ``(x, y, group)``: ``x`` float32 of shape ``(N, in_features)`` in ``bounds``, ``y`` int64 of
    shape ``(N,)`` with 1 for more than 50,000 dollars, and ``group`` int64 of shape ``(N,)``, an index into
    ``group_names``. With ``group=None`` it is ``(x, y)``.

    Numeric columns come first (``continuous`` are their positions) and are scaled by the fixed bounds of
    :data:`NUMERIC`, amounts of money through ``log1p``; then follow the categories, one-hot. Neither looks at
    the rows, so that a privacy guarantee of the training leaves nothing out. The sampling weight ``fnlwgt``
    is dropped: it says how many people a row stands for, and it was made from age, sex and race, which it
    would bring back where they are hidden.

    ==============  =================================  ================================
    ``group``       ``in_features``, if it is hidden   ``in_features``, if it is seen
    ==============  =================================  ================================
    ``None``        106                                106
    ``"sex"``       104                                106
    ``"race"``      101                                106
    ``"sex+race"``  99                                 106
    ==============  =================================  ================================

    Hiding the group's columns does not hide the group. ``relationship`` stays, and alone it gives away the
    sex of the 45 % who are ``Husband`` or ``Wife``.

    Args:
        group: The columns that define the groups, or ``None``. ``"sex+race"`` crosses both into ten groups.
        see_group: Whether the columns that define the group stay among the features, or are hidden.
        batch_size: Examples in a training batch.
        eval_batch_size: Examples in a batch of validation, test and prediction.
        data_dir: ``None`` for the packaged set, or a folder with the published ``adult.data`` and
            ``adult.test`` (plain or ``.gz``); they hold the same 32,561 + 16,281 rows. Nothing is downloaded.
        val_fraction: Fraction of the training part held out for validation, the same rows in every run.
        num_workers: Worker processes of the loaders. Reading from memory is faster without.

    Raises:
        FileNotFoundError: ``data_dir`` or one of its files does not exist.
        ValueError: An option is out of range, or a file is not what it should be.

    Example:
        >>> data = AdultData(group="sex")
        >>> x, y, group = next(iter(data.test_dataloader()))
        >>> x.shape, data.group_names
        (torch.Size([2048, 104]), ('Female', 'Male'))
        >>> [data.feature_names[i] for i in data.continuous]
        ['age', 'capital-gain', 'capital-loss', 'hours-per-week']
    """

    source = "adult"
    license = "CC BY 4.0"
    bounds = (0.0, 1.0)
    num_classes = 2
    class_names = INCOMES
    continuous = tuple(range(len(NUMERIC)))

    def __init__(
        self,
        group: Literal["sex", "race", "sex+race"] | None = "sex",
        see_group: bool = False,
        batch_size: int = 256,
        eval_batch_size: int = 2048,
        data_dir: str | None = None,
        val_fraction: float = 0.1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, data_dir, val_fraction, num_workers)
        if group not in (None, "sex", "race", "sex+race"):
            raise ValueError(f"group={group!r} must be 'sex', 'race', 'sex+race' or None")
        self.group = group
        self.see_group = see_group
        self._group_columns: tuple[str, ...] = tuple(group.split("+")) if group else ()
        self._seen = tuple(name for name in CATEGORIES if see_group or name not in self._group_columns)

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the groups, in the order of their codes; empty without groups."""
        if self.group == "sex+race":
            return tuple(f"{sex}, {race}" for sex in CATEGORIES["sex"] for race in CATEGORIES["race"])
        return CATEGORIES[self.group] if self.group else ()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the features, in their order: ``age``, ..., ``workclass=Private``, ..."""
        return (*NUMERIC, *(f"{column}={value}" for column in self._seen for value in CATEGORIES[column]))

    @property
    def in_features(self) -> int:
        """Number of features, see the table above."""
        return len(self.feature_names)

    def read(self) -> Arrays:
        """Numbers int32 ``(N, 4)``, codes uint8 ``(N, 8)`` and labels uint8 ``(N,)`` of both parts."""
        if self.data_dir is None:
            return read_packaged("adult.npz")
        return parse(read_files(self.data_dir, FILES.values(), option="data_dir", remedy=REMEDY))

    def table(self, part: str) -> Table:
        """Features, label and, if there are groups, the group."""
        by_column = torch.from_numpy(self.arrays[f"{part}_codes"]).long().unbind(1)
        codes = dict(zip(CATEGORIES, by_column, strict=True))
        hot = [one_hot(codes[column], len(CATEGORIES[column])).float() for column in self._seen]
        columns = [
            torch.cat([scale(self.arrays[f"{part}_numbers"]), *hot], dim=1),
            torch.from_numpy(self.arrays[f"{part}_labels"]).long(),
        ]
        if self._group_columns:
            group = torch.zeros_like(columns[1])
            for column in self._group_columns:
                group = group * len(CATEGORIES[column]) + codes[column]
            columns.append(group)
        return Table(*columns)


def scale(numbers: np.ndarray) -> Tensor:
    """Numeric columns in [0, 1] by their fixed bounds.

    ``(f(v) - f(low)) / (f(high) - f(low))`` with the bounds of :data:`NUMERIC`; ``f(v) = log1p(v / unit)``
    for the columns and units of :data:`LOGARITHMIC`, and ``f(v) = v`` for others.

    Args:
        numbers: Integers of shape ``(N, 4)``, in years, dollars, dollars and hours a week.

    Returns:
        float32 of shape ``(N, 4)``.
    """
    values = numbers.astype(np.float64)
    low, high = np.array(list(NUMERIC.values()), dtype=np.float64).T
    unit = np.array([LOGARITHMIC.get(column, np.inf) for column in NUMERIC])
    values, low, high = (np.where(np.isinf(unit), v, np.log1p(v / unit)) for v in (values, low, high))
    return torch.from_numpy(((values - low) / (high - low)).astype(np.float32))


def parse(files: Mapping[str, bytes]) -> Arrays:
    """The arrays of the two published files, given as ``{file name: contents}``.

    Raises:
        ValueError: A line has the wrong number of fields, an unknown category or a number out of bounds.
    """
    arrays: Arrays = {}
    for part, name in FILES.items():
        numbers, codes, labels = [], [], []
        for number, line in enumerate(files[name].decode("ascii").splitlines(), start=1):
            # adult.test opens with a comment and ends its labels in a dot; both files end in a blank line.
            if not line or line.startswith("|"):
                continue
            try:
                row = _row(line)
                numbers.append([_number(column, row[column]) for column in NUMERIC])
                codes.append([_code(column, row[column], CATEGORIES[column]) for column in CATEGORIES])
                labels.append(_code("income", row["income"].removesuffix("."), INCOMES))
            except ValueError as error:
                raise ValueError(f"{name}, line {number} is no Adult row ({error}): {line}") from None
        arrays[f"{part}_numbers"] = np.array(numbers, np.int32).reshape(-1, len(NUMERIC))
        arrays[f"{part}_codes"] = np.array(codes, np.uint8).reshape(-1, len(CATEGORIES))
        arrays[f"{part}_labels"] = np.array(labels, np.uint8)
    return arrays


def _row(line: str) -> dict[str, str]:
    fields = line.split(", ")
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} fields instead of {len(COLUMNS)}")
    return dict(zip(COLUMNS, fields, strict=True))


def _code(column: str, text: str, vocabulary: tuple[str, ...]) -> int:
    if text not in vocabulary:
        raise ValueError(f"{column}={text!r} is not in the published vocabulary")
    return vocabulary.index(text)


def _number(column: str, text: str) -> int:
    low, high = NUMERIC[column]
    if not low <= (value := int(text)) <= high:
        raise ValueError(f"{column}={value} lies outside {low}..{high}")
    return value
