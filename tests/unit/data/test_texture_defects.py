import json
import re
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from anomalib_dskd.data import TextureDefects, texture_defects
from anomalib_dskd.data.texture_defects import CATEGORIES, DEFECTS
from anomalib_dskd.errors import ArgumentError, DataError

SIDE = 128
PROBE = 32  # pixels of a crop's first row, by which it is found in the photograph


def small(root, **arguments):
    return TextureDefects(root=root, **({"train_images": 6, "test_images": 12} | arguments))


def written(root, **arguments):
    data = small(root, **arguments)
    data.prepare_data()
    return Path(root) / data.category


@pytest.fixture(scope="module", params=CATEGORIES)
def folder(request, tmp_path_factory):
    return written(tmp_path_factory.mktemp("textures"), category=request.param)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path):
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def photograph(folder):
    return getattr(skimage.data, folder.name)()


def places(crop, photo):
    """Find a crop, by its first row without a defect, in the photograph; yield pixels and left edge of each match."""
    starts = np.lib.stride_tricks.sliding_window_view(photo[: -SIDE + 1, : PROBE - SIDE], PROBE, axis=1)
    for top, left in np.argwhere((starts == crop[0, :PROBE]).all(axis=-1)):
        window = photo[top : top + SIDE, left : left + SIDE]
        if window.shape == crop.shape and (window[0] == crop[0]).all():
            yield window, left


def left_edges(paths, photo):
    found = [[left for window, left in places(read(path), photo) if (window == read(path)).all()] for path in paths]
    assert all(len(lefts) == 1 for lefts in found)
    return [lefts[0] for lefts in found]


def defective_crops(folder):
    """Yield each defective crop with its mask, the photograph's pixels at its position, and their left edge."""
    photo = photograph(folder)
    for path in sorted(folder.glob("ground_truth/*/*_mask.png")):
        kind, mask = path.parent.name, read(path)
        defective = read(folder / "test" / kind / path.name.replace("_mask", ""))
        assert not mask[0].any()  # so the first row has no defect
        found = [(window, left) for window, left in places(defective, photo) if (window == defective)[mask == 0].all()]
        assert len(found) == 1, f"{path} fits {len(found)} places"
        yield kind, defective, mask, *found[0]


# --- what is written --------------------------------------------------------------------------------------------


def test_layout_is_that_of_mvtec(folder):
    files = sorted(name for name in contents(folder) if name.endswith(".png"))
    kinds = ["stain", "scratch", "foreign"] * 2
    assert files == sorted(
        [f"train/good/{index:03d}.png" for index in range(6)]
        + [f"test/good/{index:03d}.png" for index in range(6, 12)]
        + [f"test/{kind}/{index:03d}.png" for index, kind in enumerate(kinds)]
        + [f"ground_truth/{kind}/{index:03d}_mask.png" for index, kind in enumerate(kinds)]
    )


def test_parameters_are_written_next_to_the_images(folder):
    written = json.loads((folder / "parameters.json").read_text())
    assert written == {"version": 1, "train_images": 6, "test_images": 12, "seed": 0}


@pytest.mark.parametrize(("test_images", "defective"), [(6, 3), (7, 3), (20, 10)])
def test_half_of_the_test_crops_are_defective(tmp_path, test_images, defective):
    folder = written(tmp_path, train_images=1, test_images=test_images)
    normal = len(list(folder.glob("test/good/*.png")))
    assert (len(list(folder.glob("test/*/*.png"))) - normal, normal) == (defective, test_images - defective)


@pytest.mark.parametrize("test_images", [6, 12])
def test_every_kind_of_defect_is_present(tmp_path, test_images):
    folder = written(tmp_path, train_images=1, test_images=test_images)
    assert {path.name for path in (folder / "test").iterdir()} == {"good", *DEFECTS}
    assert {path.name for path in (folder / "ground_truth").iterdir()} == set(DEFECTS)


def test_crops_and_masks_are_8_bit_and_square(folder):
    assert {read(path).shape for path in folder.rglob("*.png")} == {(SIDE, SIDE)}
    assert {value for path in folder.glob("ground_truth/*/*.png") for value in np.unique(read(path))} == {0, 255}


def test_train_and_test_crops_come_from_disjoint_areas(folder):
    photo = photograph(folder)
    train = left_edges(sorted(folder.glob("train/good/*.png")), photo)
    test = left_edges(sorted(folder.glob("test/good/*.png")), photo)
    assert (len(train), len(test)) == (6, 6)
    defective = [left for *_, left in defective_crops(folder)]
    assert max(train) + SIDE <= min(test + defective)
    assert len(set(train)) > 1
    assert len(set(test)) > 1


def test_masks_mark_exactly_the_pixels_that_differ(folder):
    crops = list(defective_crops(folder))
    assert len(crops) == 6
    for kind, defective, mask, original, _ in crops:
        assert np.array_equal(defective != original, mask == 255), kind
        assert 0.005 < (mask == 255).mean() < 0.1, kind


def test_stains_are_darker(folder):
    for kind, defective, mask, original, _ in defective_crops(folder):
        if kind == "stain":
            inside = (mask == 255) & (original > 1)
            brightness = defective[inside].sum() / original[inside].sum()
            assert 0.33 < brightness < 0.61


def test_scratches_are_of_one_gray(folder):
    for kind, defective, mask, _, _ in defective_crops(folder):
        if kind == "scratch":
            grays = defective[mask == 255].astype(int)
            paint = int(np.median(grays))
            assert paint in (25, 235)
            assert np.abs(grays - paint).max() <= 1


def test_foreign_texture_is_the_next_category(folder):
    other = getattr(skimage.data, CATEGORIES[(CATEGORIES.index(folder.name) + 1) % 3])()
    windows = np.lib.stride_tricks.sliding_window_view(other, 8, axis=1)
    for kind, defective, mask, original, _ in defective_crops(folder):
        if kind == "foreign":
            row = int((mask == 255).sum(axis=1).argmax())
            left = int(np.flatnonzero(mask[row])[0])
            run = defective[row, left : left + 8]
            assert (mask[row, left : left + 8] == 255).all()
            near = np.abs(windows.astype(int) - run).max(axis=-1) <= 1  # one gray level where both are the same
            assert near.any()
            assert not np.array_equal(run, original[row, left : left + 8])


@pytest.mark.parametrize("seed", range(20))
def test_blobs_and_strokes_have_the_documented_sizes(seed):
    blob, stroke = (shape(np.random.default_rng(seed)) for shape in (texture_defects._blob, texture_defects._stroke))
    assert 0.065 < np.sqrt(blob.sum() / np.pi) / SIDE < 0.135  # as the radius of a disk
    assert not blob[:8].any() | blob[-8:].any() | blob[:, :8].any() | blob[:, -8:].any()
    rows, columns = np.nonzero(stroke)
    assert 0.29 < np.hypot(np.ptp(rows) - 2, np.ptp(columns) - 2) / SIDE < 0.71
    assert stroke[1:-1, 1:-1].sum() == stroke.sum() > 3 * 0.29 * SIDE


def test_defects_are_those_of_version_1(tmp_path):
    """If this fails after a change of the defects, increase ``VERSION``: existing crops must not be reused."""
    assert texture_defects.VERSION == 1
    folder = written(tmp_path, category="brick")
    expected = {  # pixels of the defect, its center, and its mean gray
        "stain/000": (548, (96.9, 87.9), 51.2),
        "scratch/001": (317, (73.0, 47.0), 235.0),
        "foreign/002": (773, (50.0, 60.4), 107.2),
        "stain/003": (637, (37.6, 44.4), 57.0),
        "scratch/004": (299, (55.0, 71.0), 25.0),
        "foreign/005": (718, (36.9, 37.7), 100.7),
    }
    for name, (pixels, center, gray) in expected.items():
        mask = read(folder / "ground_truth" / f"{name}_mask.png") > 0
        assert mask.sum() == pytest.approx(pixels, abs=3)  # rounding may differ between processors
        assert np.argwhere(mask).mean(axis=0) == pytest.approx(center, abs=0.2)
        assert read(folder / "test" / f"{name}.png")[mask].mean() == pytest.approx(gray, abs=1)


# --- seeds ------------------------------------------------------------------------------------------------------


def test_same_seed_writes_the_same_bytes(folder, tmp_path):
    again = written(tmp_path, category=folder.name)
    assert contents(again) == contents(folder)


def test_another_seed_writes_other_crops(folder, tmp_path):
    first, other = contents(folder), contents(written(tmp_path, category=folder.name, seed=1))
    assert other.keys() == first.keys()
    same = [name for name in first if first[name] == other[name]]
    assert same == []


def test_number_of_test_images_does_not_change_the_training_crops(tmp_path):
    few, many = (written(tmp_path / str(count), test_images=count) for count in (6, 12))
    for index in range(6):
        name = f"train/good/{index:03d}.png"
        assert (few / name).read_bytes() == (many / name).read_bytes()


# --- as a data module -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["same_as_test", "from_test"])
def test_data_loaders_return_the_written_images(tmp_path, mode):
    data = small(tmp_path, val_split_mode=mode)
    data.prepare_data()
    data.setup()
    (train,) = data.train_dataloader()
    assert train.image.shape == (6, 3, SIDE, SIDE)
    assert not train.gt_label.any()
    share = 1 if mode == "same_as_test" else 2
    for loader in (data.val_dataloader(), data.test_dataloader()):
        (batch,) = loader
        assert batch.gt_label.int().sum() * 2 == len(batch.image) == 12 // share
        for image, label, mask, path in zip(batch.image, batch.gt_label, batch.gt_mask, batch.image_path, strict=True):
            assert np.array_equal((image[0] * 255).round().numpy().astype(np.uint8), read(path))
            assert bool(label) == (Path(path).parent.name != "good")
            assert bool(mask.any()) == bool(label)


# --- an existing folder -----------------------------------------------------------------------------------------


def test_existing_folder_is_reused(tmp_path):
    folder = written(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert written(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_categories_have_separate_folders(tmp_path):
    for category in CATEGORIES:
        written(tmp_path, category=category)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CATEGORIES)


@pytest.mark.parametrize("other", [{"seed": 1}, {"train_images": 7}, {"test_images": 13}])
def test_folder_with_other_parameters_is_refused_and_not_changed(tmp_path, other):
    folder = written(tmp_path)
    before = contents(folder)
    (name, value), made = next(iter(other.items())), "'version': 1, 'train_images': 6, 'test_images': 12, 'seed': 0"
    message = (
        rf"folder {re.escape(repr(str(folder)))} contains crops made with {{{made}}}, not crops made with .*"
        rf"'{name}': {value}.*Remove the folder, or give another --data\.root"
    )
    with pytest.raises(DataError, match=message):
        written(tmp_path, **other)
    assert contents(folder) == before


def test_folder_with_other_data_is_refused_and_not_changed(tmp_path):
    mine = tmp_path / "brick" / "train" / "good" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(
        DataError, match=r"brick' contains other data, not crops made with .* Remove the folder, or give another"
    ):
        written(tmp_path)
    assert contents(tmp_path) == {"brick/train/good/mine.png": b"mine"}


def test_file_instead_of_the_folder_is_refused(tmp_path):
    (tmp_path / "brick").write_text("a file")
    with pytest.raises(DataError, match="brick' contains other data"):
        written(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"train_images": 6', b"\xff\xfe"])
def test_folder_with_an_unreadable_parameters_file_is_refused(tmp_path, content):
    (written(tmp_path) / "parameters.json").write_bytes(content)
    with pytest.raises(DataError, match=r"brick'.* Remove the folder, or give another"):
        written(tmp_path)


# --- failures while writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("no space left on device"), DataError)]
)
def test_interrupted_writing_leaves_no_incomplete_data_set(tmp_path, monkeypatch, error, seen):
    save, saved = texture_defects._save, []

    def save_some(path, pixels):
        if len(saved) == 9:
            raise error
        save(path, pixels)
        saved.append(path)
        assert path.is_file()

    with monkeypatch.context() as patch:
        patch.setattr(texture_defects, "_save", save_some)
        with pytest.raises(seen):
            written(tmp_path)
    assert len(saved) == 9
    assert list(tmp_path.iterdir()) == []
    assert len(contents(written(tmp_path))) == 6 + 12 + 6 + 1


def test_error_while_writing_is_reported(tmp_path, monkeypatch):
    def save_nothing(_path, _pixels):
        raise OSError("no space left on device")

    monkeypatch.setattr(texture_defects, "_save", save_nothing)
    message = rf"data root {re.escape(repr(str(tmp_path)))} cannot be written: no space left .*--data\.root"
    with pytest.raises(DataError, match=message):
        written(tmp_path)


@pytest.mark.parametrize("name", ["file", "file/deeper", "long" * 100])
def test_root_that_cannot_be_a_folder_is_named(tmp_path, name):
    (tmp_path / "file").write_text("a file")
    root = tmp_path / name
    message = rf"data root {re.escape(repr(str(root)))} cannot be written: .*Give a writable folder as --data\.root"
    with pytest.raises(DataError, match=message):
        written(root)


# --- arguments --------------------------------------------------------------------------------------------------


def test_unknown_category_is_refused(tmp_path):
    with pytest.raises(
        ArgumentError, match=r"category 'bottle' is not supported\. Supported values: 'brick', 'grass', 'gravel'"
    ):
        small(tmp_path, category="bottle")


@pytest.mark.parametrize(("train_images", "test_images"), [(0, 12), (-1, 12), (6, 5), (6, 0)])
def test_too_few_images_are_refused(tmp_path, train_images, test_images):
    message = f"train_images {train_images} and test_images {test_images}: at least 1 and 6 are needed"
    with pytest.raises(ArgumentError, match=message):
        small(tmp_path, train_images=train_images, test_images=test_images)


def test_nothing_is_written_before_prepare_data(tmp_path):
    small(tmp_path / "root")
    assert list(tmp_path.iterdir()) == []
