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
    """A network with two feature levels that counts the images that it processes."""

    def __init__(self):
        self.images = 0

    def __call__(self, images):
        self.images += len(images)
        return [images[:, :, ::2, ::2] * 3, images.mean(dim=(2, 3), keepdim=True) - 1]


def batch(count: int, seed: int = 0, size: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_second_epoch_gives_the_same_directions_without_running_the_network():
    network, images = Counting(), batch(5)
    cache = FeatureCache(network, images=5, memory=1.0)
    first = [*cache(images[:3]), *cache(images[3:])]
    assert network.images == 5
    cache.end_epoch()
    order = torch.tensor([4, 0, 2, 1, 3])
    second = cache(images[order])
    assert network.images == 5
    expected = Counting()(images[order])
    for cached, computed in zip(second, expected, strict=True):
        assert cached.dtype == torch.float32
        assert cached.shape == computed.shape
        torch.testing.assert_close(cached, F.normalize(computed, dim=1), rtol=6e-4, atol=1e-7)  # float16
        cosine = (F.normalize(cached.double(), dim=1) * F.normalize(computed.double(), dim=1)).sum(1)
        assert (1 - cosine).abs().max() < 3e-7
    assert torch.equal(first[0], second[0][[1, 3, 2]])  # bit for bit: images 0, 1 and 2
    assert torch.equal(first[3], second[1][[4, 0]])


def test_key_is_the_pixels_only():
    network = Counting()
    cache = FeatureCache(network, images=10, memory=1.0)
    images = batch(2)
    cache(images)
    cache(images.contiguous(memory_format=torch.channels_last))
    assert network.images == 2
    changed = images.clone()
    changed[1, 0, 0, 0] += 1e-6
    cache(changed)
    assert network.images == 3  # only the new image
    assert len(cache) == 3


def test_order_of_a_batch_of_cached_and_new_images_is_preserved():
    cache, images = FeatureCache(Counting(), images=10, memory=1.0), batch(5)
    cache(images[[1, 3]])
    mixed = cache(images)
    for cached, computed in zip(mixed, Counting()(images), strict=True):
        torch.testing.assert_close(cached, F.normalize(computed, dim=1), rtol=6e-4, atol=1e-7)


def test_features_do_not_depend_on_the_batch_that_they_were_computed_in():
    def network(images):  # like a convolution that sums in another order in a larger batch
        return [images + 1e-3 * (len(images) - 1)]

    images = batch(4)
    batched, single = (FeatureCache(network, images=4, memory=1.0) for _ in range(2))
    batched(images)
    parts = torch.cat([single(image[None])[0] for image in images])
    assert torch.equal(batched(images)[0], parts)


def test_images_of_different_shapes_are_never_confused():
    cache = FeatureCache(lambda images: [images], images=10, memory=1.0)
    wide, tall = torch.ones(1, 3, 2, 8), torch.ones(1, 3, 8, 2)
    cache(wide)
    assert cache(tall)[0].shape == tall.shape
    assert cache(wide)[0].shape == wide.shape
    assert len(cache) == 1


def test_changing_images_switch_the_cache_off_and_free_its_memory(caplog):
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


def test_cache_stays_on_while_it_fills_and_while_it_has_half_of_the_images():
    cache = FeatureCache(Counting(), images=4, memory=1.0)
    cache(batch(2, seed=0))  # half of the images, as in one of two processes
    cache.end_epoch()
    cache(batch(2, seed=1))
    cache.end_epoch()
    cache(batch(1, seed=2))
    cache(batch(2, seed=0))  # an augmentation that leaves most images unchanged
    cache.end_epoch()
    assert cache.is_on
    assert len(cache) == 4
    cache(batch(2, seed=0))
    cache(batch(2, seed=3))  # an augmentation that leaves half of them unchanged
    cache.end_epoch()
    assert cache.is_on
    cache(batch(1, seed=0))
    cache(batch(2, seed=3))  # an augmentation that changes most images
    cache.end_epoch()
    assert not cache.is_on


@pytest.mark.parametrize(("budget", "held"), [(1.9, 0), (2, 2), (3, 2), (4, 4), (100, 8)])  # images, in blocks of two
def test_features_beyond_the_memory_are_read_from_a_file(budget, held, monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK", 2)
    row = 2 * (3 * 2 * 2 + 3)  # bytes of an image's features in float16
    network, images = Counting(), batch(7)
    cache = FeatureCache(network, images=7, memory=budget * row / 2**30)
    cache(images)
    assert cache.bytes_in_memory == held * row
    assert sum(block.nbytes for block in cache._blocks) == 8 * row  # the others are in the file
    second = cache(images)
    assert network.images == 7
    for cached, computed in zip(second, Counting()(images), strict=True):
        torch.testing.assert_close(cached, F.normalize(computed, dim=1), rtol=6e-4, atol=1e-7)


def test_no_block_is_allocated_for_images_beyond_the_limit(monkeypatch):
    monkeypatch.setattr(feature_cache, "BLOCK", 2)
    cache = FeatureCache(Counting(), images=2, memory=1.0)
    cache(batch(3))
    assert cache.bytes_in_memory == 2 * 2 * (3 * 2 * 2 + 3)  # one block, of two images


def test_a_full_disk_only_costs_speed(monkeypatch, caplog):
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
    assert network.images == 6 + 4 + 4  # those that are not cached
    cache.end_epoch()
    assert cache.is_on


def test_no_more_images_than_the_maximum_are_cached():
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
        first, second, expected = cache(images)[0], cache(images)[0], convolution(images)
    assert expected.dtype == dtype
    assert torch.equal(first, second)
    np.testing.assert_allclose(second.numpy(), F.normalize(expected.float(), dim=1).detach().numpy(), atol=5e-4)
