"""Checkpoints of a model: what is saved, and what is accepted when one is loaded."""

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, cast

from anomalib.metrics import Evaluator
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import Self

from anomalib_dskd.models.distillation.checkpoint_io import named_errors
from anomalib_dskd.models.distillation.mixin_base import ModuleMixin
from anomalib_dskd.models.distillation.resuming import (
    add_arguments,
    adopt_arguments,
    check_arguments,
    resume_training,
    without_unknown_arguments,
)
from anomalib_dskd.models.distillation.training_options import TRAINING_ONLY, TrainingOptions

__all__ = ["CheckpointMixin"]


class CheckpointMixin(ModuleMixin):
    """Saves a model's arguments in checkpoints, and refuses checkpoints of a model with others."""

    options: TrainingOptions
    """Arguments that only training depends on."""
    network_arguments: dict[str, Any]
    """Arguments that the networks of every model take."""
    planned_steps: int = 0
    """Number of optimizer steps of the training run, once it has started; 0 if all steps are alike."""
    training_only: ClassVar[frozenset[str]] = TRAINING_ONLY
    """Arguments that a trained model's results do not depend on."""
    backbones: ClassVar[frozenset[str]] = frozenset({"teacher"})
    """Arguments that name a timm model."""
    layers_by_default: ClassVar[frozenset[str]] = frozenset()
    """Arguments whose default is the value of ``layers``."""

    @property
    def schedule_arguments(self) -> frozenset[str]:
        """Arguments that, with :attr:`planned_steps`, determine what happens in a step; empty if all are alike."""
        scheduled = set() if self.options.schedule == "constant" else {"learning_rate", "schedule"}
        return frozenset(scheduled | ({"hard_mining"} if self.options.hard_mining > 0 else set()))

    @abstractmethod
    def check_weights(self) -> None:
        """Raise ``DivergedError`` unless all trained weights are finite."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override] # noqa: ANN401 - passed on
        """Load a model as anomalib does; arguments may be those that results do not depend on.

        Raises:
            CheckpointError: the file is no checkpoint, is damaged, or holds more than data.
            ArgumentError: an argument differs that results depend on.
        """
        with named_errors(checkpoint_path):
            file = without_unknown_arguments(cls, checkpoint_path)
            return cast("Self", super().load_from_checkpoint(file, *args, **kwargs))  # type: ignore[arg-type] # Lightning takes files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save as anomalib does, with the arguments; refuse weights that are not finite.

        Raises:
            DivergedError: a weight is not finite; the previous checkpoint is kept.
        """
        self.check_weights()
        super().on_save_checkpoint(checkpoint)
        add_arguments(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take arguments that were not given from the checkpoint, and refuse it if one that was given differs.

        A training run that is resumed, and ``load_from_checkpoint``, need equal arguments.

        Raises:
            ArgumentError: arguments that results depend on differ, or training cannot be resumed.
        """
        super().on_load_checkpoint(checkpoint)
        # results may be computed with other metrics than in training; anomalib's AUPRO leaves a buffer in the model's
        # state, and in that of the evaluator as a callback
        if isinstance(self.evaluator, Evaluator):
            checkpoint.get("callbacks", {}).pop(self.evaluator.state_key, None)
        trained = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("evaluator.")}
        own = {name: value for name, value in self.state_dict().items() if name.startswith("evaluator.")}
        checkpoint["state_dict"] = {**trained, **own}
        is_fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if self._trainer is not None and not is_fitting:
            adopt_arguments(self, checkpoint)
        check_arguments(self, checkpoint)
        if is_fitting:
            resume_training(self, checkpoint)
