"""Data module of the Magnetic Tile Defects data set, in the layout that its authors publish.

Huang, Qiu, Yuan: "Surface defect saliency of magnetic tile", The Visual Computer 36 (2020). The layout is
``MT_<class>/Imgs/*.jpg`` with a ``*.png`` mask of the same name next to each; there is no published split.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.dataclasses import ImageItem
from anomalib.data.datasets.base import AnomalibDataset
from anomalib.data.utils import Split, ValSplitMode
from pandas import DataFrame
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Mask

from anomalib_dskd.data.data_module_checks import check_seed, check_val_split_mode
from anomalib_dskd.data.image_files import READABLE_ERRORS, open_image, read_named_image
from anomalib_dskd.errors import ArgumentError, DataError

__all__ = ["DEFECTS", "MagneticTile", "MagneticTileDataset"]

NORMAL = "Free"
DEFECTS = ("Blowhole", "Break", "Crack", "Fray", "Uneven")
MASK_THRESHOLD = 127  # masks have JPEG-like values from 0 to 255


class MagneticTileDataset(AnomalibDataset):
    """One split of the Magnetic Tile Defects data.

    The column ``label`` of ``samples`` is the defect class, for results per class.

    Args:
        root: folder that contains ``MT_Free`` and the defect folders.
        split: ``train`` (only normal tiles), ``test`` (the other normal tiles and all defects), or ``None`` for both.
        test_ratio: fraction of the normal tiles in the test set.
        seed: seed of the split of the normal tiles.
        augmentations: applied to image and mask together.

    Raises:
        DataError: the folder is missing, or does not have the published layout.
    """

    mask_threshold = MASK_THRESHOLD

    def __init__(
        self,
        root: Path | str,
        split: Split | str | None = None,
        *,
        test_ratio: float = 0.2,
        seed: int = 0,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        samples = make_samples(Path(root), test_ratio=test_ratio, seed=seed)
        if split is not None:
            samples = samples[samples.split == Split(split).value].reset_index(drop=True)
        self.samples = samples
        self.samples.attrs["task"] = "segmentation"

    def __getitem__(self, index: int) -> ImageItem:
        """Read an image and its mask, thresholded at 127."""
        sample = self.samples.iloc[index]
        image = read_named_image(sample.image_path)
        mask = _read_mask(sample.mask_path) if sample.label_index else torch.zeros(image.shape[-2:])
        if mask.shape != image.shape[-2:]:
            msg = (
                f"mask {sample.mask_path!r} has {tuple(mask.shape)} pixels, its image {tuple(image.shape[-2:])}. "
                "Restore the published file: a mask has the size of its image."
            )
            raise DataError(msg)
        gt_mask = Mask(mask.to(torch.uint8))
        if self.augmentations:
            image, gt_mask = self.augmentations(image, gt_mask)
        return ImageItem(
            image=image,
            gt_mask=gt_mask,
            gt_label=torch.tensor(sample.label_index),
            image_path=sample.image_path,
            mask_path=sample.mask_path,
        )


class MagneticTile(AnomalibDataModule):
    """Magnetic Tile Defects: a seeded split of the normal tiles, and all five defect classes in the test set.

    Four tiles of ``Uneven`` are published with an empty mask. They are in the test set as defective images whose pixels
    are all normal.

    Args:
        root: folder that contains ``MT_Free`` and the defect folders.
        train_batch_size: images per training batch. Default, our choice: 16; the paper gives none.
        eval_batch_size: images per batch in validation and test.
        num_workers: number of worker processes that read images.
        train_augmentations: as in anomalib's data modules.
        val_augmentations: as in anomalib's data modules.
        test_augmentations: as in anomalib's data modules.
        augmentations: as in anomalib's data modules.
        test_ratio: fraction of the normal tiles in the test set. The authors publish no split.
        val_split_mode: as in anomalib's data modules. Default, as in ``MVTecAD``: the test set.
        val_split_ratio: as in anomalib's data modules.
        seed: seed of the split.

    Raises:
        ArgumentError: ``test_ratio`` is not between 0 and 1, or another argument is not supported.
    """

    def __init__(
        self,
        root: Path | str = "./datasets/MagneticTile",
        train_batch_size: int = 16,
        eval_batch_size: int = 32,
        num_workers: int = 0,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_ratio: float = 0.2,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int = 0,
    ) -> None:
        if not 0 < test_ratio < 1:
            msg = f"test_ratio {test_ratio!r} must be between 0 and 1: the fraction of normal tiles in the test set."
            raise ArgumentError(msg)
        check_seed(seed)
        check_val_split_mode(val_split_mode)
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode="from_dir",
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self._create_dataset = partial(MagneticTileDataset, Path(root), test_ratio=test_ratio, seed=seed)

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data = self._create_dataset(Split.TRAIN)
        self.test_data = self._create_dataset(Split.TEST)


def make_samples(root: Path, *, test_ratio: float, seed: int) -> DataFrame:
    """List all images with mask, class, label and split.

    Returns:
        Columns ``image_path``, ``mask_path``, ``label`` (``Free`` or the defect), ``label_index`` (0 or 1) and
        ``split``.
    """
    _check_layout(root)
    rows = []
    for label in (NORMAL, *DEFECTS):
        images = sorted((root / f"MT_{label}" / "Imgs").glob("*.jpg"))
        if not images:
            msg = f"no *.jpg images in {str(root / f'MT_{label}' / 'Imgs')!r}. {_EXPECTED}"
            raise DataError(msg)
        for image in images:
            mask = image.with_suffix(".png")
            if label != NORMAL and not mask.is_file():
                msg = f"image {str(image)!r} has no mask {mask.name!r} next to it. {_EXPECTED}"
                raise DataError(msg)
            rows.append((str(image), str(mask), label, int(label != NORMAL), Split.TEST.value))
    samples = DataFrame(rows, columns=["image_path", "mask_path", "label", "label_index", "split"])
    normal = np.flatnonzero(samples.label == NORMAL)
    test_count = round(len(normal) * test_ratio)
    if not 0 < test_count < len(normal):
        msg = f"test_ratio {test_ratio} puts all {len(normal)} normal tiles into one split. Choose another ratio."
        raise ArgumentError(msg)
    train = np.random.default_rng(seed).permutation(normal)[test_count:]
    samples.loc[train, "split"] = Split.TRAIN.value
    return samples


_EXPECTED = (
    f"Expected folders: {', '.join(f'MT_{label}/Imgs' for label in (NORMAL, *DEFECTS))} with *.jpg images and "
    "*.png masks, as in https://github.com/abin24/Magnetic-tile-defect-datasets."
)


def _check_layout(root: Path) -> None:
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        msg = f"data root {str(root)!r} {state}. Give the folder of the data with --data.root. {_EXPECTED}"
        raise DataError(msg)
    missing = [f"MT_{label}/Imgs" for label in (NORMAL, *DEFECTS) if not (root / f"MT_{label}" / "Imgs").is_dir()]
    if missing:
        found = ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        msg = f"data root {str(root)!r} does not contain {', '.join(missing)}. Found: {found}. {_EXPECTED}"
        raise DataError(msg)


def _read_mask(path: str) -> torch.Tensor:
    try:
        with open_image(path) as image:
            pixels = np.asarray(image.convert("L"))
    except READABLE_ERRORS as error:
        msg = f"mask {path!r} cannot be read: {error}. Restore the published file."
        raise DataError(msg) from error
    return torch.from_numpy(pixels > MASK_THRESHOLD)
