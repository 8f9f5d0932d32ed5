"""MNIST (LeCun, Cortes and Burges, 1998, http://yann.lecun.com/exdb/mnist)."""

from lightning_guard.data.base import Arrays
from lightning_guard.data.fashion_mnist import FashionMNISTData

REMEDY = (
    "Point it at a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (.gz or not), as MNIST was published."
)


class MNISTData(FashionMNISTData):
    """Grey images of handwritten digits, 28 x 28, in ten classes; not in the package.

    Batches, options, split and file format are those of :class:`FashionMNISTData`, but ``data_dir`` must be given:
    nothing is packaged and nothing is downloaded. The images are CC BY-SA 3.0, made by LeCun and Cortes from
    handwriting that NIST collected.

    Args:
        batch_size: Examples in a training batch.
        eval_batch_size: Examples in a batch of validation, test and prediction.
        data_dir: A folder with the four published idx files (or ``.gz``), 60,000 + 10,000.
        val_fraction: Fraction of the training part held out for validation, the same images in every run.
        num_workers: Worker processes of the loaders. Reading from memory is faster without.

    Raises:
        FileNotFoundError: on first use, ``data_dir`` is not stated, or it or one of its files does not exist.
        ValueError: An option is out of range, or a file is not what it should be.
    """

    license = "CC BY-SA 3.0"
    class_names = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
    remedy = REMEDY

    @property
    def source(self) -> str:
        """``mnist``."""
        return "mnist"

    def packaged(self) -> Arrays:
        """Refused: there is no packaged MNIST.

        Raises:
            FileNotFoundError: always.
        """
        raise FileNotFoundError(f"data_dir={self.data_dir} names no folder, and MNIST is not in the package. {REMEDY}")
