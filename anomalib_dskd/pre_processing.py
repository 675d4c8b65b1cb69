"""What an image goes through before the networks see it."""

import timm
from anomalib.pre_processing import PreProcessor
from timm.models import get_pretrained_cfg
from torchvision.transforms.v2 import Compose, Normalize, Resize

__all__ = ["create_pre_processor"]


def create_pre_processor(teacher: str, image_size: tuple[int, int]) -> PreProcessor:
    """Resize without a crop, then normalise with the mean and deviation that the teacher was trained with.

    ``antialias`` is off because anomalib switches it off in exported models: with it on in training, the same
    image would score differently on the line.

    Args:
        teacher: timm model name.
        image_size: height and width in pixels.
    """
    cfg = get_pretrained_cfg(teacher)
    mean = cfg.mean if cfg is not None else timm.data.IMAGENET_DEFAULT_MEAN
    std = cfg.std if cfg is not None else timm.data.IMAGENET_DEFAULT_STD
    return PreProcessor(transform=Compose([Resize(image_size, antialias=False), Normalize(mean=mean, std=std)]))
