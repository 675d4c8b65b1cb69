"""TAD++ as an anomalib model."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from anomalib.data import ImageBatch
from anomalib.models.components import AnomalibModule
from torch import Tensor, nn
from torch.optim import Optimizer

from anomalib_dskd.argument_checks import check_choice, check_not_negative
from anomalib_dskd.components.backbone import check_teacher
from anomalib_dskd.components.discrepancy import distillation_loss
from anomalib_dskd.components.pseudo_defects import PseudoDefects
from anomalib_dskd.components.randomness import seeded
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.lightning_model import DistillationModule
from anomalib_dskd.models.distillation.training_loader import estimate_batch_norm
from anomalib_dskd.models.tad.assistant import Assistant, GuidanceAttention
from anomalib_dskd.models.tad.loss import entropy_loss, guidance_losses
from anomalib_dskd.models.tad.torch_model import TadModel
from anomalib_dskd.pre_processing import get_normalization

__all__ = ["Tad", "assistant_steps"]

logger = logging.getLogger(__name__)

Guidance = Literal["learned", "equal"]


def assistant_steps(steps: int, share: float) -> int:
    """Return how many of all optimizer steps train the assistant, before the others train the student.

    Args:
        steps: number of optimizer steps of the training run, 2 or more.
        share: of the assistant; it has at least one step, and the student too.

    Example:
        >>> assistant_steps(100, share=0.3), assistant_steps(2, share=0.1), assistant_steps(2, share=0.9)
        (30, 1, 1)
    """
    return min(max(1, round(share * steps)), steps - 1)


class Tad(DistillationModule, AnomalibModule):
    """Heterogeneous teacher-assistant dual-path learning (TAD++): a student with a second guide besides its teacher.

    Reimplemented from the abstract of "Inverse Meets Distillation: Heterogeneous Teacher-Assistant Dual-Path Learning
    for Unsupervised Defect Detection"; the authors' code and text were not seen; their results are not claimed.

    First a compact assistant of another architecture learns the pretrained teacher's features of normal images. Then a
    student of the teacher's architecture learns from both, with learned weights, and learns the clean image's features
    from damaged images (the inverse path). Where student and teacher differ, the image is anomalous. Only these two
    run at inference.

    The phase follows from the optimizer step and the number of all steps, so that an interrupted training run resumes
    in the right one; resuming with another number of steps is refused. There are no results before the student's
    phase: metrics of validations mean nothing, and a checkpoint cannot be tested.

    Args:
        assistant: timm backbone of another architecture than the teacher's, or none (an ablation). Default, our
            choice: EfficientNet-Lite0, which is compact, and made of other blocks than a ResNet.
        assistant_layers: indices into its feature levels, as many as ``layers``; features of another
            size than the teacher's are resized. Default: the same as ``layers``.
        assistant_share: share of the optimizer steps, at the start, which train the assistant and not the student; at
            least one step, and at most all but one. Default, our choice: 0.3.
        guidance: weights of teacher and assistant for each image and level: ``learned``, or ``equal`` (an ablation).
        entropy_weight: of the loss that keeps learned weights from ignoring one guide; they tend to a softmax of the
            negative distances divided by this number. Default, our choice: 0.1, the order of the distances.
        inverse_weight: of the inverse path, the two guides having 1 together; 0 leaves it out (an ablation). Default,
            our choice: 0.5, as it is a regularizer.
        defect_probability: of a training image to be damaged for the inverse path. Default, our choice: 1, as the
            student sees the clean ones anyway.
        **kwargs: shared arguments, which
            :class:`~anomalib_dskd.models.distillation.lightning_model.DistillationModule` documents.

    Raises:
        ArgumentError: a value is out of range or a combination makes no sense.

    Example:
        >>> model = Tad(image_size=128, assistant=None)
        >>> model.model.smallest_image
        32
    """

    model: TadModel
    training_only: ClassVar[frozenset[str]] = DistillationModule.training_only | {
        "assistant_share",
        "defect_probability",
        "entropy_weight",
        "inverse_weight",
    }
    backbones: ClassVar[frozenset[str]] = DistillationModule.backbones | {"assistant"}
    layers_by_default: ClassVar[frozenset[str]] = frozenset({"assistant_layers"})
    training_components: ClassVar[tuple[str, ...]] = ("assistant", "attention", "pseudo_defects")

    def __init__(
        self,
        assistant: str | None = "tf_efficientnet_lite0",
        assistant_layers: Sequence[int] | None = None,
        assistant_share: float = 0.3,
        guidance: Guidance = "learned",
        entropy_weight: float = 0.1,
        inverse_weight: float = 0.5,
        defect_probability: float = 1.0,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        check_not_negative(entropy_weight=entropy_weight, inverse_weight=inverse_weight)
        super().__init__(**kwargs)
        teacher, layers = self.network_arguments["teacher"], self.network_arguments["layers"]
        _check_guides(teacher, assistant, assistant_share, guidance)
        self.assistant_share = assistant_share
        self.entropy_weight = entropy_weight
        self.inverse_weight = inverse_weight
        self.assistant: Assistant | None = None
        self.attention: GuidanceAttention | None = None
        seed = self.options.seed
        with seeded(seed):
            self.model = TadModel(**self.network_arguments)
            levels = self.model.teacher.levels
            if assistant is not None:
                assistant_layers = layers if assistant_layers is None else assistant_layers
                self.assistant = Assistant(assistant, assistant_layers, levels)
                self.attention = GuidanceAttention(levels) if guidance == "learned" else None
        self.pseudo_defects = PseudoDefects(*get_normalization(teacher), seed=seed, probability=defect_probability)
        self.check_image_size()

    def check_image_size(self) -> None:
        """Check the image size against the assistant too."""
        super().check_image_size()
        if self.assistant is not None and self.network_size is not None:
            self.assistant.backbone.check_size(*self.network_size)

    # --- phases -------------------------------------------------------------------------------------------------

    @property
    def schedule_arguments(self) -> frozenset[str]:
        """Arguments that, with :attr:`planned_steps`, determine what happens in a step, such as its phase."""
        return super().schedule_arguments | ({"assistant_share"} if self.assistant is not None else set())

    @property
    def is_assistant_phase(self) -> bool:
        """Whether the next optimizer step trains the assistant, and not the student."""
        return self.assistant is not None and self.global_step < self._assistant_steps

    @property
    def phase(self) -> range:
        """Steps of the assistant's or the student's phase, whichever the next step belongs to."""
        if self.assistant is None:
            return super().phase
        end = self._assistant_steps
        return range(end) if self.is_assistant_phase else range(end, self.planned_steps)

    @property
    def students_learn(self) -> bool:
        """Whether it is the student's phase, and not the assistant's."""
        return not self.is_assistant_phase

    @property
    def _assistant_steps(self) -> int:
        return assistant_steps(self.planned_steps, self.assistant_share)

    def on_train_start(self) -> None:
        """Refuse a training run without a step for the student."""
        super().on_train_start()
        if self.assistant is not None and self.planned_steps < 2:  # noqa: PLR2004 - one for each
            msg = (
                "a training run of one optimizer step trains only the assistant. Supported: 2 steps or more. Give more "
                "--trainer.max_epochs, a smaller --data.train_batch_size, --trainer.fast_dev_run 2, or assistant null."
            )
            raise ArgumentError(msg)

    def on_train_end(self) -> None:
        """Warn if training was stopped before the student's first step, as a callback may do."""
        super().on_train_end()
        if self.assistant is not None and not self.model.is_trained:
            logger.warning(
                "training has stopped in the assistant's phase: the student has not been trained, and there are no "
                "results. Metrics do not change in this phase: increase the patience of EarlyStopping, give a smaller "
                "assistant_share, or resume from the checkpoint."
            )

    def on_train_batch_start(self, batch: ImageBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Freeze the assistant at the end of its phase, with batch-norm statistics of its last weights."""
        if self.assistant is None:
            return
        backbone, is_first = self.assistant.backbone, batch_idx % self.trainer.accumulate_grad_batches == 0
        if self.global_step == self._assistant_steps and is_first:
            estimate_batch_norm(self, backbone, lambda batch: backbone(torch.as_tensor(batch.image)))
        self.assistant.train(self.is_assistant_phase)

    # --- training -----------------------------------------------------------------------------------------------

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the sum of the phase's losses, and let the progress bar show the phase."""
        total = super().training_step(batch, batch_idx)
        phase = 1.0 if self.is_assistant_phase else 2.0
        self.log("phase", phase, on_step=True, on_epoch=False, prog_bar=True, batch_size=batch.batch_size)
        idle = [parameter.sum() for parameter in self._idle_parameters()]
        # several processes wait for a gradient of every parameter
        return total + 0 * torch.stack(idle).sum() if idle else total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep the optimizer's momentum from changing parameters that are not trained in this phase."""
        super().on_before_optimizer_step(optimizer)
        for parameter in self._idle_parameters():
            parameter.grad = None

    def compute_losses(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return ``assistant`` in its phase; then those of the guides, the inverse path and the guides' weights."""
        images = torch.as_tensor(batch.image)
        teacher = self.model.teacher_features(images)
        if self.is_assistant_phase:
            return {"assistant": self._distill(teacher, self._assist(batch, teacher))}
        student = self.model.student(images)
        losses = self._guide(batch, teacher, student)
        if self.inverse_weight > 0:
            damaged, _ = self.pseudo_defects(images, batch.image_path, epoch=self.current_epoch)
            losses["inverse"] = self.inverse_weight * self._distill(teacher, self.model.student(damaged))
        return losses

    def run_students(self, batch: ImageBatch) -> None:
        """Pass a training batch through the student, without damage, as at inference."""
        self.model.student(torch.as_tensor(batch.image))

    def _guide(self, batch: ImageBatch, teacher: list[Tensor], student: list[Tensor]) -> dict[str, Tensor]:
        if self.assistant is None:
            return {"from_teacher": self._distill(teacher, student)}
        with torch.no_grad():
            guides = [teacher, self._assist(batch, teacher)]
        if self.attention is None:
            weights = torch.full((len(teacher[0]), len(teacher), len(guides)), 1 / len(guides), device=self.device)
        else:
            weights = self.attention(student, guides)  # (B, K, 2)
        from_teacher, from_assistant = guidance_losses(student, guides, weights, hard_mining=self.mined_share)
        losses = {"from_teacher": from_teacher, "from_assistant": from_assistant}
        if self.attention is not None:
            losses["entropy"] = self.entropy_weight * entropy_loss(weights)
        return losses

    def _distill(self, teacher: list[Tensor], features: list[Tensor]) -> Tensor:
        return distillation_loss(teacher, features, l2_weight=0.0, hard_mining=self.mined_share)

    def _assist(self, batch: ImageBatch, teacher: list[Tensor]) -> list[Tensor]:
        """Return the assistant's features in the teacher's shapes."""
        assert self.assistant is not None  # the callers check
        features: list[Tensor] = self.assistant(torch.as_tensor(batch.image), [level.shape[-2:] for level in teacher])
        return features

    def _idle_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that are not trained in the current phase."""
        if self.assistant is None:
            return
        idle: list[nn.Module | None]
        idle = [self.model.student, self.attention] if self.is_assistant_phase else [self.assistant]
        for network in idle:
            if network is not None:
                yield from network.parameters()


def _check_guides(teacher: str, assistant: str | None, share: float, guidance: str) -> None:
    if assistant is not None:
        check_teacher(assistant, role="assistant")
        if assistant.partition(".")[0] == teacher.partition(".")[0]:
            msg = (
                f"assistant {assistant!r} has the teacher's architecture, and would teach nothing else. Give a "
                "backbone of another family, such as 'tf_efficientnet_lite0', or null for none."
            )
            raise ArgumentError(msg)
    if not 0 < share < 1:
        msg = f"assistant_share {share!r} must be a share of the steps larger than 0 and smaller than 1."
        raise ArgumentError(msg)
    check_choice(Guidance, guidance=guidance)
