"""The weights and batch-norm statistics that images are scored with, during and after training."""

import logging
from typing import TYPE_CHECKING, Any

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.hooks import RemovableHandle

from anomalib_dskd.models.distillation.resuming import CHECKPOINT_KEY
from anomalib_dskd.models.distillation.training_loader import estimate_batch_norm
from anomalib_dskd.training.weight_average import WeightAverage

if TYPE_CHECKING:
    from anomalib_dskd.models.distillation.lightning_model import DistillationModule

__all__ = ["EvaluationWeights"]

logger = logging.getLogger(__name__)


class EvaluationWeights(Callback):
    """Prepares a model for evaluation within and after training: averaged weights, batch-norm statistics of their own.

    Training continues from the last step's weights, which a checkpoint holds too.

    Args:
        ema_decay: decay of the exponential moving average of the trained weights; 0 evaluates the last step's weights.
    """

    def __init__(self, *, ema_decay: float) -> None:
        self.ema_decay = ema_decay
        self.average: WeightAverage | None = None
        """Set while training with ``ema_decay``."""
        self._resumed: dict[str, Any] | None = None
        self._hook: RemovableHandle | None = None

    # --- training ---------------------------------------------------------------------------------------------------

    def on_load_checkpoint(
        self,
        trainer: Trainer,
        pl_module: "DistillationModule",  # type: ignore[override] # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Remember the average of a training run that is resumed."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._resumed = checkpoint.get(CHECKPOINT_KEY, {}).get("weight_average")

    def on_train_start(self, trainer: Trainer, pl_module: "DistillationModule") -> None:  # type: ignore[override]
        """Start or resume the average, and update it after each optimizer step."""
        resumed, self._resumed = self._resumed, None
        if resumed is None and self.ema_decay == 0:
            return
        average = WeightAverage(pl_module.model, decay=self.ema_decay)
        if resumed is not None:
            average.load_state_dict(resumed)
            average.restore()
        if self.ema_decay == 0:
            logger.warning("the checkpoint's averaged weights are dropped, because ema_decay is 0 now.")
            return

        def update(*_: object) -> None:
            if pl_module.students_learn:
                average.update()

        (optimizer,) = trainer.optimizers
        self.average, self._hook = average, optimizer.register_step_post_hook(update)

    def on_train_batch_start(self, *_: object) -> None:
        """Continue training from the last step's weights, if averaged ones were evaluated."""
        if self.average is not None:
            self.average.restore()

    def on_train_end(self, trainer: Trainer, pl_module: "DistillationModule") -> None:  # type: ignore[override] # noqa: ARG002
        """Leave the averaged weights in the model."""
        if self.average is not None and not self.average.is_applied:  # training did not end with a validation
            self._prepare(pl_module)
        self._stop_averaging()

    def on_exception(self, trainer: Trainer, pl_module: "DistillationModule", exception: BaseException) -> None:  # type: ignore[override] # noqa: ARG002
        """Leave the averaged weights in the model after an interruption too."""
        self._stop_averaging()

    def _stop_averaging(self) -> None:
        if self.average is not None and self._hook is not None:
            self.average.apply()
            self._hook.remove()
        self.average = self._hook = None

    # --- evaluation and checkpoints ---------------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: "DistillationModule") -> None:  # type: ignore[override]
        """Within training, evaluate the weights that a checkpoint is to contain.

        Raises:
            DivergedError: a weight is not finite.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            self._prepare(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: "DistillationModule") -> None:  # type: ignore[override]
        """Without a validation, prepare the model for being saved here.

        Raises:
            DivergedError: a weight is not finite.
        """
        if not trainer.enable_validation:
            self._prepare(pl_module)

    def _prepare(self, module: "DistillationModule") -> None:
        if self.average is not None:
            self.average.apply()
        estimate_batch_norm(module, module.model, module.run_students)
        module.check_weights()

    def on_save_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: "DistillationModule",  # type: ignore[override] # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Save the average as the model's weights, between validations too, and the last step's weights."""
        if self.average is not None:
            checkpoint.setdefault(CHECKPOINT_KEY, {})["weight_average"] = self.average.state_dict()
            averaged = {f"model.{name}": weight for name, weight in self.average.average.items()}
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **averaged}
