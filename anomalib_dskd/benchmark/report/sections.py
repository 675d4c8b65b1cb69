"""What a report says of a data set: accuracy and cost of each model, and the paper's beside them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anomalib_dskd.benchmark.report import paper
from anomalib_dskd.benchmark.report.scatter import Point
from anomalib_dskd.benchmark.report.tables import (
    ACCURACY,
    COSTS,
    IMAGE_AUROC,
    IN_PAPER,
    MACS,
    NOT_MEASURED,
    OPENVINO,
    PARAMETERS,
    PYTORCH,
    Cell,
    Column,
    Quantity,
    Record,
    Table,
    compare,
    paper_cell,
    summarise,
    value_at,
    values_of,
)

__all__ = [
    "DataSet",
    "ablation_table",
    "category_tables",
    "class_tables",
    "cost_table",
    "points_of",
    "summary_table",
]

LONG_TABLE = 25  # rows, from where on a table is folded


# --- accuracy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """All records of one data set."""

    name: str
    records: list[Record]

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of their first results."""
        return list(dict.fromkeys(record["model"] for record in self.records))

    @property
    def categories(self) -> list[str | None]:
        """Categories of the data set, or None alone."""
        return list(dict.fromkeys(record.get("category") for record in self.records))

    @property
    def benchmark(self) -> paper.Benchmark | None:
        """The paper's results on this data set."""
        return paper.benchmark_of(self.name)

    def of(self, model: str) -> list[Record]:
        """Return the records of a model."""
        return [record for record in self.records if record["model"] == model]

    def method(self, model: str) -> str | None:
        """Return the paper's name of a model, if it has it."""
        first = self.of(model)[0]
        return paper.method_of(first["class_path"], first.get("init_args") or {})

    def ablation(self, model: str) -> paper.Ablation | None:
        """Return the paper's ablation that a model is, if it is one."""
        first = self.of(model)[0]
        return paper.ablation_of(first["class_path"], first.get("init_args") or {})

    def paper_mean(self, model: str, quantity: Quantity) -> float | None:
        """Return the paper's mean over the categories that we have, which an ablation has for all of them alone."""
        categories = {str(category) for category in summarise(self.of(model), quantity).categories if category}
        if self.benchmark is None or quantity not in IN_PAPER:
            return None
        figure = self.benchmark.mean(self.method(model), quantity.path[1], categories)
        ablation = self.ablation(model)
        if figure is None and ablation and self.benchmark is paper.MVTEC_AD:
            is_whole = categories == self.benchmark.all_categories
            return ablation.figures[IN_PAPER.index(quantity)] if is_whole else None
        return figure


def summary_table(data: DataSet) -> Table:
    """One row a model, as in tables 5 and 7 to 9."""
    groups = [data.of(model) for model in data.models]
    categories = len(data.categories)
    columns, cells = [Column("model", is_text=True)], [[Cell(model)] for model in data.models]
    for quantity in ACCURACY:
        columns.append(Column(quantity.label))
        parts = [compare(groups, quantity, categories)]
        if quantity in IN_PAPER:
            figures = [data.paper_mean(model, quantity) for model in data.models]
            if any(figure is not None for figure in figures):
                columns.append(Column("paper", is_paper=True))
                parts.append([paper_cell(figure) for figure in figures])
        for row, *additions in zip(cells, *parts, strict=True):
            row.extend(additions)
    title = f"Accuracy, means over {categories} categories, %" if categories > 1 else "Accuracy, %"
    paper_note = " ".join(_paper_notes(data, IN_PAPER))
    notes = [note for note in (_seed_note(data.records), paper_note) if note]
    return Table(title, columns, cells, notes=notes)


def category_tables(data: DataSet) -> list[Table]:
    """One row a category, as in tables 1 to 4, for each of the figures that were measured."""
    if data.categories == [None]:
        return []
    tables = []
    for quantity in ACCURACY:
        paper_columns = _PaperColumns(data, quantity)
        rows = []
        for category in data.categories:
            of_category = [record for record in data.records if record.get("category") == category]
            groups = [[record for record in of_category if record["model"] == model] for model in data.models]
            figures = paper_columns.figures(category)
            rows.append([Cell(category or "all"), *paper_columns.beside(compare(groups, quantity), figures)])
        means = compare([data.of(model) for model in data.models], quantity, len(rows))
        figures = [data.paper_mean(model, quantity) for model in data.models]
        last_rows = []
        if len(rows) > 1:
            spreads = [_category_spread(data.of(model), quantity) for model in data.models]
            last_rows.append([Cell("mean"), *paper_columns.beside(means, figures)])
            last_rows.append([Cell("spread"), *paper_columns.beside(spreads, [None] * len(spreads))])
        if any(quantity.of(record) is not None for record in data.records):
            columns = [Column("category", is_text=True), *paper_columns.headings()]
            notes = _paper_notes(data, [quantity])[:1]
            notes += ["Spread: standard deviation (n - 1) over the categories."] if len(rows) > 1 else []
            tables.append(Table(f"{_capital(quantity.label)} by category, %", columns, rows, last_rows, notes))
    return tables


def _category_spread(records: Iterable[Record], quantity: Quantity) -> Cell:
    spread = summarise(records, quantity).category_spread
    return Cell(NOT_MEASURED) if spread is None else Cell(quantity.text(spread), spread * quantity.scale)


class _PaperColumns:
    """Puts a column with the paper's figures behind that of each model that the paper has."""

    def __init__(self, data: DataSet, quantity: Quantity) -> None:
        self.data = data
        self.quantity = quantity
        figures = [self.figures(category) for category in data.categories]
        self.has_paper = [any(figure is not None for figure in column) for column in zip(*figures, strict=True)]

    def headings(self) -> list[Column]:
        headings = []
        for model, has_paper in zip(self.data.models, self.has_paper, strict=True):
            headings.append(Column(model))
            headings += [Column(f"{model}, paper", is_paper=True)] if has_paper else []
        return headings

    def figures(self, category: str | None) -> list[float | None]:
        benchmark, metric = self.data.benchmark, self.quantity.path[1]
        if benchmark is None or category is None or self.quantity not in IN_PAPER:
            return [None] * len(self.data.models)
        return [benchmark.figure(self.data.method(model), metric, category) for model in self.data.models]

    def beside(self, cells: Iterable[Cell], figures: Iterable[float | None]) -> list[Cell]:
        row = []
        for cell, figure, has_paper in zip(cells, figures, self.has_paper, strict=True):
            row += [cell, paper_cell(figure)] if has_paper else [cell]
        return row


def class_tables(data: DataSet) -> list[Table]:
    """One row a kind of defect, against all good images, for each of the figures that were measured."""
    kinds = list(dict.fromkeys((r.get("category"), kind) for r in data.records for kind in r.get("classes") or {}))
    has_categories = data.categories != [None]
    tables = []
    for quantity in ACCURACY:
        rows, is_measured = [], False
        for category, kind in kinds:
            records = [_of_kind(r, kind) for r in data.records if r.get("category") == category]
            is_measured |= any(quantity.of(record) is not None for record in records)
            counts = sorted({record["images"] for record in records if record["images"] is not None})
            images = Cell(" or ".join(map(str, counts)) or NOT_MEASURED, counts[0] if counts else None)
            groups = [[record for record in records if record["model"] == model] for model in data.models]
            lead = [Cell(category or "all")] if has_categories else []
            rows.append([*lead, Cell(kind), images, *compare(groups, quantity)])
        lead_columns = [Column("category", is_text=True)] if has_categories else []
        columns = [*lead_columns, Column("kind", is_text=True), Column("images"), *map(Column, data.models)]
        if is_measured:
            title = f"{_capital(quantity.label)} by kind of defect, %"
            tables.append(Table(title, columns, rows, is_folded=len(rows) > LONG_TABLE))
    return tables


def _of_kind(record: Record, kind: str) -> Record:
    """Return the record as if its test set had only this kind of defect."""
    figures = (record.get("classes") or {}).get(kind) or {}
    return {**record, "figures": figures, "images": figures.get("images")}


def ablation_table(data: Sequence[DataSet]) -> Table | None:
    """List the paper's ablations that have a row here, unless they stand beside it already.

    The paper's are means over MVTec AD. Beside a figure on other data they would invite a comparison that means
    nothing, so that they stand in a table of their own; there the order of the rows can be compared.
    """
    found = {model: ablation for d in data for model in d.models if (ablation := d.ablation(model))}
    apart = [
        model
        for data_set in data
        for model in data_set.models
        if data_set.ablation(model) and data_set.paper_mean(model, IMAGE_AUROC) is None
    ]
    if not apart or len(set(found.values())) == 1:  # the whole model alone is no ablation
        return None
    columns = [Column("model here", is_text=True), Column("row of the paper", is_text=True)]
    columns += [Column(quantity.label, is_paper=True) for quantity in IN_PAPER]
    rows = [
        [Cell(model), Cell(f"Table {ablation.table}, {ablation.row}"), *map(paper_cell, ablation.figures)]
        for model, ablation in found.items()
    ]
    note = (
        "These are the paper's figures, means over the 15 categories of MVTec AD. They stand apart from ours, which "
        "are not: the order of the rows can be compared, the figures cannot."
    )
    return Table("The paper's ablations on MVTec AD, %", columns, rows, notes=[note])


# --- cost --------------------------------------------------------------------------------------------------------


def cost_table(data: DataSet) -> Table:
    """One row a model, as the columns of table 6; the paper's own below, as far as they can be compared."""
    groups = [data.of(model) for model in data.models]
    rows = [[Cell(model)] for model in data.models]
    for quantity in COSTS:
        for row, cell in zip(rows, compare(groups, quantity), strict=True):
            row.append(cell)
    at_its_size = {tuple(record.get("image_size") or ()) for record in data.records} == {paper.TABLE_6_SIZE}
    in_paper = {m: paper.TABLE_6[name] for m in data.models if (name := data.method(m)) and name in paper.TABLE_6}
    for model, complexity in in_paper.items():
        known = {PARAMETERS: paper_cell(complexity.parameters)}
        if at_its_size:
            known |= {PYTORCH: paper_cell(1000 * complexity.seconds), MACS: paper_cell(complexity.gmac, 2)}
        lead = Cell(f"{model}, paper", is_paper=True)
        rows.append([lead, *(known.get(quantity, paper_cell(None)) for quantity in COSTS)])
    columns = [Column("model", is_text=True)]
    columns += [Column(quantity.label, largest_first=quantity.more_is_better) for quantity in COSTS]
    return Table("Cost", columns, rows, notes=_cost_notes(data, at_its_size=at_its_size, has_paper=bool(in_paper)))


def _cost_notes(data: DataSet, *, at_its_size: bool, has_paper: bool) -> list[str]:
    done = [record for record in data.records if record["status"] == "done"]
    batches = {r["model"]: value_at(r, ("speed", "throughput_batch")) for r in done}
    throughput = ", ".join(f"{model} {batch}" for model, batch in batches.items() if batch is not None)
    notes = [
        "Means over categories and seeds. Milliseconds are those of one image at a time; peak memory is that of the "
        "process up to the end of training; GMAC are billions of multiply-adds an image; training images/s are those "
        "of the epochs after the first, in which caches fill, where there is more than one."
    ]
    notes += [f"Batch that the throughput was reached with: {throughput}."] if throughput else []
    if has_paper:
        compared = "" if at_its_size else "; at our image size its parameters alone compare"
        notes.append(
            f"Paper: Table 6, on an Intel i7 at 2.3 GHz and 256 x 256 pixels{compared}. Its 39.3 M parameters of DSKD "
            "include some that no forward pass reaches; its 68.9 M of PaDiM fit another "
            "backbone than ResNet18. Its memory is left out: what was measured is not said."
        )
    cpus = {value_at(record, ("machine", "cpu")) for record in data.records} - {None}
    notes += ["Measured on different processors (see below): times do not compare."] if len(cpus) > 1 else []
    return notes


def points_of(data: DataSet) -> list[Point]:
    """Return accuracy and latencies of each model that has them."""
    points = []
    for model in data.models:
        accuracy, *latencies = (
            summarise(data.of(model), quantity).mean for quantity in (IMAGE_AUROC, PYTORCH, OPENVINO)
        )
        if accuracy is not None:
            points.append(Point(model, 100 * accuracy, *latencies))
    return points


# --- notes ---------------------------------------------------------------------------------------------------------


def _seed_note(records: Iterable[Record]) -> str:
    seeds: dict[str, set[int]] = defaultdict(set)
    for record in records:
        if record["status"] == "done":
            seeds[record["model"]].add(record["seed"])
    if not seeds:
        return "No job is done."
    counts = Counter(len(of_model) for of_model in seeds.values())
    usual = counts.most_common(1)[0][0]
    others = ", ".join(f"{model} {len(of_model)}" for model, of_model in seeds.items() if len(of_model) != usual)
    if counts.keys() == {1}:
        return "One seed: the spread is not known."
    number = f"{usual} seed{'s' if usual > 1 else ''}{f' ({others})' if others else ''}"
    return f"Mean ± standard deviation (n - 1) over {number}; a figure without ± has fewer than two whole seeds."


def _paper_notes(data: DataSet, quantities: Iterable[Quantity]) -> list[str]:
    """Say where the paper's figures come from, and how our settings differ from its own."""
    benchmark = data.benchmark
    shown = [q for q in quantities if any(data.paper_mean(model, q) is not None for model in data.models)]
    if benchmark is None or not shown:
        return []
    numbers = sorted({benchmark.tables[quantity.path[1]] for quantity in shown})
    notes = [f"Paper: Table{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}, {benchmark.name}."]
    ours = [r for model in data.models if data.method(model) == "Dskd" for r in data.of(model)]
    if ours:
        epochs, sizes = (values_of(ours, name) for name in ("epochs", "image_size"))
        theirs = f"{paper.EPOCHS} epochs on images of {' x '.join(map(str, benchmark.image_size))}"
        notes.append(f"There DSKD was trained for {theirs}; here for {epochs} epochs on {sizes}.")
    if {str(category) for category in data.categories} < benchmark.all_categories:
        notes.append("The paper's means are over the categories that we have, not over all of its own.")
    return notes


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
