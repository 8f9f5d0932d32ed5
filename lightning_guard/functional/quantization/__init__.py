"""Quantisation in training: grids of whole numbers, learned steps, and layers that compute with them."""

from lightning_guard.functional.quantization.grids import (
    activation_grid,
    fake_quantize,
    fake_quantize_input,
    snapped,
    weight_grid,
    weight_scale,
)
from lightning_guard.functional.quantization.layers import (
    FakeQuantization,
    LostRows,
    QuantizedLayer,
    Range,
    Slot,
    fake_quantized,
    quantizable,
)
from lightning_guard.functional.quantization.learned import StepLearner, fitted_range, fitted_step, lsq
from lightning_guard.functional.quantization.private_ranges import CELLS, NoisyRanges, range_rows
from lightning_guard.functional.quantization.selection import chosen_layers, ranges_by_layer
from lightning_guard.functional.quantization.statistics import anew, batch_norms

__all__ = [
    "CELLS",
    "FakeQuantization",
    "LostRows",
    "NoisyRanges",
    "QuantizedLayer",
    "Range",
    "Slot",
    "StepLearner",
    "activation_grid",
    "anew",
    "batch_norms",
    "chosen_layers",
    "fake_quantize",
    "fake_quantize_input",
    "fake_quantized",
    "fitted_range",
    "fitted_step",
    "lsq",
    "quantizable",
    "range_rows",
    "ranges_by_layer",
    "snapped",
    "weight_grid",
    "weight_scale",
]
