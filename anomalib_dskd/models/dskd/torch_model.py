"""The networks of DSKD and how their features meet (section 3, Fig. 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.components.backbone import Backbone
from anomalib_dskd.components.decoder import DecoderStudent
from anomalib_dskd.components.embedding import DeepFeatureEmbedding, DirectEmbedding
from anomalib_dskd.components.feature_cache import FeatureCache
from anomalib_dskd.components.teacher import Teacher
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.dskd.anomaly_map import AnomalyMapGenerator, anomaly_score

__all__ = ["DskdModel", "Embedding", "Features", "Losses", "MapPair"]

MapPair = Literal["T-D", "T-E", "E-D"]
Losses = Literal["both", "encoder", "decoder"]
Embedding = Literal["raw", "normalized"]

LOSSES_FOR_PAIR: dict[str, tuple[str, ...]] = {
    "T-D": ("both", "decoder"),
    "T-E": ("both", "encoder"),
    "E-D": ("both",),
}


@dataclass(frozen=True)
class Features:
    """Feature pyramids of one batch, each one ``(B, C_k, H_k, W_k)`` a level.

    Attributes:
        teacher: the teacher's, without gradient.
        students: those of the students that have a loss: ``encoder``, ``decoder`` or both.
    """

    teacher: list[Tensor]
    students: dict[str, list[Tensor]]


class DskdModel(nn.Module):
    """Frozen teacher, encoder student, deep feature embedding and decoder student.

    With ResNet18, three levels and two residual blocks in the embedding: 20.95 M parameters and 6.16 GMAC at
    256x256, the function that the paper's Table 6 gives 39.3 M parameters. Those count two whole ResNet18
    (11,689,512 each, with the layer4 and fc that no forward pass reaches), the decoder (3,703,168), the
    embedding (11,680,000), and a 1x1 convolution from 1024 to 512 channels with its batch norm (525,312) that
    is never run: 39,287,504 together.

    Args:
        teacher: timm backbone that supports ``features_only``.
        layers: indices into its feature levels; (1, 2, 3) are conv2_x, conv3_x and conv4_x of a ResNet.
        map_pair: the two networks whose discrepancy is the anomaly map (Table 7).
        losses: students that are distilled from the teacher (Table 7).
        map_layers: the ones of ``layers`` that the map adds up (Table 9); all by default.
        embedding: fuse all levels into the embedding, or down-sample the deepest alone (Table 8).
        embedding_blocks: residual blocks of the embedding.
        embedding_input: the encoder's features as they are, or divided by their norm (Algorithm 2, line 7).
        embedding_gradient: let the decoder's loss train the encoder student through the embedding.
        l2_weight: lambda of Eq. (6).
        sigma: of Eq. (9), in pixels.

    Raises:
        ArgumentError: a value is out of range, or a combination leaves the map without a trained student.
    """

    def __init__(
        self,
        teacher: str = "resnet18.tv_in1k",
        layers: Sequence[int] = (1, 2, 3),
        *,
        map_pair: MapPair = "T-D",
        losses: Losses = "both",
        map_layers: Sequence[int] | None = None,
        embedding: bool = True,
        embedding_blocks: int = 2,
        embedding_input: Embedding = "raw",
        embedding_gradient: bool = True,
        l2_weight: float = 0.1,
        sigma: float = 4.0,
    ) -> None:
        super().__init__()
        _check_combination(map_pair, losses, embedding_gradient=embedding_gradient)
        _check_embedding(embedding_blocks, embedding_input)
        self.map_pair = map_pair
        self.losses = losses
        self.map_levels = _positions(map_layers, layers)
        self.embedding_input = embedding_input
        self.embedding_gradient = embedding_gradient
        self.is_trained = False

        self.teacher = Teacher(teacher, layers)
        self.encoder_student = Backbone(teacher, layers)
        levels = self.teacher.levels
        self.embedding: nn.Module | None = None
        self.decoder_student: nn.Module | None = None
        if losses != "encoder":
            self.embedding = DeepFeatureEmbedding(levels, embedding_blocks) if embedding else DirectEmbedding(levels)
            self.decoder_student = DecoderStudent(levels)
        self.teacher_cache: FeatureCache | None = None
        """Set while training, to run the teacher once for each image instead of once in each epoch."""
        self.anomaly_map_generator = AnomalyMapGenerator(l2_weight=l2_weight, sigma=sigma)

    @property
    def smallest_image(self) -> int:
        """Least height and width in pixels: two cells of the embedding, and more than the blur reflects."""
        return max(4 * self.teacher.levels[-1].stride, self.anomaly_map_generator.margin + 1)

    @property
    def largest_score(self) -> float:
        """Upper bound of the anomaly map and the score."""
        return self.anomaly_map_generator.bound(len(self.map_levels))

    def forward(self, images: Tensor) -> Features | InferenceBatch:
        """Map normalised images ``(B, 3, H, W)`` to features in training, to map and score in evaluation.

        Returns:
            In training :class:`Features`; in evaluation ``anomaly_map`` ``(B, 1, H, W)`` and ``pred_score``
            ``(B, 1)``.

        Raises:
            ArgumentError: images smaller than the networks' strides or the blur allow.
            TeacherWeightsError: the teacher has no pretrained weights yet.
        """
        if not torch.compiler.is_exporting():  # sizes can be symbols there, and training has checked them
            self.check_size(*images.shape[-2:])
        return self._training_features(images) if self.training else self._infer(images)

    def _training_features(self, images: Tensor) -> Features:
        teacher = self.teacher if self.teacher_cache is None else self.teacher_cache
        return Features(teacher=teacher(images), students=self.student_features(images))

    def student_features(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Map images ``(B, 3, H, W)`` to the pyramids of the students that are distilled."""
        encoded = self.encoder_student(images)
        students = {}
        if self.losses != "decoder":
            students["encoder"] = encoded
        if self.losses != "encoder":
            students["decoder"] = self._decode(encoded)
        return students

    def _infer(self, images: Tensor) -> InferenceBatch:
        """Run only the networks that the map's pair needs."""
        features: dict[str, list[Tensor]] = {"E": self.encoder_student(images)}
        if "T" in self.map_pair:
            features["T"] = self.teacher(images)
        if "D" in self.map_pair:
            features["D"] = self._decode(features["E"])
        first, second = ([features[name][level] for level in self.map_levels] for name in self.map_pair.split("-"))
        anomaly_map = self.anomaly_map_generator(first, second, images.shape[-2:])
        return InferenceBatch(pred_score=anomaly_score(anomaly_map), anomaly_map=anomaly_map)

    def _decode(self, encoded: Sequence[Tensor]) -> list[Tensor]:
        assert self.embedding is not None  # the constructor sees to it
        assert self.decoder_student is not None
        features = encoded if self.embedding_gradient else [level.detach() for level in encoded]
        if self.embedding_input == "normalized":
            features = [F.normalize(level, dim=1) for level in features]
        decoded: list[Tensor] = self.decoder_student(self.embedding(features), [level.shape[-2:] for level in encoded])
        return decoded

    def check_size(self, height: int, width: int) -> None:
        """Raise unless the networks and the blur can work on images of this size.

        Raises:
            ArgumentError: too small, or not the only size that the teacher takes.
        """
        backbone = self.teacher.backbone
        if backbone.fixed_size is not None and backbone.fixed_size != (height, width):
            msg = f"images of {height}x{width} pixels: the teacher {backbone.name!r} takes {backbone.fixed_size} alone."
            raise ArgumentError(msg)
        if min(height, width) < self.smallest_image:
            msg = (
                f"images of {height}x{width} pixels are too small: the teacher {backbone.name!r} with layers "
                f"{list(backbone.layers)} and this sigma need at least {self.smallest_image}x{self.smallest_image}. "
                "Give a larger image_size, shallower layers or a smaller sigma."
            )
            raise ArgumentError(msg)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the tensors: whether the students have been trained."""
        return {"is_trained": self.is_trained}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore whether the students have been trained."""
        self.is_trained = state["is_trained"]


def _check_combination(map_pair: str, losses: str, *, embedding_gradient: bool) -> None:
    if losses not in LOSSES_FOR_PAIR.get(map_pair, ()):
        legal = "; ".join(f"{pair}: {', '.join(names)}" for pair, names in LOSSES_FOR_PAIR.items())
        msg = (
            f"map_pair {map_pair!r} with losses {losses!r} is no known pair, or compares a student that is not "
            f"distilled from the teacher. Legal losses for each map_pair are {legal}."
        )
        raise ArgumentError(msg)
    if losses == "decoder" and not embedding_gradient:
        msg = (
            "losses 'decoder' with embedding_gradient false never trains the encoder student. "
            "Set embedding_gradient to true, or losses to 'both'."
        )
        raise ArgumentError(msg)


def _check_embedding(blocks: int, embedding_input: str) -> None:
    if blocks < 1:
        msg = f"embedding_blocks {blocks} must be 1 or larger."
        raise ArgumentError(msg)
    if embedding_input not in get_args(Embedding):
        msg = f"embedding_input {embedding_input!r} must be {' or '.join(map(repr, get_args(Embedding)))}."
        raise ArgumentError(msg)


def _positions(map_layers: Sequence[int] | None, layers: Sequence[int]) -> tuple[int, ...]:
    """Positions in the pyramid of the layers that the map adds up."""
    chosen = list(layers) if map_layers is None else list(map_layers)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(layers):
        msg = f"map_layers {chosen} must be one or more different ones of layers {list(layers)}."
        raise ArgumentError(msg)
    return tuple(list(layers).index(layer) for layer in chosen)
