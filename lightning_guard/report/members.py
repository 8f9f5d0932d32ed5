"""What a finished run was trained on, read again without what training did to it."""

from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from lightning_guard.functional.privacy import everyone, population

_AT_ONCE = 512


def partly(trainer: pl.Trainer) -> str:
    """Why this trainer sees a part of the rows only; nothing if it sees all of them."""
    for name, whole in (("overfit_batches", 0), ("limit_train_batches", 1.0)):
        if (value := getattr(trainer, name)) != whole:
            return f"{name}={value} trained on a part of the rows, and which is not recorded"
    return ""


def trained_on(trainer: pl.Trainer, data: Any) -> DataLoader | str:
    """Every row that this training has seen, each once and in their order, or why they are not known.

    Rows come from the data module as it is, so guards that draw, replace or add rows have no part in it; what the
    data set itself does at random to a row, it does again.

    | case                                             | result                                                  |
    |--------------------------------------------------|---------------------------------------------------------|
    | several loaders, a stream, a sampler with weights | the reason                                             |
    | training that saw a part of the rows only        | the reason: an attack would take strangers for members  |
    | Poisson sampling                                 | all rows: whether one was drawn is part of the secret   |
    """
    if reason := partly(trainer):
        return reason
    loader = data.train_dataloader()
    loader = loader[0] if isinstance(loader, list) and len(loader) == 1 else loader
    try:
        population(loader)
    except ValueError as error:
        return str(error)
    seen, needed = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.num_training_batches
    if seen < needed:
        return f"training ended after {seen} of {needed} batches, so some rows were never seen"
    return everyone(loader, _AT_ONCE)
