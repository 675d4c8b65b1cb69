import hashlib
import random

import numpy as np
import pytest
import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torch import Tensor

from anomalib_dskd.components.pseudo_defects import PseudoDefects
from anomalib_dskd.errors import ArgumentError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATHS = ["data/good/0.png", "data/good/1.png", "data/good/2.png"]


def images(batch: int = 3) -> Tensor:
    pixels = torch.rand(batch, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def defects(**arguments) -> PseudoDefects:
    return PseudoDefects(MEAN, STD, **{"seed": 0, **arguments})


def test_defects_are_anomalibs_on_the_image_before_normalization():
    defective, masks = defects()(images(), PATHS, epoch=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = PerlinAnomalyGenerator(probability=1.0)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for index, image in enumerate(images()):
        key = f"0 4 good/{index}.png".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            expected, mask = generator(image * std + mean)
        assert torch.equal(masks[index], mask)
        torch.testing.assert_close(defective[index], (expected.clamp(0, 1) - mean) / std, atol=1e-5, rtol=1e-5)


def test_only_masked_pixels_change():
    defective, masks = defects()(images(), PATHS, epoch=0)
    assert masks.shape == (3, 1, 64, 48)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    inside = masks.bool().expand_as(defective)
    assert torch.equal(defective[~inside], images()[~inside])
    assert (defective[inside] != images()[inside]).float().mean() > 0.9
    pixels = defective * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() > -1e-5
    assert pixels.max() < 1 + 1e-5


def test_defects_do_not_depend_on_the_batch():
    together, masks = defects()(images(), PATHS, epoch=1)
    for order in ([2, 0, 1], [1]):
        defective, mask = defects()(images()[order], [PATHS[index] for index in order], epoch=1)
        assert torch.equal(defective, together[order])
        assert torch.equal(mask, masks[order])


@pytest.mark.parametrize("change", ["seed", "epoch", "path"])
def test_defects_depend_on_seed_epoch_and_path(change):
    first = defects()(images(1), PATHS[:1], epoch=0)[1]
    seed, epoch, path = (int(change == name) for name in ("seed", "epoch", "path"))
    other = defects(seed=seed)(images(1), PATHS[path : path + 1], epoch=epoch)[1]
    assert not torch.equal(first, other)


def test_defects_do_not_depend_on_the_folder_of_the_dataset():
    expected = defects()(images(), PATHS, epoch=0)[0]
    actual = defects()(images(), [f"/mnt/elsewhere/{path}" for path in PATHS], epoch=0)[0]
    assert torch.equal(actual, expected)


def test_without_paths_defects_depend_on_the_pixels():
    first, masks = defects()(images(), None, epoch=0)
    assert not torch.equal(masks[0], masks[1])
    again = defects()(images()[[1, 0]], None, epoch=0)[0]
    assert torch.equal(again, first[[1, 0]])


def test_global_generators_neither_change_nor_have_an_effect():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(defects()(images(), PATHS, epoch=0)[0])
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        assert torch.equal(before[0], after[0])
        assert (before[1] == after[1]).all()
        assert before[2] == after[2]
    assert torch.equal(*results)


def test_default_seed_is_that_of_pytorchs_generator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        torch.rand(3)
        unseeded = defects(seed=None)
    assert torch.equal(unseeded(images(), PATHS, epoch=0)[0], defects(seed=5)(images(), PATHS, epoch=0)[0])


def test_images_get_defects_with_the_given_probability():
    many = images(1).expand(200, -1, -1, -1)
    paths = [f"good/{index}.png" for index in range(200)]
    defective, masks = defects(probability=0.25)(many, paths, epoch=0)
    is_defective = masks.flatten(1).any(dim=1)
    assert 30 <= is_defective.sum() <= 70  # mean 50, standard deviation 6
    assert torch.equal(defective[~is_defective], many[~is_defective])


def test_defective_pixels_are_clamped_to_the_range_of_images():
    brightness = defects()
    brightness.generator = lambda image: (torch.stack([image[0] + 2, image[1] - 2, image[2]]), torch.ones(1, 64, 48))
    defective, _ = brightness(images(1), PATHS[:1], epoch=0)
    bright, dark, same = defective[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    torch.testing.assert_close((bright, dark), (torch.ones(64, 48), torch.zeros(64, 48)))
    assert same.std() > 0.1


def test_mixed_precision_and_memory_format_change_nothing():
    expected, masks = defects()(images(), PATHS, epoch=0)
    with torch.autocast("cpu", torch.bfloat16):
        defective, mixed_masks = defects()(images().contiguous(memory_format=torch.channels_last), PATHS, epoch=0)
    assert torch.equal(masks, mixed_masks)
    assert torch.equal(defective, expected)
    assert defective.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("probability", [0.0, -0.5, 1.5, float("nan")])
def test_probabilities_out_of_range_are_refused(probability):
    with pytest.raises(ArgumentError, match=f"defect_probability {probability} must be larger than 0, and 1 at most"):
        defects(probability=probability)
