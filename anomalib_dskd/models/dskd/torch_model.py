"""The networks of DSKD and how their features meet (section 3, Fig. 3)."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.argument_checks import check_choice
from anomalib_dskd.components.backbone import Backbone
from anomalib_dskd.components.decoder import DecoderStudent
from anomalib_dskd.components.embedding import DeepFeatureEmbedding, DirectEmbedding
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.torch_model import DistillationModel, Pyramid

__all__ = ["DskdModel", "Embedding", "Encoder", "Losses", "MapPair"]

MapPair = Literal["T-D", "T-E", "E-D"]
Losses = Literal["both", "encoder", "decoder"]
Embedding = Literal["raw", "normalized"]
Encoder = Literal["student", "teacher"]

LOSSES_FOR_PAIR: dict[str, tuple[str, ...]] = {
    "T-D": ("both", "decoder"),
    "T-E": ("both", "encoder"),
    "E-D": ("both",),
}


class DskdModel(DistillationModel):
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
        map_layers: the ones of ``layers`` that the map sums (Table 9); all by default.
        encoder: network whose features are embedded: the encoder student, or the teacher itself. Then there is no
            encoder student: 4.33 GMAC at 256x256 with ResNet18.
        embedding: fuse all levels into the embedding, or downsample only the deepest (Table 8).
        embedding_blocks: residual blocks of the embedding.
        embedding_input: the encoder's features as they are, or divided by their norm (Algorithm 2, line 7).
        embedding_gradient: let the decoder's loss train the encoder student through the embedding.
        l2_weight: lambda of Eq. (6).
        **kwargs: of the anomaly map, which :class:`DistillationModel` documents.

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
        encoder: Encoder = "student",
        embedding: bool = True,
        embedding_blocks: int = 2,
        embedding_input: Embedding = "raw",
        embedding_gradient: bool = True,
        l2_weight: float = 0.1,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        _check_combination(map_pair, losses, embedding_gradient=embedding_gradient)
        check_choice(Embedding, embedding_input=embedding_input)
        check_choice(Encoder, encoder=encoder)
        if encoder == "teacher":
            _check_teacher_as_encoder(map_pair, losses, embedding_input)
        super().__init__(teacher, layers, l2_weight=l2_weight, **kwargs)
        self.map_pair = map_pair
        self.losses = losses
        self.map_levels = _positions(map_layers, layers)
        self.embedding_input = embedding_input
        self.embedding_gradient = embedding_gradient
        self.encoder_student = Backbone(teacher, layers) if encoder == "student" else None
        levels = self.teacher.levels
        self.embedding: nn.Module | None = None
        self.decoder_student: nn.Module | None = None
        if losses != "encoder":
            self.embedding = DeepFeatureEmbedding(levels, embedding_blocks) if embedding else DirectEmbedding(levels)
            self.decoder_student = DecoderStudent(levels)

    def student_features(self, images: Tensor, teacher: Pyramid) -> dict[str, list[Tensor]]:
        """Map images ``(B, 3, H, W)`` to the pyramids of the students that are distilled, which Eq. (7) compares."""
        if self.encoder_student is None:
            return {"decoder": self._decode(teacher)}
        encoded = self.encoder_student(images)
        students = {}
        if self.losses != "decoder":
            students["encoder"] = encoded
        if self.losses != "encoder":
            students["decoder"] = self._decode(encoded)
        return students

    def compared_pyramids(self, images: Tensor) -> tuple[Pyramid, Pyramid]:
        """Run only the networks that ``map_pair`` needs."""
        pyramids: dict[str, Pyramid] = {}
        if "T" in self.map_pair:
            pyramids["T"] = self.teacher(images)
        pyramids["E"] = pyramids["T"] if self.encoder_student is None else self.encoder_student(images)
        if "D" in self.map_pair:
            pyramids["D"] = self._decode(pyramids["E"])
        first, second = self.map_pair.split("-")
        return pyramids[first], pyramids[second]

    def _decode(self, encoded: Sequence[Tensor]) -> list[Tensor]:
        assert self.embedding is not None  # the constructor checks it
        assert self.decoder_student is not None
        features = encoded if self.embedding_gradient else [level.detach() for level in encoded]
        if self.embedding_input == "normalized":
            features = [F.normalize(level, dim=1) for level in features]
        decoded: list[Tensor] = self.decoder_student(self.embedding(features), [level.shape[-2:] for level in encoded])
        return decoded


def _check_combination(map_pair: str, losses: str, *, embedding_gradient: bool) -> None:
    if losses not in LOSSES_FOR_PAIR.get(map_pair, ()):
        supported = "; ".join(f"{pair}: {', '.join(names)}" for pair, names in LOSSES_FOR_PAIR.items())
        msg = (
            f"map_pair {map_pair!r} with losses {losses!r} is an unknown pair, or compares a student that is not "
            f"distilled from the teacher. Supported losses for each map_pair: {supported}."
        )
        raise ArgumentError(msg)
    if losses == "decoder" and not embedding_gradient:
        msg = (
            "losses 'decoder' with embedding_gradient false never trains the encoder student. "
            "Set embedding_gradient to true, or losses to 'both'."
        )
        raise ArgumentError(msg)


def _check_teacher_as_encoder(map_pair: str, losses: str, embedding_input: str) -> None:
    if map_pair != "T-D" or losses == "encoder":
        msg = (
            f"encoder 'teacher' with map_pair {map_pair!r} and losses {losses!r}: there is no encoder student. "
            "Supported values: map_pair 'T-D', losses 'both' or 'decoder'."
        )
        raise ArgumentError(msg)
    if embedding_input != "normalized":
        msg = (
            f"encoder 'teacher' with embedding_input {embedding_input!r}: the teacher's features are cached with unit "
            "norm in training, so that evaluation would embed others. Set embedding_input to 'normalized'."
        )
        raise ArgumentError(msg)


def _positions(map_layers: Sequence[int] | None, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the positions in the pyramid of the layers that the map sums."""
    chosen = list(layers) if map_layers is None else list(map_layers)
    if not chosen or len(set(chosen)) != len(chosen) or not set(chosen) <= set(layers):
        msg = f"map_layers {chosen} must be one or more distinct values of layers {list(layers)}."
        raise ArgumentError(msg)
    return tuple(list(layers).index(layer) for layer in chosen)
