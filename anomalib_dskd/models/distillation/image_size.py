"""The image size of a model, and the pre-processor that follows from it."""

from anomalib.pre_processing import PreProcessor
from torch import nn

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.pre_processing import check_normalization, create_pre_processor

__all__ = ["DEFAULT_IMAGE_SIZE", "height_and_width", "resolve_pre_processor"]

DEFAULT_IMAGE_SIZE = (256, 256)  # section 4.1.2, for MVTec AD and MVTec 3D-AD


def height_and_width(image_size: object) -> tuple[object, ...]:
    """Return height and width in pixels for one side of a square, for both, or for the default.

    >>> height_and_width(128), height_and_width([96, 128]), height_and_width(None)
    ((128, 128), (96, 128), (256, 256))
    """
    if image_size is None:
        return DEFAULT_IMAGE_SIZE
    return tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)


def resolve_pre_processor(
    pre_processor: nn.Module | bool, teacher: str, image_size: int | tuple[int, int] | None
) -> nn.Module | bool:
    """Return the given pre-processor, or the teacher's for an image size.

    Raises:
        ArgumentError: both are given, the size is not one or two positive integers, or the pre-processor does not
            normalize as the teacher's training did.
    """
    if pre_processor is not True:
        if image_size is not None:
            msg = "image_size and pre_processor exclude each other: resize in the pre_processor, or leave that out."
            raise ArgumentError(msg)
        if isinstance(pre_processor, PreProcessor):
            check_normalization(pre_processor, teacher)
        return pre_processor
    given = height_and_width(image_size)
    size = [extent for extent in given if type(extent) is int and extent > 0]  # bool is a subclass of int
    if len(given) != 2 or len(size) != 2:  # noqa: PLR2004 - height and width
        msg = (
            f"image_size {image_size!r} must be one number of pixels, or height and width, each an integer and at "
            "least 1."
        )
        raise ArgumentError(msg)
    return create_pre_processor(teacher, (size[0], size[1]))
