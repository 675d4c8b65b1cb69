"""What a report says beside its figures: what was compared, with what, and what failed."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anomalib_dskd.benchmark.report.sections import DataSet
from anomalib_dskd.benchmark.report.tables import NOT_MEASURED, Cell, Column, Record, Table, values_of

__all__ = [
    "facts_of",
    "failure_table",
    "machine_table",
    "note_table",
    "settings_table",
    "weights_table",
]


def failure_table(records: Iterable[Record]) -> Table | None:
    """List the jobs that failed, with their reasons."""
    rows = [
        [
            Cell(str(r.get(name) if r.get(name) is not None else ""))
            for name in ("model", "data", "category", "seed", "reason")
        ]
        for r in records
        if r["status"] == "failed"
    ]
    columns = [Column(name, is_text=True) for name in ("model", "data", "category", "seed", "reason")]
    return Table("Failed jobs", columns, rows) if rows else None


def settings_table(data: Iterable[DataSet]) -> Table:
    """List what was compared."""
    names = ("class_path", "init_args", "epochs", "epochs_source", "image_size", "precision", "accelerator", "seed")
    headings = ("data", "model", "class", "arguments", "epochs", "epochs from", "image size", "precision", "device")
    columns = [Column(name, is_text=True) for name in (*headings, "seeds", "jobs done")]
    rows = []
    for data_set in data:
        for model in data_set.models:
            records = data_set.of(model)
            done = sum(record["status"] == "done" for record in records)
            values = [Cell(values_of(records, name)) for name in names]
            rows.append([Cell(data_set.name), Cell(model), *values, Cell(f"{done} of {len(records)}", done)])
    note = (
        "Precision is that of training in epochs; all else is done in 32-bit floating point, but for what an INT8 "
        "export leaves unquantised: there OpenVINO chooses, as it does for its users."
    )
    return Table("Settings", columns, rows, notes=[note])


def weights_table(records: Iterable[Record]) -> Table | None:
    """List the files of pretrained weights."""
    files = Counter(
        tuple(str(weights.get(name) or NOT_MEASURED) for name in ("name", "file", "sha256"))
        for record in records
        for weights in record.get("weights") or []
    )
    columns = [Column(name, is_text=True) for name in ("weights", "file", "SHA-256")]
    rows = [[*map(Cell, file), Cell(str(count), count)] for file, count in files.items()]
    return Table("Pretrained weights", [*columns, Column("jobs")], rows) if rows else None


def machine_table(records: Iterable[Record]) -> Table | None:
    """Describe the machines and versions."""
    machines = Counter(json.dumps(r["machine"], sort_keys=False) for r in records if r.get("machine"))
    described = [json.loads(machine) for machine in machines]
    names = list(dict.fromkeys(name for machine in described for name in machine))
    rows = [[Cell(name), *(Cell(str(m.get(name) or NOT_MEASURED)) for m in described)] for name in names]
    headings = [f"{number} ({count} jobs)" for number, count in enumerate(machines.values(), start=1)]
    columns = [Column(name, is_text=True) for name in ("machine", *headings)]
    return Table("Machines and versions", columns, rows) if rows else None


def note_table(records: Iterable[Record]) -> Table | None:
    """List what a job could not measure."""
    notes = Counter((r["model"], r["data"], str(note)) for r in records for note in r.get("notes") or [])
    rows = [[*map(Cell, note), Cell(str(count), count)] for note, count in notes.items()]
    columns = [Column(name, is_text=True) for name in ("model", "data", "note")]
    return Table("What could not be measured", [*columns, Column("jobs")], rows) if rows else None


def facts_of(records: Sequence[Record], plan: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what to know before any figure, as pairs of a name and a text.

    Args:
        records: the latest result of each job that has one.
        plan: all jobs; empty if they are not known.
    """
    ended = {record["job"] for record in records}
    missing = [job for job in plan if job["job"] not in ended]
    status = Counter(record["status"] for record in records)
    times = sorted(
        str(r[name])[:16].replace("T", " ") for r in records for name in ("started", "finished") if r.get(name)
    )
    machines = [record["machine"] for record in records if record.get("machine")]
    weights = {f"{file['name']} from {file['file']}" for r in records for file in r.get("weights") or []}
    facts = {
        "jobs": f"{status['done']} done, {status['failed']} failed" + (f", {len(missing)} to do" if missing else ""),
        "to do": ", ".join(f"{model} ({count})" for model, count in Counter(job["model"] for job in missing).items()),
        "models": ", ".join(dict.fromkeys(record["model"] for record in records)),
        "data": ", ".join(dict.fromkeys(record["data"] for record in records)),
        "seeds": values_of(records, "seed"),
        "epochs": values_of(records, "epochs"),
        "run": " to ".join(dict.fromkeys((times[0], times[-1]))) + " UTC" if times else "",
        "processor": "; ".join(dict.fromkeys(f"{m.get('cpu')}, {m.get('cores')} cores" for m in machines)),
        "weights": ", ".join(sorted(weights)) or "each model's own, which may differ from one another",
        "commit": ", ".join(dict.fromkeys(str(m["commit"]) for m in machines if m.get("commit"))),
    }
    return [(name, text or NOT_MEASURED) for name, text in facts.items() if text or name != "to do"]
