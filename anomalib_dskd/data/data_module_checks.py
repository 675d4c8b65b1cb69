"""Checks of data modules' arguments."""

from pathlib import PureWindowsPath

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode

from anomalib_dskd.errors import ArgumentError

__all__ = ["check_names", "check_seed", "check_val_split_mode"]


def check_names(data: AnomalibDataModule) -> None:
    """Raise unless results stay in their folder: anomalib names folders after the data set and its category.

    Raises:
        ArgumentError: a name that leads elsewhere.
    """
    for what in ("name", "category"):
        value = str(getattr(data, what, None) or "")
        path = PureWindowsPath(value)  # which knows both kinds of separators
        if path.anchor or ".." in path.parts:
            msg = f"{what} {value!r} of the data would put results outside of their folder. Give a name, not a path."
            raise ArgumentError(msg)


def check_seed(seed: int) -> None:
    """Raise unless ``seed`` can seed a split.

    Raises:
        ArgumentError: negative, or no whole number.
    """
    if not isinstance(seed, int) or seed < 0:
        msg = f"seed {seed!r} must be a whole number, 0 or larger."
        raise ArgumentError(msg)


def check_val_split_mode(mode: ValSplitMode | str) -> None:
    """Refuse to be without validation data: anomalib's trainer asks for them, and thresholds come from them.

    Raises:
        ArgumentError: unknown mode, or ``none``.
    """
    legal = [known.value for known in ValSplitMode if known not in {ValSplitMode.NONE, ValSplitMode.FROM_DIR}]
    if mode not in legal:
        given = mode.value if isinstance(mode, ValSplitMode) else mode
        is_none = given == ValSplitMode.NONE.value
        what = "gives no validation images, which thresholds need" if is_none else "is unknown or has no folder here"
        msg = f"val_split_mode {given!r} {what}. Legal are {legal}."
        raise ArgumentError(msg)
