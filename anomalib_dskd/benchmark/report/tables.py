"""Tables of a report: quantities, their means over seeds and categories, and cells with the best in bold."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import pandas as pd

from anomalib_dskd.benchmark.job_result import JobResult

__all__ = [
    "ACCURACY",
    "AUPRO",
    "COSTS",
    "IMAGE_AUROC",
    "IMAGE_F1_AT_THRESHOLD",
    "IN_PAPER",
    "MACS",
    "NOT_MEASURED",
    "OPENVINO",
    "PARAMETERS",
    "PIXEL_AUROC",
    "PYTORCH",
    "Cell",
    "Column",
    "Quantity",
    "Summary",
    "Table",
    "compare",
    "list_values",
    "paper_cell",
    "summarize",
]

NOT_MEASURED = "n/a"
NOT_IN_PAPER = "\N{EN DASH}"


@dataclass(frozen=True)
class Quantity:
    """A number in a job's result, and how it is shown.

    Args:
        field: where it is, such as ``speed.pytorch_ms``.
        label: heading of its column.
        scale: factor from the result's unit to the unit that is shown.
        decimals: number of decimals that are shown, and to which the best is determined.
        more_is_better: whether the largest or the smallest is the best.
        is_exact: it is counted, not measured, and shown without standard deviation.
    """

    field: str
    label: str
    scale: float = 1.0
    decimals: int = 1
    more_is_better: bool = False
    is_exact: bool = False

    @property
    def name(self) -> str:
        """The last part of the field, such as ``pytorch_ms``."""
        return self.field.rpartition(".")[2]

    def of(self, result: JobResult) -> float | None:
        """Return the number in the result's unit, or None if it was not measured or is not finite."""
        value = attrgetter(self.field)(result)
        return float(value) if value is not None and math.isfinite(value) else None

    def text(self, value: float) -> str:
        """Return the text that shows a number in the result's unit."""
        return f"{value * self.scale:.{self.decimals}f}"


IMAGE_AUROC = Quantity("metrics.image_AUROC", "image AUROC", scale=100, more_is_better=True)
IMAGE_F1 = Quantity("metrics.image_F1", "image F1", scale=100, more_is_better=True)
IMAGE_F1_AT_THRESHOLD = Quantity(
    "metrics.image_F1_at_threshold", "image F1 at threshold", scale=100, more_is_better=True
)
PIXEL_AUROC = Quantity("metrics.pixel_AUROC", "pixel AUROC", scale=100, more_is_better=True)
AUPRO = Quantity("metrics.AUPRO", "AUPRO", scale=100, more_is_better=True)
PYTORCH = Quantity("speed.pytorch_ms", "PyTorch, ms")
OPENVINO = Quantity("speed.openvino_ms", "OpenVINO, ms")
MACS = Quantity("cost.macs", "GMAC", scale=1e-9, decimals=2, is_exact=True)
PARAMETERS = Quantity("cost.parameters", "parameters, M", scale=1e-6, decimals=2, is_exact=True)

IN_PAPER = (IMAGE_AUROC, PIXEL_AUROC, AUPRO)
ACCURACY = (IMAGE_AUROC, IMAGE_F1, IMAGE_F1_AT_THRESHOLD, PIXEL_AUROC, AUPRO)
COSTS = (
    PYTORCH,
    OPENVINO,
    Quantity("speed.openvino_int8_ms", "OpenVINO INT8, ms"),
    Quantity("cost.int8_F1_at_threshold", "INT8 image F1 at threshold, %", scale=100, more_is_better=True),
    Quantity("speed.throughput", "throughput, images/s", more_is_better=True),
    MACS,
    PARAMETERS,
    Quantity("cost.trained_parameters", "trained, M", scale=1e-6, decimals=2, is_exact=True),
    Quantity("cost.peak_memory_mib", "peak memory, MiB", decimals=0),
    Quantity("cost.export_mib", "export, MiB", is_exact=True),
    Quantity("training.fit_seconds", "fit, s"),
    Quantity("training.images_per_second", "training, images/s", more_is_better=True),
)


@dataclass(frozen=True)
class Cell:
    """A text, an addition in small print, and the number to sort by."""

    text: str
    value: float | None = None
    extra: str = ""
    is_best: bool = False
    is_paper: bool = False


@dataclass(frozen=True)
class Column:
    """A heading; ``largest_first`` is the order after the first click on it."""

    label: str
    is_text: bool = False
    is_paper: bool = False
    largest_first: bool = True


@dataclass(frozen=True)
class Table:
    """Rows, whose first cells are their names, and last rows that sorting does not move."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    last_rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_folded: bool = False

    def has_extra(self, column: int) -> bool:
        """Return whether a cell of a column has small print, for which the whole column then reserves space."""
        return any(row[column].extra for row in [*self.rows, *self.last_rows])


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviations of a quantity over seeds and categories; None where there is nothing to average."""

    mean: float | None
    std: float | None
    category_std: float | None
    categories: frozenset[str]
    is_failed: bool  # all jobs failed


def summarize(results: Iterable[JobResult], quantity: Quantity) -> Summary:
    """Average over the seeds of each category, then over the categories.

    The standard deviation (n - 1) is that of the seeds' means over the categories, over the seeds that have all
    categories; that over the categories is of their means over the seeds.

    Args:
        results: of one model on one data set, done or failed.
        quantity: what to average.

    Returns:
        Numbers in the result's unit; a category of None is ``""``.
    """
    results = list(results)
    rows = [(result.seed, result.category or "", quantity.of(result)) for result in results]
    values = pd.DataFrame(rows, columns=["seed", "category", "value"]).dropna()
    by_category = values.astype({"value": float}).pivot_table("value", index="seed", columns="category")
    means, of_seeds = by_category.mean(), by_category.dropna().mean(axis=1)
    mean, std, category_std = (
        None if math.isnan(number) else float(number) for number in (means.mean(), of_seeds.std(), means.std())
    )
    is_failed = bool(results) and all(result.status == "failed" for result in results)
    return Summary(mean, std, category_std, frozenset(means.index), is_failed)


def compare(groups: Sequence[Iterable[JobResult]], quantity: Quantity, categories: int | None = None) -> list[Cell]:
    """Return one cell per group, with the best in bold if there are at least two.

    Args:
        groups: results of each model.
        quantity: what to compare.
        categories: number of categories of the data set; a mean over fewer says so, and is not compared.
    """
    summaries = [summarize(group, quantity) for group in groups]
    complete = [s.mean for s in summaries if s.mean is not None and categories in {None, len(s.categories)}]
    best = quantity.text((max if quantity.more_is_better else min)(complete)) if len(complete) > 1 else None
    cells = []
    for summary in summaries:
        if summary.mean is None:
            cells.append(Cell("failed" if summary.is_failed else NOT_MEASURED))
            continue
        is_complete = categories in {None, len(summary.categories)}
        extra = [f"± {quantity.text(summary.std)}"] if summary.std is not None and not quantity.is_exact else []
        extra += [] if is_complete else [f"({len(summary.categories)} of {categories})"]
        text = quantity.text(summary.mean)
        cells.append(Cell(text, summary.mean * quantity.scale, " ".join(extra), is_complete and text == best))
    return cells


def paper_cell(percent: float | None, decimals: int = 1) -> Cell:
    """Return a result of the paper, or a dash if it has none."""
    text = NOT_IN_PAPER if percent is None else f"{percent:.{decimals}f}"
    return Cell(text, percent, is_paper=True)


def list_values(results: Iterable[JobResult], name: str) -> str:
    """List the different values of a setting, such as ``epochs``."""
    separator = "; " if name == "init_args" else ", "
    return separator.join(dict.fromkeys(_text(getattr(result, name), name) for result in results))


def _text(value: object, name: str) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={json.dumps(item)}" for key, item in value.items()) or "defaults"
    if name == "epochs" and value is None:
        return "one pass"
    return NOT_MEASURED if value is None else str(value)
