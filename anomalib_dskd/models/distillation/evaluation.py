"""Evaluation of trained models: validation, test, prediction and direct calls."""

import logging
from typing import Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from anomalib_dskd.errors import ArgumentError, NotTrainedError
from anomalib_dskd.evaluation import keep_raw_scores
from anomalib_dskd.models.distillation.images import check_batch, check_images
from anomalib_dskd.models.distillation.mixin_base import ModuleMixin
from anomalib_dskd.models.distillation.torch_model import DistillationModel

__all__ = ["EvaluationMixin"]

logger = logging.getLogger(__name__)


class EvaluationMixin(ModuleMixin):
    """Scores images, and refuses to before the model has been trained."""

    model: DistillationModel
    """The networks."""

    def forward(self, batch: Tensor, *_: Any, **__: Any) -> InferenceBatch:  # noqa: ANN401 - anomalib's signature
        """Map images as read from files to normalized scores, maps and labels, as exported models do.

        The result has no gradient: anomalib's ``TorchInferencer`` calls this, and its visualizer cannot convert
        tensors with a gradient. For gradients call :attr:`model` with pre-processed images.

        Args:
            batch: images ``(B, 3, H, W)`` of any height and width, from 0 to 1.

        Returns:
            ``pred_score`` and ``pred_label`` ``(B, 1)``, ``anomaly_map`` and ``pred_mask`` ``(B, 1, H', W')`` of the
            size that the pre-processor resizes to.

        Raises:
            ArgumentError: another shape, type or range, or the model is in training mode.
        """
        if torch.compiler.is_exporting():
            return super().forward(batch)
        check_images(batch, self.pre_processor, dtype=next(self.parameters()).dtype)
        if self.training:
            msg = f"this {self.name} is in training mode: call .eval() first, or use anomalib's Engine."
            raise ArgumentError(msg)
        with torch.no_grad():
            return super().forward(batch)

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> ImageBatch:  # type: ignore[override] # noqa: ARG002
        """Add map ``(B, 1, H, W)`` and score ``(B, 1)`` to the batch, and raw ones for the metrics."""
        keep_raw_scores(batch, self._predict(batch), largest=self.model.largest_score)
        return batch

    test_step = validation_step  # type: ignore[assignment]

    def predict_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> ImageBatch:  # type: ignore[override] # noqa: ARG002
        """Add map and score to the batch, without raw ones: no metric reads them, and predictions may be kept."""
        self._predict(batch)
        return batch

    def _predict(self, batch: ImageBatch) -> InferenceBatch:
        check_batch(batch)
        predictions: InferenceBatch = self.model(batch.image)
        batch.update(**predictions._asdict())
        return predictions

    def on_validation_start(self) -> None:
        """Refuse to validate before training."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.require_training("validate")

    def on_test_start(self) -> None:
        """Refuse to test before training."""
        self.require_training("test")
        self.warn_without_thresholds()

    def on_predict_start(self) -> None:
        """Refuse to predict before training."""
        self.require_training("predict")
        self.warn_without_thresholds()

    def require_training(self, purpose: str) -> None:
        """Raise unless the networks that score images have been trained.

        Raises:
            NotTrainedError: they have not; the message names ``purpose``.
        """
        if not self.model.is_trained:
            msg = (
                f"cannot {purpose}: the networks of this {self.name} that score images have not been trained, and "
                f"scores would be random. Give a trained model with --ckpt_path (`anomalib {purpose} ... --ckpt_path "
                "results/.../model.ckpt`), or train it to the end."
            )
            raise NotTrainedError(msg)

    def warn_without_thresholds(self) -> None:
        """Warn if no validation has set thresholds: the raw scores are still right."""
        post_processor = self.post_processor
        if not isinstance(post_processor, PostProcessor) or not post_processor.enable_thresholding:
            return
        if post_processor.image_threshold.isnan():
            logger.warning(
                "no validation has set thresholds of this %s: scores are not normalized, and labels mean nothing. "
                "Train with a validation at the end (limit_val_batches above 0).",
                self.name,
            )
