"""Which masks belong to which images, where anomalib pairs sorted lists."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anomalib.data import Folder, Folder3D, MVTecAD, Tabular
from PIL import Image

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.data.mask_pairs import check_mask_pairs, find_wrong_pairs
from anomalib_dskd.errors import DataError
from tests.conftest import engine

SIDE = 64


def write(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels if "mask" not in name.split("/")[0] else pixels[..., 0] // 128 * 255).save(path)


def folder(root: Path, *, kind: type = Folder, **arguments: object) -> Folder:
    write(root, *(f"good/{index}" for index in range(4)), "good_test/0")
    folders = {"normal_dir": "good", "normal_test_dir": "good_test", "abnormal_dir": "bad", "mask_dir": "masks"}
    return kind("parts", root=root, num_workers=0, **{**folders, "val_split_mode": "same_as_test", **arguments})


def wrong(data: Folder) -> dict[str, str]:
    """Names of wrongly paired images and masks below the data set's root."""
    data.setup()
    root = Path(data.root).resolve()
    return {str(i.relative_to(root)): str(m.relative_to(root)) for i, m, _ in find_wrong_pairs(data)}


@pytest.mark.parametrize("kind", [Folder, Folder3D])
def test_image_1_is_not_that_of_mask_12(kind, tmp_path):
    write(tmp_path, "bad/1", "bad/2", "masks/12", "masks/2")
    assert wrong(folder(tmp_path, kind=kind)) == {"bad/1.png": "masks/12.png"}


@pytest.mark.parametrize(
    "mask", ["{}", "{}_mask", "{}_gt", "{}-label", "mask{}", "GT_{}", "{}_Ground_Truth", "{}_seg_mask"]
)
def test_usual_names_of_masks_are_supported(mask, tmp_path):
    images = ["1", "part_12", "scratch"]
    write(tmp_path, *(f"bad/{name}" for name in images), *(f"masks/{mask.format(name)}" for name in images))
    assert wrong(folder(tmp_path)) == {}


@pytest.mark.parametrize("mask", ["1_2_mask", "01", "1b", "1_copy"])
def test_other_names_that_contain_the_images_are_not(mask, tmp_path):
    write(tmp_path, "bad/1", f"masks/{mask}")
    assert wrong(folder(tmp_path)) == {"bad/1.png": f"masks/{mask}.png"}


def test_each_abnormal_dir_has_the_mask_dir_of_its_position(tmp_path):
    write(tmp_path, "bad/crack/1", "bad/scratch/1", "masks/a/1", "masks/b/1")
    abnormal = ["bad/crack", "bad/scratch"]
    assert wrong(folder(tmp_path, abnormal_dir=abnormal, mask_dir=["masks/a", "masks/b"])) == {}
    for arguments in (
        {"abnormal_dir": abnormal[::-1], "mask_dir": ["masks/a", "masks/b"]},
        {"abnormal_dir": abnormal, "mask_dir": ["masks/b", "masks/a"]},
    ):
        assert wrong(folder(tmp_path, **arguments)) == {
            "bad/crack/1.png": "masks/a/1.png",
            "bad/scratch/1.png": "masks/b/1.png",
        }


def test_the_order_of_lists_counts_for_images_with_different_names_too(tmp_path):
    write(tmp_path, "bad/crack/1", "bad/scratch/2", "masks/a/1", "masks/b/2")
    arguments = {"abnormal_dir": ["bad/scratch", "bad/crack"], "mask_dir": ["masks/a", "masks/b"]}
    assert len(wrong(folder(tmp_path, **arguments))) == 2


def test_folders_with_the_images_names_have_their_masks(tmp_path):
    write(tmp_path, "bad/dent/1", "bad/scratch/1", "masks/dent/1", "masks/scratch/1")
    assert wrong(folder(tmp_path)) == {}
    assert wrong(folder(tmp_path, abnormal_dir=["bad/dent", "bad/scratch"])) == {}
    (tmp_path / "masks" / "b").mkdir()
    shutil.move(tmp_path / "masks" / "dent", tmp_path / "masks" / "z" / "dent")
    assert set(wrong(folder(tmp_path))) == {"bad/dent/1.png", "bad/scratch/1.png"}


def test_a_name_of_a_folder_further_up_counts_too(tmp_path):
    write(tmp_path, "cam1/bad/1", "cam2/bad/1", "masks/cam1/1", "masks/cam2/1")
    assert wrong(folder(tmp_path, abnormal_dir=["cam1/bad", "cam2/bad"])) == {}


def test_masks_without_folders_are_told_apart_by_their_names(tmp_path):
    write(tmp_path, "bad/dent/1", "bad/scratch/2", "masks/1", "masks/2")
    assert wrong(folder(tmp_path)) == {}


def test_equal_names_in_folders_of_other_names_cannot_be_checked_and_are_refused(tmp_path):
    write(tmp_path, "bad/dent/1", "bad/scratch/1", "masks/a/1", "masks/b/1")
    data = folder(tmp_path)
    assert len(wrong(data)) == 2
    with pytest.raises(DataError, match="has the name too, and names of folders do not tell which one is right"):
        check_mask_pairs(data)


def test_a_defect_class_may_be_named_as_the_folder_of_masks(tmp_path):
    root = tmp_path / "a" / "bottle"
    write(root, "train/good/0", "test/good/0")
    for kind in ("a", "b"):
        write(root, *(f"test/{kind}/{i}" for i in range(2)), *(f"ground_truth/{kind}/{i}_mask" for i in range(2)))
    data = MVTecAD(root.parent, "bottle", num_workers=0)
    data.setup()
    assert find_wrong_pairs(data) == []


def test_a_table_of_pairs_may_have_any_names(tmp_path):
    write(tmp_path, "good/0", "good/1", "bad/1", "masks/x")
    rows = [("good/0.png", "normal", "", "train"), ("good/1.png", "normal", "", "test")]
    rows.append(("bad/1.png", "abnormal", "masks/x.png", "test"))
    columns = ("image_path", "label", "mask_path", "split")
    table = pd.DataFrame(rows, columns=columns, dtype=object)  # with pandas 3, anomalib fails on other types
    data = Tabular("parts", table, root=tmp_path, num_workers=0, val_split_mode="same_as_test")
    data.setup()
    assert "x.png" in "".join(data.test_data.samples.mask_path)
    assert find_wrong_pairs(data) == []


def test_synthetic_defects_are_no_reason_to_refuse_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "bad/0", "bad/1", "masks/0", "masks/1")
    assert wrong(folder(tmp_path, val_split_mode="synthetic", val_split_ratio=0.5)) == {}


def test_magnetic_tile_has_no_wrong_pairs(magnetic_tile_root):
    data = MagneticTile(magnetic_tile_root)
    data.setup()
    assert find_wrong_pairs(data) == []


def train(model: Dskd, data: Folder, root: Path) -> None:
    engine(root, max_epochs=1).fit(model, datamodule=data)


def test(model: Dskd, data: Folder, root: Path) -> None:
    model.model.is_trained = True
    engine(root).test(model, datamodule=data)


test.__test__ = False


@pytest.mark.parametrize("run", [train, test])
def test_wrong_pairs_stop_training_and_tests(run: Callable, tiny_model, tmp_path):
    write(tmp_path, "bad/1", "masks/12")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=r"^1 masks are paired .*bad/1.png' with '.*masks/12.png': the mask's name"):
            run(tiny_model, folder(tmp_path), tmp_path / "results")
