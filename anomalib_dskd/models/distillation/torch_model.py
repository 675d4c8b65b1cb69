"""Base of the networks of all detectors: a frozen teacher, and the anomaly map from two feature pyramids."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor, nn

from anomalib_dskd.components.anomaly_map import AnomalyMapGenerator, anomaly_score
from anomalib_dskd.components.teacher import Teacher
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.tiling import create_tiler, map_tiles, tiler_settings
from anomalib_dskd.training.feature_cache import FeatureCache

__all__ = ["DistillationModel", "Pyramid"]

Pyramid = Sequence[Tensor]
"""Features ``(B, C_k, H_k, W_k)``, one tensor per level, shallow to deep."""


class DistillationModel(nn.Module):
    """A frozen teacher, students that a subclass adds, and the anomaly map from the distance of two pyramids.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels.
        l2_weight: lambda of DSKD's Eq. (6).
        sigma: standard deviation of the map's Gaussian blur in pixels, Eq. (9).
        context_weight: weight in the map of the deepest level's errors, averaged over 3x3 neighbors.

    Raises:
        ArgumentError: a value is out of range.
    """

    scored_student: str
    """Name in :meth:`student_features` of the pyramid that the anomaly map compares with the teacher's."""

    def __init__(
        self,
        teacher: str,
        layers: Sequence[int],
        *,
        l2_weight: float = 0.0,
        sigma: float = 4.0,
        context_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.is_trained = False
        self.teacher = Teacher(teacher, layers)
        self.map_levels: Sequence[int] = range(len(self.teacher.levels))
        """Positions in the pyramid of the levels that the map sums."""
        self.coarsest_stride = 2 * self.teacher.levels[-1].stride
        """Stride in image pixels of the coarsest features: those of an embedding below the deepest level."""
        self.tiler: Tiler | None = None
        """Set by anomalib's ``TilerConfigurationCallback`` or a checkpoint, to compute maps of tiles of the images."""
        self.teacher_cache: FeatureCache | None = None
        """Set in training, to run the teacher once per image instead of once per image and epoch."""
        self.anomaly_map_generator = AnomalyMapGenerator(
            l2_weight=l2_weight, sigma=sigma, context_weight=context_weight
        )

    @property
    def smallest_image(self) -> int:
        """Least height and width in pixels: two cells of the coarsest features, and more than the blur reflects."""
        return max(2 * self.coarsest_stride, self.anomaly_map_generator.margin + 1)

    @property
    def largest_score(self) -> float:
        """Upper bound of the anomaly map and the score."""
        return self.anomaly_map_generator.bound(len(self.map_levels))

    @abstractmethod
    def student_features(self, images: Tensor, teacher: Pyramid) -> dict[str, list[Tensor]]:
        """Return the students' pyramids by name.

        Args:
            images: normalized, ``(B, 3, H, W)``.
            teacher: the teacher's pyramid of these images, for students that read it.
        """

    def teacher_features(self, images: Tensor) -> list[Tensor]:
        """Map images ``(B, 3, H, W)`` to the teacher's pyramid for a loss: with unit norm where it is cached."""
        features: list[Tensor] = (self.teacher if self.teacher_cache is None else self.teacher_cache)(images)
        return features

    def compared_pyramids(self, images: Tensor) -> tuple[Pyramid, Pyramid]:
        """Map normalized images ``(B, 3, H, W)`` to the two pyramids whose distance is the anomaly map."""
        teacher: list[Tensor] = self.teacher(images)
        return teacher, self.student_features(images, teacher)[self.scored_student]

    def forward(self, images: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]] | InferenceBatch:
        """Map normalized images ``(B, 3, H, W)`` to features in training, to map and score in evaluation.

        Returns:
            In training the teacher's pyramid and the students' by name; in evaluation an ``InferenceBatch`` with
            ``anomaly_map`` ``(B, 1, H, W)`` and ``pred_score`` ``(B, 1)``.

        Raises:
            ArgumentError: images smaller than the networks' strides or the blur allow.
            TeacherWeightsError: the teacher has no pretrained weights yet.
        """
        if not torch.compiler.is_exporting():  # sizes can be symbols there, and training has checked them
            self.check_size(*images.shape[-2:])
        if self.training:
            teacher = self.teacher_features(images)
            return teacher, self.student_features(images, teacher)
        tiler = self.tiler
        summed = self._summed_map(images) if tiler is None else map_tiles(images, tiler, self._summed_map)
        anomaly_map = self.anomaly_map_generator.smooth(summed)
        return InferenceBatch(pred_score=anomaly_score(anomaly_map), anomaly_map=anomaly_map)

    def _summed_map(self, images: Tensor) -> Tensor:
        first, second = self.compared_pyramids(images)
        levels = self.map_levels
        height, width = images.shape[-2:]
        pyramids = [first[k] for k in levels], [second[k] for k in levels]
        return self.anomaly_map_generator.sum_levels(*pyramids, (height, width))

    def check_size(self, height: int, width: int) -> None:
        """Raise unless the networks and the blur can work on images of this size.

        With a tiler, its tiles have to be of such a size, and the images no smaller.

        Raises:
            ArgumentError: too small, or another size than the only one that the teacher supports.
        """
        if self.tiler is not None:
            tile = (self.tiler.tile_size_h, self.tiler.tile_size_w)
            if height < tile[0] or width < tile[1]:
                msg = (
                    f"images of {height}x{width} pixels are smaller than tiles of {tile[0]}x{tile[1]}. Give a larger "
                    "image_size, or a smaller tile_size of TilerConfigurationCallback."
                )
                raise ArgumentError(msg)
            height, width = tile
        backbone = self.teacher.backbone
        backbone.check_size(height, width)
        if min(height, width) < self.smallest_image:
            msg = (
                f"images of {height}x{width} pixels are too small: the teacher {backbone.name!r} with layers "
                f"{list(backbone.layers)} and this sigma need at least {self.smallest_image}x{self.smallest_image}. "
                "Give a larger image_size, shallower layers or a smaller sigma."
            )
            raise ArgumentError(msg)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores besides tensors: whether the students are trained, and on which tiles."""
        return {"is_trained": self.is_trained, "tiler": tiler_settings(self.tiler)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore whether the students have been trained, and on which tiles.

        Raises:
            ArgumentError: a tiler has been set, and the checkpoint's is another.
        """
        self.is_trained = state["is_trained"]
        self.tiler = create_tiler(state.get("tiler"), self.tiler)  # 0.2.0 had no tiling
