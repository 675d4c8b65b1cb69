import logging
import pickle

import pytest
import torch
from anomalib.data.dataclasses import DepthItem
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from anomalib_dskd import MagneticTile
from anomalib_dskd.data import image_cache, magnetic_tile
from anomalib_dskd.data.image_cache import CachedImages, cache_training_images, is_deterministic


@pytest.fixture
def data(magnetic_tile_root) -> MagneticTile:
    module = MagneticTile(magnetic_tile_root, augmentations=v2.Resize((32, 32), antialias=False))
    module.setup()
    return module


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of the files that are decoded."""
    paths, original = [], magnetic_tile.read_named_image
    monkeypatch.setattr(magnetic_tile, "read_named_image", lambda path: paths.append(path) or original(path))
    return paths


def same(first, second) -> bool:
    fields = ("image", "gt_mask", "gt_label")
    tensors = all(torch.equal(getattr(first, name), getattr(second, name)) for name in fields)
    types = all(type(getattr(first, name)) is type(getattr(second, name)) for name in fields)
    return tensors and types and (first.image_path, first.mask_path) == (second.image_path, second.mask_path)


def test_second_epoch_decodes_nothing_and_gives_the_same_items(data, read):
    expected = [data.train_data[index] for index in range(8)]
    cache_training_images(data, memory=1.0)
    read.clear()
    for epoch in range(2):
        assert all(same(data.train_data[index], expected[index]) for index in range(8)), epoch
    assert len(read) == 8


def test_memory_is_a_limit(data, read):
    cache_training_images(data, memory=3 * 3 * 32 * 32 * 4 / 2**30)
    read.clear()
    for _ in range(3):
        assert [item.image.shape for item in data.train_data] == [(3, 32, 32)] * 8
    assert len(read) == 3 + 3 * 5


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # where there is one core
def test_workers_share_decoded_images(data):
    expected = [data.train_data[index].image for index in range(8)]
    cache_training_images(data, memory=1.0)
    loader = DataLoader(data.train_data, num_workers=2, collate_fn=data.train_data.collate_fn)
    for _ in loader:
        pass
    assert data.train_data._states.tolist() == [1] * 8  # filled by the workers
    for batch, image in zip(loader, expected, strict=True):
        assert torch.equal(batch.image[0], image)


def test_random_augmentations_are_never_cached(data, caplog):
    data.train_data.augmentations = v2.Compose([v2.Resize((32, 32)), v2.RandomHorizontalFlip()])
    with caplog.at_level(logging.INFO, "anomalib_dskd"):
        cache_training_images(data, memory=1.0)
    assert not isinstance(data.train_data, CachedImages)
    assert "RandomHorizontalFlip" in caplog.text


def test_new_augmentations_empty_the_cache(data):
    cache_training_images(data, memory=1.0)
    assert data.train_data[0].image.shape == (3, 32, 32)
    data.train_data.augmentations = v2.Resize((16, 16))
    assert data.train_data[0].image.shape == (3, 16, 16)
    assert data.train_data[0].image.shape == (3, 16, 16)


def test_random_augmentations_of_a_later_training_run_are_not_cached(data):
    cache_training_images(data, memory=1.0)
    torch.manual_seed(0)
    data.train_data.augmentations = v2.Compose([v2.Resize((32, 32)), v2.RandomHorizontalFlip()])
    images = [data.train_data[0].image for _ in range(20)]
    assert len({image.numpy().tobytes() for image in images}) == 2
    cache_training_images(data, memory=1.0)
    assert not isinstance(data.train_data, CachedImages)


def test_cache_can_be_disabled_for_a_later_training_run(data):
    original = data.train_data
    cache_training_images(data, memory=1.0)
    cache_training_images(data, memory=0)
    assert data.train_data is original


def test_items_with_depth_are_not_cached(data, monkeypatch):
    cached = CachedImages(data.train_data, memory=1.0)
    assert cached._images is not None
    monkeypatch.setattr(image_cache, "ImageItem", DepthItem)  # so that the data set's items are of another class
    assert CachedImages(data.train_data, memory=1.0)._images is None


def test_changing_an_item_does_not_change_the_cache(data):
    cache_training_images(data, memory=1.0)
    expected = data.train_data[0].image.clone()
    data.train_data[0].image.mul_(0)
    assert torch.equal(data.train_data[0].image, expected)


def test_defective_images_are_always_read(data, read):
    cached = CachedImages(data.test_data, memory=1.0)
    defect = int(data.test_data.samples.index[data.test_data.samples.label_index == 1][0])
    read.clear()
    for _ in range(2):
        assert cached[defect].gt_mask.any()
    assert len(read) == 2


def test_attributes_are_forwarded_to_the_data_set(data):
    original = data.train_data
    cache_training_images(data, memory=1.0)
    cache_training_images(data, memory=1.0)  # must not wrap the data set twice
    assert data.train_data.dataset is original
    assert data.train_data.task == original.task
    assert data.train_data.samples is original.samples
    assert len(data.train_data) == 8


def test_pickled_copy_reads_the_files(data):
    cached = CachedImages(data.train_data, memory=1.0)
    copied = pickle.loads(pickle.dumps(cached))
    assert same(copied[3], cached[3])
    assert same(copied[3], cached[3])


def test_new_samples_replace_the_cached_ones(data):
    cache_training_images(data, memory=1.0)
    everything = [data.train_data[index] for index in range(8)]
    data.train_data.samples = data.train_data.samples.iloc[[5, 2]]
    for again in range(2):
        cache_training_images(data, memory=1.0)
        assert len(data.train_data) == 2
        for index, old in enumerate((2, 5)):  # anomalib sorts them
            for _ in range(2):
                assert same(data.train_data[index], everything[old]), again


def test_rows_changed_in_place_are_read(data):
    """A label too: a cached item would have the mask of a normal image."""
    defect = data.test_data.samples.query("label_index == 1").iloc[0]
    cache_training_images(data, memory=1.0)
    before = [data.train_data[index] for index in (0, 1)]
    for name in ("image_path", "mask_path", "label_index"):
        data.train_data.samples.loc[0, name] = defect[name]
    item = data.train_data[0]
    assert (item.image_path, int(item.gt_label)) == (defect.image_path, 1)
    assert item.gt_mask.any()
    assert not torch.equal(item.image, before[0].image)
    assert same(data.train_data[1], before[1])


def test_a_subset_in_place_has_its_own_images(data):
    cache_training_images(data, memory=1.0)
    everything = [data.train_data[index] for index in range(8)]
    data.train_data.subsample([3, 6], inplace=True)
    assert len(data.train_data) == 2
    assert all(same(data.train_data[index], everything[old]) for index, old in enumerate((3, 6)))


def test_zero_memory_disables_the_cache(data):
    original = data.train_data
    cache_training_images(data, memory=0)
    assert data.train_data is original


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (None, True),
        (v2.Compose([v2.Resize(8), v2.Normalize([0.5], [0.5])]), True),
        (torch.nn.Sequential(v2.CenterCrop(8)), True),
        (v2.Compose([v2.Resize(8), v2.Compose([v2.ColorJitter(0.1)])]), False),
        (v2.RandomApply([v2.Resize(8)]), False),
        (v2.Lambda(lambda image: image), False),
    ],
)
def test_only_known_transforms_are_deterministic(transform, expected):
    assert is_deterministic(transform) is expected
