"""Post-processing: thresholds and normalized scores, also for validation sets with normal images only."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch
from anomalib.metrics import AnomalibMetric, F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.pixel_metrics import ScoreCounts, find_best_threshold

__all__ = ["NormalQuantilePixelThreshold", "NormalQuantilePostProcessor", "NormalQuantileThreshold"]

logger = logging.getLogger(__name__)

NORMAL_QUANTILE = 0.95  # see NormalQuantilePostProcessor
SENSITIVITY = 0.5  # anomalib's
LEVELS = ("image", "pixel")


class _NormalQuantile(Metric):
    """Mixin of metrics for the best threshold, or a quantile of the normal images' scores if there are only those.

    The score of an anomaly map is its largest value: masks are then non-empty for as few normal images as are predicted
    anomalous.

    Args:
        fields: names of two fields of a batch: scores ``(B,)`` or maps ``(B, H, W)``, and labels or masks of the same
            shape.
    """

    fields: Sequence[str]

    def __init__(self, fields: list[str]) -> None:
        super().__init__(fields=fields, strict=False)
        self.quantile = NORMAL_QUANTILE
        """From 0 to 1; the post-processor sets its own before the threshold is computed."""
        self.normal_images: int | None = None
        """Number of normal images that the last threshold is a quantile of; None if there were anomalous images."""
        self.normal_scores: list[Tensor]
        self.add_state("normal_scores", default=[], dist_reduce_fx="cat")
        self.has_anomalous: Tensor
        self.add_state("has_anomalous", default=torch.tensor(False), dist_reduce_fx="max")

    def update(self, batch: Batch[Any], *_: Any, **__: Any) -> None:  # noqa: ANN401
        """Add a batch, unless one of the fields is missing."""
        super().update(batch)  # type: ignore[safe-super] # that of anomalib's metric
        scores, defects = (getattr(batch, field, None) for field in self.fields)
        if scores is not None and defects is not None:
            is_normal = ~defects.reshape(len(defects), -1).any(dim=1)
            self.has_anomalous = self.has_anomalous | ~is_normal.all()
            # (B, ...) to (normal images,)
            self.normal_scores.append(scores.reshape(len(scores), -1).amax(dim=1)[is_normal])

    def compute(self) -> Tensor:
        """Return the threshold, and record its kind in :attr:`normal_images`."""
        self.normal_images = None
        if self.has_anomalous:
            return self.find_best()
        scores = dim_zero_cat(self.normal_scores)
        self.normal_images = len(scores)
        return torch.quantile(scores, self.quantile)

    @abstractmethod
    def find_best(self) -> Tensor:
        """Return the threshold with the best F1 score."""


class NormalQuantileThreshold(_NormalQuantile, F1AdaptiveThreshold):  # type: ignore[misc]
    """The threshold of images with the best F1 score, or a quantile of the scores if all images are normal.

    With anomalous images, anomalib returns the lowest score that it counts as anomalous, which is that of a defect; its
    post-processor then calls only larger scores anomalous, and misses this defect. The threshold here is the middle
    between this score and the next lower one, that of a normal image; if there is none, half of this score.
    """

    def find_best(self) -> Tensor:
        """Return the threshold with the best F1 score."""
        return _middle_below(F1AdaptiveThreshold.compute(self), dim_zero_cat(self.preds))


class NormalQuantilePixelThreshold(_NormalQuantile, AnomalibMetric, ScoreCounts):  # type: ignore[misc]
    """The same of pixels, whose memory does not grow with the number of images; best up to the width of a bin."""

    def find_best(self) -> Tensor:
        """Return the threshold with the best F1 score of pixels."""
        return torch.tensor(find_best_threshold(*self.sum_counts()))


def _middle_below(lowest: Tensor, scores: Tensor) -> Tensor:
    """Return the middle between the lowest anomalous score and the next lower one.

    >>> _middle_below(torch.tensor(0.7), torch.tensor([0.3, 0.7, 0.5, 0.9])).item()
    0.6000000238418579
    """
    below = scores[scores < lowest]
    return (lowest + below.max()) / 2 if len(below) else lowest - lowest.abs() / 2


class NormalQuantilePostProcessor(PostProcessor):
    r"""anomalib's post-processor with a threshold that needs no anomalous images.

    A normalized score above 0.5, the threshold, is predicted anomalous. The validation set determines the threshold:

    - With anomalous images, the threshold has the best F1 score: it is the middle between the lowest score that counts
      as anomalous and the next lower one. (anomalib takes the former, and calls the image that has it normal.) As in
      anomalib, scores are shifted by the threshold and divided by the range of the validation scores.
    - With normal images only, the threshold t is a quantile of their scores: at 0.95, about one normal image in
      twenty is predicted anomalous. (anomalib takes the largest score: a single outlier among the normal images
      determines it, and more images raise it.) The normalized score is the score's share of twice the threshold,

      .. math:: \min\left(\frac{s}{2 t}, 1\right)

      so that 0 means no discrepancy, and 0.6 means 20 % above the threshold. (anomalib divides by the range of the
      normal images' scores, which a single outlier stretches, too.) The same applies to anomaly maps, with the
      largest value of each as its score: masks are non-empty for about one normal image in twenty, instead of
      covering every twentieth pixel.

    A sensitivity above 0.5 lowers the decision threshold, one below 0.5 raises it: to
    :math:`2 t (1 - \text{sensitivity})` with normal images only. Checkpoints and exported models contain all of this.

    Args:
        enable_normalization: as in anomalib.
        enable_thresholding: as in anomalib.
        enable_threshold_matching: as in anomalib.
        image_sensitivity: as in anomalib. Default: the checkpoint's, or 0.5.
        pixel_sensitivity: as in anomalib. Default: the checkpoint's, or 0.5.
        normal_quantile: share of the normal validation images whose scores are below the threshold, if there are no
            anomalous ones. Used when validation sets the thresholds, that is, in training. Default: the checkpoint's,
            or 0.95 (our choice: 20 images are enough to estimate it).

    Raises:
        ArgumentError: a value is out of range.
    """

    _image_threshold_metric: NormalQuantileThreshold
    _pixel_threshold_metric: NormalQuantilePixelThreshold  # type: ignore[assignment]

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
        arguments = {
            "image_sensitivity": image_sensitivity,
            "pixel_sensitivity": pixel_sensitivity,
            "normal_quantile": normal_quantile,
        }
        self._given = {name: value for name, value in arguments.items() if value is not None}
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
        self._image_threshold_metric = NormalQuantileThreshold(["pred_score", "gt_label"])
        self._pixel_threshold_metric = NormalQuantilePixelThreshold(["anomaly_map", "gt_mask"])
        self._has_warned = False

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "normal_quantile")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Load a checkpoint's settings, except those that were given to the constructor."""
        super().load_checkpoint_config({name: value for name, value in config.items() if name not in self._given})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set thresholds and the range of scores."""
        metrics = {"image": self._image_threshold_metric, "pixel": self._pixel_threshold_metric}
        for metric in metrics.values():
            metric.quantile = self.normal_quantile
            metric.normal_images = None  # of an earlier validation
        super().on_validation_epoch_end(trainer, pl_module)
        counts = [metric.normal_images for metric in metrics.values() if metric.normal_images is not None]
        if not (counts and self.enable_thresholding):
            return
        self._warn_of_few_images(max(counts))
        if self.enable_normalization:
            for level in LEVELS:
                has_threshold = not getattr(self, f"_{level}_threshold").isnan()
                if metrics[level].normal_images is not None or not has_threshold:
                    self._scale_by_threshold(level)

    def _scale_by_threshold(self, level: str) -> None:
        """Map a score of 0 to 0, and the threshold to 0.5."""
        threshold: Tensor = getattr(self, f"{level}_threshold")  # the other level's if this one has none
        smallest: Tensor = getattr(self, f"{level}_min")
        if threshold > 0 and smallest >= 0:  # otherwise scores do not start at 0: anomalib's range
            smallest.zero_()
            getattr(self, f"{level}_max").copy_(2 * threshold)

    def _warn_of_few_images(self, images: int) -> None:
        needed = 1 / (1 - self.normal_quantile) if self.normal_quantile < 1 else 1
        if images + 1e-6 < needed and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "validation has %d normal images and no anomalous ones: too few to estimate the %g quantile, so that "
                "the threshold is close to their largest score. Validate with %d or more, or give a smaller "
                "normal_quantile.",
                images,
                self.normal_quantile,
                round(needed),
            )
