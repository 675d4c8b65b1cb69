"""TAD++ as an anomalib model."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor, nn
from torch.optim import Optimizer

from anomalib_dskd.argument_checks import check_choice, check_not_negative
from anomalib_dskd.components.backbone import check_teacher
from anomalib_dskd.components.discrepancy import distillation_loss
from anomalib_dskd.components.pseudo_defects import PseudoDefects
from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.lightning_model import DistillationMixin
from anomalib_dskd.models.distillation.training_options import (
    DEFAULT_TEACHER,
    Schedule,
    TrainingOptions,
    resolve_pre_processor,
    steps_an_epoch,
)
from anomalib_dskd.models.tad.assistant import Assistant, GuidanceAttention
from anomalib_dskd.models.tad.loss import entropy_loss, guidance_losses
from anomalib_dskd.models.tad.torch_model import TadModel
from anomalib_dskd.pre_processing import normalisation

__all__ = ["Tad", "is_assistants_epoch"]

logger = logging.getLogger(__name__)

Guidance = Literal["learned", "equal"]


def is_assistants_epoch(epoch: int, epochs: int, share: float) -> bool:
    """Whether the assistant learns in an epoch, and not the student: in the first ``share`` of them, at least one.

    >>> [is_assistants_epoch(epoch, epochs=10, share=0.3) for epoch in range(5)]
    [True, True, True, False, False]
    """
    return epoch < max(1, round(share * epochs))


class Tad(DistillationMixin, AnomalibModule):
    """Heterogeneous teacher-assistant dual-path learning (TAD++): a teacher's pair whose student has a second guide.

    Reimplemented from the abstract of "Inverse Meets Distillation: Heterogeneous Teacher-Assistant Dual-Path Learning
    for Unsupervised Defect Detection"; the authors' code and text were not seen; their figures are not claimed.

    First a compact assistant of another architecture learns the pretrained teacher's features of good images. Then a
    student of the teacher's architecture learns from both, with learnt weights, and learns to give the clean image's
    features for damaged ones (the inverse path). Where student and teacher differ, the image is anomalous. Nothing
    but these two runs outside training.

    The share of the epochs that the assistant has follows from the epoch and ``max_epochs`` alone, so that an
    interrupted training goes on in the right phase; it is refused with another ``max_epochs``. Until the student's
    phase, there are no results: what a validation measures there means nothing, and a checkpoint from there cannot be
    tested.

    Args:
        teacher: timm backbone that supports ``features_only``. Default, our choice: DSKD's ImageNet ResNet18 with
            torchvision's weights.
        layers: indices into the backbone's feature levels. Default, our choice: DSKD's.
        teacher_weights: file of pretrained weights, safetensors or a PyTorch state dict. Default: the folder in
            the environment variable ``ANOMALIB_DSKD_WEIGHTS``, else the package of the ``lite`` extra, else what
            timm has cached or can download. Read when training starts; a checkpoint brings the teacher with it.
        image_size: height and width that images are resized to, with no crop. Default, our choice: 256, DSKD's.
            Not together with a ``pre_processor`` of your own.
        assistant: timm backbone of another architecture than the teacher's, or none (an ablation). Default, our
            choice: EfficientNet-Lite0, which is compact, and made of other blocks than a ResNet.
        assistant_layers: indices into its feature levels, as many as ``layers``; what has another size than the
            teacher's level is resized. Default: the same as ``layers``.
        assistant_share: of the epochs, the first ones, in which the assistant learns, and the student does not; at
            least one epoch. Default, our choice: 0.3.
        guidance: weights of teacher and assistant for each image and level: ``learned``, or ``equal`` (an ablation).
        entropy_weight: of the loss that keeps learnt weights from leaving one guide out; they tend to a softmax of
            the negative distances divided by this number. Default, our choice: 0.1, the order of the distances.
        inverse_weight: of the inverse path, the two guides having 1 together; 0 leaves it out (an ablation). Default,
            our choice: 0.5, as it is a regulariser.
        defect_probability: of a training image to be damaged for the inverse path. Default, our choice: 1, as the
            student sees the clean ones anyway.
        sigma: standard deviation of the map's blur in pixels; 0 for none. Default, our choice: 4, DSKD's.
        learning_rate: of Adam; with ``one_cycle`` its peak. Default, our choice: 0.001, DSKD's.
        schedule: ``constant``, or ``one_cycle``: up to ``learning_rate`` over the first 30 % of the steps, then down to
            nearly nothing, across both phases. Default, our choice: constant, as in DSKD.
        betas: of Adam. Default, our choice: (0.5, 0.999), DSKD's.
        weight_decay: of Adam. Default: 0; the abstract gives none.
        batch_norm_images: training images from which the batch-norm statistics are estimated anew before each
            evaluation within training; 0 keeps the running averages. Default, our choice: 256, as in DSKD.
        ema_decay: decay of an exponential average of the student's weights over its steps, such as 0.99.
            Evaluations, checkpoints and exports then have the average instead of the last step's weights. Needs
            ``batch_norm_images`` above 0. Default: 0, no average, as in DSKD.
        teacher_cache: GiB of memory for the teacher's features of the training images, which are the same in each
            epoch; what needs more is kept in a temporary file. 0 computes them in each epoch, as happens with
            augmentations that may be random and on a GPU. Default, our choice: 1.
        image_cache: GiB of memory for decoded, resized training images; those beyond, and all of them with random
            augmentations, are decoded in each epoch. Default, our choice: 1.
        seed: initialise what is trained, and draw all random numbers of an epoch, such as the damage and the order of
            its batches, from this number and the epoch's. A training that is resumed then ends as if it had never been
            stopped. Default, anomalib's: unseeded; each training, and each that is resumed, has an order of its own.
        pre_processor: as in every anomalib model.
        post_processor: as in every anomalib model. Default:
            :class:`~anomalib_dskd.post_processing.NormalQuantilePostProcessor`, which says what a score of 0.5 means.
        evaluator: as in every anomalib model. Default: :class:`~anomalib_dskd.evaluation.RawScoreEvaluator`.
        visualizer: as in every anomalib model.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Tad(image_size=128, assistant=None)
        >>> model.model.smallest_image
        32
    """

    model: TadModel
    training_only: ClassVar[frozenset[str]] = DistillationMixin.training_only | {
        "assistant_share",
        "defect_probability",
        "entropy_weight",
        "inverse_weight",
    }
    backbones: ClassVar[frozenset[str]] = DistillationMixin.backbones | {"assistant"}
    like_layers: ClassVar[frozenset[str]] = frozenset({"assistant_layers"})
    training_parts: ClassVar[tuple[str, ...]] = ("assistant", "attention", "pseudo_defects")

    def __init__(
        self,
        teacher: str = DEFAULT_TEACHER,
        layers: Sequence[int] = (1, 2, 3),
        teacher_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        assistant: str | None = "tf_efficientnet_lite0",
        assistant_layers: Sequence[int] | None = None,
        assistant_share: float = 0.3,
        guidance: Guidance = "learned",
        entropy_weight: float = 0.1,
        inverse_weight: float = 0.5,
        defect_probability: float = 1.0,
        sigma: float = 4.0,
        learning_rate: float = 1e-3,
        schedule: Schedule = "constant",
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 0.0,
        batch_norm_images: int = 256,
        ema_decay: float = 0.0,
        teacher_cache: float = 1.0,
        image_cache: float = 1.0,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        options = TrainingOptions.from_arguments(locals())
        check_not_negative(sigma=sigma, entropy_weight=entropy_weight, inverse_weight=inverse_weight)
        _check_guides(teacher, assistant, assistant_share, guidance)
        check_teacher(teacher)
        super().__init__(
            pre_processor=resolve_pre_processor(pre_processor, teacher, image_size),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.options = options
        self.assistant_share = assistant_share
        self.entropy_weight = entropy_weight
        self.inverse_weight = inverse_weight
        self.assistant: Assistant | None = None
        self.attention: GuidanceAttention | None = None
        with seeded(seed):
            self.model = TadModel(teacher, layers, sigma=sigma)
            levels = self.model.teacher.levels
            if assistant is not None:
                assistant_layers = layers if assistant_layers is None else assistant_layers
                self.assistant = Assistant(assistant, assistant_layers, levels)
                self.attention = GuidanceAttention(levels) if guidance == "learned" else None
        self.pseudo_defects = PseudoDefects(*normalisation(teacher), seed=seed, probability=defect_probability)
        if self.input_size is not None:
            self.model.check_size(*self.input_size)
            self._check_assistants_size(*self.input_size)

    # --- phases -------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> frozenset[str]:
        """Arguments by which what happens in an epoch depends on how many there will be, as the phases do."""
        return super().planned | ({"assistant_share"} if self.assistant is not None else set())

    @property
    def is_assistants_phase(self) -> bool:
        """Whether the assistant learns in the present epoch, and not the student."""
        return self.assistant is not None and is_assistants_epoch(
            self.current_epoch, self.trainer.max_epochs or 0, self.assistant_share
        )

    @property
    def students_learn(self) -> bool:
        """Whether it is the student's phase, and not the assistant's."""
        return not self.is_assistants_phase

    def on_fit_start(self) -> None:
        """Refuse a training in which the student would have no epoch."""
        epochs = self.trainer.max_epochs or 0
        self._check_students_share(epochs - 1, f"max_epochs {self.trainer.max_epochs}")
        super().on_fit_start()

    def on_train_start(self) -> None:
        """Refuse a training that ends by its number of steps before the student's first epoch."""
        super().on_train_start()
        steps, an_epoch = self.trainer.max_steps, steps_an_epoch(self.trainer)
        if steps > 0 and an_epoch is not None:
            self._check_students_share((steps - 1) // an_epoch, f"max_steps {steps}")

    def _check_students_share(self, last_epoch: int, what: str) -> None:
        epochs = self.trainer.max_epochs or 0
        has_none = epochs < 1 or is_assistants_epoch(min(last_epoch, epochs - 1), epochs, self.assistant_share)
        if self.assistant is not None and has_none:
            msg = (
                f"{what} with assistant_share {self.assistant_share} has no end, or no epoch for the student: give "
                "--trainer.max_epochs, at least 2, a smaller assistant_share, or assistant null."
            )
            raise ArgumentError(msg)

    def on_train_end(self) -> None:
        """Warn if training was stopped before the student's first epoch, as a callback may do."""
        super().on_train_end()
        if self.assistant is not None and not self.model.is_trained:
            logger.warning(
                "training has stopped while the assistant was still learning: the student has learnt nothing, and "
                "there are no results. Figures do not change in that time: let an EarlyStopping wait longer "
                "(patience), give a smaller assistant_share, or go on from the checkpoint."
            )

    def on_train_epoch_start(self) -> None:
        """Freeze the assistant once it has learnt, with batch-norm statistics of its last weights."""
        super().on_train_epoch_start()
        if self.assistant is None:
            return
        backbone, epochs = self.assistant.backbone, self.trainer.max_epochs or 0
        has_learnt = self.current_epoch > 0 and not self.is_assistants_phase
        if has_learnt and is_assistants_epoch(self.current_epoch - 1, epochs, self.assistant_share):
            self.estimate_batch_norm(backbone, lambda batch: backbone(torch.as_tensor(batch.image)))
        self.assistant.train(self.is_assistants_phase)

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the sum of the phase's losses, and let the progress bar show the phase."""
        total = super().training_step(batch, batch_idx)
        phase = 1.0 if self.is_assistants_phase else 2.0
        self.log("phase", phase, on_step=True, on_epoch=False, prog_bar=True, batch_size=batch.batch_size)
        idle = [parameter.sum() for parameter in self._idle_parameters()]
        # several processes wait for a gradient of every parameter
        return total + 0 * torch.stack(idle).sum() if idle else total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Keep the optimiser from moving, by its momentum, what does not learn in this phase."""
        for parameter in self._idle_parameters():
            parameter.grad = None

    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return ``assistant`` in its phase; then those of the guides, the inverse path and the guides' weights."""
        images = torch.as_tensor(batch.image)
        teacher = self.model.teacher_features(images)
        if self.is_assistants_phase:
            return {"assistant": distillation_loss(teacher, self._assist(batch, teacher), l2_weight=0.0)}
        student = self.model.student(images)
        losses = self._guide(batch, teacher, student)
        if self.inverse_weight > 0:
            damaged, _ = self.pseudo_defects(images, batch.image_path, epoch=self.current_epoch)
            inverse = distillation_loss(teacher, self.model.student(damaged), l2_weight=0.0)
            losses["inverse"] = self.inverse_weight * inverse
        return losses

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through the student, clean as it will be on the line."""
        self.model.student(torch.as_tensor(batch.image))

    def _guide(self, batch: ImageBatch, teacher: list[Tensor], student: list[Tensor]) -> dict[str, Tensor]:
        if self.assistant is None:
            return {"from_teacher": distillation_loss(teacher, student, l2_weight=0.0)}
        with torch.no_grad():
            guides = [teacher, self._assist(batch, teacher)]
        if self.attention is None:
            weights = torch.full((len(teacher[0]), len(teacher), len(guides)), 1 / len(guides), device=self.device)
        else:
            weights = self.attention(student, guides)  # (B, K, 2)
        from_teacher, from_assistant = guidance_losses(student, guides, weights)
        losses = {"from_teacher": from_teacher, "from_assistant": from_assistant}
        if self.attention is not None:
            losses["entropy"] = self.entropy_weight * entropy_loss(weights)
        return losses

    def _assist(self, batch: ImageBatch, teacher: list[Tensor]) -> list[Tensor]:
        """Return the assistant's features in the teacher's shapes."""
        assert self.assistant is not None  # the callers see to it
        features: list[Tensor] = self.assistant(torch.as_tensor(batch.image), [level.shape[-2:] for level in teacher])
        return features

    def _check_assistants_size(self, height: int, width: int) -> None:
        backbone = None if self.assistant is None else self.assistant.backbone
        if backbone is not None and backbone.fixed_size not in {None, (height, width)}:
            msg = (
                f"images of {height}x{width} pixels: the assistant {backbone.name!r} takes {backbone.fixed_size} "
                "alone. Give this image_size, or an assistant that takes any."
            )
            raise ArgumentError(msg)

    def _idle_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that do not learn in the present phase."""
        if self.assistant is None:
            return
        idle: list[nn.Module | None]
        idle = [self.model.student, self.attention] if self.is_assistants_phase else [self.assistant]
        for network in idle:
            if network is not None:
                yield from network.parameters()


def _check_guides(teacher: str, assistant: str | None, share: float, guidance: str) -> None:
    if assistant is not None:
        check_teacher(assistant, role="assistant")
        if assistant.partition(".")[0] == teacher.partition(".")[0]:
            msg = (
                f"assistant {assistant!r} has the teacher's architecture, and would know nothing else. Give a backbone "
                "of another family, such as 'tf_efficientnet_lite0', or null for none."
            )
            raise ArgumentError(msg)
    if not 0 < share < 1:
        msg = f"assistant_share {share!r} must be a share of the epochs larger than 0 and smaller than 1."
        raise ArgumentError(msg)
    check_choice(Guidance, guidance=guidance)
