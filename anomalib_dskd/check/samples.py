"""The images of a data module's splits, with their labels, masks and depth images."""

from pathlib import Path
from typing import Any, NamedTuple

from anomalib.data import AnomalibDataModule
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset

__all__ = ["Sample", "list_datasets", "list_samples"]


class Sample(NamedTuple):
    """An image of one split."""

    split: str
    image: str
    is_anomalous: bool
    masks: tuple[str, ...]  # several are combined
    threshold: int | None  # above which a mask's pixel is defective, if the data set defines one
    depths: tuple[str, ...]


def list_datasets(data: AnomalibDataModule) -> dict[str, Any]:
    """Return the data sets of a data module by split, without the splits that it does not have."""
    datasets = {split: getattr(data, f"{split}_data", None) for split in ("train", "val", "test")}
    return {split: dataset for split, dataset in datasets.items() if dataset is not None}


def list_samples(data: AnomalibDataModule) -> list[Sample]:
    """Return the images of all splits; for synthetic defects, the source images instead of the temporary files."""
    samples = []
    for split, dataset in list_datasets(data).items():
        table = dataset.source_samples if isinstance(dataset, SyntheticAnomalyDataset) else dataset.samples
        threshold = getattr(dataset, "mask_threshold", None)
        for row in table.itertuples():
            masks, depths = (_paths(getattr(row, name, None)) for name in ("mask_path", "depth_path"))
            samples.append(Sample(split, str(row.image_path), bool(row.label_index == 1), masks, threshold, depths))
    return samples


def _paths(value: object) -> tuple[str, ...]:
    """Return the paths in a cell of a data set's table, which has one, several (MVTec LOCO) or none."""
    paths = value if isinstance(value, (list, tuple)) else [value]
    return tuple(str(path) for path in paths if isinstance(path, str | Path) and str(path))
