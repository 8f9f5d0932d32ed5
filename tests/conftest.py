"""What every test has: one thread, quiet trainers, and the networks of `tests.toys`."""

import logging
import warnings

import pytest
import torch

torch.set_num_threads(1)
for name in ("pytorch_lightning", "lightning", "lightning.pytorch"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # whatever a trainer writes, it writes there


@pytest.fixture(autouse=True)
def _loaders_as_they_were():
    """Lightning wraps DataLoader while it asks for loaders, and leaves the wrapping if that fails."""
    owners = (torch.utils.data.DataLoader, torch.utils.data.BatchSampler)
    before = [(owner, dict(vars(owner))) for owner in owners]
    yield
    for owner, attributes in before:
        for name in ("__init__", "__setattr__", "__delattr__", "__old__init__", "__old__setattr__", "__old__delattr__"):
            if name in attributes:
                setattr(owner, name, attributes[name])
            elif name in vars(owner):
                delattr(owner, name)
