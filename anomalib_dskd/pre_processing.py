"""Image pre-processing: resizing and normalization with the teacher's mean and standard deviation."""

from collections.abc import Sequence

from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.pre_processing import PreProcessor
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch import Tensor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_dskd.errors import ArgumentError

__all__ = ["AntialiasedPreProcessor", "check_normalization", "create_pre_processor", "get_normalization"]


class AntialiasedPreProcessor(PreProcessor):
    """anomalib's pre-processor, with antialiasing in exported models too.

    anomalib's own switches antialiasing off in exports, which then give other scores than the model that was tested.
    """

    def forward(self, batch: Tensor) -> Tensor:
        """Resize and normalize images ``(B, 3, H, W)`` in [0, 1] as in training."""
        transformed: Tensor = self.transform(batch) if self.transform else batch
        return transformed


def create_pre_processor(teacher: str, image_size: tuple[int, int]) -> PreProcessor:
    """Return a pre-processor that resizes without cropping and normalizes as in the teacher's pretraining.

    The resize is antialiased, as in anomalib's other models.

    Args:
        teacher: timm model name.
        image_size: height and width in pixels.
    """
    mean, std = get_normalization(teacher)
    return AntialiasedPreProcessor(
        transform=Compose([Resize(image_size, antialias=True), Normalize(mean=mean, std=std)])
    )


def check_normalization(pre_processor: PreProcessor, teacher: str) -> None:
    """Raise an error unless a pre-processor normalizes as in the teacher's pretraining.

    Raises:
        ArgumentError: it has no ``Normalize``, or one with another mean or standard deviation.
    """
    expected = [list(values) for values in get_normalization(teacher)]
    transforms = extract_transforms_by_type(pre_processor.transform, Normalize)
    if not transforms:
        msg = (
            f"the pre_processor does not normalize; the teacher {teacher!r} was trained with mean and std {expected}. "
            "Add torchvision's v2.Normalize with these, or give pre_processor false and normalized images."
        )
        raise ArgumentError(msg)
    for transform in transforms:
        given = [list(transform.mean), list(transform.std)]
        if given != expected:
            msg = (
                f"the pre_processor normalizes with mean and std {given}, but the teacher {teacher!r} was trained with "
                f"{expected}. Use these, or the model's own configure_pre_processor(image_size, teacher={teacher!r})."
            )
            raise ArgumentError(msg)


def get_normalization(teacher: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and standard deviation, one value per channel, that a timm model was pretrained with.

    >>> get_normalization("tf_efficientnet_lite0")
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    cfg = get_pretrained_cfg(teacher)
    return (cfg.mean, cfg.std) if cfg is not None else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
