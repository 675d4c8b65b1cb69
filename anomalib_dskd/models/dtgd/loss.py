"""The losses of DTGD: consistency with the normal teacher, and dissimilarity to the anomaly teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.components.discrepancy import discrepancy, distillation_loss

__all__ = ["DtgdLoss", "dissimilarity_loss"]


def dissimilarity_loss(
    decoder: Sequence[Tensor], anomaly_teacher: Sequence[Tensor], masks: Tensor, *, margin: float
) -> Tensor:
    r"""Average, over the damaged part of the images, the cosine similarity of two pyramids beyond a margin.

    .. math::
        \ell = \frac{1}{K} \sum_k
        \frac{\sum_{bij} m^k_{bij} \max(0, \cos(d^k_{bij}, a^k_{bij}) - \mu)}{\sum_{bij} m^k_{bij}}

    where :math:`m^k_{bij}` is the share of a feature pixel of image :math:`b` that is damaged.

    Args:
        decoder: the decoder student's features, one ``(B, C_k, H_k, W_k)`` per level.
        anomaly_teacher: the teacher's features of the damaged images, of the same shapes.
        masks: ``(B, 1, H, W)``, 1 where an image is damaged and 0 elsewhere.
        margin: cosine up to which features count as unlike.

    Returns:
        Scalar; 0 where nothing is damaged.

    Example:
        >>> a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])  # cosine 24/25
        >>> features = [a.view(1, 2, 1, 1)], [b.view(1, 2, 1, 1)]
        >>> round(dissimilarity_loss(*features, torch.ones(1, 1, 4, 4), margin=0.5).item(), 6)
        0.46
    """
    levels = []
    for decoded, damaged in zip(decoder, anomaly_teacher, strict=True):
        cosine = 1 - discrepancy(decoded, damaged, l2_weight=0.0)  # (B, 1, H_k, W_k)
        share = F.interpolate(masks.float(), size=cosine.shape[-2:], mode="area")  # (B, 1, H_k, W_k)
        excess = (share * (cosine - margin).clamp_min(0)).sum()
        levels.append(excess / share.sum().clamp_min(torch.finfo(share.dtype).tiny))
    return torch.stack(levels).mean()


class DtgdLoss(nn.Module):
    """Consistency of encoder and decoder with the normal teacher, and dissimilarity to the anomaly teacher.

    Args:
        margin: see :func:`dissimilarity_loss`.
        dissimilarity_weight: of the dissimilarity; each consistency has 1.
    """

    def __init__(self, *, margin: float, dissimilarity_weight: float) -> None:
        super().__init__()
        self.margin = margin
        self.dissimilarity_weight = dissimilarity_weight

    def forward(
        self,
        normal_teacher: Sequence[Tensor],
        students: dict[str, list[Tensor]],
        anomaly_teacher: Sequence[Tensor],
        masks: Tensor,
        *,
        hard_mining: float = 0.0,
    ) -> dict[str, Tensor]:
        """Map pyramids to the losses ``encoder``, ``decoder`` and ``dissimilarity``, the last one weighted.

        Args:
            normal_teacher: the teacher's features of the clean images, one ``(B, C_k, H_k, W_k)`` per level.
            students: features of encoder and decoder, of the same shapes.
            anomaly_teacher: the teacher's features of the damaged images.
            masks: ``(B, 1, H, W)``, 1 where an image is damaged and 0 elsewhere.
            hard_mining: share of the pixels whose gradient of the consistency is reduced.
        """
        losses = {
            name: distillation_loss(normal_teacher, features, l2_weight=0.0, hard_mining=hard_mining)
            for name, features in students.items()
        }
        dissimilarity = dissimilarity_loss(students["decoder"], anomaly_teacher, masks, margin=self.margin)
        return {**losses, "dissimilarity": self.dissimilarity_weight * dissimilarity}
