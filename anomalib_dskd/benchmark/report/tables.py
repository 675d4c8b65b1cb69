"""Tables of a report: what is shown, how it is averaged, and which figure is the best."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ACCURACY",
    "AUPRO",
    "COSTS",
    "IMAGE_AUROC",
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
    "Record",
    "Summary",
    "Table",
    "compare",
    "paper_cell",
    "summarise",
    "value_at",
    "values_of",
]

Record = dict[str, Any]

NOT_MEASURED = "n/a"
NOT_IN_PAPER = "\N{EN DASH}"


@dataclass(frozen=True)
class Quantity:
    """A number of a record: where it stands, what it is called, and how it is shown.

    Args:
        path: keys that lead to it.
        label: heading of its column.
        scale: factor from the record's unit to the one shown.
        decimals: that are shown, and at which the best is chosen.
        more_is_better: or less.
        is_exact: counted, not measured: it has no spread.
    """

    path: tuple[str, str]
    label: str
    scale: float = 1.0
    decimals: int = 1
    more_is_better: bool = False
    is_exact: bool = False

    def of(self, record: Record) -> float | None:
        """Return the number in the record's unit, or None where it was not measured."""
        value = value_at(record, self.path)
        return float(value) if value is not None and math.isfinite(value) else None

    def text(self, value: float) -> str:
        """Return a number in the record's unit as it is shown."""
        return f"{value * self.scale:.{self.decimals}f}"


IMAGE_AUROC = Quantity(("figures", "image_AUROC"), "image AUROC", scale=100, more_is_better=True)
IMAGE_F1 = Quantity(("figures", "image_F1"), "image F1", scale=100, more_is_better=True)
PIXEL_AUROC = Quantity(("figures", "pixel_AUROC"), "pixel AUROC", scale=100, more_is_better=True)
AUPRO = Quantity(("figures", "AUPRO"), "AUPRO", scale=100, more_is_better=True)
PYTORCH = Quantity(("speed", "pytorch_ms"), "PyTorch, ms")
OPENVINO = Quantity(("speed", "openvino_ms"), "OpenVINO, ms")
MACS = Quantity(("cost", "macs"), "GMAC", scale=1e-9, decimals=2, is_exact=True)
PARAMETERS = Quantity(("cost", "parameters"), "parameters, M", scale=1e-6, decimals=2, is_exact=True)

IN_PAPER = (IMAGE_AUROC, PIXEL_AUROC, AUPRO)
ACCURACY = (IMAGE_AUROC, IMAGE_F1, PIXEL_AUROC, AUPRO)
COSTS = (
    PYTORCH,
    OPENVINO,
    Quantity(("speed", "openvino_int8_ms"), "OpenVINO INT8, ms"),
    Quantity(("speed", "throughput"), "throughput, images/s", more_is_better=True),
    MACS,
    PARAMETERS,
    Quantity(("cost", "trained_parameters"), "trained, M", scale=1e-6, decimals=2, is_exact=True),
    Quantity(("cost", "peak_memory_mib"), "peak memory, MiB", decimals=0),
    Quantity(("cost", "export_mib"), "export, MiB", is_exact=True),
    Quantity(("training", "fit_seconds"), "fit, s"),
    Quantity(("training", "images_per_second"), "training, images/s", more_is_better=True),
)


@dataclass(frozen=True)
class Cell:
    """Text, what stands after it in small print, and the number to sort by."""

    text: str
    value: float | None = None
    extra: str = ""
    is_best: bool = False
    is_paper: bool = False


@dataclass(frozen=True)
class Column:
    """A heading; a click on it sorts numbers from the largest or from the smallest."""

    label: str
    is_text: bool = False
    is_paper: bool = False
    largest_first: bool = True


@dataclass(frozen=True)
class Table:
    """Rows, the first cell of each being its name, and last rows that are not sorted with the others."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    last_rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_folded: bool = False

    def has_extra(self, column: int) -> bool:
        """Tell whether a column has any small print, for which all its cells then leave room."""
        return any(row[column].extra for row in [*self.rows, *self.last_rows])


@dataclass(frozen=True)
class Summary:
    """A quantity over seeds and categories, in the records' unit; ``mean`` is None where nothing was measured."""

    mean: float | None
    spread: float | None
    category_spread: float | None
    categories: frozenset[str | None]
    is_failed: bool


def summarise(records: Iterable[Record], quantity: Quantity) -> Summary:
    """Average over the seeds of each category, then over the categories.

    The spread is the standard deviation (n - 1), over the seeds that have all of these categories, of each seed's
    mean over the categories; None for a single seed. The spread over categories is that of each one's mean over seeds.

    Args:
        records: of one model on one data set, of any status.
        quantity: what to average.
    """
    records = list(records)
    seeds: dict[int, dict[str | None, float]] = defaultdict(dict)
    for record in records:
        value = quantity.of(record)
        if value is not None:
            seeds[record["seed"]][record.get("category")] = value
    categories = frozenset(category for values in seeds.values() for category in values)
    if not categories:
        is_failed = bool(records) and all(record["status"] == "failed" for record in records)
        return Summary(None, None, None, categories, is_failed)
    means = [statistics.fmean(v[category] for v in seeds.values() if category in v) for category in categories]
    whole = [statistics.fmean(values.values()) for values in seeds.values() if len(values) == len(categories)]
    return Summary(statistics.fmean(means), _spread(whole), _spread(means), categories, is_failed=False)


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def compare(groups: Sequence[Iterable[Record]], quantity: Quantity, categories: int | None = None) -> list[Cell]:
    """Return one cell a group, the best in bold if there are two to choose from.

    Args:
        groups: the records of each model.
        quantity: what to compare.
        categories: number that a mean must be over to be compared; a mean over fewer says so.
    """
    summaries = [summarise(group, quantity) for group in groups]
    whole = [s.mean for s in summaries if s.mean is not None and categories in {None, len(s.categories)}]
    best = quantity.text((max if quantity.more_is_better else min)(whole)) if len(whole) > 1 else None
    cells = []
    for summary in summaries:
        if summary.mean is None:
            cells.append(Cell("failed" if summary.is_failed else NOT_MEASURED))
            continue
        is_whole = categories in {None, len(summary.categories)}
        extra = [f"± {quantity.text(summary.spread)}"] if summary.spread is not None and not quantity.is_exact else []
        extra += [] if is_whole else [f"({len(summary.categories)} of {categories})"]
        text = quantity.text(summary.mean)
        cells.append(Cell(text, summary.mean * quantity.scale, " ".join(extra), is_whole and text == best))
    return cells


def paper_cell(percent: float | None, decimals: int = 1) -> Cell:
    """Return a figure of the paper, or a dash where it has none."""
    text = NOT_IN_PAPER if percent is None else f"{percent:.{decimals}f}"
    return Cell(text, percent, is_paper=True)


def value_at(record: Record, path: Iterable[str]) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return what stands at a path of keys, or None where one of them is missing."""
    value: Any = record
    for name in path:
        value = (value or {}).get(name)
    return value


def values_of(records: Iterable[Record], name: str) -> str:
    """List the different values of a setting."""
    separator = "; " if name == "init_args" else ", "
    return separator.join(dict.fromkeys(_plain(record.get(name), name) for record in records))


def _plain(value: Any, name: str) -> str:  # noqa: ANN401 - whatever JSON holds
    if name == "image_size" and isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={json.dumps(item)}" for key, item in value.items()) or "defaults"
    if name == "epochs" and value is None:
        return "one pass"
    return NOT_MEASURED if value is None else str(value)
