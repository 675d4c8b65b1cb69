"""Tables of accuracy on one data set: means, by category, by kind of defect; and the paper's ablations."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from anomalib_dskd.benchmark.job_result import JobResult, Metrics
from anomalib_dskd.benchmark.report import paper
from anomalib_dskd.benchmark.report.data_set import DataSet
from anomalib_dskd.benchmark.report.tables import (
    ACCURACY,
    IMAGE_AUROC,
    IN_PAPER,
    NOT_MEASURED,
    Cell,
    Column,
    Quantity,
    Table,
    compare,
    list_values,
    paper_cell,
    summarize,
)

__all__ = ["ablation_table", "accuracy_tables"]

F1_NOTE = (
    "Image F1 is that of the best threshold for the test images; at threshold, that of the labels that a model "
    "predicts by the threshold from its validation, which is fitted to the test images where they are validated on too."
)
LONG_TABLE = 25  # rows above which a table is folded

Item = TypeVar("Item")


def accuracy_tables(data: DataSet) -> list[Table]:
    """Return the table of means, then, per metric that was measured, those by category and by kind of defect."""
    tables = [_summary_table(data)]
    if data.categories != [None]:
        tables += [_category_table(data, quantity) for quantity in ACCURACY if _is_measured(data.results, quantity)]
    return [*tables, *(table for quantity in ACCURACY if (table := _class_table(data, quantity)))]


def _is_measured(results: Iterable[JobResult], quantity: Quantity) -> bool:
    return any(quantity.of(result) is not None for result in results)


def _summary_table(data: DataSet) -> Table:
    """One row per model, as in the paper's tables 5 and 7 to 9."""
    categories = len(data.categories)
    columns, rows = [Column("model", is_text=True)], [[Cell(model)] for model in data.models]
    for quantity in ACCURACY:
        columns.append(Column(quantity.label))
        additions = [compare(data.by_model(data.results), quantity, categories)]
        published = [data.paper_mean(model, quantity) for model in data.models]
        if any(percent is not None for percent in published):
            columns.append(Column("paper", is_paper=True))
            additions.append([paper_cell(percent) for percent in published])
        for row, *cells in zip(rows, *additions, strict=True):
            row.extend(cells)
    title = f"Accuracy, means over {categories} categories, %" if categories > 1 else "Accuracy, %"
    paper_note = " ".join(_paper_notes(data, IN_PAPER))
    notes = [_seed_note(data.done), F1_NOTE, paper_note]
    return Table(title, columns, rows, notes=[note for note in notes if note])


def _category_table(data: DataSet, quantity: Quantity) -> Table:
    """One row per category, as in the paper's tables 1 to 4."""
    published = [
        [data.paper_result(model, quantity, category) for model in data.models] for category in data.categories
    ]
    has_paper = [any(percent is not None for percent in column) for column in zip(*published, strict=True)]

    def row(name: str, cells: Sequence[Cell], percents: Iterable[float | None]) -> list[Cell]:
        return [Cell(name), *_interleave(cells, map(paper_cell, percents), has_paper)]

    rows = []
    for category, percents in zip(data.categories, published, strict=True):
        groups = data.by_model(result for result in data.results if result.category == category)
        rows.append(row(category or "all", compare(groups, quantity), percents))
    last_rows, notes = [], _paper_notes(data, [quantity])[:1]
    if len(rows) > 1:
        groups = data.by_model(data.results)
        means = [data.paper_mean(model, quantity) for model in data.models]
        last_rows = [
            row("mean", compare(groups, quantity, len(rows)), means),
            row("std", [_category_std(group, quantity) for group in groups], [None] * len(groups)),
        ]
        notes.append("std: standard deviation (n - 1) over the categories.")
    headings = _interleave(
        map(Column, data.models), [Column(f"{model}, paper", is_paper=True) for model in data.models], has_paper
    )
    title = f"{_capitalize(quantity.label)} by category, %"
    return Table(title, [Column("category", is_text=True), *headings], rows, last_rows, notes)


def _interleave(ours: Iterable[Item], of_paper: Iterable[Item], has_paper: Iterable[bool]) -> list[Item]:
    """Insert the paper's column after that of each model that the paper has."""
    columns = zip(ours, of_paper, has_paper, strict=True)
    return [item for own, published, is_shown in columns for item in ([own, published] if is_shown else [own])]


def _category_std(results: Iterable[JobResult], quantity: Quantity) -> Cell:
    std = summarize(results, quantity).category_std
    return Cell(NOT_MEASURED) if std is None else Cell(quantity.text(std), std * quantity.scale)


def _class_table(data: DataSet, quantity: Quantity) -> Table | None:
    """One row per kind of defect, each against all normal images, or None if this was not measured."""
    kinds = list(dict.fromkeys((result.category, kind) for result in data.results for kind in result.classes))
    has_categories = data.categories != [None]
    rows, is_measured = [], False
    for category, kind in kinds:
        of_category = [result for result in data.results if result.category == category]
        found = [result.classes[kind].images for result in of_category if kind in result.classes]
        counts = sorted({count for count in found if count is not None})
        images = Cell(" or ".join(map(str, counts)) or NOT_MEASURED, counts[0] if counts else None)
        results = [replace(result, metrics=result.classes.get(kind, Metrics())) for result in of_category]
        is_measured |= _is_measured(results, quantity)
        lead = [Cell(category or "all")] if has_categories else []
        rows.append([*lead, Cell(kind), images, *compare(data.by_model(results), quantity)])
    lead_columns = [Column("category", is_text=True)] if has_categories else []
    columns = [*lead_columns, Column("kind", is_text=True), Column("images"), *map(Column, data.models)]
    title = f"{_capitalize(quantity.label)} by kind of defect, %"
    return Table(title, columns, rows, is_folded=len(rows) > LONG_TABLE) if is_measured else None


def ablation_table(data: Sequence[DataSet]) -> Table | None:
    """List the paper's ablations that the models correspond to, unless all are already next to our results.

    The paper's results are means over MVTec AD. Next to results on other data they would suggest a comparison that is
    not valid, so they have a table of their own, in which the order of the rows can be compared.
    """
    found = {model: ablation for d in data for model in d.models if (ablation := d.ablation(model))}
    has_more = any(d.ablation(m) and d.paper_mean(m, IMAGE_AUROC) is None for d in data for m in d.models)
    if not has_more or len(set(found.values())) == 1:  # only the full model
        return None
    columns = [Column("model", is_text=True), Column("row of the paper", is_text=True)]
    columns += [Column(quantity.label, is_paper=True) for quantity in IN_PAPER]
    rows = [
        [Cell(model), Cell(f"Table {ablation.table}, {ablation.row}"), *map(paper_cell, ablation.results)]
        for model, ablation in found.items()
    ]
    note = (
        "These are the paper's results: means over the 15 categories of MVTec AD. Ours are on other data: compare the "
        "order of the rows, not the values."
    )
    return Table("The paper's ablations on MVTec AD, %", columns, rows, notes=[note])


# --- notes -------------------------------------------------------------------------------------------------------


def _seed_note(done: Iterable[JobResult]) -> str:
    seeds: dict[str, set[int]] = defaultdict(set)
    for result in done:
        seeds[result.model].add(result.seed)
    if not seeds:
        return "No job is done."
    counts = Counter(len(of_model) for of_model in seeds.values())
    usual = counts.most_common(1)[0][0]
    if counts.keys() == {1}:
        return "One seed: the standard deviation is unknown."
    others = ", ".join(f"{model} {len(of_model)}" for model, of_model in seeds.items() if len(of_model) != usual)
    number = f"{usual} seed{'s' if usual > 1 else ''}{f' ({others})' if others else ''}"
    return f"Mean ± standard deviation (n - 1) over {number}; a result without ± has fewer than two complete seeds."


def _paper_notes(data: DataSet, quantities: Iterable[Quantity]) -> list[str]:
    """Name the tables of the paper's results that are shown, and the differences between its settings and ours."""
    benchmark = data.benchmark
    shown = [q for q in quantities if any(data.paper_mean(model, q) is not None for model in data.models)]
    if benchmark is None or not shown:
        return []
    numbers = sorted({benchmark.tables[quantity.name] for quantity in shown})
    notes = [f"Paper: Table{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}, {benchmark.name}."]
    ours = [result for result in data.results if data.method(result.model) == "Dskd"]
    if ours:
        epochs, sizes = (list_values(ours, name) for name in ("epochs", "image_size"))
        theirs = f"{paper.EPOCHS} epochs on images of {' x '.join(map(str, benchmark.image_size))}"
        notes.append(f"The paper trained DSKD for {theirs}, this benchmark for {epochs} epochs on {sizes}.")
    if {str(category) for category in data.categories} < benchmark.all_categories:
        notes.append(
            "The paper's means are over the categories of this benchmark, not over all categories of the paper."
        )
    return notes


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]
