"""A small demonstration data set, made from photographs that scikit-image includes: no download needed.

The normal images are crops of a brick wall, a lawn and a gravel path. Half of the test crops have synthetic defects,
which are easier to detect than real ones: use the data set to try the commands, not to compare models.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from anomalib.data import MVTecAD
from anomalib.data.utils import ValSplitMode
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data as photographs
from skimage.draw import disk, line
from skimage.morphology import dilation
from torchvision.transforms.v2 import Transform

from anomalib_dskd.argument_checks import check_choice
from anomalib_dskd.data.data_module_checks import check_seed, check_val_split_mode
from anomalib_dskd.errors import ArgumentError, DataError

__all__ = ["CATEGORIES", "DEFECTS", "TextureDefects"]

Category = Literal["brick", "grass", "gravel"]
CATEGORIES: tuple[str, ...] = get_args(Category)
CROP = 128  # height and width in pixels
STAIN = (0.35, 0.6)  # factor of the brightness. Our choice, as the next one: visible but not obvious
SCRATCH = (25, 235)  # gray levels of dark and bright scratches
ROUGHNESS = 0.15  # of a blob's contour
CONTOUR_LEVEL = 0.4  # of the smoothed, noisy disk
BORDER = 320  # of 512 columns; training crops are to the left, test crops to the right
PARAMETERS_FILE = "parameters.json"
VERSION = 1  # increase it when the defects change, so that existing crops are not reused

Gray = npt.NDArray[np.uint8]
Region = npt.NDArray[np.bool_]


class TextureDefects(MVTecAD):
    """Crops of a photographed texture; half of the test crops have stains, scratches or foreign texture.

    Training and test crops come from disjoint areas of the photograph. Images and masks are written as PNG files in the
    layout of MVTec AD below ``root``, and reused if they exist.

    Args:
        root: folder to write the data set to.
        category: ``brick``, ``grass`` or ``gravel``.
        train_images: number of normal training crops.
        test_images: number of test crops, half of them defective.
        train_batch_size: images per training batch.
        eval_batch_size: images per batch in validation and test.
        num_workers: number of worker processes that read images.
        train_augmentations: as in anomalib's data modules.
        val_augmentations: as in anomalib's data modules.
        test_augmentations: as in anomalib's data modules.
        augmentations: as in anomalib's data modules.
        val_split_mode: as in anomalib's data modules. Default, as in ``MVTecAD``: the test set.
        val_split_ratio: as in anomalib's data modules.
        seed: seed of the crops and the defects.

    Raises:
        ArgumentError: unknown category, too few images, or another argument is not supported.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/TextureDefects",
        category: str = "brick",
        train_images: int = 100,
        test_images: int = 60,
        train_batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int = 0,
    ) -> None:
        check_choice(Category, category=category)
        _check_counts(train_images, test_images)
        check_seed(seed)
        check_val_split_mode(val_split_mode)
        super().__init__(
            root=root,
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.counts = {"train_images": train_images, "test_images": test_images, "seed": seed}
        self.parameters = {"version": VERSION, **self.counts}

    def prepare_data(self) -> None:
        """Write the images and masks, unless they exist.

        Raises:
            DataError: the folder contains something else, or cannot be written.
        """
        folder = self.root / self.category
        try:
            if not folder.exists():
                self._write(folder)
        except OSError as error:
            if not os.path.isdir(folder):  # otherwise another process was faster
                msg = f"data root {str(self.root)!r} cannot be written: {error}. Give a writable folder as --data.root."
                raise DataError(msg) from error
        self._check_written(folder)

    def _write(self, folder: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        # renamed when it is complete, so that an interrupted run leaves no incomplete data set
        with tempfile.TemporaryDirectory(dir=self.root, prefix=f".{self.category}-") as scratch:
            written = Path(scratch, self.category)
            _write_category(written, self.category, **self.counts)
            (written / PARAMETERS_FILE).write_text(json.dumps(self.parameters))
            written.rename(folder)

    def _check_written(self, folder: Path) -> None:
        try:
            written = json.loads((folder / PARAMETERS_FILE).read_text())
        except (OSError, ValueError):
            written = None
        if written != self.parameters:
            msg = (
                f"folder {str(folder)!r} contains {'other data' if written is None else f'crops made with {written}'}, "
                f"not crops made with {self.parameters}. Remove the folder, or give another --data.root."
            )
            raise DataError(msg)


def _check_counts(train_images: int, test_images: int) -> None:
    least = 2 * len(DEFECTS)  # half of the test images are defective
    if train_images < 1 or test_images < least:
        msg = (
            f"train_images {train_images} and test_images {test_images}: at least 1 and {least} are needed, so that "
            "the test set has every kind of defect."
        )
        raise ArgumentError(msg)


def _write_category(folder: Path, category: str, *, train_images: int, test_images: int, seed: int) -> None:
    photograph = _photograph(category)
    foreign = _photograph(CATEGORIES[(CATEGORIES.index(category) + 1) % len(CATEGORIES)])
    random = np.random.default_rng([seed, CATEGORIES.index(category)])
    for index in range(train_images):
        _save(folder / "train" / "good" / f"{index:03d}.png", _crop(photograph[:, :BORDER], random))
    for index in range(test_images):
        crop = _crop(photograph[:, BORDER:], random)
        if index < test_images // 2:
            defect = list(DEFECTS)[index % len(DEFECTS)]
            defective, region = _add_defect(crop, _crop(foreign, random), defect, random)
            _save(folder / "test" / defect / f"{index:03d}.png", defective)
            _save(folder / "ground_truth" / defect / f"{index:03d}_mask.png", region.astype(np.uint8) * 255)
        else:
            _save(folder / "test" / "good" / f"{index:03d}.png", crop)


def _photograph(category: str) -> Gray:
    pixels: Gray = getattr(photographs, category)()  # (512, 512)
    return pixels


def _crop(area: Gray, random: np.random.Generator) -> Gray:
    top, left = (random.integers(0, extent - CROP + 1) for extent in area.shape)
    return area[top : top + CROP, left : left + CROP]


def _add_defect(crop: Gray, foreign: Gray, defect: str, random: np.random.Generator) -> tuple[Gray, Region]:
    """Return the defective crop, and the region of exactly the pixels that differ from ``crop``."""
    paint, shape = DEFECTS[defect]
    region = shape(random)
    painted = paint(crop, foreign, random)
    painted = np.where(painted == crop, crop ^ 1, painted)  # equal by chance: change by one gray level
    return np.where(region, painted, crop).astype(np.uint8), region


def _blob(random: np.random.Generator) -> Region:
    """An irregular disk inside the crop, with a radius of about 7 to 13 % of the crop's height."""
    radius = random.uniform(0.07, 0.13) * CROP
    center = random.uniform(2 * radius, CROP - 2 * radius, size=2)
    field = np.zeros((CROP, CROP))
    field[disk(center, radius, shape=field.shape)] = 1  # type: ignore[no-untyped-call]
    noise = gaussian_filter(random.normal(size=field.shape), 3)
    blob: Region = gaussian_filter(field, 2) + ROUGHNESS * noise / noise.std() * (field > 0) > CONTOUR_LEVEL
    return blob


def _stroke(random: np.random.Generator) -> Region:
    """A straight line, 3 pixels wide, with a length of 30 to 70 % of the crop's height."""
    length, angle = random.uniform(0.3, 0.7) * CROP, random.uniform(0, np.pi)
    middle = random.uniform(0.35, 0.65, size=2) * CROP
    half = np.array([np.sin(angle), np.cos(angle)]) * length / 2
    start, end = (np.clip(np.round(middle + sign * half), 2, CROP - 3).astype(int) for sign in (-1, 1))
    region = np.zeros((CROP, CROP), dtype=bool)
    region[line(*start, *end)] = True  # type: ignore[no-untyped-call]
    scratch: Region = dilation(region, np.ones((3, 3), dtype=bool))
    return scratch


def _stain(crop: Gray, _foreign: Gray, random: np.random.Generator) -> Gray:
    return (crop * random.uniform(*STAIN)).astype(np.uint8)


def _scratch(crop: Gray, _foreign: Gray, random: np.random.Generator) -> Gray:
    return np.full_like(crop, random.choice(SCRATCH))


def _foreign_texture(_crop: Gray, foreign: Gray, _random: np.random.Generator) -> Gray:
    return foreign


Paint = Callable[[Gray, Gray, np.random.Generator], Gray]
Shape = Callable[[np.random.Generator], Region]
DEFECTS: dict[str, tuple[Paint, Shape]] = {
    "stain": (_stain, _blob),
    "scratch": (_scratch, _stroke),
    "foreign": (_foreign_texture, _blob),
}


def _save(path: Path, pixels: Gray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)
