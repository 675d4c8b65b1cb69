"""The report of a benchmark: ``results.csv``, ``report.md`` and ``report.html``, from what the run left on disk.

Figures are means over seeds, plus and minus their standard deviation (n - 1), and are shown rounded; the best of
those that were measured here is bold, and so is what ties with it at the precision shown. The DSKD paper's figures
stand beside ours where it has that row, and never take part in this. What was not measured is "n/a".
"""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from anomalib_dskd.benchmark.report import paper
from anomalib_dskd.benchmark.report.facts import (
    facts_of,
    failure_table,
    machine_table,
    note_table,
    settings_table,
    weights_table,
)
from anomalib_dskd.benchmark.report.gallery import Gallery, make_gallery
from anomalib_dskd.benchmark.report.scatter import draw_accuracy_against_latency
from anomalib_dskd.benchmark.report.sections import (
    DataSet,
    ablation_table,
    category_tables,
    class_tables,
    cost_table,
    points_of,
    summary_table,
)
from anomalib_dskd.benchmark.report.tables import ACCURACY, COSTS, IMAGE_AUROC, Record, Table, value_at
from anomalib_dskd.benchmark.run_folder import CONFIG, RESULTS, read_plan, read_results
from anomalib_dskd.errors import ArgumentError, DataError

__all__ = ["write_report"]

CSV_COLUMNS: Mapping[str, tuple[str, ...]] = {
    **{name: (name,) for name in ("job", "status", "reason", "model", "class_path", "init_args", "data", "category")},
    **{name: (name,) for name in ("seed", "epochs", "epochs_source", "image_size", "precision", "accelerator")},
    **{f"{quantity.path[1]}_fraction": quantity.path for quantity in ACCURACY},
    "fit_seconds": ("training", "fit_seconds"),
    "trained_epochs": ("training", "epochs"),
    "training_images": ("training", "images"),
    "training_images_per_second": ("training", "images_per_second"),
    **{name: ("speed", name) for name in ("pytorch_ms", "openvino_ms", "openvino_int8_ms")},
    "throughput_images_per_second": ("speed", "throughput"),
    "throughput_batch": ("speed", "throughput_batch"),
    **{name: ("cost", name) for name in ("peak_memory_mib", "parameters", "trained_parameters", "macs", "export_mib")},
    **{name: (name,) for name in ("classes", "notes", "weights")},
    **{name: ("machine", name) for name in ("cpu", "cores", "threads", "platform", "python", "anomalib", "torch")},
    **{name: ("machine", name) for name in ("openvino", "timm", "anomalib_dskd", "commit")},
    **{name: (name,) for name in ("started", "finished")},
}


JOB_ID = "[0-9a-f]{12}"  # it names a folder
KINDS: Mapping[str, type] = {
    **dict.fromkeys(("status", "model", "class_path", "data", "category"), str),
    "seed": int,
    **dict.fromkeys(("init_args", "classes", "machine"), dict),
    **dict.fromkeys(("weights", "notes"), list),
}
NAMES_OF_KINDS = {str: "a text", int: "a whole number", dict: "a mapping", list: "a list"}
OPTIONAL = ("category", "init_args", "classes", "machine", "weights", "notes")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a text begins that a spreadsheet runs


def write_report(run_folder: Path, *, gallery_images: int = 6) -> list[Path]:
    """Write ``results.csv``, ``report.md`` and ``report.html`` into a run folder.

    Args:
        run_folder: of a benchmark, finished or not.
        gallery_images: images under each heading of a gallery, of which every data set has one; 0 for none.

    Returns:
        The three files.

    Raises:
        ArgumentError: ``gallery_images`` is negative.
        DataError: the folder holds no results, or what it holds is damaged, or it cannot be written.
    """
    if gallery_images < 0:
        msg = f"gallery_images {gallery_images} must be 0, for no gallery, or larger."
        raise ArgumentError(msg)
    records = _read(run_folder)
    grouped: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        grouped[record["data"]].append(record)
    data = [DataSet(name, of_data) for name, of_data in grouped.items()]
    sections = [_section(run_folder, data_set, gallery_images) for data_set in data]
    config = run_folder / CONFIG
    page = {
        "name": run_folder.resolve().name,
        "facts": facts_of(records, read_plan(run_folder) or []),
        "sections": sections,
        "ablations": ablation_table(data),
        "failures": failure_table(records),
        "tables": [
            table
            for table in (note_table(records), settings_table(data), weights_table(records), machine_table(records))
            if table
        ],
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
        "citation": paper.CITATION,
    }
    contents = {
        "results.csv": _csv(records),
        "report.md": _render("report.md", page),
        "report.html": _render("report.html", page),
    }
    paths = [run_folder / name for name in contents]
    try:
        for path, text in zip(paths, contents.values(), strict=True):
            _write(path, text)
    except OSError as error:
        msg = f"the report in {str(run_folder)!r} cannot be written: {error}. Make room or change the permissions."
        raise DataError(msg) from error
    return paths


def _write(path: Path, text: str) -> None:
    """Put a file in its place; what is there may be a link that leads out of a folder that someone has sent."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with part.open("x", encoding="utf-8", newline="") as file:
        file.write(text)
    part.replace(path)


@dataclass(frozen=True)
class _Section:
    """What the report says of one data set."""

    name: str
    accuracy: list[Table]
    cost: Table
    picture: str | None
    gallery: Gallery | None


def _section(run_folder: Path, data: DataSet, gallery_images: int) -> _Section:
    points = points_of(data)
    named = "; ".join(
        f"{point.name} {point.accuracy:.1f} % at {', '.join(f'{latency:.1f}' for latency in point.latencies)} ms"
        for point in points
        if point.latencies
    )
    done = [record for record in data.records if record["status"] == "done"]
    return _Section(
        name=data.name,
        accuracy=[summary_table(data), *category_tables(data), *class_tables(data)],
        cost=cost_table(data),
        picture=draw_accuracy_against_latency(
            points, accuracy=IMAGE_AUROC.label, label=f"Accuracy against latency on {data.name}: {named}."
        ),
        gallery=make_gallery(run_folder, done, images=gallery_images),
    )


def _read(run_folder: Path) -> list[Record]:
    """Read the latest result of each job, and check what the report relies on."""
    advice = "Give the folder that `anomalib-dskd benchmark` wrote, one that holds results.jsonl."
    if not run_folder.is_dir():
        state = "is no folder" if run_folder.exists() else "does not exist"
        msg = f"run folder {str(run_folder)!r} {state}. {advice}"
        raise DataError(msg)
    if not (run_folder / RESULTS).is_file():
        found = ", ".join(sorted(path.name for path in run_folder.iterdir())[:10]) or "nothing"
        msg = f"run folder {str(run_folder)!r} has no {RESULTS}; it holds {found}. {advice}"
        raise DataError(msg)
    records = read_results(run_folder)
    if not records:
        msg = f"{str(run_folder / RESULTS)!r} holds no finished job. Let the benchmark finish one, then report again."
        raise DataError(msg)
    for record in records:
        _check(record, run_folder)
    jobs: dict[tuple[Any, ...], str] = {}
    for record in records:
        key = (record["model"], record["data"], record.get("category"), record["seed"])
        other = jobs.setdefault(key, record["job"])
        if other != record["job"]:
            msg = (
                f"jobs {other} and {record['job']} in {str(run_folder / RESULTS)!r} are both {key[0]} on {key[1]}, "
                f"category {key[2]}, seed {key[3]}: one figure cannot stand for both. Remove the line of one."
            )
            raise DataError(msg)
    return records


def _check(record: Record, run_folder: Path) -> None:
    problems = [
        f"{name} {record.get(name)!r} is not {NAMES_OF_KINDS[kind]}"
        for name, kind in KINDS.items()
        if not isinstance(record.get(name), kind) and not (name in OPTIONAL and record.get(name) is None)
    ]
    if not re.fullmatch(JOB_ID, str(record["job"])):
        problems.append(f"job {record['job']!r} is not the twelve hexadecimal digits that a benchmark gives")
    problems += [
        f"weights {weights!r} lacks its name or file"
        for weights in record.get("weights") or []
        if isinstance(weights, dict) and not {"name", "file"} <= weights.keys()
    ]
    for name in ("weights", "classes"):
        items = record.get(name) or {}
        parts = items.values() if isinstance(items, dict) else items
        if isinstance(items, dict | list) and not all(isinstance(part, dict) for part in parts):
            problems.append(f"{name} {items!r} holds something else than mappings")
    for quantity in (*ACCURACY, *COSTS):
        group = record.get(quantity.path[0]) or {}
        is_group = isinstance(group, dict)
        value = group.get(quantity.path[1]) if is_group else group
        if value is not None and not (is_group and isinstance(value, int | float)):
            problems.append(f"{'.'.join(quantity.path)} {value!r} is not a number or null")
    if problems:
        msg = (
            f"job {record['job']} in {str(run_folder / RESULTS)!r} is no result of a benchmark: {'; '.join(problems)}. "
            "Remove its line, and run the benchmark again."
        )
        raise DataError(msg)


def _csv(records: Iterable[Record]) -> str:
    """Return one line a job. Accuracy is in fractions as recorded: the rounded percentages are in the other files."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for record in records:
        values = (value_at(record, path) for path in CSV_COLUMNS.values())
        writer.writerow(_csv_cell(value) for value in values)
    return buffer.getvalue()


def _csv_cell(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict | list):
        return json.dumps(value)
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
    environment.filters["md"] = _markdown
    return environment.get_template(template).render(page)


def _markdown(text: str) -> str:
    """Escape what would be markup in a table's cell or a line of Markdown."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\|*`[]":
        text = text.replace(character, "\\" + character)
    return text
