"""A benchmark's folder on disk: what it compares, and each result from the moment that it is there."""

import difflib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from typing_extensions import Self

from anomalib_dskd.benchmark.config import Job
from anomalib_dskd.errors import ArgumentError, DataError, DskdError

__all__ = ["CONFIG", "PREDICTIONS", "RESULTS", "RunFolder", "job_path", "read_plan", "read_results"]

CONFIG = "config.yaml"
RESULTS = "results.jsonl"
PREDICTIONS = "predictions.npz"
PLAN = "plan.json"
STATUS = ("done", "failed")
TRAININGS = "trainings"
MOST_NAMED = 3  # links in an error


class RunFolder:
    """Holds ``config.yaml``, ``results.jsonl`` with one line a finished job, and a folder for each job.

    A result is on disk before the next job starts. Use it as a context manager: only one process may write.

    Args:
        path: the folder; made if it is not there.
        config: the configuration as YAML, without what does not change results (the folder, the runner).

    Raises:
        ArgumentError: the folder holds the results of another configuration, or links, or another process writes there.
        DataError: the folder cannot be written.
    """

    def __init__(self, path: Path, config: str) -> None:
        self.path = path
        self.config = config
        self._lock = FileLock(path / ".lock", timeout=0)

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_links()
            self._lock.acquire()
            self._keep_config()
            self._drop_half_line()
        except Timeout as error:
            msg = f"run folder {str(self.path)!r} is in use by another benchmark. Wait for it, or give another folder."
            raise ArgumentError(msg) from error
        except OSError as error:
            self._lock.release()
            raise DataError(self._cannot_write(error)) from error
        except DskdError:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def job_folder(self, job_id: str) -> Path:
        """Return the folder of a job's log and predictions, made if it is not there."""
        folder = job_path(self.path, job_id)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def training(self, name: str) -> Path:
        """Return the file of trained weights that several jobs use."""
        return self.path / TRAININGS / f"{name}.pt"

    def keep_plan(self, jobs: Sequence[Job]) -> None:
        """Write down which jobs the configuration means, so that a report can tell what is missing.

        Raises:
            ArgumentError: it meant others before; a file of weights has changed, or the program that reads it.
        """
        plan = [{"job": job.id, **json.loads(json.dumps(asdict(job), default=str))} for job in jobs]
        before = read_plan(self.path)
        if before is not None:
            if [job["job"] for job in before] == [job["job"] for job in plan]:
                return
            if self.finished():
                raise ArgumentError(self._other_jobs(before, plan))
            (self.path / RESULTS).unlink(missing_ok=True)  # failures of jobs that are not meant any more
        _write_whole(self.path / PLAN, json.dumps(plan, indent=1))

    def _other_jobs(self, before: list[dict[str, Any]], plan: list[dict[str, Any]]) -> str:
        changes = (
            f"{new['model']}: {name} was {old.get(name)}, is {new.get(name)}"
            for old, new in zip(before, plan, strict=False)
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and name != "job"
        )
        changed = "; ".join(itertools.islice(changes, MOST_NAMED)) or f"{len(before)} jobs were, {len(plan)} are now"
        return (
            f"run folder {str(self.path)!r} holds results of other jobs, though of the same configuration: "
            f"{changed}. Give another --run_folder, or restore what has changed."
        )

    def drop_trainings(self) -> None:
        """Delete the trained weights that jobs have shared: none needs them any more."""
        shutil.rmtree(self.path / TRAININGS, ignore_errors=True)

    def finished(self) -> set[str]:
        """Return the jobs that are done; one that failed is to be tried again."""
        return {record["job"] for record in read_results(self.path) if record["status"] == "done"}

    def append(self, record: dict[str, Any]) -> None:
        """Write a job's result down at once.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        line = json.dumps(record, sort_keys=True) + "\n"
        try:
            with (self.path / RESULTS).open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(self._cannot_write(error)) from error

    def _refuse_links(self) -> None:
        """Write nothing where a folder that someone has sent points to."""
        links = [str(path) for path in sorted(self.path.rglob("*")) if path.is_symlink()]
        if links:
            msg = (
                f"run folder {str(self.path)!r} holds links, through which results would go elsewhere: "
                f"{', '.join(links[:MOST_NAMED])}. Replace them by what they point to, or give another --run_folder."
            )
            raise ArgumentError(msg)

    def _keep_config(self) -> None:
        kept = self.path / CONFIG
        before = kept.read_text(encoding="utf-8") if kept.is_file() else None
        if before is None or (before != self.config and not self.finished()):
            _write_whole(kept, self.config)
        elif before != self.config:
            changes = difflib.unified_diff(before.splitlines(), self.config.splitlines(), lineterm="", n=0)
            changed = "\n".join(line for line in changes if not line.startswith(("---", "+++", "@@")))
            msg = (
                f"run folder {str(self.path)!r} holds results of another configuration (- there, + now):\n{changed}\n"
                "Give another --run_folder, or the same configuration as before."
            )
            raise ArgumentError(msg)

    def _drop_half_line(self) -> None:
        """Cut off a line that a killed process left unfinished, so that the next one starts afresh."""
        results = self.path / RESULTS
        if not results.is_file():
            return
        contents = results.read_bytes()
        if contents and not contents.endswith(b"\n"):
            with results.open("r+b") as file:
                file.truncate(contents.rfind(b"\n") + 1)

    def _cannot_write(self, error: OSError) -> str:
        return (
            f"run folder {str(self.path)!r} cannot be written: {error}. Finished results are kept; make room or "
            "change the permissions, and give the same command again."
        )


def _write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def job_path(run_folder: Path, job_id: str) -> Path:
    """Return where a job's log and predictions are."""
    return run_folder / "jobs" / job_id


def read_plan(path: Path) -> list[dict[str, Any]] | None:
    """Return all jobs of a benchmark, done or not, each with its number ``job``; none if that was not written down.

    Raises:
        DataError: the file holds something else.
    """
    file = path / PLAN
    if not file.is_file():
        return None
    try:
        plan = json.loads(file.read_bytes())
        return [{**job, "job": str(job["job"]), "model": str(job["model"])} for job in plan]
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{str(file)!r} is no plan of a benchmark: {error!r}. Remove it: it is written anew."
        raise DataError(msg) from error


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the latest result of each job, in the order in which the jobs were first finished.

    A last line that was cut off is left out.

    Raises:
        DataError: another line is no result.
    """
    results = path / RESULTS
    if not results.is_file():
        return []
    lines = results.read_bytes().split(b"\n")
    latest: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line's end is empty, or cut off
        try:
            record = json.loads(line)
            if record["status"] not in STATUS:
                msg = f"status {record['status']!r} is neither of {', '.join(STATUS)}"
                raise ValueError(msg)
            latest[record["job"]] = record
        except (ValueError, TypeError, KeyError) as error:
            msg = f"line {number} of {str(results)!r} is no result of a benchmark: {error}. Remove that line."
            raise DataError(msg) from error
    return list(latest.values())
