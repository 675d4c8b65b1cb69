"""Pixel metrics whose memory does not grow with the number of images: scores are counted in narrow bins.

torchmetrics and anomalib keep all maps and sort them: some 10 GiB for 1,000 images of 512x512 pixels. With fixed
thresholds torchmetrics counts too, but reads all pixels once per threshold.
"""

from typing import Any

import torch
from anomalib.utils.cv import connected_components_cpu
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

__all__ = [
    "BINS",
    "PixelAUPRO",
    "PixelAUROC",
    "ScoreCounts",
    "area_under_curve",
    "bin_indices",
    "bin_limits",
    "find_best_threshold",
    "weight_by_region",
]

BINS = 1 << 20
"""Number of bins: sign, exponent, and the first 11 bits of an FP32 number's mantissa. Two scores in one bin differ by
at most 0.05 %, wherever a model's scale lies."""
BITS = 12  # of an FP32 number that bins do not tell apart


def bin_indices(scores: Tensor) -> Tensor:
    """Return the bin of each score, from 0 to ``BINS - 1``; higher scores are in the same or higher bins.

    As integers, the bits of positive FP32 numbers have the order of the numbers; those of negative ones the reverse.

    >>> indices = bin_indices(torch.tensor([-3.0, -1e-9, 0.0, 1e-9, 0.5, 0.5001, 0.501, 3.0]))
    >>> (indices.diff() > 0).tolist()
    [True, True, True, True, False, True, True]
    """
    bits = (scores.float() + 0.0).contiguous().view(torch.int32)  # + 0.0: -0.0 has the bits of a negative number
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered >> BITS).long() + BINS // 2


def bin_limits(index: int) -> tuple[float, float]:
    """Return the lowest score of a bin, and that of the next one.

    >>> low, high = bin_limits(int(bin_indices(torch.tensor(0.7))))
    >>> low <= 0.7 < high, round((high - low) / low, 5)
    (True, 0.00035)
    """
    ordered = torch.tensor([index, index + 1], dtype=torch.int64).sub(BINS // 2).mul(1 << BITS)
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).clamp(-(2**31), 2**31 - 1).int()
    low, high = bits.view(torch.float32).tolist()
    return low, high


def weight_by_region(masks: Tensor) -> Tensor:
    """Weight each anomalous pixel by the inverse size of its connected region, so that each region counts once.

    Args:
        masks: true for anomalous pixels, ``(B, H, W)``, on the CPU. Pixels that touch at a corner are connected.

    Returns:
        FP64 weights, 0 for normal pixels, ``(B, H, W)``.
    """
    regions = connected_components_cpu(masks[:, None].float())[:, 0].long()  # numbered from 1 over all masks
    sizes = torch.bincount(regions.flatten())
    weights: Tensor = torch.where(regions > 0, 1 / sizes[regions].double(), 0.0)
    return weights


class ScoreCounts(Metric):
    """Numbers of normal and of anomalous pixels by score. Base class: it adds up what subclasses compute from.

    Args:
        **kwargs: as in torchmetrics.
    """

    full_state_update = False
    # lists, so that a metric without pixels takes no memory; one tensor (BINS,) in each process that has any
    normal_counts: list[Tensor]
    anomalous_counts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - torchmetrics'
        super().__init__(**kwargs)
        self.add_state("normal_counts", default=[], dist_reduce_fx="cat")
        self.add_state("anomalous_counts", default=[], dist_reduce_fx="cat")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            maps: anomaly maps ``(B, H, W)`` or ``(B, 1, H, W)``.
            masks: true or 1 for anomalous pixels, of the same shape.
        """
        # on the CPU: on a GPU, weighted counts depend on the order of additions
        bins = bin_indices(maps.cpu()).flatten()
        masks = masks.cpu().bool().reshape(-1, *masks.shape[-2:])  # (B, 1, H, W) to (B, H, W)
        weights, is_anomalous = self.weigh(masks).flatten(), masks.flatten()
        normal = torch.bincount(bins[~is_anomalous], minlength=BINS)
        anomalous = torch.bincount(bins[is_anomalous], weights[is_anomalous], minlength=BINS).float()
        for counts, added in ((self.normal_counts, normal), (self.anomalous_counts, anomalous)):
            if counts:
                counts[0] = counts[0] + added.to(counts[0].device)  # the CPU, with anomalib's `compute_on_cpu`
            else:
                counts.append(added.to(self.device))

    def weigh(self, masks: Tensor) -> Tensor:
        """Return what each anomalous pixel counts, ``(B, H, W)``: here 1."""
        return torch.ones(masks.shape, dtype=torch.float64)

    def sum_counts(self) -> tuple[Tensor, Tensor]:
        """Return the FP64 counts of normal and of anomalous pixels by bin ``(BINS,)``, of all processes."""
        normal, anomalous = (
            dim_zero_cat(counts).cpu().double().reshape(-1, BINS).sum(dim=0)
            for counts in (self.normal_counts, self.anomalous_counts)
        )
        return normal, anomalous


class PixelAUROC(ScoreCounts):
    """Area under the pixels' ROC curve."""

    def compute(self) -> Tensor:
        """Return the area, a fraction."""
        return torch.tensor(area_under_curve(*self.sum_counts()))


class PixelAUPRO(ScoreCounts):
    """Area under the curve of the mean overlap with connected regions of the masks, up to a false positive rate.

    Args:
        fpr_limit: largest false positive rate; the area is divided by it.
        **kwargs: as in torchmetrics.
    """

    def __init__(self, fpr_limit: float, **kwargs: Any) -> None:  # noqa: ANN401 - torchmetrics'
        super().__init__(**kwargs)
        self.fpr_limit: Tensor
        self.register_buffer("fpr_limit", torch.tensor(fpr_limit))  # as in anomalib's, whose checkpoints contain it

    def weigh(self, masks: Tensor) -> Tensor:
        """Weight the pixels of each region by the inverse of their number."""
        return weight_by_region(masks)

    def compute(self) -> Tensor:
        """Return the area, a fraction."""
        return torch.tensor(area_under_curve(*self.sum_counts(), limit=self.fpr_limit.item()))


def area_under_curve(normal: Tensor, anomalous: Tensor, *, limit: float = 1.0) -> float:
    """Return the area under the rate of anomalous over that of normal pixels above a threshold, divided by ``limit``.

    Args:
        normal: FP64 counts of normal pixels by bin, lowest scores first.
        anomalous: the same of anomalous pixels, which may be weighted.
        limit: largest rate of normal pixels; the curve is linear between bins.

    Example:
        Scores 1, 2 and 3 of normal pixels, 2 and 3 of anomalous ones; equal scores count one half:

        >>> round(area_under_curve(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])), 4)
        0.6667
    """
    false, true = (
        torch.cat([counts.new_zeros(1), counts.flip(0).cumsum(0) / counts.sum()]) for counts in (normal, anomalous)
    )
    last = int((false <= limit).nonzero()[-1])
    if false[last] < limit and last + 1 < len(false):
        share = (limit - false[last]) / (false[last + 1] - false[last])
        false[last + 1], true[last + 1] = limit, torch.lerp(true[last], true[last + 1], share)
        last += 1
    return float(torch.trapezoid(true[: last + 1], false[: last + 1])) / limit


def find_best_threshold(normal: Tensor, anomalous: Tensor) -> float:
    """Return the threshold between two bins with the best F1 score of pixels above it.

    Args:
        normal: FP64 counts of normal pixels by bin, lowest scores first.
        anomalous: the same of anomalous pixels, at least one.

    Returns:
        The middle between the lowest bin above the threshold and the next one below it that has pixels.
    """
    hits, alarms = (counts.flip(0).cumsum(0).flip(0) for counts in (anomalous, normal))
    f1 = 2 * hits / (hits + alarms + anomalous.sum())
    lowest = int(torch.where(anomalous > 0, f1, -1.0).argmax())
    below = (normal + anomalous)[:lowest].nonzero()
    low = bin_limits(lowest)[0]
    return (low + bin_limits(int(below[-1]))[1]) / 2 if len(below) else low - abs(low) / 2
