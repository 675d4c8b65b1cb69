"""Anomaly map and image score from feature discrepancies (DSKD, section 3.3, Eq. 8 to 10)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.argument_checks import check_not_negative
from anomalib_dskd.components.discrepancy import discrepancy, pooled_discrepancy

__all__ = ["AnomalyMapGenerator", "anomaly_score", "sum_of_levels"]


def sum_of_levels(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    r"""Up-sample the map of each level bilinearly to the image size and sum them, Eq. (8).

    .. math:: M = \sum_{k=1}^{K} \mathrm{Upsample}(M^k)

    Args:
        maps: one ``(B, 1, H_k, W_k)`` per level.
        size: height and width of the image in pixels.

    Returns:
        Map ``(B, 1, H, W)``.
    """
    return torch.stack([F.interpolate(level, size=size, mode="bilinear") for level in maps]).sum(dim=0)


def anomaly_score(anomaly_map: Tensor) -> Tensor:
    r"""Return the largest value of each map, Eq. (10).

    Args:
        anomaly_map: ``(B, 1, H, W)``.

    Returns:
        Scores ``(B, 1)``.
    """
    return anomaly_map.amax(dim=(-2, -1))


CONTEXT = 3  # pixels of the deepest level, as in PatchCore


class AnomalyMapGenerator(nn.Module):
    """Smoothed map of the discrepancy between two feature pyramids, at image size, Eq. (8) and (9).

    Args:
        l2_weight: lambda of Eq. (6).
        sigma: standard deviation of the Gaussian of Eq. (9) in pixels of the network's input; 0 disables the blur.
        context_weight: weight of one more summand, the discrepancy of the deepest level after its errors have been
            averaged over 3x3 neighbors, :func:`~anomalib_dskd.components.discrepancy.pooled_discrepancy`.

    Raises:
        ArgumentError: ``sigma`` or ``context_weight`` is negative.
    """

    def __init__(self, *, l2_weight: float = 0.1, sigma: float = 4.0, context_weight: float = 0.0) -> None:
        super().__init__()
        check_not_negative(sigma=sigma, context_weight=context_weight)
        self.l2_weight = l2_weight
        self.context_weight = context_weight
        self.kernel_size = compute_kernel_size(sigma) if sigma > 0 else 1
        self.blur = _separable_blur(sigma, self.kernel_size) if sigma > 0 else nn.Identity()

    @property
    def margin(self) -> int:
        """Pixels beyond the image edge that the blur pads by reflection: an image must be larger than this."""
        return self.kernel_size // 2

    def bound(self, levels: int) -> float:
        """Return the largest value that a map summed over ``levels`` levels can take."""
        return 2 * (1 + self.l2_weight) * (levels + self.context_weight)

    def forward(self, first: Sequence[Tensor], second: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Map two pyramids, each one ``(B, C_k, H_k, W_k)`` per level, to a map ``(B, 1, H, W)`` in FP32."""
        return self.smooth(self.sum_levels(first, second, size))

    def sum_levels(self, first: Sequence[Tensor], second: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the map before the blur, Eq. (8)."""
        with _without_autocast(first[0].device.type):
            maps = [discrepancy(a, b, l2_weight=self.l2_weight) for a, b in zip(first, second, strict=True)]
            if self.context_weight > 0:
                context = pooled_discrepancy(first[-1], second[-1], l2_weight=self.l2_weight, size=CONTEXT)
                maps.append(self.context_weight * context)
            return sum_of_levels(maps, size)

    def smooth(self, summed: Tensor) -> Tensor:
        """Return the blurred map, Eq. (9)."""
        with _without_autocast(summed.device.type):
            smooth: Tensor = self.blur(summed)
        return smooth


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context in FP32: BF16 rounds in steps as large as the differences between scores."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _separable_blur(sigma: float, size: int) -> nn.Sequential:
    """Blur columns, then rows: the same Gaussian for ``2 * size`` instead of ``size ** 2`` multiply-adds per pixel."""
    blurs = [GaussianBlur2d(sigma, kernel_size=(size, 1)), GaussianBlur2d(sigma, kernel_size=(1, size))]
    for blur in blurs:
        blur.register_buffer("kernel", blur.kernel, persistent=False)  # sigma determines it: not part of checkpoints
    return nn.Sequential(*blurs)
