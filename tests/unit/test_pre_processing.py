import pytest
import torch
from anomalib.pre_processing import PreProcessor
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_dskd.pre_processing import create_pre_processor
from tests.conftest import RESNET

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
HALF = [0.5, 0.5, 0.5]


def photograph(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("teacher", "mean", "std"),
    [
        ("resnet18.tv_in1k", IMAGENET_MEAN, IMAGENET_STD),
        ("resnet18", IMAGENET_MEAN, IMAGENET_STD),
        ("tf_efficientnet_lite0", HALF, HALF),
        ("tf_efficientnet_lite0.in1k", HALF, HALF),
        (RESNET, HALF, HALF),
        ("darknet17", IMAGENET_MEAN, IMAGENET_STD),  # timm has no weights for it
    ],
)
def test_mean_and_std_are_those_of_the_teachers_pretraining(teacher: str, mean: list[float], std: list[float]):
    _, normalize = create_pre_processor(teacher, (64, 64)).transform.transforms
    assert isinstance(normalize, Normalize)
    assert list(normalize.mean) == mean
    assert list(normalize.std) == std


def test_resize_is_to_the_given_height_and_width_with_antialiasing():
    resize, _ = create_pre_processor(RESNET, (48, 80)).transform.transforms
    assert isinstance(resize, Resize)
    assert list(resize.size) == [48, 80]
    assert resize.antialias is True


@pytest.mark.parametrize("size", [(100, 150), (30, 20), (32, 96)])
def test_whole_image_is_resized_then_normalized(size: tuple[int, int]):
    image = photograph(*size)
    resized = F.interpolate(image, (32, 96), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    actual = create_pre_processor("resnet18.tv_in1k", (32, 96))(image)
    torch.testing.assert_close(actual, (resized - mean) / std, rtol=0, atol=1e-5)


def test_nothing_is_cropped():
    image = torch.zeros(1, 3, 60, 120)
    for row in (slice(0, 20), slice(40, 60)):
        for column in (slice(0, 40), slice(80, 120)):
            image[..., row, column] = 1
    actual = create_pre_processor(RESNET, (30, 30))(image)  # (1, 3, 30, 30), of -1 and 1
    assert [round(actual[0, 0, row, column].item(), 5) for row in (0, 14, 29) for column in (0, 14, 29)] == [
        *(1, -1, 1),
        *(-1, -1, -1),
        *(1, -1, 1),
    ]


def test_exported_transform_gives_the_same_image():
    pre_processor = create_pre_processor(RESNET, (32, 32))
    image = photograph(100, 150)
    antialiased = F.interpolate(image, (32, 32), mode="bilinear", antialias=True) * 2 - 1
    torch.testing.assert_close(pre_processor(image), antialiased, rtol=0, atol=1e-5)
    torch.testing.assert_close(pre_processor(image), pre_processor.transform(image), rtol=0, atol=0)


def test_anomalibs_own_pre_processor_still_exports_without_antialiasing():
    transform = create_pre_processor(RESNET, (32, 32)).transform
    image = photograph(100, 150)
    # once this fails, AntialiasedPreProcessor is not needed
    assert (PreProcessor(transform)(image) - transform(image)).abs().max() > 0.1
