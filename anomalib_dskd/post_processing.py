"""Thresholds and normalised scores, also where validation has good images alone."""

import logging
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_dskd.errors import ArgumentError

__all__ = ["NormalQuantilePostProcessor", "NormalQuantileThreshold"]

logger = logging.getLogger(__name__)

NORMAL_QUANTILE = 0.95  # see NormalQuantilePostProcessor
SENSITIVITY = 0.5  # anomalib's
LEVELS = ("image", "pixel")


class NormalQuantileThreshold(F1AdaptiveThreshold):
    """anomalib's threshold where there are defects, a quantile of the good images' scores where there are none.

    Of a map, an image's largest value counts: a mask then outlines something in no more good images than that.

    Args:
        fields: of a batch: scores ``(B,)`` or maps ``(B, H, W)``, and labels or masks of the same shape.
        quantile: from 0 to 1.
    """

    def __init__(self, fields: list[str], *, quantile: float) -> None:
        super().__init__(fields=fields, strict=False)
        self.quantile = quantile
        self.normal_images: int | None = None
        """Good images that the last threshold is a quantile of; None if it is anomalib's."""
        self.largest: list[Tensor]
        self.add_state("largest", default=[], dist_reduce_fx="cat")

    def update(self, batch: Batch[Any], *_: Any, **__: Any) -> None:  # type: ignore[override] # noqa: ANN401
        """Add a batch, unless it lacks one of the fields."""
        super().update(batch)
        scores, defects = (getattr(batch, field, None) for field in self.fields)
        if scores is not None and defects is not None:
            is_good = ~defects.reshape(len(defects), -1).any(dim=1)
            self.largest.append(scores.reshape(len(scores), -1).amax(dim=1)[is_good])  # (B, ...) to (good images,)

    def compute(self) -> Tensor:  # type: ignore[override] # torchmetrics returns its curve, anomalib one number
        """Return the threshold, and note in :attr:`normal_images` which one it is."""
        self.normal_images = None
        if self._has_anomalous_samples():
            return super().compute()
        largest = dim_zero_cat(self.largest)
        self.normal_images = len(largest)
        return torch.quantile(largest, self.quantile)


class NormalQuantilePostProcessor(PostProcessor):
    r"""anomalib's post-processor, with a threshold that needs no defects.

    A normalised score of 0.5 is the threshold, and an image is called defective above it. What the threshold is,
    depends on the validation set:

    - With defects, it is anomalib's: the one with the best F1 score. Scores are shifted to it and divided by the span
      of the validation set's scores.
    - Without, it is a quantile of the good images' scores: at 0.95, about one good part in twenty is called defective.
      (anomalib takes the largest: then one odd image among the good ones decides, and more images raise it.) A
      normalised score is the share of twice the threshold,

      .. math:: \min\left(\frac{s}{2 t}, 1\right)

      so that 0 means no discrepancy at all, and 0.6 a fifth more than the threshold. (anomalib divides by the span
      of the good images' scores, which one odd image stretches too.) Maps are treated the same, where each image's
      largest value counts: outlines appear in about one good image in twenty, not on every twentieth pixel.

    A sensitivity above 0.5 moves the decision down, below 0.5 up: to :math:`2 t (1 - \text{sensitivity})` without
    defects. All of it is part of checkpoints and exported models.

    Args:
        enable_normalization: as in anomalib.
        enable_thresholding: as in anomalib.
        enable_threshold_matching: as in anomalib.
        image_sensitivity: as in anomalib. Default: the checkpoint's, or 0.5.
        pixel_sensitivity: as in anomalib. Default: the checkpoint's, or 0.5.
        normal_quantile: share of the good images in validation that are to stay below the threshold, if there are no
            defects. Used when validation sets the thresholds, which is in training. Default, our choice: the
            checkpoint's, or 0.95, since 20 images are enough to tell it.

    Raises:
        ArgumentError: a value is out of range.
    """

    _image_threshold_metric: NormalQuantileThreshold
    _pixel_threshold_metric: NormalQuantileThreshold

    def __init__(
        self,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        enable_threshold_matching: bool = True,
        image_sensitivity: float | None = None,
        pixel_sensitivity: float | None = None,
        *,
        normal_quantile: float | None = None,
    ) -> None:
        given = {
            "image_sensitivity": image_sensitivity,
            "pixel_sensitivity": pixel_sensitivity,
            "normal_quantile": normal_quantile,
        }
        self._given = {name: value for name, value in given.items() if value is not None}
        for name, value in self._given.items():
            if not 0 <= value <= 1:
                msg = f"{name} {value!r} must be a number from 0 to 1."
                raise ArgumentError(msg)
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=enable_threshold_matching,
            image_sensitivity=self._given.get("image_sensitivity", SENSITIVITY),
            pixel_sensitivity=self._given.get("pixel_sensitivity", SENSITIVITY),
        )
        self.normal_quantile = self._given.get("normal_quantile", NORMAL_QUANTILE)
        self._image_threshold_metric = self._threshold_metric("pred_score", "gt_label")
        self._pixel_threshold_metric = self._threshold_metric("anomaly_map", "gt_mask")
        self._has_told = False

    def _threshold_metric(self, *fields: str) -> NormalQuantileThreshold:
        return NormalQuantileThreshold(list(fields), quantile=self.normal_quantile)

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "normal_quantile")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Take over a checkpoint's settings, except those that were given to the constructor."""
        super().load_checkpoint_config({name: value for name, value in config.items() if name not in self._given})
        for metric in (self._image_threshold_metric, self._pixel_threshold_metric):
            metric.quantile = self.normal_quantile

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set thresholds and the range of scores."""
        metrics = {"image": self._image_threshold_metric, "pixel": self._pixel_threshold_metric}
        for metric in metrics.values():
            metric.normal_images = None  # of an earlier validation
        super().on_validation_epoch_end(trainer, pl_module)
        is_good_alone = any(metric.normal_images is not None for metric in metrics.values())
        if not (is_good_alone and self.enable_thresholding):
            return
        self._tell_of_few_images(max(metric.normal_images or 0 for metric in metrics.values()))
        if self.enable_normalization:
            for level in LEVELS:
                has_own = not getattr(self, f"_{level}_threshold").isnan()
                if metrics[level].normal_images is not None or not has_own:
                    self._scale_by_threshold(level)

    def _scale_by_threshold(self, level: str) -> None:
        """Let 0 stay 0, and the threshold become 0.5."""
        threshold: Tensor = getattr(self, f"{level}_threshold")  # the other level's where this one has none
        smallest: Tensor = getattr(self, f"{level}_min")
        if threshold > 0 and smallest >= 0:  # else the model's scores do not start at 0: anomalib's range
            smallest.zero_()
            getattr(self, f"{level}_max").copy_(2 * threshold)

    def _tell_of_few_images(self, images: int) -> None:
        needed = 1 / (1 - self.normal_quantile) if self.normal_quantile < 1 else 1
        if images + 1e-6 < needed and not self._has_told:
            self._has_told = True
            logger.warning(
                "validation has %d good images and no defects: too few to tell their %g quantile, so that the "
                "threshold is close to the largest score among them. Validate with %d or more, or give a smaller "
                "normal_quantile.",
                images,
                self.normal_quantile,
                round(needed),
            )
