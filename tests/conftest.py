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
