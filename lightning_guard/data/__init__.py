"""Two small real data sets that come with the package, as Lightning DataModules."""

from lightning_guard.data.adult import AdultData
from lightning_guard.data.fashion_mnist import FashionMNISTData

__all__ = ["AdultData", "FashionMNISTData"]
