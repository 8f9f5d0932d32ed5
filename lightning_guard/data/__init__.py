"""Two small real data sets that come with the package, and what can be put beside them, as Lightning DataModules."""

from lightning_guard.data.adult import AdultData
from lightning_guard.data.fashion_mnist import FashionMNISTData
from lightning_guard.data.mnist import MNISTData
from lightning_guard.data.scattered import ScatteredData

__all__ = ["AdultData", "FashionMNISTData", "MNISTData", "ScatteredData"]
