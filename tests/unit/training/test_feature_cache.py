import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_dskd.training import feature_cache
from anomalib_dskd.training.feature_cache import FeatureCache


class Counting:
    """Two feature levels, and the number of images that it was asked for."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return [images[:, :, ::2, ::2] * 3, images.mean(dim=(2, 3), keepdim=True) - 1]


def batch(count: int, seed: int = 0, size: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_second_epoch_gives_the_same_directions_without_the_network():
    network, images = Counting(), batch(5)
    cache = FeatureCache(network, images=5, memory=1.0)
    first = [*cache(images[:3]), *cache(images[3:])]
    assert network.images == 5
    cache.end_epoch()
    order = torch.tensor([4, 0, 2, 1, 3])
    again = cache(images[order])
    assert network.images == 5
    expected = Counting()(images[order])
    for mine, theirs in zip(again, expected, strict=True):
        assert mine.dtype == torch.float32
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, F.normalize(theirs, dim=1), rtol=6e-4, atol=1e-7)  # float16
        cosine = (F.normalize(mine.double(), dim=1) * F.normalize(theirs.double(), dim=1)).sum(1)
        assert (1 - cosine).abs().max() < 3e-7
    assert torch.equal(first[0], again[0][[1, 3, 2]])  # bit for bit: images 0, 1 and 2
    assert torch.equal(first[3], again[1][[4, 0]])


def test_images_are_found_by_their_pixels_alone():
    network = Counting()
    cache = FeatureCache(network, images=10, memory=1.0)
    images = batch(2)
    cache(images)
    cache(images.contiguous(memory_format=torch.channels_last))
    assert network.images == 2
    changed = images.clone()
    changed[1, 0, 0, 0] += 1e-6
    cache(changed)
    assert network.images == 3  # the new image alone
    assert len(cache) == 3


def test_a_batch_of_old_and_new_images_keeps_its_order():
    cache, images = FeatureCache(Counting(), images=10, memory=1.0), batch(5)
    cache(images[[1, 3]])
    mixed = cache(images)
    for mine, theirs in zip(mixed, Counting()(images), strict=True):
        torch.testing.assert_close(mine, F.normalize(theirs, dim=1), rtol=6e-4, atol=1e-7)


def test_features_do_not_depend_on_the_batch_in_which_they_were_computed():
    def network(images):  # as a convolution may, whose sums are ordered otherwise in a larger batch
        return [images + 1e-3 * (len(images) - 1)]

    images = batch(4)
    together, alone = (FeatureCache(network, images=4, memory=1.0) for _ in range(2))
    together(images)
    parts = torch.cat([alone(image[None])[0] for image in images])
    assert torch.equal(together(images)[0], parts)


def test_images_of_another_shape_are_never_mixed_up():
    cache = FeatureCache(lambda images: [images], images=10, memory=1.0)
    wide, tall = torch.ones(1, 3, 2, 8), torch.ones(1, 3, 8, 2)
    cache(wide)
    assert cache(tall)[0].shape == tall.shape
    assert cache(wide)[0].shape == wide.shape
    assert len(cache) == 1


def test_changing_images_switch_it_off_and_free_it(caplog):
    network = Counting()
    cache = FeatureCache(network, images=4, memory=1.0)
    with caplog.at_level(logging.INFO, "anomalib_dskd"):
        for epoch in range(2):
            cache(batch(4, seed=epoch))
            assert cache.is_on
            cache.end_epoch()
    assert not cache.is_on
    assert (len(cache), cache.bytes_in_memory) == (0, 0)
    assert "differ from epoch to epoch" in caplog.text
    cache(batch(4, seed=1))
    assert (network.images, len(cache)) == (12, 0)


def test_it_stays_on_while_it_fills_and_while_it_finds():
    cache = FeatureCache(Counting(), images=4, memory=1.0)
    cache(batch(2, seed=0))  # half of the images, as one of two processes sees them
    cache.end_epoch()
    cache(batch(2, seed=1))
    cache.end_epoch()
    cache(batch(1, seed=2))
    cache(batch(2, seed=0))  # an augmentation that mostly leaves an image as it is
    cache.end_epoch()
    assert cache.is_on
    assert len(cache) == 4
    cache(batch(2, seed=0))
    cache(batch(2, seed=3))  # one that does for half of them
    cache.end_epoch()
    assert cache.is_on
    cache(batch(1, seed=0))
    cache(batch(2, seed=3))  # one that mostly does not
    cache.end_epoch()
    assert not cache.is_on


@pytest.mark.parametrize(("budget", "held"), [(1.9, 0), (2, 2), (3, 2), (4, 4), (100, 8)])  # images, in blocks of two
def test_what_memory_does_not_hold_goes_to_a_file_and_comes_back(budget, held, monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK", 2)
    row = 2 * (3 * 2 * 2 + 3)  # bytes of an image's features in float16
    network, images = Counting(), batch(7)
    cache = FeatureCache(network, images=7, memory=budget * row / 2**30)
    cache(images)
    assert cache.bytes_in_memory == held * row
    assert cache.bytes_on_disk == (8 - held) * row
    again = cache(images)
    assert network.images == 7
    for mine, theirs in zip(again, Counting()(images), strict=True):
        torch.testing.assert_close(mine, F.normalize(theirs, dim=1), rtol=6e-4, atol=1e-7)


def test_no_block_is_made_for_images_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK", 2)
    cache = FeatureCache(Counting(), images=2, memory=1.0)
    cache(batch(3))
    assert cache.bytes_in_memory == 2 * 2 * (3 * 2 * 2 + 3)  # one block, of two images


def test_a_full_disk_costs_speed_and_nothing_else(monkeypatch, caplog):
    monkeypatch.setattr(feature_cache, "BLOCK", 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "_block_on_disk", full)
    row = 2 * (3 * 2 * 2 + 3)
    network, images = Counting(), batch(6)
    cache = FeatureCache(network, images=6, memory=2 * row / 2**30)
    cache(images)
    cache.end_epoch()
    assert len(cache) == 2
    assert "No space left on device" in caplog.text
    assert "set TMPDIR" in caplog.text
    expected = F.normalize(images[2:, :, ::2, ::2] * 3, dim=1)
    torch.testing.assert_close(cache(images[2:])[0], expected, rtol=6e-4, atol=1e-7)
    cache(images)
    assert network.images == 6 + 4 + 4  # those that are not kept
    cache.end_epoch()
    assert cache.is_on


def test_never_more_images_than_asked_for():
    cache = FeatureCache(Counting(), images=3, memory=1.0)
    cache(batch(5))
    assert len(cache) == 3


def test_copies_are_empty():
    cache = FeatureCache(Counting(), images=3, memory=0.5)
    cache(batch(2))
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(copied), copied.images, copied.memory) == (0, 3, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_works_under_autocast(dtype):
    convolution = torch.nn.Conv2d(3, 4, 1)
    cache = FeatureCache(lambda images: [convolution(images).detach()], images=3, memory=1.0)
    images = batch(3)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        first, again, expected = cache(images)[0], cache(images)[0], convolution(images)
    assert expected.dtype == dtype
    assert torch.equal(first, again)
    np.testing.assert_allclose(again.numpy(), F.normalize(expected.float(), dim=1).detach().numpy(), atol=5e-4)
