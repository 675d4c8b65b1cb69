import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data.utils import synthetic
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_dskd.data import MagneticTile
from anomalib_dskd.data.magnetic_tile import DEFECTS, MagneticTileDataset
from anomalib_dskd.errors import ArgumentError, DataError

CLASSES = ("Free", *DEFECTS)
REAL_ROOT = "ANOMALIB_DSKD_TEST_MAGNETIC_TILE"


@pytest.fixture
def root(magnetic_tile_root, tmp_path):
    """A copy of the small data set that a test may damage."""
    return Path(shutil.copytree(magnetic_tile_root, tmp_path / "data"))


def set_up(root, **arguments):
    data = MagneticTile(root=root, **arguments)
    data.setup()
    return data


def names(dataset):
    """Name images within the data set, whatever its root is."""
    return [str(Path(path).relative_to(Path(path).parents[2])) for path in dataset.samples.image_path]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def index_of(dataset, label):
    return int(np.flatnonzero(dataset.samples.label == label)[0])


# --- the split --------------------------------------------------------------------------------------------------


def test_defects_are_the_five_published_classes():
    assert DEFECTS == ("Blowhole", "Break", "Crack", "Fray", "Uneven")


@pytest.mark.parametrize(("test_ratio", "count"), [(0.1, 1), (0.2, 2), (0.3, 3), (0.5, 5), (0.9, 9)])
def test_test_ratio_is_the_fraction_of_normal_tiles_in_the_test_set(magnetic_tile_root, test_ratio, count):
    data = set_up(magnetic_tile_root, test_ratio=test_ratio)
    assert Counter(data.train_data.samples.label) == {"Free": 10 - count}
    assert Counter(data.test_data.samples.label) == {"Free": count} | dict.fromkeys(DEFECTS, 2)


def test_every_normal_tile_is_in_exactly_one_split(magnetic_tile_root):
    data = set_up(magnetic_tile_root)
    normal = [name for name in names(data.train_data) + names(data.test_data) if "MT_Free" in name]
    assert sorted(normal) == [f"MT_Free/Imgs/exp1_num_{index}.jpg" for index in range(10)]


def test_same_seed_gives_the_same_split(magnetic_tile_root):
    first, second = (set_up(magnetic_tile_root, seed=3) for _ in range(2))
    assert names(first.train_data) == names(second.train_data)
    assert names(first.test_data) == names(second.test_data)


def test_seeds_give_different_splits(magnetic_tile_root):
    splits = {tuple(names(set_up(magnetic_tile_root, seed=seed).train_data)) for seed in range(5)}
    assert len(splits) > 1


def test_split_does_not_depend_on_the_global_random_state(magnetic_tile_root):
    np.random.seed(0)
    torch.manual_seed(0)
    first = names(set_up(magnetic_tile_root).train_data)
    np.random.seed(1)
    torch.manual_seed(1)
    assert names(set_up(magnetic_tile_root).train_data) == first


def test_split_does_not_depend_on_the_order_of_files_on_disk(magnetic_tile_root, monkeypatch):
    expected = names(set_up(magnetic_tile_root).train_data)
    listed = Path.glob
    for reorder in (sorted, lambda paths: sorted(paths, reverse=True)):
        monkeypatch.setattr(Path, "glob", lambda path, pattern, reorder=reorder: iter(reorder(listed(path, pattern))))
        assert names(set_up(magnetic_tile_root).train_data) == expected


def test_split_does_not_depend_on_where_the_data_is(magnetic_tile_root, root):
    assert names(set_up(root).train_data) == names(set_up(magnetic_tile_root).train_data)


def test_dataset_without_a_split_has_all_images(magnetic_tile_root):
    dataset = MagneticTileDataset(magnetic_tile_root)
    assert Counter(dataset.samples.label) == {"Free": 10} | dict.fromkeys(DEFECTS, 2)
    assert Counter(dataset.samples.split) == {"train": 8, "test": 12}
    assert dataset.task == "segmentation"


@pytest.mark.parametrize("test_ratio", [-0.1, 0, 1, 1.5, float("nan")])
def test_test_ratio_out_of_range_is_refused(tmp_path, test_ratio):
    with pytest.raises(ArgumentError, match=rf"test_ratio {test_ratio!r} must be between 0 and 1"):
        MagneticTile(root=tmp_path, test_ratio=test_ratio)


@pytest.mark.parametrize("test_ratio", [0.01, 0.99])
def test_test_ratio_that_empties_a_split_is_refused(magnetic_tile_root, test_ratio):
    with pytest.raises(ArgumentError, match=f"test_ratio {test_ratio} puts all 10 normal tiles into one split"):
        set_up(magnetic_tile_root, test_ratio=test_ratio)


# --- images, masks, labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", CLASSES)
def test_image_values_are_pils(magnetic_tile_root, label):
    dataset = MagneticTileDataset(magnetic_tile_root)
    item = dataset[index_of(dataset, label)]
    gray = torch.from_numpy(pixels(item.image_path).astype(np.float32) / 255)
    assert f"MT_{label}" in item.image_path
    torch.testing.assert_close(torch.as_tensor(item.image), gray.expand(3, *gray.shape), rtol=0, atol=1e-6)


def test_mask_values_above_127_are_defect(root):
    dataset = MagneticTileDataset(root)
    index = index_of(dataset, "Crack")
    mask = np.zeros_like(pixels(dataset.samples.mask_path[index]))
    mask[5, 3:9] = [0, 1, 120, 127, 128, 255]
    Image.fromarray(mask).save(dataset.samples.mask_path[index])
    gt_mask = dataset[index].gt_mask
    assert gt_mask.shape == mask.shape
    assert gt_mask.nonzero().tolist() == [[5, 7], [5, 8]]


@pytest.mark.parametrize("label", DEFECTS)
def test_mask_is_the_published_one(magnetic_tile_root, label):
    dataset = MagneticTileDataset(magnetic_tile_root, "test")
    item = dataset[index_of(dataset, label)]
    expected = torch.zeros(item.image.shape[-2:], dtype=torch.bool)
    expected[30:60, 40:80] = True
    assert torch.equal(torch.as_tensor(item.gt_mask).bool(), expected)
    assert item.gt_label == 1
    assert item.mask_path == str(Path(item.image_path).with_suffix(".png"))


def test_defect_with_an_empty_mask_stays_anomalous(root):
    for index in range(2):
        path = root / "MT_Uneven" / "Imgs" / f"exp1_num_{index}.png"
        Image.fromarray(np.minimum(pixels(path), 127)).save(path)
    dataset = set_up(root).test_data
    items = [dataset[int(index)] for index in np.flatnonzero(dataset.samples.label == "Uneven")]
    assert [int(item.gt_label) for item in items] == [1, 1]
    assert [int(item.gt_mask.sum()) for item in items] == [0, 0]


def test_normal_tile_has_a_zero_mask(magnetic_tile_root):
    item = MagneticTileDataset(magnetic_tile_root, "train")[0]
    assert item.gt_label == 0
    assert torch.equal(torch.as_tensor(item.gt_mask).bool(), torch.zeros(item.image.shape[-2:], dtype=torch.bool))


def test_normal_tile_needs_no_mask_file(root):
    for path in root.glob("MT_Free/Imgs/*.png"):
        path.unlink()
    data = set_up(root)
    assert [int(item.gt_mask.sum()) for item in data.train_data] == [0] * 8


def test_samples_keep_the_class_after_setup(magnetic_tile_root):
    data = set_up(magnetic_tile_root)
    for dataset in (data.train_data, data.val_data, data.test_data):
        samples = dataset.samples
        assert list(samples.label) == [Path(path).parts[-3].removeprefix("MT_") for path in samples.image_path]
        assert list(samples.label_index) == [int(label != "Free") for label in samples.label]


def test_augmentations_change_image_and_mask_together(magnetic_tile_root):
    plain = MagneticTileDataset(magnetic_tile_root)
    flipped = MagneticTileDataset(magnetic_tile_root, augmentations=RandomHorizontalFlip(p=1))
    index = index_of(plain, "Break")
    assert not torch.equal(flipped[index].image, plain[index].image)
    assert torch.equal(flipped[index].image, plain[index].image.flip(-1))
    assert torch.equal(flipped[index].gt_mask, plain[index].gt_mask.flip(-1))
    assert flipped[index].gt_mask.any()


def test_data_module_gives_each_split_its_augmentations(magnetic_tile_root):
    train, val, test, common = (RandomHorizontalFlip(p=1) for _ in range(4))
    data = set_up(magnetic_tile_root, train_augmentations=train, val_augmentations=val, test_augmentations=test)
    assert data.train_data.augmentations is train
    assert data.val_data.augmentations is val
    assert data.test_data.augmentations is test
    data = set_up(magnetic_tile_root, augmentations=common)
    assert all(split.augmentations is common for split in (data.train_data, data.val_data, data.test_data))


# --- validation splits and batches ------------------------------------------------------------------------------


def test_validation_same_as_test_has_the_test_images(magnetic_tile_root):
    data = set_up(magnetic_tile_root)
    assert names(data.val_data) == names(data.test_data)
    labels = torch.cat([batch.gt_label for batch in data.val_dataloader()])
    assert labels.tolist() == list(data.test_data.samples.label_index)


def test_validation_from_test_splits_the_test_images_and_keeps_the_class(magnetic_tile_root):
    whole = names(set_up(magnetic_tile_root).test_data)
    data = set_up(magnetic_tile_root, val_split_mode="from_test", val_split_ratio=0.5)
    assert sorted(names(data.val_data) + names(data.test_data)) == sorted(whole)
    for dataset, loader in ((data.val_data, data.val_dataloader()), (data.test_data, data.test_dataloader())):
        samples = dataset.samples
        assert Counter(samples.label_index) == {0: 1, 1: 5}
        assert list(samples.label) == [Path(path).parts[-3].removeprefix("MT_") for path in samples.image_path]
        (batch,) = loader
        assert batch.gt_label.int().tolist() == list(samples.label_index)


def test_validation_from_test_is_seeded(magnetic_tile_root):
    first, second = (set_up(magnetic_tile_root, val_split_mode="from_test", seed=1) for _ in range(2))
    assert names(first.val_data) == names(second.val_data)


def test_synthetic_validation_takes_normal_tiles_from_the_training_set(magnetic_tile_root, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "ROOT", tmp_path)
    data = set_up(magnetic_tile_root, val_split_mode="synthetic", val_split_ratio=0.5)
    assert Counter(data.train_data.samples.label) == {"Free": 4}
    assert Counter(data.val_data.samples.label_index) == {0: 2, 1: 2}
    (batch,) = data.val_dataloader()
    assert batch.gt_label.sum() == 2
    assert not batch.gt_mask[~batch.gt_label.bool()].any()
    normal = {path for path, label in zip(names(data.val_data), batch.gt_label, strict=True) if not label}
    assert normal.isdisjoint(names(data.train_data))
    assert len(list(data.test_dataloader())) == 1


@pytest.mark.parametrize("mode", ["same_as_test", "from_test"])
def test_train_and_test_loaders_give_every_image_once(magnetic_tile_root, mode):
    data = set_up(magnetic_tile_root, val_split_mode=mode, train_batch_size=3, eval_batch_size=5)
    for dataset, loader, size in (
        (data.train_data, data.train_dataloader(), 3),
        (data.test_data, data.test_dataloader(), 5),
    ):
        batches = list(loader)
        assert [len(batch.image) for batch in batches[:-1]] == [size] * (len(batches) - 1)
        paths = [path for batch in batches for path in batch.image_path]
        assert sorted(paths) == sorted(dataset.samples.image_path)


@pytest.mark.parametrize(
    ("mode", "why"),
    [("none", "gives no validation images"), ("from_dir", "needs a validation folder"), ("sideways", "is unknown")],
)
def test_validation_without_images_is_refused(magnetic_tile_root, mode, why):
    message = f"val_split_mode '{mode}' {why}.* Supported values: 'same_as_test', 'from_train'"
    with pytest.raises(ArgumentError, match=message):
        MagneticTile(magnetic_tile_root, val_split_mode=mode)


@pytest.mark.parametrize("seed", [-1, 1.5, None])
def test_seed_that_cannot_seed_is_refused(magnetic_tile_root, seed):
    with pytest.raises(ArgumentError, match=f"seed {seed} must be an integer, 0 or larger"):
        MagneticTile(magnetic_tile_root, seed=seed)


def test_batch_fields(magnetic_tile_root):
    data = set_up(magnetic_tile_root)
    (batch,) = data.test_dataloader()
    samples = data.test_data.samples
    sizes = {pixels(path).shape for path in samples.image_path}
    assert len(sizes) > 1  # anomalib's collate function resizes them to one
    height, width = batch.image.shape[-2:]
    assert (height, width) in sizes
    assert batch.image.shape == (12, 3, height, width)
    assert batch.image.dtype == torch.float32
    assert 0 <= batch.image.min() < batch.image.max() <= 1
    assert batch.gt_mask.shape == (12, height, width)
    assert batch.gt_mask.unique().tolist() == [0, 1]
    assert batch.gt_label.int().tolist() == list(samples.label_index)
    assert batch.gt_mask.flatten(1).any(1).tolist() == batch.gt_label.bool().tolist()
    assert batch.image_path == list(samples.image_path)
    assert batch.mask_path == list(samples.mask_path)


def test_batch_sizes_are_as_given(magnetic_tile_root):
    data = set_up(magnetic_tile_root)
    assert (data.train_dataloader().batch_size, data.test_dataloader().batch_size) == (16, 32)
    assert data.train_dataloader().num_workers == 0


# --- bad data ---------------------------------------------------------------------------------------------------


def test_missing_root_is_named(tmp_path):
    root = tmp_path / "nowhere"
    message = rf"data root {re.escape(repr(str(root)))} does not exist.*--data\.root.*MT_Free/Imgs.*MT_Uneven/Imgs"
    with pytest.raises(DataError, match=message):
        set_up(root)


def test_empty_root_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"does not contain MT_Free/Imgs, .*MT_Uneven/Imgs\. Found: nothing\. Expected folders"
    ):
        set_up(tmp_path)


def test_contents_of_a_root_with_another_layout_are_named(tmp_path):
    for name in ("wood", "bottle"):
        (tmp_path / name / "train" / "good").mkdir(parents=True)
    with pytest.raises(DataError, match=r"does not contain MT_Free/Imgs, .*\. Found: bottle, wood\. Expected folders"):
        set_up(tmp_path)


@pytest.mark.parametrize("label", CLASSES)
def test_missing_class_is_named(root, label):
    shutil.rmtree(root / f"MT_{label}")
    with pytest.raises(DataError, match=rf"does not contain MT_{label}/Imgs\. Found: MT_"):
        set_up(root)


@pytest.mark.parametrize("label", CLASSES)
def test_class_without_images_is_named(root, label):
    folder = root / f"MT_{label}" / "Imgs"
    for path in folder.glob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match=rf"no \*\.jpg images in {re.escape(repr(str(folder)))}"):
        set_up(root)


def test_missing_mask_is_named(root):
    (root / "MT_Fray" / "Imgs" / "exp1_num_1.png").unlink()
    with pytest.raises(DataError, match=r"MT_Fray/Imgs/exp1_num_1\.jpg' has no mask 'exp1_num_1\.png' next to it"):
        set_up(root)


def read_all(root):
    for _ in MagneticTileDataset(root):
        pass


def test_mask_of_another_size_is_named_with_both_sizes(root):
    path = root / "MT_Break" / "Imgs" / "exp1_num_0.png"
    height, width = pixels(path).shape
    Image.fromarray(np.zeros((height, width + 1), dtype=np.uint8)).save(path)
    message = rf"MT_Break/Imgs/exp1_num_0\.png' has \({height}, {width + 1}\) pixels, its image \({height}, {width}\)"
    with pytest.raises(DataError, match=message):
        read_all(root)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # by anomalib's read_image
def test_corrupt_image_is_named(root):
    truncate(root / "MT_Crack" / "Imgs" / "exp1_num_1.jpg")
    with pytest.raises(DataError, match=r"image '.*MT_Crack/Imgs/exp1_num_1\.jpg' cannot be read: .+ Replace the file"):
        read_all(root)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12
def test_corrupt_image_is_named_when_a_worker_reads_it(root):
    truncate(root / "MT_Crack" / "Imgs" / "exp1_num_1.jpg")
    batches = iter(set_up(root, num_workers=1).test_dataloader())
    with pytest.raises(DataError, match=r"image '.*MT_Crack/Imgs/exp1_num_1\.jpg' cannot be read"):
        next(batches)
    assert list(batches) == []  # the worker ends here; left to the garbage collector it takes 5 seconds


def test_16_bit_image_is_named(root):
    path = root / "MT_Free" / "Imgs" / "exp1_num_4.jpg"
    Image.fromarray(np.full((20, 30), 300, dtype=np.uint16)).save(path, format="PNG")
    with pytest.raises(DataError, match=r"MT_Free/Imgs/exp1_num_4\.jpg' has more than 8 bits per channel"):
        read_all(root)


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_text("This is no image.")])
def test_corrupt_mask_is_named(root, damage):
    damage(root / "MT_Blowhole" / "Imgs" / "exp1_num_0.png")
    message = r"mask '.*MT_Blowhole/Imgs/exp1_num_0\.png' cannot be read: .+ Restore the published file"
    with pytest.raises(DataError, match=message):
        read_all(root)


# --- the published data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    if not os.environ.get(REAL_ROOT):
        pytest.skip(f"needs the published Magnetic Tile data; give its folder in {REAL_ROOT}")
    return set_up(os.environ[REAL_ROOT])


def test_published_data_has_the_known_counts_and_split(published):
    labels = Counter(published.train_data.samples.label) + Counter(published.test_data.samples.label)
    assert labels == {"Free": 952, "Blowhole": 115, "Break": 85, "Crack": 57, "Fray": 32, "Uneven": 103}
    assert Counter(published.train_data.samples.label) == {"Free": 762}
    assert len(published.test_data) == 582


def test_published_data_has_four_defects_with_an_empty_mask(published):
    test = published.test_data
    defects = [test[int(index)] for index in np.flatnonzero(test.samples.label_index)]
    assert len(defects) == 392
    empty = {Path(item.image_path).stem for item in defects if not item.gt_mask.any()}
    assert empty == {"exp3_num_45042", "exp4_num_45057", "exp4_num_124690", "exp4_num_352527"}
    assert all(item.gt_label == 1 for item in defects)
