"""A small demonstration data set, made from photographs that scikit-image ships: no download needed.

Crops of a brick wall, a lawn and a gravel path are the good parts; half of the test crops are damaged. The
damage is painted, so it is easier to find than real defects: use it to try the commands, not to compare models.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

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

from anomalib_dskd.data.data_module_checks import check_seed, check_val_split_mode
from anomalib_dskd.errors import ArgumentError, DataError

__all__ = ["CATEGORIES", "DEFECTS", "TextureDefects"]

CATEGORIES = ("brick", "grass", "gravel")
CROP = 128  # pixels a side
STAIN = (0.35, 0.6)  # share of the light left; this and the next are our choice: visible, not glaring
SCRATCH = (25, 235)  # gray of a dark and of a bright scratch
ROUGHNESS = 0.15  # of a blob's outline
OUTLINE = 0.4  # level of the smoothed, noisy disk at which a blob ends
BORDER = 320  # train crops lie left of this column of the 512, test crops right of it
PARAMETERS_FILE = "parameters.json"
VERSION = 1  # to be raised when the painting changes, so that old crops are not taken for new ones

Gray = npt.NDArray[np.uint8]
Region = npt.NDArray[np.bool_]


class TextureDefects(MVTecAD):
    """Crops of a photographed texture; in the test half of them have stains, scratches or foreign texture.

    Train and test crops come from disjoint areas of the photograph. Images and masks are written as PNG in the
    layout of MVTec AD below ``root``, for a person to look at, and reused when they are there.

    Args:
        root: folder to write the data set to.
        category: ``brick``, ``grass`` or ``gravel``.
        train_images: good crops for training.
        test_images: crops for the test, half of them damaged.
        train_batch_size: images a training batch.
        eval_batch_size: images a batch in validation and test.
        num_workers: processes that read images beside the main one.
        train_augmentations: as in every anomalib data module.
        val_augmentations: as in every anomalib data module.
        test_augmentations: as in every anomalib data module.
        augmentations: as in every anomalib data module.
        val_split_mode: as in every anomalib data module. Default, as in ``MVTecAD``: the test set.
        val_split_ratio: as in every anomalib data module.
        seed: of the crops and the damage.

    Raises:
        ArgumentError: unknown category, too few images, or another argument has no legal value.
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
        if category not in CATEGORIES:
            msg = f"category {category!r} is unknown. Legal are {', '.join(CATEGORIES)}."
            raise ArgumentError(msg)
        if train_images < 1 or test_images < 2 * len(DEFECTS):
            msg = (
                f"train_images {train_images} and test_images {test_images}: at least 1 and {2 * len(DEFECTS)} are "
                "needed, so that every kind of defect is in the test."
            )
            raise ArgumentError(msg)
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
        """Write the images and masks, unless they are there.

        Raises:
            DataError: the folder holds something else, or cannot be written.
        """
        folder = self.root / self.category
        try:
            if folder.exists():
                self._check_written(folder)
                return
            self.root.mkdir(parents=True, exist_ok=True)
            # written aside and renamed, so that an interrupted run leaves no half data set behind
            with tempfile.TemporaryDirectory(dir=self.root, prefix=f".{self.category}-") as scratch:
                made = Path(scratch, self.category)
                _write_category(made, self.category, **self.counts)
                (made / PARAMETERS_FILE).write_text(json.dumps(self.parameters))
                made.rename(folder)
        except OSError as error:
            if os.path.isdir(folder):  # another process was faster
                self._check_written(folder)
                return
            msg = f"data root {str(self.root)!r} cannot be written: {error}. Give a writable folder as --data.root."
            raise DataError(msg) from error

    def _check_written(self, folder: Path) -> None:
        file = folder / PARAMETERS_FILE
        try:
            written = json.loads(file.read_text())
        except (OSError, ValueError):
            written = None
        if written != self.parameters:
            msg = (
                f"folder {str(folder)!r} holds {'other data' if written is None else f'crops made with {written}'}, "
                f"not with {self.parameters}. Remove the folder, or give another --data.root."
            )
            raise DataError(msg)


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
            damaged, region = _damage(crop, _crop(foreign, random), defect, random)
            _save(folder / "test" / defect / f"{index:03d}.png", damaged)
            _save(folder / "ground_truth" / defect / f"{index:03d}_mask.png", region.astype(np.uint8) * 255)
        else:
            _save(folder / "test" / "good" / f"{index:03d}.png", crop)


def _photograph(category: str) -> Gray:
    pixels: Gray = getattr(photographs, category)()  # (512, 512)
    return pixels


def _crop(area: Gray, random: np.random.Generator) -> Gray:
    top, left = (random.integers(0, extent - CROP + 1) for extent in area.shape)
    return area[top : top + CROP, left : left + CROP]


def _damage(crop: Gray, foreign: Gray, defect: str, random: np.random.Generator) -> tuple[Gray, Region]:
    """Return the damaged crop and the region whose pixels, and no others, differ from ``crop``."""
    paint, shape = DEFECTS[defect]
    region = shape(random)
    painted = paint(crop, foreign, random)
    painted = np.where(painted == crop, crop ^ 1, painted)  # by chance the same: one gray level apart
    return np.where(region, painted, crop).astype(np.uint8), region


def _blob(random: np.random.Generator) -> Region:
    """An uneven disk, about 7 to 13 % of the crop's side in radius, well inside the crop."""
    radius = random.uniform(0.07, 0.13) * CROP
    centre = random.uniform(2 * radius, CROP - 2 * radius, size=2)
    field = np.zeros((CROP, CROP))
    field[disk(centre, radius, shape=field.shape)] = 1  # type: ignore[no-untyped-call]
    noise = gaussian_filter(random.normal(size=field.shape), 3)
    blob: Region = gaussian_filter(field, 2) + ROUGHNESS * noise / noise.std() * (field > 0) > OUTLINE
    return blob


def _stroke(random: np.random.Generator) -> Region:
    """A straight scratch, 3 pixels wide, 30 to 70 % of the crop's side long."""
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
