"""Table of latency, memory and parameters on one data set, and the points of the plot of accuracy against latency."""

from anomalib_dskd.benchmark.report import paper
from anomalib_dskd.benchmark.report.data_set import DataSet
from anomalib_dskd.benchmark.report.scatter import Point
from anomalib_dskd.benchmark.report.tables import (
    COSTS,
    IMAGE_AUROC,
    MACS,
    OPENVINO,
    PARAMETERS,
    PYTORCH,
    Cell,
    Column,
    Table,
    compare,
    paper_cell,
    summarize,
)

__all__ = ["cost_table", "list_points"]


def cost_table(data: DataSet) -> Table:
    """One row per model, as the columns of the paper's table 6; below them the paper's values that are comparable."""
    rows = [[Cell(model)] for model in data.models]
    for quantity in COSTS:
        for row, cell in zip(rows, compare(data.by_model(data.results), quantity), strict=True):
            row.append(cell)
    is_same_size = all(tuple(result.image_size) == paper.TABLE_6_SIZE for result in data.results)
    in_paper = {m: paper.TABLE_6[name] for m in data.models if (name := data.method(m)) and name in paper.TABLE_6}
    for model, complexity in in_paper.items():
        known = {PARAMETERS: paper_cell(complexity.parameters)}
        if is_same_size:
            known |= {PYTORCH: paper_cell(1000 * complexity.seconds), MACS: paper_cell(complexity.gmac, 2)}
        lead = Cell(f"{model}, paper", is_paper=True)
        rows.append([lead, *(known.get(quantity, paper_cell(None)) for quantity in COSTS)])
    columns = [Column("model", is_text=True)]
    columns += [Column(quantity.label, largest_first=quantity.more_is_better) for quantity in COSTS]
    return Table("Cost", columns, rows, notes=_notes(data, is_same_size=is_same_size, has_paper=bool(in_paper)))


def _notes(data: DataSet, *, is_same_size: bool, has_paper: bool) -> list[str]:
    notes = [
        "Means over categories and seeds. Latency is measured at batch size 1; peak memory is that of the process up "
        "to the end of training; GMAC are billions of multiply-adds per image; training images/s are those of all "
        "epochs but the first, which also fills caches, if there are several."
    ]
    batches = {result.model: result.speed.throughput_batch for result in data.done}
    throughput = ", ".join(f"{model} {batch}" for model, batch in batches.items() if batch is not None)
    notes += [f"Batch size of the throughput: {throughput}."] if throughput else []
    if has_paper:
        compared = "" if is_same_size else "; at this image size only its number of parameters is comparable"
        notes.append(
            f"Paper: Table 6, on an Intel i7 at 2.3 GHz and 256 x 256 pixels{compared}. Its 39.3 M parameters of DSKD "
            "include some that no forward pass uses; its 68.9 M of PaDiM fit another backbone than ResNet18. Its "
            "memory is left out: the paper does not say what was measured."
        )
    cpus = {result.machine.cpu for result in data.done}
    notes += ["Measured on different processors (see below): times are not comparable."] if len(cpus) > 1 else []
    return notes


def list_points(data: DataSet) -> list[Point]:
    """Return the accuracy and latencies of each model with an accuracy."""
    points = []
    for model in data.models:
        accuracy, *latencies = (
            summarize(data.of(model), quantity).mean for quantity in (IMAGE_AUROC, PYTORCH, OPENVINO)
        )
        if accuracy is not None:
            points.append(Point(model, 100 * accuracy, *latencies))
    return points
