"""Checks of the masks of one image, and of which image each mask is paired with."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from anomalib.data import AnomalibDataModule
from numpy.typing import NDArray

from anomalib_dskd.check.finding import Finding
from anomalib_dskd.check.image_checks import ImageSummary, unsafe_finding
from anomalib_dskd.check.samples import Sample
from anomalib_dskd.data.image_files import READABLE_ERRORS, open_image
from anomalib_dskd.data.mask_pairs import find_wrong_pairs
from anomalib_dskd.errors import UnsafeImageError

__all__ = ["check_masks", "check_pairs"]

MAX_DEFECTIVE = 0.9  # share of an image; a mask with more is probably inverted


def check_masks(sample: Sample, image: ImageSummary | None, *, needs_mask: bool) -> Iterator[Finding]:
    """Check the mask files of an image.

    Args:
        sample: the image with its label and mask files.
        image: summary of the image, or none if it cannot be read.
        needs_mask: a defective image must have a mask.
    """
    masks = [mask for mask in sample.masks if sample.is_anomalous or Path(mask).is_file()]
    if not masks and sample.is_anomalous and needs_mask:
        text = "is defective and has no mask, although other images have one: pixel metrics would be wrong"
        yield Finding("error", "no-mask", text, [sample.image])
    for path in masks:
        try:
            with open_image(path) as file:
                mask = np.asarray(file.convert("L"))
        except FileNotFoundError:
            yield Finding("error", "no-mask", "is the mask of a defective image and does not exist", [path])
        except UnsafeImageError as error:
            yield unsafe_finding(error, path)
        except READABLE_ERRORS as error:
            text = f"is a mask that cannot be read: {type(error).__name__}"
            yield Finding("error", "unreadable-mask", text, [path])
        else:
            yield from _check_mask(path, mask, sample, image)


def _check_mask(path: str, mask: NDArray[np.uint8], sample: Sample, image: ImageSummary | None) -> Iterator[Finding]:
    if image is not None and mask.shape[::-1] != image.size:
        text = "is a mask whose size differs from its image's: it would not cover the defect"
        yield Finding("error", "mask-size", text, [path])
    if sample.threshold is None and len(np.unique(mask)) > 2:  # noqa: PLR2004 - normal and defective
        text = "is a mask with values other than black and white: all values except 0 count as defective"
        yield Finding("warning", "mask-not-binary", text, [path])
    defective = (mask > (sample.threshold or 0)).mean()
    if sample.is_anomalous and not defective:
        text = "is an empty mask of a defective image: all its pixels count as normal"
        yield Finding("warning", "mask-empty", text, [path])
    if sample.is_anomalous and defective > MAX_DEFECTIVE:
        text = "is a mask that marks nearly the whole image as defective: is it inverted? Defects must be white"
        yield Finding("warning", "mask-inverted", text, [path])
    if not sample.is_anomalous and defective:
        text = "is a mask that marks a defect in an image labeled as normal"
        yield Finding("error", "mask-of-good-image", text, [path])


def check_pairs(data: AnomalibDataModule) -> Iterator[Finding]:
    """Find masks that anomalib has paired with an image that they do not belong to."""
    for image, mask, reason in find_wrong_pairs(data):
        text = f"are an image and the mask that anomalib pairs with it, the wrong one: {reason}. Both must sort alike"
        yield Finding("error", "mask-of-other-image", text, [str(image), str(mask)])
