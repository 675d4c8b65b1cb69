import logging

import pytest
import torch
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize, ToDtype

from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation import images as images_module
from anomalib_dskd.models.distillation.images import check_images, is_flat, warn_of_flat_images
from anomalib_dskd.pre_processing import create_pre_processor

IMAGES = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
NORMALIZED = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
PRE_PROCESSOR = create_pre_processor("resnet18", (64, 64))


def non_finite(value: float) -> torch.Tensor:
    images = IMAGES.clone()
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:, :1], r"shape \(2, 1, 8, 10\)\. Supported: .* Repeat a gray channel"),
        (torch.rand(1, 4, 64, 64), r"shape \(1, 4, 64, 64\)\. Supported: .* drop an alpha channel"),
        (IMAGES[0], r"shape \(3, 8, 10\)\. Supported: floating-point tensors of shape \(B, 3, H, W\)"),
        (IMAGES.permute(0, 2, 3, 1), r"shape \(2, 8, 10, 3\)"),
        ((IMAGES * 255).byte(), r"type torch\.uint8\. Supported: .* images\.float\(\) / 255"),
        (IMAGES.double(), r"type torch\.float64 for a model of torch\.float32\. Give images\.to\(torch\.float32\)"),
        (IMAGES * 255, r"values from \S+ to 25\d\.?\d*\. Supported: .* Divide 8-bit values by 255"),
        (NORMALIZED(IMAGES), r"values from -2\S* to 2\S*\. Supported: .* do not normalize"),
        (non_finite(torch.nan), "values from nan to nan"),
        (non_finite(torch.inf), "to inf"),
        (non_finite(-torch.inf), "from -inf"),
    ],
)
def test_what_makes_no_sense_is_refused(images, message, tiny_model):
    with pytest.raises(ArgumentError, match=message):
        check_images(images, PRE_PROCESSOR)
    with pytest.raises(ArgumentError, match=message):
        tiny_model.eval()(images)


@pytest.mark.parametrize("images", [IMAGES, IMAGES * 0, IMAGES * 0 + 1])
def test_images_as_they_are_read_are_legal(images, tiny_model):
    check_images(images, PRE_PROCESSOR)
    assert tiny_model.eval()(images).anomaly_map.isfinite().all()


def test_images_of_the_models_own_type_are_legal():
    check_images(IMAGES.half(), PRE_PROCESSOR, dtype=torch.float16)


def test_mixed_precision_takes_the_types_that_it_casts():
    with torch.autocast("cpu", torch.bfloat16):
        check_images(IMAGES.bfloat16(), PRE_PROCESSOR)
        with pytest.raises(ArgumentError, match=r"type torch\.float64"):
            check_images(IMAGES.double(), PRE_PROCESSOR)


def test_a_resize_may_overshoot_by_a_rounding_error():
    check_images(IMAGES.clone().fill_(1 + 1e-6), PRE_PROCESSOR)


@pytest.mark.parametrize(
    "pre_processor", [None, PreProcessor(Compose([Resize(64), ToDtype(torch.float32, scale=True), NORMALIZED]))]
)
def test_types_and_values_are_left_to_a_pre_processor_of_ones_own(pre_processor):
    check_images((IMAGES * 255).byte(), pre_processor)
    check_images(NORMALIZED(IMAGES), pre_processor)
    with pytest.raises(ArgumentError, match="shape"):
        check_images(IMAGES[:, :1], pre_processor)


def noisy(gray: float, deviation: float) -> torch.Tensor:
    """A normalized image of a gray from 0 to 255, with noise of so many gray levels."""
    noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)) * deviation
    return NORMALIZED(((gray + noise).round().clamp(0, 255) / 255)[None])[0]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (noisy(0, 0), True),
        (noisy(255, 0), True),
        (noisy(120, 0), True),
        (noisy(0, 1), True),  # a covered camera
        (noisy(120, 0.7), True),
        (noisy(120, 3), False),  # a plain surface
        (noisy(120, 40), False),
    ],
)
def test_an_image_of_one_color_is_flat(image, expected):
    textured = noisy(120, 40)
    assert is_flat(torch.stack([textured, image, textured])).tolist() == [False, expected, False]


def test_color_in_one_channel_alone_is_contrast():
    image = noisy(120, 0)
    image[2] = noisy(120, 40)[2]
    assert not is_flat(image[None]).item()


def test_each_flat_file_is_named_once(caplog, monkeypatch):
    monkeypatch.setattr(images_module, "_warned", set())
    caplog.set_level(logging.WARNING)
    batch = torch.stack([noisy(120, 40), noisy(0, 0), noisy(255, 0)])
    for _ in range(2):
        warn_of_flat_images(batch, ["fine.png", "black.png", "white.png"])
    named = [f"image '{name}.png' has hardly any contrast: is it a photograph?" for name in ("black", "white")]
    assert [message.startswith(start) for message, start in zip(caplog.messages, named, strict=True)] == [True, True]
    warn_of_flat_images(batch, None)
    assert caplog.messages[2].startswith("image of unknown name has hardly any contrast")
    assert len(caplog.messages) == 3
