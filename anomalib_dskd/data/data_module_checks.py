"""What data modules were given and have listed, and checks of their arguments."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from pandas import DataFrame

from anomalib_dskd.errors import ArgumentError

__all__ = ["as_list", "check_names", "check_seed", "check_val_split_mode", "check_validation_images", "sample_tables"]


def as_list(names: str | Path | Sequence[str | Path] | None) -> Sequence[str | Path]:
    """Return the folders that an argument of ``Folder`` gives: one, several or none."""
    return [names] if isinstance(names, str | Path) else names or []


def sample_tables(data: AnomalibDataModule, splits: Iterable[str] = ("train", "val", "test")) -> list[DataFrame]:
    """Return the tables of the images of splits; for synthetic defects that of the source images.

    Args:
        data: data module that has been set up.
        splits: of ``train``, ``val`` and ``test``.
    """
    datasets = [getattr(data, f"{split}_data", None) for split in splits]
    tables = [getattr(dataset, "source_samples", getattr(dataset, "samples", None)) for dataset in datasets]
    return [table for table in tables if table is not None]


def check_names(data: AnomalibDataModule) -> None:
    """Check that results stay in their folder: anomalib names subfolders after the data set and its category.

    Raises:
        ArgumentError: the name or the category is an absolute path or contains ``..``.
    """
    for what in ("name", "category"):
        value = str(getattr(data, what, None) or "")
        path = PureWindowsPath(value)  # accepts both kinds of separators
        if path.anchor or ".." in path.parts:
            msg = f"{what} {value!r} of the data would put results outside of their folder. Give a name, not a path."
            raise ArgumentError(msg)


def check_validation_images(data: AnomalibDataModule) -> None:
    """Check that a data module has validation images: anomalib's end in an ``AttributeError`` without.

    Args:
        data: has been set up.

    Raises:
        ArgumentError: it has none; the message names ``val_split_mode``.
    """
    if len(getattr(data, "val_data", ())):
        return
    check_val_split_mode(data.val_split_mode)
    msg = (
        f"the validation split of the data is empty, and thresholds need validation images. Give more images, or a "
        f"larger val_split_ratio than {data.val_split_ratio}."
    )
    raise ArgumentError(msg)


def check_seed(seed: int) -> None:
    """Check that ``seed`` can seed a split.

    Raises:
        ArgumentError: it is negative or not an integer.
    """
    if not isinstance(seed, int) or seed < 0:
        msg = f"seed {seed!r} must be an integer, 0 or larger."
        raise ArgumentError(msg)


def check_val_split_mode(mode: ValSplitMode | str) -> None:
    """Check that there will be validation images: anomalib's trainer and thresholds need them.

    Raises:
        ArgumentError: the mode is unknown, ``none`` or ``from_dir``.
    """
    supported = [known.value for known in ValSplitMode if known not in {ValSplitMode.NONE, ValSplitMode.FROM_DIR}]
    if mode not in supported:
        given = mode.value if isinstance(mode, ValSplitMode) else mode
        reason = {
            ValSplitMode.NONE.value: "gives no validation images, which thresholds need",
            ValSplitMode.FROM_DIR.value: "needs a validation folder, which this data set does not have",
        }.get(given, "is unknown")
        msg = f"val_split_mode {given!r} {reason}. Supported values: {', '.join(map(repr, supported))}."
        raise ArgumentError(msg)
