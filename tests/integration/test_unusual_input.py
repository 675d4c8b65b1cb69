"""Unusual images in production: black, of any size, gray, or not to be decoded."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from anomalib.data import Folder, PredictDataset
from PIL import Image

from anomalib_dskd import Dskd
from anomalib_dskd.errors import DataError, UnsafeImageError
from anomalib_dskd.models.distillation import images as images_module
from tests.conftest import engine, write_bomb

ASTRONAUT = Image.fromarray(skimage.data.astronaut())
IMAGES = {
    "usual.png": ASTRONAUT.crop((0, 0, 200, 200)),
    "small.png": ASTRONAUT.crop((100, 100, 109, 107)),
    "pixel.png": ASTRONAUT.crop((100, 100, 101, 101)),
    "wide.png": ASTRONAUT.crop((0, 0, 500, 20)),
    "gray.png": ASTRONAUT.convert("L"),
    "bits.png": ASTRONAUT.convert("1"),
    "alpha.png": ASTRONAUT.convert("RGBA"),
    "palette.png": ASTRONAUT.convert("P"),
    "cmyk.jpg": ASTRONAUT.convert("CMYK"),
    "black.png": Image.new("RGB", (120, 90)),
    "white.png": Image.new("L", (120, 90), 255),
    "covered.png": Image.fromarray(np.random.default_rng(0).poisson(0.3, (90, 120)).astype(np.uint8)),
}
FLAT = {"black.png", "white.png", "covered.png", "pixel.png"}


def too_large(pixels: int) -> str:
    return rf"is too large to decode\. Image size \({pixels} pixels\) exceeds limit"


@pytest.fixture
def model(tiny_model: Dskd) -> Dskd:
    """A model that is marked as trained."""
    tiny_model.model.is_trained = True
    tiny_model.visualizer = None
    return tiny_model


def predict(model: Dskd, path: Path, folder: Path) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = engine(folder).predict(model, dataset=PredictDataset(path))
    return {Path(path).name: item for batch in batches for path, item in zip(batch.image_path, batch, strict=True)}


def test_every_readable_image_has_a_finite_result_and_flat_ones_are_named(model, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images_module, "_warned", set())
    for name, image in IMAGES.items():
        image.save(tmp_path / name)
    with caplog.at_level(logging.WARNING, logger="anomalib_dskd"):
        items = predict(model, tmp_path, tmp_path / "results")
    assert set(items) == set(IMAGES)
    for name, item in items.items():
        assert item.anomaly_map.shape == (64, 64), name
        assert item.anomaly_map.isfinite().all(), name
        assert item.pred_score.isfinite().all(), name
    warned = [message for message in caplog.messages if "has hardly any contrast" in message]
    assert sorted(Path(message.split("'")[1]).name for message in warned) == sorted(FLAT)


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path: write_bomb(path, 10_000, 10_000), UnsafeImageError, too_large(100_000_000)),
        (lambda path: write_bomb(path, 50_000, 50_000), UnsafeImageError, too_large(2_500_000_000)),
        (lambda path: ASTRONAUT.save(path, "EPS"), UnsafeImageError, "is a PostScript program, which is not run"),
        (lambda path: Image.new("I;16", (64, 64)).save(path), DataError, "has more than 8 bits"),
    ],
    ids=["100 million pixels", "bomb", "program", "16 bits"],
)
@pytest.mark.parametrize("command", ["predict", "test", "fit"])
def test_unsafe_images_are_refused_before_any_is_decoded(command, write, error, message, model, tmp_path, monkeypatch):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        for index in range(4):
            ASTRONAUT.crop((10 * index, 0, 10 * index + 80, 80)).save(tmp_path / name / f"{index}.png")
    write(tmp_path / "good" / "last.png")
    decoded = []
    monkeypatch.setattr(Image.Image, "convert", lambda *arguments: decoded.append(arguments))
    match = rf"image '.*last.png' {message}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if command == "predict":
            with pytest.raises(error, match=match):
                engine(tmp_path).predict(model, dataset=PredictDataset(tmp_path / "good"))
        else:
            folders = {"normal_dir": "good", "normal_test_dir": "good", "abnormal_dir": "bad"}
            data = Folder("parts", root=tmp_path, **folders, num_workers=0, val_split_mode="same_as_test")
            with pytest.raises(error, match=match):
                getattr(engine(tmp_path, max_epochs=1), command)(model, datamodule=data)
    assert not decoded
