"""What an image goes through before the networks see it."""

from collections.abc import Sequence

from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_dskd.errors import ArgumentError

__all__ = ["check_normalisation", "create_pre_processor", "normalisation"]


def create_pre_processor(teacher: str, image_size: tuple[int, int]) -> PreProcessor:
    """Resize without a crop, then normalise with the mean and deviation that the teacher was trained with.

    ``antialias`` is off because anomalib switches it off in exported models: with it on in training, the same
    image would score differently on the line.

    Args:
        teacher: timm model name.
        image_size: height and width in pixels.
    """
    mean, std = normalisation(teacher)
    return PreProcessor(transform=Compose([Resize(image_size, antialias=False), Normalize(mean=mean, std=std)]))


def check_normalisation(pre_processor: PreProcessor, teacher: str) -> None:
    """Refuse a pre-processor that normalises otherwise than the teacher's training did, or not at all.

    Raises:
        ArgumentError: it has no ``Normalize``, or one with another mean or standard deviation.
    """
    legal = [list(values) for values in normalisation(teacher)]
    if not extract_transforms_by_type(pre_processor.transform, Normalize):
        msg = (
            f"the pre_processor does not normalise; the teacher {teacher!r} was trained with mean and std {legal}. Add "
            "torchvision's v2.Normalize with these, or give pre_processor false and normalised images."
        )
        raise ArgumentError(msg)
    for transform in extract_transforms_by_type(pre_processor.transform, Normalize):
        given = [list(transform.mean), list(transform.std)]
        if given != legal:
            msg = (
                f"the pre_processor normalises with mean and std {given}, but the teacher {teacher!r} was trained with "
                f"{legal}. Use these, or the model's own configure_pre_processor(image_size, teacher={teacher!r})."
            )
            raise ArgumentError(msg)


def normalisation(teacher: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and deviation, one a channel, of the images that a timm model was trained with.

    >>> normalisation("tf_efficientnet_lite0")
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    cfg = get_pretrained_cfg(teacher)
    return (cfg.mean, cfg.std) if cfg is not None else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
