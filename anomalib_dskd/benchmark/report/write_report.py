"""The report of a benchmark: ``results.csv``, ``report.md`` and ``report.html``, from the files of its run folder.

Results are means over seeds ± their standard deviation (n - 1). The best of the benchmark is bold, as is what equals it
at the precision shown; the DSKD paper's results are next to ours where it has them, and are not compared.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from anomalib_dskd.benchmark.job_result import JobResult, Machine
from anomalib_dskd.benchmark.report import facts, paper
from anomalib_dskd.benchmark.report.accuracy_tables import ablation_table, accuracy_tables
from anomalib_dskd.benchmark.report.cost_table import cost_table, list_points
from anomalib_dskd.benchmark.report.data_set import DataSet
from anomalib_dskd.benchmark.report.gallery import Gallery, make_gallery
from anomalib_dskd.benchmark.report.scatter import draw_accuracy_against_latency
from anomalib_dskd.benchmark.report.tables import ACCURACY, IMAGE_AUROC, Table
from anomalib_dskd.benchmark.run_folder import CONFIG, RESULTS, read_plan, read_results
from anomalib_dskd.errors import ArgumentError, DataError
from anomalib_dskd.file_writing import write_file

__all__ = ["write_report"]

CSV_COLUMNS: Mapping[str, str] = {  # fields of a job's result
    **{name: name for name in ("job", "status", "reason", "model", "class_path", "init_args", "data", "category")},
    **{name: name for name in ("seed", "epochs", "epochs_source", "image_size", "precision", "accelerator")},
    **{f"{quantity.name}_fraction": quantity.field for quantity in ACCURACY},
    "fit_seconds": "training.fit_seconds",
    "trained_epochs": "training.epochs",
    "training_images": "training.images",
    "training_images_per_second": "training.images_per_second",
    **{name: f"speed.{name}" for name in ("pytorch_ms", "openvino_ms", "openvino_int8_ms")},
    "throughput_images_per_second": "speed.throughput",
    "throughput_batch": "speed.throughput_batch",
    **{name: f"cost.{name}" for name in ("peak_memory_mib", "parameters", "trained_parameters", "macs", "export_mib")},
    **{name: name for name in ("classes", "notes", "weights")},
    **{field.name: f"machine.{field.name}" for field in fields(Machine)},
    **{name: name for name in ("started", "finished")},
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters of a text that a spreadsheet evaluates


def write_report(run_folder: Path, *, gallery_images: int = 6) -> list[Path]:
    """Write ``results.csv``, ``report.md`` and ``report.html`` into a run folder.

    Args:
        run_folder: of a benchmark, finished or not.
        gallery_images: number of images under each heading of a data set's gallery; 0 for no gallery.

    Returns:
        The three files.

    Raises:
        ArgumentError: ``gallery_images`` is negative.
        DataError: the folder holds no results or damaged ones, or it cannot be written.
    """
    if gallery_images < 0:
        msg = f"gallery_images {gallery_images} must be 0, for no gallery, or larger."
        raise ArgumentError(msg)
    plan = read_plan(run_folder) or []
    results = _read(run_folder, plan)
    page = _page(run_folder, results, plan, gallery_images)
    contents = {
        "results.csv": _csv(results),
        "report.md": _render("report.md", page),
        "report.html": _render("report.html", page),
    }
    paths = {run_folder / name: text for name, text in contents.items()}
    try:
        for path, text in paths.items():
            write_file(path, text)
    except OSError as error:
        msg = (
            f"the report in {str(run_folder)!r} cannot be written: {error}. Free disk space or change the permissions."
        )
        raise DataError(msg) from error
    return list(paths)


def _read(run_folder: Path, plan: Sequence[Mapping[str, Any]]) -> list[JobResult]:
    """Read the latest result of each job, in the order of the benchmark's jobs: a cluster ends them in any order."""
    advice = "Give the folder that `anomalib-dskd benchmark` wrote, one that holds results.jsonl."
    if not run_folder.is_dir():
        state = "is not a folder" if run_folder.exists() else "does not exist"
        msg = f"run folder {str(run_folder)!r} {state}. {advice}"
        raise DataError(msg)
    file = run_folder / RESULTS
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in run_folder.iterdir())[:10]) or "nothing"
        msg = f"run folder {str(run_folder)!r} has no {RESULTS}; it holds {found}. {advice}"
        raise DataError(msg)
    results = read_results(run_folder)
    if not results:
        msg = f"{str(file)!r} holds no finished job. Let the benchmark finish one, then write the report again."
        raise DataError(msg)
    jobs: dict[tuple[Any, ...], str] = {}
    for result in results:
        key = (result.model, result.data, result.category, result.seed)
        other = jobs.setdefault(key, result.job)
        if other != result.job:
            msg = (
                f"jobs {other} and {result.job} in {str(file)!r} are both {key[0]} on {key[1]}, category {key[2]}, "
                f"seed {key[3]}: the report can show only one. Delete the line of the other."
            )
            raise DataError(msg)
    order = {job["job"]: number for number, job in enumerate(plan)}
    return sorted(results, key=lambda result: order.get(result.job, len(order)))


@dataclass(frozen=True)
class _Section:
    """Part of the report about one data set."""

    name: str
    accuracy: list[Table]
    cost: Table
    plot: str | None
    gallery: Gallery | None


def _page(
    run_folder: Path, results: list[JobResult], plan: Sequence[Mapping[str, Any]], gallery_images: int
) -> dict[str, Any]:
    """Return the variables of the templates."""
    grouped: dict[str, list[JobResult]] = defaultdict(list)
    for result in results:
        grouped[result.data].append(result)
    data = [DataSet(name, of_data) for name, of_data in grouped.items()]
    config = run_folder / CONFIG
    tables = (
        facts.note_table(results),
        facts.settings_table(data),
        facts.weights_table(results),
        facts.machine_table(results),
    )
    return {
        "name": run_folder.resolve().name,
        "facts": facts.list_facts(results, plan),
        "sections": [_section(run_folder, data_set, gallery_images) for data_set in data],
        "ablations": ablation_table(data),
        "failures": facts.failure_table(results),
        "tables": [table for table in tables if table],
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
        "citation": paper.CITATION,
    }


def _section(run_folder: Path, data: DataSet, gallery_images: int) -> _Section:
    points = list_points(data)
    described = "; ".join(
        f"{point.name} {point.accuracy:.1f} % at {', '.join(f'{latency:.1f}' for latency in point.latencies)} ms"
        for point in points
        if point.latencies
    )
    label = f"Accuracy against latency on {data.name}: {described}."
    return _Section(
        name=data.name,
        accuracy=accuracy_tables(data),
        cost=cost_table(data),
        plot=draw_accuracy_against_latency(points, accuracy=IMAGE_AUROC.label, label=label),
        gallery=make_gallery(run_folder, data.done, images=gallery_images),
    )


def _csv(results: Iterable[JobResult]) -> str:
    """Return one line per job. Accuracy is in fractions, not rounded."""
    rows = [[_csv_cell(attrgetter(field)(result)) for field in CSV_COLUMNS.values()] for result in results]
    text: str = pd.DataFrame(rows, columns=list(CSV_COLUMNS), dtype=object).to_csv(index=False, lineterminator="\n")
    return text


def _csv_cell(value: Any) -> Any:  # noqa: ANN401 - a field of a result
    if isinstance(value, dict | list):
        return json.dumps(value, default=asdict, sort_keys=True)
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _render(template: str, page: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = _escape_markdown
    return environment.get_template(template).render(page)


def _escape_markdown(text: str) -> str:
    """Escape what would be markup in a table's cell or a line of Markdown."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\|*`[]":
        text = text.replace(character, "\\" + character)
    return text
