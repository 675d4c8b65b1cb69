"""Checks of one image file: can it be read, and will it be read as intended?"""

import contextlib
import hashlib
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import imagehash
import numpy as np
from anomalib.data.utils import read_depth_image
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageStat

from anomalib_dskd.check.finding import Finding, Severity
from anomalib_dskd.data.image_files import READABLE_ERRORS, has_high_bit_depth, open_image
from anomalib_dskd.errors import UnsafeImageError

__all__ = ["ImageSummary", "check_depth", "check_image", "unsafe_finding"]

HASH_SIZE = 16  # of the perceptual hash, which has its square as number of bits
MIN_CONTRAST = 1.0  # standard deviation in gray levels
UPRIGHT = 1  # EXIF orientation
ALPHA: tuple[Severity, str] = ("warning", "has an alpha channel; it is dropped, so transparent pixels become visible")
MODES: dict[str, tuple[Severity, str]] = {
    "P": ("note", "has a palette; it is converted to RGB"),
    "CMYK": ("warning", "is CMYK; it is converted to RGB without a color profile, which changes its colors"),
    "YCbCr": ("note", "is YCbCr; it is converted to RGB"),
    "LAB": ("warning", "is LAB; it is converted to RGB without a color profile"),
    "HSV": ("note", "is HSV; it is converted to RGB"),
    "1": ("note", "is black and white; it is read as 0 and 255"),
    "RGBA": ALPHA,
    "LA": ALPHA,
    "PA": ALPHA,
}


class ImageSummary(NamedTuple):
    """The properties by which images are compared with each other."""

    size: tuple[int, int]  # width and height
    digest: bytes  # of the decoded pixels
    hash: NDArray[np.bool_]  # perceptual, (HASH_SIZE ** 2,)


def check_image(path: str) -> tuple[list[Finding], ImageSummary | None]:
    """Check an image file; return the findings, and its summary if it can be read."""
    findings: list[Finding] = []
    try:
        with open_image(path) as image:
            findings.extend(_check_header(path, image))
            rgb = _to_rgb(image)
    except UnsafeImageError as error:
        return [*findings, unsafe_finding(error, path)], None
    except READABLE_ERRORS as error:
        reason = str(error).replace(f" {path!r}", "").replace(path, "it") or type(error).__name__
        text = f"cannot be read: {reason}. Replace or remove it"
        return [*findings, Finding("error", "unreadable", text, [path])], None
    if max(ImageStat.Stat(rgb).stddev) < MIN_CONTRAST:
        findings.append(Finding("warning", "flat", "has hardly any contrast: covered camera or empty image", [path]))
    perceptual_hash = imagehash.phash(rgb, hash_size=HASH_SIZE).hash.ravel()
    return findings, ImageSummary(rgb.size, hashlib.sha256(rgb.tobytes()).digest(), perceptual_hash)


def check_depth(path: str) -> Iterator[Finding]:
    """Check a depth image, such as one of MVTec 3D-AD."""
    try:
        with contextlib.suppress(*READABLE_ERRORS):  # a format that PIL does not support
            open_image(path).close()
        read_depth_image(path)
    except UnsafeImageError as error:
        yield unsafe_finding(error, path)
    except Exception as error:  # its reader raises many kinds
        text = f"is a depth image that cannot be read: {type(error.__cause__ or error).__name__}"
        yield Finding("error", "unreadable-depth", text, [path])


def unsafe_finding(error: UnsafeImageError, path: str) -> Finding:
    """Return the finding for a file that must not be decoded."""
    return Finding("error", "unsafe", str(error).removeprefix(f"image {path!r} ").removesuffix("."), [path])


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8 bits; the range of values of a deeper one is stretched, where ``convert`` would clip."""
    if not has_high_bit_depth(image.mode):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
    span = np.ptp(values)
    stretched = (values - values.min()) / (span or 1) * 255
    return Image.fromarray(stretched.astype(np.uint8)).convert("RGB")


def _check_header(path: str, image: Image.Image) -> Iterator[Finding]:
    has_16_bits = _has_16_bits(image)  # before PIL changes the image's tiles
    if getattr(image, "n_frames", 1) > 1:
        yield Finding("warning", "frames", "has more than one frame; only the first one is read", [path])
    if _orientation(image) != UPRIGHT:
        text = "is rotated by its EXIF orientation, which anomalib ignores: rotate the pixels instead"
        yield Finding("warning", "exif-orientation", text, [path])
    if has_high_bit_depth(image.mode):
        text = "has more than 8 bits per channel; anomalib would clip it to white. Convert the data set to 8 bits"
        yield Finding("error", "deep", text, [path])
    elif image.mode in MODES:
        severity, text = MODES[image.mode]
        yield Finding(severity, f"mode-{image.mode.lower()}", text, [path])
    elif "transparency" in image.info:
        yield Finding(ALPHA[0], "mode-transparency", ALPHA[1], [path])
    elif has_16_bits:
        yield Finding("note", "mode-16", "has 16 bits per channel; only the upper 8 are read", [path])


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, or upright if EXIF is damaged: the pixels can be read all the same."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except (*READABLE_ERRORS, struct.error, TypeError):
        return UPRIGHT


def _has_16_bits(image: Image.Image) -> bool:
    """Whether PIL reduces a color image from 16 to 8 bits per channel, which its mode does not show."""
    return any(re.search(";16[BLN]", str(tile.args)) for tile in getattr(image, "tile", ()))
