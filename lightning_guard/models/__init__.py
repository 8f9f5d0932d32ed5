"""Five small classifiers for the packaged data, ordinary LightningModules."""

from lightning_guard.models.cnn import SmallCNN, StridedCNN
from lightning_guard.models.mlp import MLP
from lightning_guard.models.scattering import ScatteringClassifier
from lightning_guard.models.transformer import SmallTransformer

__all__ = ["MLP", "ScatteringClassifier", "SmallCNN", "SmallTransformer", "StridedCNN"]
