"""Facts about a benchmark run: settings, weights, machines, failures, notes, and a summary of the run."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from anomalib_dskd.benchmark.job_result import JobResult, Machine
from anomalib_dskd.benchmark.report.data_set import DataSet
from anomalib_dskd.benchmark.report.tables import NOT_MEASURED, Cell, Column, Table, list_values

__all__ = ["failure_table", "list_facts", "machine_table", "note_table", "settings_table", "weights_table"]


def failure_table(results: Iterable[JobResult]) -> Table | None:
    """List the failed jobs and the reasons."""
    names = ("model", "data", "category", "seed", "reason")
    failed = [[getattr(result, name) for name in names] for result in results if result.status == "failed"]
    rows = [[Cell("" if value is None else str(value)) for value in values] for values in failed]
    return Table("Failed jobs", _text_columns(*names), rows) if rows else None


def settings_table(data: Iterable[DataSet]) -> Table:
    """List the settings of each model on each data set."""
    names = ("class_path", "init_args", "epochs", "epochs_source", "image_size", "precision", "accelerator", "seed")
    headings = ("data", "model", "class", "arguments", "epochs", "epochs from", "image size", "precision", "device")
    rows = []
    for data_set in data:
        for model in data_set.models:
            results = data_set.of(model)
            done = sum(result.status == "done" for result in results)
            values = [Cell(list_values(results, name)) for name in names]
            rows.append([Cell(data_set.name), Cell(model), *values, Cell(f"{done} of {len(results)}", done)])
    note = (
        "Precision is that of the training of models that train in epochs. Everything else runs in FP32, except layers "
        "that an INT8 export leaves unquantized, whose precision OpenVINO chooses as it does by default."
    )
    return Table("Settings", _text_columns(*headings, "seeds", "jobs done"), rows, notes=[note])


def weights_table(results: Iterable[JobResult]) -> Table | None:
    """List the files of pretrained weights."""
    return _count_table(
        "Pretrained weights",
        ("weights", "file", "SHA-256"),
        ((w.name, w.file, w.sha256 or NOT_MEASURED) for result in results for w in result.weights),
    )


def note_table(results: Iterable[JobResult]) -> Table | None:
    """List the notes of jobs, such as measurements that failed."""
    notes = ((result.model, result.data, note) for result in results for note in result.notes)
    return _count_table("Notes", ("model", "data", "note"), notes)


def machine_table(results: Iterable[JobResult]) -> Table | None:
    """Describe the machines and the versions of packages."""
    machines = Counter(result.machine for result in results if result.status == "done")
    names = sorted(field.name for field in fields(Machine))
    rows = [[Cell(name), *(Cell(str(getattr(m, name) or NOT_MEASURED)) for m in machines)] for name in names]
    headings = [f"{number} ({count} jobs)" for number, count in enumerate(machines.values(), start=1)]
    return Table("Machines and versions", _text_columns("machine", *headings), rows) if machines else None


def list_facts(results: Sequence[JobResult], plan: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Summarize a run as pairs of a name and a text.

    Args:
        results: the latest result of each job that has one.
        plan: all jobs; empty if they are not known.
    """
    ended = {result.job for result in results}
    missing = Counter(job["model"] for job in plan if job["job"] not in ended)
    status = Counter(result.status for result in results)
    times = sorted(time[:16].replace("T", " ") for r in results for time in (r.started, r.finished) if time)
    machines = [result.machine for result in results if result.status == "done"]
    weights = {f"{weights.name} from {weights.file}" for result in results for weights in result.weights}
    to_do = f", {missing.total()} to do" if missing else ""
    facts = {
        "jobs": f"{status['done']} done, {status['failed']} failed{to_do}",
        "to do": ", ".join(f"{model} ({count})" for model, count in missing.items()),
        "models": ", ".join(dict.fromkeys(result.model for result in results)),
        "data": ", ".join(dict.fromkeys(result.data for result in results)),
        "seeds": list_values(results, "seed"),
        "epochs": list_values(results, "epochs"),
        "run": " to ".join(dict.fromkeys((times[0], times[-1]))) + " UTC" if times else "",
        "processor": "; ".join(dict.fromkeys(f"{machine.cpu}, {machine.cores} cores" for machine in machines)),
        "GPU": "; ".join(dict.fromkeys(machine.gpu for machine in machines if machine.gpu)),
        "weights": ", ".join(sorted(weights)) or "each model's default, which may differ between models",
        "commit": ", ".join(dict.fromkeys(machine.commit for machine in machines if machine.commit)),
    }
    return [(name, text or NOT_MEASURED) for name, text in facts.items() if text or name not in {"to do", "GPU"}]


def _text_columns(*labels: str) -> list[Column]:
    return [Column(label, is_text=True) for label in labels]


def _count_table(title: str, headings: Sequence[str], rows: Iterable[tuple[str, ...]]) -> Table | None:
    """List different rows, and the number of jobs with each."""
    counts = [[*map(Cell, row), Cell(str(count), count)] for row, count in Counter(rows).items()]
    return Table(title, [*_text_columns(*headings), Column("jobs")], counts) if counts else None
