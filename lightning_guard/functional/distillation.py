"""How far a student is from its teacher, and whether the teacher knows anything."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_losses(logits: Tensor, teacher: Tensor, temperature: float = 1.0, multilabel: bool = False) -> Tensor:
    r"""Divergence of each example's softened predictions from the teacher's, in nats, in float32 or wider.

    .. math:: T^2 \, \mathrm{KL}\big(\sigma(z_t / T) \,\|\, \sigma(z_s / T)\big)

    The factor :math:`T^2` keeps the size of the gradients as :math:`T` changes (Hinton et al., 2015). The teacher's
    logits are taken as constants.

    Args:
        logits: of the student.
        teacher: logits of the teacher, of the same shape.
        temperature: :math:`T`, above 0; the higher it is, the more the wrong classes say.
        multilabel: each logit is a label of its own.

    | ``logits``                            | divergence                                      |
    |---------------------------------------|-------------------------------------------------|
    | ``(N, C, ...)``, C >= 2               | of the softmax over C, summed over ``...``      |
    | ``(N, C, ...)`` with ``multilabel``   | of one sigmoid a logit, summed                  |
    | ``(N,)`` or ``(N, 1)``                | of the sigmoid                                  |
    | equal logits                          | 0, with zero gradient                           |

    Returns:
        Divergences of shape ``(N,)``.

    Raises:
        ValueError: if the shapes differ or the temperature is not above 0.

    Reference:
        Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, arXiv:1503.02531.

    Example:
        >>> distillation_losses(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=2.0)
        tensor([0.4438])
    """
    if logits.shape != teacher.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} cannot be compared with the teacher's of shape "
            f"{tuple(teacher.shape)}; take a teacher of the same classes"
        )
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    s, t = _wide(logits) / temperature, _wide(teacher.detach()) / temperature
    if multilabel or s.dim() == 1 or (s.dim() == 2 and s.shape[1] == 1):
        p = t.sigmoid()
        kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    else:
        kl = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True)
    return temperature**2 * kl.reshape(len(kl), -1).sum(1)


def feature_losses(features: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared distance between each example's features and the teacher's, both scaled to length one.

    .. math:: \Big\| \frac{f_s}{\|f_s\|_2} - \frac{f_t}{\|f_t\|_2} \Big\|_2^2 = 2 - 2 \cos(f_s, f_t)

    Features are hints as in Romero et al. (2015), where shapes are equal and no regressor is needed; the lengths are
    left free, as in Zagoruyko and Komodakis (2017), since a norm layer behind would undo them.

    Args:
        features: of the student, ``(N, ...)``.
        teacher: of the teacher, of the same shape, taken as constants.

    Returns:
        Distances of shape ``(N,)``, from 0 to 4.

    Raises:
        ValueError: if the shapes differ.

    Reference:
        Romero et al., FitNets, ICLR 2015, arXiv:1412.6550. Zagoruyko and Komodakis, Paying more attention to
        attention, ICLR 2017, arXiv:1612.03928.

    Example:
        >>> feature_losses(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor([2.])
    """
    if features.shape != teacher.shape:
        raise ValueError(
            f"features of shape {tuple(features.shape)} cannot be compared with the teacher's of shape "
            f"{tuple(teacher.shape)}; name layers of equal shapes"
        )
    s, t = (F.normalize(_wide(f).reshape(len(f), -1), dim=1) for f in (features, teacher.detach()))
    return (s - t).square().sum(1)


def output_losses(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of each example's outputs from the teacher's, for regression or for logits.

    For logits it is the limit of :func:`distillation_losses` at high temperature (Hinton et al., 2015), up to a
    factor and a shift that is the same for all classes.

    Args:
        outputs: of the student, ``(N, ...)``.
        teacher: of the teacher, of the same shape, taken as constants.

    Returns:
        Differences of shape ``(N,)``, in squared units of the outputs.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> output_losses(torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 3.0], [2.0, 2.0]]))
        tensor([2., 0.])
    """
    if outputs.shape != teacher.shape:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} cannot be compared with the teacher's of shape "
            f"{tuple(teacher.shape)}; take a teacher with the same outputs"
        )
    return (_wide(outputs) - _wide(teacher.detach())).square().reshape(len(outputs), -1).mean(1)


def hits_and_counts(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """How many targets the logits get right, and how often each answer is the right one.

    What the best constant answer gets right is the largest count: a teacher below it knows nothing.

    | ``logits``              | ``target``                     | counted                                      |
    |-------------------------|--------------------------------|----------------------------------------------|
    | ``(N, C, ...)``, C >= 2 | whole ``(N, ...)``             | classes; negative ones are left out          |
    | ``(N, C, ...)``         | floating ``(N, C, ...)``       | each label, on from 0.5                      |
    | ``(N,)`` or ``(N, 1)``  | ``(N,)`` or ``(N, 1)`` in [0, 1] | the two classes, on from 0.5                 |
    | anything else           |                                | None: nothing that can be right or wrong     |

    Returns:
        Hits, a scalar, and counts ``(L, A)`` for L questions with A answers each; None where there is no answer.

    Example:
        >>> hits_and_counts(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 0, 1]))
        (tensor(1), tensor([[2, 1]]))
    """
    single = logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)
    if single and target.numel() == len(logits):
        if bool(((target < 0) | (target > 1)).any()):
            return None
        labels, said = (target.reshape(-1, 1) >= 0.5).long(), logits.reshape(-1, 1) > 0
    elif logits.dim() >= 2 and target.shape == logits.shape and target.is_floating_point():
        labels = (target >= 0.5).long().movedim(1, -1).reshape(-1, logits.shape[1])
        said = (logits > 0).movedim(1, -1).reshape(-1, logits.shape[1])
    elif logits.dim() >= 2 and logits.shape[1] >= 2 and not target.is_floating_point():
        if target.shape != logits.shape[:1] + logits.shape[2:]:
            return None
        known = target >= 0
        right = (logits.argmax(1) == target) & known
        return right.sum(), torch.bincount(target[known].long(), minlength=logits.shape[1]).unsqueeze(0)
    else:
        return None
    ones = labels.sum(0)
    return (said == labels.bool()).sum(), torch.stack([len(labels) - ones, ones], 1)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype.itemsize > 2 else values.float()
