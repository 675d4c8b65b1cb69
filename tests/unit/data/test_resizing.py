import pytest
import torch
from torchvision.transforms.v2 import Resize

from anomalib_dskd.data.resizing import resize_for_export


@pytest.mark.parametrize("size", [(16, 24), (80, 70)])
def test_images_for_exports_are_resized_as_in_training(size):
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    expected = Resize(size, antialias=True)(images)
    torch.testing.assert_close(resize_for_export(images, size), expected)
    assert resize_for_export(images, None) is resize_for_export(images, (64, 48)) is images
