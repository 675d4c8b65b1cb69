"""Folders of images that tests of files and links share."""

from pathlib import Path

import numpy as np
from anomalib.data import Folder
from PIL import Image


def write(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng([index, len(str(folder))]).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def parts(root: Path, **arguments: object) -> Folder:
    folders = {"normal_dir": "good", "abnormal_dir": "bad", "normal_test_dir": "good_test"}
    return Folder("parts", root=root, **{**folders, "num_workers": 0, "val_split_mode": "same_as_test", **arguments})
