"""The networks of TAD++ that work on the line: a teacher, and a student of the same architecture."""

from collections.abc import Sequence

from torch import Tensor

from anomalib_dskd.components.backbone import Backbone
from anomalib_dskd.models.distillation.torch_model import DistillationModel, Features

__all__ = ["TadModel"]


class TadModel(DistillationModel):
    """Frozen teacher, and a student of its architecture that starts from random weights: the pair of STFPM.

    Reimplemented from the abstract; the authors' code and text were not seen; their figures are not claimed.

    What guides the student beside the teacher is no part of this: only training needs it.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels.
        sigma: standard deviation of the map's blur in pixels.

    Raises:
        ArgumentError: a value is out of range.
    """

    def __init__(self, teacher: str, layers: Sequence[int] = (1, 2, 3), *, sigma: float = 4.0) -> None:
        super().__init__(teacher, layers, l2_weight=0.0, sigma=sigma)
        self.student = Backbone(teacher, layers)

    @property
    def coarsest_stride(self) -> int:
        """Image pixels along a cell of the coarsest features: there is no embedding below the deepest level."""
        return self.teacher.levels[-1].stride

    def training_features(self, images: Tensor) -> Features:
        """Map normalised images ``(B, 3, H, W)`` to the teacher's features and the student's."""
        return Features(teacher=self.teacher_features(images), students={"student": self.student(images)})

    def compared_pyramids(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Run teacher and student."""
        return self.teacher(images), self.student(images)
