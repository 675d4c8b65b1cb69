"""The networks of TAD++ at inference: a teacher, and a student of the same architecture."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from anomalib_dskd.components.backbone import Backbone
from anomalib_dskd.models.distillation.torch_model import DistillationModel, Pyramid

__all__ = ["TadModel"]


class TadModel(DistillationModel):
    """Frozen teacher, and a student of its architecture that starts from random weights: the pair of STFPM.

    Reimplemented from the abstract; the authors' code and text were not seen; their results are not claimed.

    The assistant and the guidance attention are training-only and are not part of this model.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels.
        **kwargs: of the anomaly map, which :class:`DistillationModel` documents.

    Raises:
        ArgumentError: a value is out of range.
    """

    scored_student = "student"

    def __init__(self, teacher: str, layers: Sequence[int] = (1, 2, 3), **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(teacher, layers, **kwargs)
        self.student = Backbone(teacher, layers)
        self.coarsest_stride = self.teacher.levels[-1].stride  # no embedding below the deepest level

    def student_features(self, images: Tensor, teacher: Pyramid) -> dict[str, list[Tensor]]:  # noqa: ARG002
        """Run the student, which reads nothing of the teacher's."""
        return {"student": self.student(images)}
