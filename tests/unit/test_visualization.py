"""Images of results: their caption, and their files, which replace no other image's and no earlier run's."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem, PredictDataset
from anomalib.visualization import ImageVisualizer
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_dskd import Dskd, MagneticTile
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.visualization import CAPTION_HEIGHT, ResultVisualizer, check_file_names
from tests.conftest import engine


def write(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def saved(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


@pytest.fixture
def model(tiny_model: Dskd) -> Dskd:
    tiny_model.model.is_trained = True
    return tiny_model


def predict(model: Dskd, data: Path, results: Path) -> Path:
    """Predict as one command does; return the folder of the images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(results).predict(model, data_path=data)
    return Path(model.visualizer.output_dir)


def test_the_default_visualizer_is_ours(model):
    assert type(model.visualizer) is ResultVisualizer


def test_images_of_equal_names_have_a_file_each(model, tmp_path):
    new = write(tmp_path / "new", "camA/img/001.png", "camB/img/001.png")
    images = predict(model, new, tmp_path / "results")
    assert images.name == "images"
    assert saved(images) == ["new/camA/img/001.png", "new/camB/img/001.png"]
    first, second = (np.asarray(Image.open(images / name)) for name in saved(images))
    assert not np.array_equal(first, second)


def test_predictions_of_two_days_have_a_folder_each(model, tmp_path, caplog):
    days = write(tmp_path, "day1/img/001.png", "day2/img/001.png")
    first = predict(model, days / "day1" / "img", tmp_path / "results")
    content = (first / "img" / "001.png").read_bytes()
    with caplog.at_level(logging.INFO, "anomalib_dskd"):
        second = predict(model, days / "day2" / "img", tmp_path / "results")
    assert second == first.with_name("images_1")
    assert f"Images with anomaly maps: {second}" in caplog.messages
    assert (first / "img" / "001.png").read_bytes() == content
    assert (second / "img" / "001.png").read_bytes() != content
    assert predict(model, days / "day1" / "img", tmp_path / "elsewhere") == next(tmp_path.rglob("elsewhere/**/images"))


def test_a_folder_that_the_user_gives_is_not_overwritten_either(model, tmp_path):
    new = write(tmp_path / "new", "1.png")
    model.visualizer.output_dir = tmp_path / "mine"
    assert [predict(model, new, tmp_path).name for _ in range(3)] == ["mine", "mine_1", "mine_2"]
    model.visualizer.output_dir = tmp_path / "other"
    assert predict(model, new, tmp_path) == tmp_path / "other"


def test_a_single_image_has_its_folders_name(model, tmp_path):
    new = write(tmp_path / "new", "img/001.png")
    assert saved(predict(model, new / "img" / "001.png", tmp_path / "results")) == ["img/001.png"]


@pytest.mark.parametrize("name", ["parts", "another name"])
def test_images_of_a_test_have_a_file_each(name, model, tmp_path):
    """``Folder`` with several folders whose last names are equal; anomalib finds others by the data set's name."""
    root = write(tmp_path / "parts", "good/0.png", "ok/cam/0.png", "bad/a/cam/0.png", "bad/b/cam/0.png")
    folders = {"normal_dir": "good", "normal_test_dir": "ok", "abnormal_dir": ["bad/a", "bad/b"]}
    data = Folder(name, root=root, **folders, num_workers=0, val_split_mode="same_as_test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path / "results").test(model, datamodule=data)
    images = ["parts/bad/a/cam/0.png", "parts/bad/b/cam/0.png", "parts/ok/cam/0.png"]
    assert saved(Path(model.visualizer.output_dir)) == images


def test_all_tiles_of_magnetic_tile_have_a_file(model, magnetic_tile_root, tmp_path):
    """All its images are in folders of one name, ``Imgs``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path).test(model, datamodule=MagneticTile(magnetic_tile_root))
    data = MagneticTile(magnetic_tile_root)
    data.setup()
    assert len(list(Path(model.visualizer.output_dir).rglob("*.jpg"))) == len(data.test_data)


def test_images_of_a_loader_that_lists_no_files_keep_their_whole_path(model, tmp_path):
    new = write(tmp_path / "new", "camA/1.png", "camB/1.png")
    items = list(PredictDataset(new))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(tmp_path).predict(model, dataloaders=DataLoader(items, batch_size=2, collate_fn=ImageBatch.collate))
    images = Path(model.visualizer.output_dir)
    assert saved(images) == [str((new / name).relative_to("/")) for name in ("camA/1.png", "camB/1.png")]


def test_anomalibs_visualizer_is_refused_where_it_would_overwrite(model, tmp_path):
    new = write(tmp_path / "new", "camA/img/001.png", "camB/img/001.png", "camB/img/002.png")
    model.visualizer = ImageVisualizer()
    with pytest.raises(ArgumentError, match=r"ImageVisualizer would save .*camA/img/001.png' and '.*camB/img/001.png'"):
        predict(model, new, tmp_path / "results")
    assert saved(predict(model, new / "camB", tmp_path / "results")) == ["img/001.png", "img/002.png"]


def test_anomalibs_visualizer_is_still_needed_to_be_replaced():
    """If this fails, anomalib tells images of equal names apart, and ResultVisualizer may no longer be needed."""
    with pytest.raises(ArgumentError, match="to the same file, 'img/1.png'"):
        check_file_names(ImageVisualizer(), ["/new/a/img/1.png", "/new/b/img/1.png"], None)


def item(**fields) -> ImageItem:
    return ImageItem(image=torch.zeros(3, 64, 64), anomaly_map=torch.zeros(64, 64), **fields)


def test_an_image_gets_a_line_of_its_own_and_is_anomalibs_below_it():
    scored = item(pred_score=torch.tensor(0.75), pred_label=torch.tensor(True))
    drawn, plain = ResultVisualizer().draw(scored), ImageVisualizer().visualize(scored)
    assert drawn.size == (plain.width, plain.height + CAPTION_HEIGHT)
    assert np.array_equal(np.asarray(drawn)[CAPTION_HEIGHT:], np.asarray(plain))
    caption = np.asarray(drawn)[:CAPTION_HEIGHT]
    assert caption.max() == 255
    others = [{"pred_score": torch.tensor(0.5)}, {"pred_label": torch.tensor(False)}, {"gt_label": torch.tensor(True)}]
    given = {"pred_score": torch.tensor(0.75), "pred_label": torch.tensor(True)}
    lines = [caption, *(np.asarray(ResultVisualizer().draw(item(**{**given, **o})))[:CAPTION_HEIGHT] for o in others)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(lines) for b in lines[:i])


@pytest.mark.parametrize(("text", "fields"), [({"enable": False}, {"pred_score": torch.tensor(0.7)}), ({}, {})])
def test_without_text_or_score_an_image_is_anomalibs(text, fields):
    drawn = ResultVisualizer(text_config=text).draw(item(**fields))
    assert np.array_equal(np.asarray(drawn), np.asarray(ImageVisualizer(text_config=text).visualize(item(**fields))))


def test_anomalibs_visualizer_still_draws_no_score():
    """If this fails, ``ResultVisualizer`` may no longer be needed."""
    scores = [ImageVisualizer().visualize(item(pred_score=torch.tensor(score))) for score in (0.2, 0.8)]
    assert np.array_equal(*map(np.asarray, scores))
