"""How much a representation says of an attribute, by kernels."""

import torch
from torch import Tensor


def median_bandwidth(x: Tensor) -> Tensor:
    """The median distance between different points, a common width of a Gaussian kernel; without a gradient.

    Args:
        x: points ``(n,)`` or ``(n, D)``.

    Returns:
        A positive scalar; 1 where all points are the same.

    Example:
        >>> median_bandwidth(torch.tensor([0.0, 0.0, 3.0]))
        tensor(3.)
    """
    x = _rows(x.detach())
    distances = torch.pdist(x)
    distances = distances[distances > 0]  # an attribute of few values would have a median of 0
    return distances.median() if len(distances) else x.new_tensor(1.0)


def mmd2(x: Tensor, y: Tensor, bandwidth: float | Tensor | None = None, unbiased: bool = False) -> Tensor:
    r"""The squared maximum mean discrepancy of two samples under a Gaussian kernel.

    .. math:: \overline{k(x, x')} + \overline{k(y, y')} - 2\, \overline{k(x, y)}, \quad
              k(a, b) = \exp(-\lVert a - b \rVert^2 / 2\sigma^2)

    Args:
        x: points ``(n,)`` or ``(n, D)``.
        y: points ``(m,)`` or ``(m, D)``.
        bandwidth: :math:`\sigma`; None is the median distance of both samples together.
        unbiased: leave each point's kernel with itself out. The estimate is then right on average, and may be
            negative; the biased one is at least 0 and never right for small samples of the same distribution.

    Returns:
        A scalar; 0 with a zero gradient where a sample has fewer than two points.

    Reference:
        Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012.

    Example:
        >>> mmd2(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).item()
        0.0
    """
    x, y = _rows(x), _rows(y)
    n, m = len(x), len(y)
    if n < 2 or m < 2:
        return (x.sum() + y.sum()) * 0
    kernel = _gram(torch.cat([x, y]), bandwidth)
    xx, yy, xy = kernel[:n, :n].sum(), kernel[n:, n:].sum(), kernel[:n, n:].mean()
    if unbiased:
        return (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy
    return xx / n**2 + yy / m**2 - 2 * xy


def hsic(
    x: Tensor,
    s: Tensor,
    bandwidths: tuple[float | Tensor | None, float | Tensor | None] = (None, None),
    normalised: bool = False,
) -> Tensor:
    r"""The Hilbert-Schmidt independence criterion of two variables under Gaussian kernels.

    .. math:: \frac{1}{(n - 1)^2} \operatorname{tr}(K H L H), \quad H = I - \tfrac1n

    which is 0 in the limit of many examples exactly where the variables are independent. The estimate is biased
    upwards by the order of :math:`1/n`.

    Args:
        x: first variable ``(n,)`` or ``(n, D)``, e.g. logits.
        s: second variable ``(n,)`` or ``(n, A)``, continuous or one-hot; a row with a NaN is left out.
        bandwidths: of both kernels; None is the median distance.
        normalised: divide by the geometric mean of each variable's own criterion, which gives a value in [0, 1].

    Returns:
        A scalar of at least 0; 0 with a zero gradient where fewer than two rows are known.

    Reference:
        Gretton, Bousquet, Smola and Schölkopf, Measuring Statistical Dependence with Hilbert-Schmidt Norms, ALT 2005.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> round(hsic(x, 2 * x, normalised=True).item(), 4)
        1.0
    """
    x, s = _rows(x), _rows(s)
    known = ~s.isnan().any(1)
    x, s = x[known], s[known].to(x)
    if len(x) < 2:
        return x.sum() * 0
    k, l = _centred(_gram(x, bandwidths[0])), _centred(_gram(s, bandwidths[1]))  # noqa: E741  as in the paper
    found = (k * l).sum()  # tr(KHLH), for H is idempotent and both are symmetric
    if normalised:
        return found / (k.square().sum() * l.square().sum()).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    return found / (len(x) - 1) ** 2


def _rows(x: Tensor) -> Tensor:
    x = x if x.dtype.itemsize > 2 else x.float()  # half precision has too few digits for distances
    return x.unsqueeze(1) if x.dim() == 1 else x.flatten(1)


def _gram(x: Tensor, bandwidth: float | Tensor | None) -> Tensor:
    width = median_bandwidth(x) if bandwidth is None else bandwidth
    squares = (x.unsqueeze(1) - x).square().sum(2) if x.shape[1] <= 8 else _squares(x)
    return torch.exp(-squares / (2 * width**2))


def _squares(x: Tensor) -> Tensor:
    inner = x @ x.T  # no (n, n, D) tensor for wide representations
    own = inner.diagonal()
    return (own.unsqueeze(1) + own - 2 * inner).clamp_min(0)


def _centred(k: Tensor) -> Tensor:
    return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()
