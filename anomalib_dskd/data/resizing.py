"""Resizing of images of a data set to the size that an exported model takes."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

__all__ = ["resize_for_export"]


def resize_for_export(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize images ``(B, C, H, W)``, with antialiasing as in training, to the size that an exported model takes.

    Args:
        images: from 0 to 1.
        size: height and width in pixels; None keeps those of the images.
    """
    if size is None or images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
