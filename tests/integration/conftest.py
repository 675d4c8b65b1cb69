"""A model that is trained on good images alone and exported, once for all tests."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from anomalib.data import Folder
from PIL import Image

from anomalib_dskd import Dskd
from anomalib_dskd.post_processing import NormalQuantilePostProcessor
from tests.conftest import RESNET, engine

MODEL_SIZE = (75, 100)  # no multiple of the strides
ARGUMENTS = {"teacher": RESNET, "image_size": MODEL_SIZE, "sigma": 2.0, "visualizer": False, "seed": 0}
NORMAL_QUANTILE, IMAGE_SENSITIVITY = 0.8, 0.45


@dataclass(frozen=True)
class Trained:
    """A model, what it was trained with, and its checkpoint."""

    model: Dskd
    data: Folder
    checkpoint: Path


@dataclass(frozen=True)
class Exported:
    """A model, and its two exports."""

    model: Dskd
    onnx: Path
    xml: Path


@pytest.fixture(scope="session")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of good parts, and of new ones, every other of which has a defect."""
    folder, random = tmp_path_factory.mktemp("factory"), np.random.default_rng(0)
    for name, count in {"good": 60, "new": 8}.items():
        (folder / name).mkdir()
        for index in range(count):
            top, left = random.integers(0, 512 - 96, size=2)
            pixels = skimage.data.brick()[top : top + 96, left : left + 96].copy()
            if name == "new" and index % 2:
                pixels[30:60, 30:60] = 255 - pixels[30:60, 30:60]
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def trained(factory: Path, resnet_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    data = Folder("parts", root=factory, normal_dir="good", num_workers=0, train_batch_size=8, seed=0)
    post_processor = NormalQuantilePostProcessor(normal_quantile=NORMAL_QUANTILE, image_sensitivity=IMAGE_SENSITIVITY)
    model = Dskd(**ARGUMENTS, teacher_weights=resnet_weights, post_processor=post_processor)
    folder = tmp_path_factory.mktemp("trained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine(folder, max_epochs=4).fit(model, datamodule=data)
    return Trained(model.eval(), data, next(folder.rglob("model.ckpt")))


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exports")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter and its dependencies
        return Exported(trained.model, trained.model.to_onnx(folder), trained.model.to_openvino(folder))
