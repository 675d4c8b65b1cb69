"""AFKD as an anomalib model."""

from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from torch import Tensor

from anomalib_dskd.components.discrepancy import distillation_loss
from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.models.afkd.fusion import FusionWeights
from anomalib_dskd.models.afkd.torch_model import AfkdModel
from anomalib_dskd.models.distillation.lightning_model import DistillationModule

__all__ = ["Afkd"]


class Afkd(DistillationModule, AnomalibModule):
    """Asymptotic fusion knowledge distillation: reverse distillation from feature levels that are fused step by step.

    Reimplemented from the abstract of "Asymptotic fusion knowledge distillation for industrial anomaly detection";
    the authors' code and text were not seen; their results are not claimed.

    The levels of a pretrained teacher are fused one after the other, shallow ones first, with learned weights at each
    pixel. A decoder student learns to reconstruct the teacher's features of normal images from their embedding. Where
    it fails to, the image is anomalous. There is no encoder student, so that it computes less than DSKD.

    Args:
        fusion: weights of the levels that are fused: ``learned`` at each pixel (the abstract), or fixed and ``equal``
            (an ablation).
        embedding_blocks: residual blocks in the embedding of the fused levels. Default, our choice: two, as in DSKD.
        **kwargs: shared arguments, which
            :class:`~anomalib_dskd.models.distillation.lightning_model.DistillationModule` documents.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Afkd(image_size=128, fusion="equal")
        >>> model.model.smallest_image
        64
    """

    model: AfkdModel

    def __init__(self, fusion: FusionWeights = "learned", embedding_blocks: int = 2, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        with seeded(self.options.seed):
            self.model = AfkdModel(**self.network_arguments, fusion=fusion, embedding_blocks=embedding_blocks)
        self.check_image_size()

    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return the loss of the decoder student: ``1 - cos``, averaged over pixels and levels."""
        teacher, students = self.model(torch.as_tensor(batch.image))
        loss = distillation_loss(teacher, students["decoder"], l2_weight=0.0, hard_mining=self.mined_share)
        return {"decoder": loss}
