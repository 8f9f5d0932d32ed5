"""Fixed wavelet features of images and a linear classifier on them, a strong pair under differential privacy."""

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_guard.models.base import Classifier

SIGMA = 0.8  # width of the finest wavelet, in pixels
XI = 0.75 * math.pi  # its frequency, in radians a pixel
SMALL = 0.01  # a coefficient at which the logarithm bends, images lying in [0, 1]
RIDGE = 0.1  # of the mean eigenvalue, added to all before whitening
FIGURES = 500  # random images that the whitening is computed from, in about half a second


class Scattering(nn.Module):
    """Second-order Morlet scattering of images, a fixed feature map without parameters.

    With the wavelets ``psi[j, t]`` of scale ``2^j`` and angle ``pi t / angles``, and a Gaussian ``phi`` of width
    ``0.8 * 2^(scales - 1)``, the channels of an image ``x`` are, sampled every ``2^scales`` pixels::

        S0           =     x * phi
        S1[j, t]     =    |x * psi[j, t]| * phi
        S2[j, t, k, u] = ||x * psi[j, t]| * psi[k, u]| * phi    for k > j

    in this order, ``1 + scales * angles + angles^2 * scales * (scales - 1) / 2`` of them for each input channel.
    A modulus is sampled every ``2^j`` pixels, ``j`` the scale of its wavelet. ``psi[j, t](u)`` is
    ``4^-j psi(2^-j R u)``, with ``R`` the rotation by the angle, and ::

        psi(u) = c g(u) (exp(i xi u1) - b),    g(u) = exp(-(u1^2 + s^2 u2^2) / (2 * 0.8^2)),    s = 4 / angles

    where ``b`` makes the sum over ``psi`` vanish, ``c`` the sum over ``c g`` one, and ``xi`` is ``3 pi / 4``. Images
    are continued over their edges by reflection.

    Each image is transformed for itself and nothing is learnt from data. A moved image has nearly the same
    features (up to ``2^scales`` pixels), a deformed one similar features, and the map does not enlarge distances.

    ``forward`` takes ``(N, C, image_size, image_size)`` and returns ``(N, C * channels, side, side)`` with
    ``side = image_size / 2^scales``, without gradient with respect to the images.

    Args:
        image_size: Height and width of the images, in pixels, a multiple of ``2^scales`` above it.
        scales: Number of octaves, at least 1.
        angles: Number of orientations in half a turn, at least 1.

    Raises:
        ValueError: An argument is out of its range, or an image has another size.

    References:
        Mallat, Group Invariant Scattering, 2012, https://arxiv.org/abs/1101.2286.
        Bruna and Mallat, Invariant Scattering Convolution Networks, 2013, https://arxiv.org/abs/1203.1513.
        Andreux et al., Kymatio: Scattering Transforms in Python, 2020, https://arxiv.org/abs/1812.11214, for the
        constants of the wavelets.

    Example:
        >>> Scattering()(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 81, 7, 7])
    """

    phi_0: Tensor

    def __init__(self, image_size: int = 28, scales: int = 2, angles: int = 8) -> None:
        super().__init__()
        if scales < 1 or angles < 1:
            raise ValueError(f"scales={scales} and angles={angles} must be at least 1")
        self.image_size, self.scales, self.angles = image_size, scales, angles
        step = 2**scales
        if image_size % step or image_size <= step:
            raise ValueError(f"image_size={image_size} must be a multiple of 2^scales={step} and above it")
        self.channels = 1 + scales * angles + angles**2 * scales * (scales - 1) // 2
        self.side = image_size // step
        size = image_size + 2 * step
        # Transfer functions of the wavelets of scale 2^k on the grid of every 2^j-th pixel, where they are used.
        for j, k in self._filters():
            bank = torch.stack([morlet(size, k, math.pi * t / angles, 4 / angles, 2**j) for t in range(angles)])
            transfer = torch.view_as_real(torch.fft.fft2(bank))  # a complex buffer would not survive module.bfloat16()
            self.register_buffer(f"psi_{j}_{k}", transfer.float(), persistent=False)
        for j in range(scales):
            self.register_buffer(f"phi_{j}", lowpass(size, step, 2**j)[1:-1].float(), persistent=False)

    def _filters(self) -> Iterator[tuple[int, int]]:
        yield from ((0, k) for k in range(self.scales))
        yield from ((j, k) for j in range(1, self.scales) for k in range(j + 1, self.scales))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"image_size={self.image_size} must be that of the images, {tuple(x.shape)}")
        if not len(x):  # a Poisson batch may be empty, which the FFT refuses
            return self.phi_0.new_zeros(0, x.shape[1] * self.channels, self.side, self.side)
        with torch.autocast(x.device.type, enabled=False):
            x = F.pad(x.float(), 4 * (2**self.scales,), mode="reflect")[:, :, None]
            paths, second = [self._smooth(x, 0)], []
            for j in range(self.scales):
                modulus = self._modulus(x, 0, j)  # (N, C, angles, size / 2^j, size / 2^j)
                paths.append(self._smooth(modulus, j))
                second += [self._smooth(self._modulus(modulus, j, k), k) for k in range(j + 1, self.scales)]
            return torch.cat(paths + second, dim=2).flatten(1, 2).to(self.phi_0.dtype)

    def _modulus(self, x: Tensor, j: int, k: int) -> Tensor:
        """``|x * psi[k]|`` at every ``2^k``-th pixel, of ``M`` maps that hold every ``2^j``-th, ``(N, C, M, ...)``."""
        n, c, m, size, _ = x.shape
        fold, small = 2 ** (k - j), size // 2 ** (k - j)
        blocks = torch.fft.fft2(x)[:, :, :, None].unflatten(-1, (fold, small)).unflatten(-3, (fold, small))
        psi = torch.view_as_complex(self.get_buffer(f"psi_{j}_{k}").float())
        psi = psi.unflatten(-1, (fold, small)).unflatten(-3, (fold, small)) / fold**2
        # Every fold-th pixel has the mean of the fold^2 blocks of the spectrum; a loop is faster than mean(dim).
        total = blocks[..., 0, :, 0, :] * psi[..., 0, :, 0, :]
        for row, column in list(product(range(fold), repeat=2))[1:]:
            total.addcmul_(blocks[..., row, :, column, :], psi[..., row, :, column, :])
        wave = torch.fft.ifft2(total)
        return (wave.real.square() + wave.imag.square()).sqrt().view(n, c, m * self.angles, small, small)

    def _smooth(self, x: Tensor, j: int) -> Tensor:
        phi = self.get_buffer(f"phi_{j}").float()
        return phi @ x @ phi.T


class ScatteringClassifier(Classifier):
    """A linear classifier on scattering features, made for training with differential privacy.

    ``forward`` takes images of shape ``(N, in_channels, image_size, image_size)`` in [0, 1] and returns logits of
    shape ``(N, num_classes)``, or ``(N,)`` for two classes. It takes what :meth:`features` returns as well, of
    shape ``(N, in_features)``: that is the same in every epoch, and computing it once makes epochs many times
    shorter.

    A scattering coefficient ``s`` becomes ``log(1 + |s| / 0.01)`` with the sign of ``s``; the coefficients at each
    position are centred and whitened with the mean and the covariance that they have for random figures
    (:func:`figures`), and those of an example are divided by their norm. No statistic of the data is used, and an
    example's logits do not depend on another's, as differential privacy asks. The gradient of an example has at
    most the norm 2, whatever the weights are. The linear layer starts at zero.

    Differential privacy adds noise of one size in all directions, and whitening gives the directions in which
    images differ a like size. The optimizer is SGD since Adam gives all weights steps of one size, those
    without signal too. Good values for 60,000 images and epsilon 3 are ``max_grad_norm=0.02``, which gives most
    of the wrongly classified examples one weight, a learning rate that makes ``lr * max_grad_norm`` 30, a
    constant one, Poisson batches of 8192 and 40 epochs; without privacy, a learning rate of 10 to 100. So large
    a rate makes the softmax so sure that gradients become denormal numbers, which a CPU handles ten times slower:
    call ``torch.set_flush_denormal(True)``.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels, a multiple of ``2^scales`` above it.
        scales: Number of octaves of the wavelets.
        angles: Number of orientations of the wavelets in half a turn.
        lr: Learning rate of SGD. It is far larger than usual since clipped gradients and inputs are small.
        momentum: Momentum of SGD.

    Raises:
        ValueError: An argument is out of its range, or an input has neither of the shapes.

    References:
        Tramer and Boneh, Differentially Private Learning Needs Better Features, 2021,
        https://arxiv.org/abs/2011.11660.

    Example:
        >>> net, images = ScatteringClassifier(), torch.rand(2, 1, 28, 28)
        >>> net(images).shape
        torch.Size([2, 10])
        >>> net(net.features(images)).shape
        torch.Size([2, 10])
    """

    mean: Tensor
    whitening: Tensor

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        scales: int = 2,
        angles: int = 8,
        lr: float = 1500.0,
        momentum: float = 0.9,
    ) -> None:
        super().__init__(num_classes, lr, weight_decay=0.0, schedule="constant")
        self.momentum = momentum
        self.scattering = Scattering(image_size, scales, angles)
        self.in_features = in_channels * self.scattering.channels * self.scattering.side**2
        samples = torch.cat([self._compressed(x) for x in figures(FIGURES, image_size).split(32)])
        mean, whitening = whitened(samples.transpose(0, 1).flatten(1).double())
        # They go with the checkpoint: other versions of torch may draw other figures.
        self.register_buffer("mean", mean.float())
        self.register_buffer("whitening", whitening.float())
        self.head = nn.Linear(self.in_features, self.num_logits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = x if x.ndim == 2 else self._features(x)
        logits = self.head(features.to(self.head.weight.dtype))
        return logits.squeeze(-1) if self.num_logits == 1 else logits

    @torch.no_grad()
    def features(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """What the linear layer sees of a whole data set.

        Small batches stay in the cache of a CPU, where an image of 28 x 28 takes about a millisecond.

        Args:
            images: Images ``(N, in_channels, image_size, image_size)`` in [0, 1].
            batch_size: Images that are transformed at once.

        Returns:
            float16 of shape ``(N, in_features)``, rows of norm one, on the device of the module; 8 kB for an image
            of 28 x 28.
        """
        return torch.cat([self._features(x.to(self.device)).half() for x in images.split(batch_size)])

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        compressed = self._compressed(x).unflatten(1, (-1, self.scattering.channels)).flatten(3)
        with torch.autocast(x.device.type, enabled=False):
            white = self.whitening.float() @ (compressed - self.mean.float()[:, None])
        return F.normalize(white.flatten(1), dim=1)

    def _compressed(self, x: Tensor) -> Tensor:
        s = self.scattering(x).float()
        return s.sign() * torch.log1p(s.abs() / SMALL)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def figures(n: int, size: int, ellipses: int = 8) -> Tensor:
    """Images of random grey ellipses that hide one another on a black ground, the same in every call.

    They have edges at all places and angles, as photographs have ("dead leaves": Baradad et al., Learning to See
    by Looking at Noise, 2021, https://arxiv.org/abs/2106.05963), and stand for images when there must be no look
    at the data.

    Returns:
        float32 in [0, 1], of shape ``(n, 1, size, size)``.
    """
    generator = torch.Generator().manual_seed(0)
    line, x = torch.arange(size) + 0.5, torch.zeros(n, 1, size, size)
    for _ in range(ellipses):
        place, rows, angle, width, height, grey = torch.rand(6, n, 1, 1, 1, generator=generator)
        across, down = line - size * place, line[:, None] - size * rows
        cos, sin = torch.cos(math.pi * angle), torch.sin(math.pi * angle)
        u1 = (cos * across + sin * down) / (size / 2) ** width  # the half axes lie between 1 and size / 2 pixels
        u2 = (cos * down - sin * across) / (size / 2) ** height
        x = torch.where(u1**2 + u2**2 < 1, grey, x)
    return x


def whitened(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``m`` and matrix ``(S + r I)^(-1/2)`` of samples in columns, with covariance ``S`` of shape ``(C, C)``.

    The ridge ``r`` is a tenth of the mean eigenvalue of ``S``, and keeps what the samples lack from being blown up.
    """
    values, vectors = torch.linalg.eigh(samples.cov(correction=0))
    values = values + RIDGE * values.mean()
    return samples.mean(dim=1), vectors @ (values**-0.5 * vectors).T


def morlet(size: int, scale: int, angle: float, slant: float, step: int) -> Tensor:
    """The wavelet ``psi[scale, angle]`` around pixel (0, 0) of a periodic image, on every ``step``-th pixel.

    Returns:
        complex128 of shape ``(size / step, size / step)``, with sum zero.
    """
    line = torch.arange(-2 * size, 3 * size, step, dtype=torch.float64) / 2**scale
    u1 = math.cos(angle) * line + math.sin(angle) * line[:, None]
    u2 = math.cos(angle) * line[:, None] - math.sin(angle) * line
    bell = torch.exp(-(u1**2 + (slant * u2) ** 2) / (2 * SIGMA**2))
    wave = bell * torch.exp(1j * XI * u1)
    return _wrap(wave - bell * wave.sum() / bell.sum(), size // step) / bell.sum()


def _wrap(x: Tensor, size: int) -> Tensor:
    return x.view(5, size, 5, size).sum(dim=(0, 2))


def lowpass(size: int, window: int, step: int) -> Tensor:
    """Gaussian means of ``size / step`` numbers, for the centres of the windows of ``window`` pixels.

    Returns:
        float64 of shape ``(size / window, size / step)``, with rows that sum to one.
    """
    centres = window * torch.arange(size // window, dtype=torch.float64) + (window - 1) / 2
    line = torch.arange(-2 * size, 3 * size, step, dtype=torch.float64)
    bell = torch.exp(-((line - centres[:, None]) ** 2) / (2 * (SIGMA * window / 2) ** 2))
    bell = bell.unflatten(1, (5, -1)).sum(dim=1)
    return bell / bell.sum(dim=1, keepdim=True)
