"""Teacher: the frozen, pretrained network that the students imitate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from anomalib_dskd.components.backbone import Backbone, FeatureLevel
from anomalib_dskd.components.teacher_weights import TeacherWeights
from anomalib_dskd.errors import TeacherWeightsError

__all__ = ["Teacher"]


class Teacher(nn.Module):
    """A pretrained timm backbone, always in evaluation mode and without gradient.

    It starts without pretrained weights; :meth:`load_weights` or a checkpoint provides them. Until then a forward
    pass raises an error, so that random features are never used in place of pretrained ones.

    Args:
        name: timm model that supports ``features_only``.
        layers: indices into timm's feature levels.
    """

    def __init__(self, name: str, layers: Sequence[int]) -> None:
        super().__init__()
        self.backbone = Backbone(name, layers).requires_grad_(False)
        self.weights_origin: dict[str, str] | None = None
        self.train(False)

    @property
    def levels(self) -> tuple[FeatureLevel, ...]:
        """Channels, stride and sign of each feature level."""
        return self.backbone.levels

    def load_weights(self, weights: TeacherWeights) -> None:
        """Copy pretrained weights into the network and record their origin.

        Raises:
            TeacherWeightsError: file missing or unreadable, or its tensors do not fit the network.
        """
        weights.load_into(self.backbone)
        self.weights_origin = weights.origin

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002 - the teacher has no training mode
        """Stay in evaluation mode when the enclosing model changes its mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images ``(B, 3, H, W)`` to one ``(B, C_k, H_k, W_k)`` tensor per level, without gradient.

        Raises:
            TeacherWeightsError: no pretrained weights have been loaded.
        """
        if self.weights_origin is None:
            msg = (
                f"the teacher {self.backbone.name!r} has no pretrained weights yet, and random ones would give "
                "meaningless scores. Train the model, load a checkpoint, or call `load_teacher_weights()` first."
            )
            raise TeacherWeightsError(msg)
        features: list[Tensor] = self.backbone(images)
        return features

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint needs in addition to the tensors: the origin of the weights."""
        return {"weights_origin": self.weights_origin}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the origin of the weights from a checkpoint."""
        self.weights_origin = state["weights_origin"]
