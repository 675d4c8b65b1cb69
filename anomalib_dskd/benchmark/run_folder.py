"""Run folder of a benchmark: its configuration, the list of its jobs, and the result of each finished job."""

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
from anomalib_dskd.benchmark.job_result import JobResult
from anomalib_dskd.errors import ArgumentError, DataError, DskdError
from anomalib_dskd.file_writing import write_file

__all__ = ["CONFIG", "PREDICTIONS", "RESULTS", "RunFolder", "job_path", "read_plan", "read_results"]

CONFIG = "config.yaml"
RESULTS = "results.jsonl"
PREDICTIONS = "predictions.npz"
PLAN = "plan.json"
CHECKPOINTS = "checkpoints"
MOST_NAMED = 3  # links or changes in an error


class RunFolder:
    """Holds ``config.yaml``, ``plan.json``, ``results.jsonl`` with one line per finished job, and a folder per job.

    A result is on disk before the next job starts. Use it as a context manager: only one process may write.

    Args:
        path: the folder; created if it does not exist.
        config: the configuration as YAML, without what does not affect results (the folder, the runner).

    Raises:
        ArgumentError: the folder holds results of another configuration, or links, or another process uses it.
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
            self._write_config()
            self._remove_incomplete_line()
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
        """Return the folder of a job's log and predictions; it is created if it does not exist."""
        folder = job_path(self.path, job_id)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def checkpoint(self, name: str) -> Path:
        """Return the file for the trained weights of a training run that several jobs share."""
        return self.path / CHECKPOINTS / f"{name}.pt"

    def delete_checkpoints(self) -> None:
        """Delete the weights of shared training runs, once all jobs are done."""
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)

    def write_plan(self, jobs: Sequence[Job]) -> None:
        """Write the list of all jobs, so that a report can tell which are missing.

        Raises:
            ArgumentError: the folder holds results of other jobs, because a file of weights or the program has changed.
        """
        plan = [{"job": job.id, **json.loads(json.dumps(asdict(job), default=str))} for job in jobs]
        before = read_plan(self.path)
        if before is not None:
            if [job["job"] for job in before] == [job["job"] for job in plan]:
                return
            if self.finished():
                raise ArgumentError(self._other_jobs(before, plan))
            (self.path / RESULTS).unlink(missing_ok=True)  # it holds only failures of the former jobs
        write_file(self.path / PLAN, json.dumps(plan, indent=1))

    def finished(self) -> set[str]:
        """Return the IDs of the jobs that are done; failed jobs are run again."""
        return {result.job for result in read_results(self.path) if result.status == "done"}

    def append(self, result: JobResult) -> None:
        """Write a job's result to disk.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        try:
            with (self.path / RESULTS).open("a", encoding="utf-8") as file:
                file.write(result.to_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(self._cannot_write(error)) from error

    def _refuse_links(self) -> None:
        """Raise if the folder, which may be from someone else, holds links to files outside."""
        links = [str(path) for path in sorted(self.path.rglob("*")) if path.is_symlink()]
        if links:
            msg = (
                f"run folder {str(self.path)!r} holds links, through which files outside would be overwritten: "
                f"{', '.join(links[:MOST_NAMED])}. Replace them by what they point to, or give another --run_folder."
            )
            raise ArgumentError(msg)

    def _write_config(self) -> None:
        file = self.path / CONFIG
        before = file.read_text(encoding="utf-8") if file.is_file() else None
        if before is None or (before != self.config and not self.finished()):
            write_file(file, self.config)
        elif before != self.config:
            changes = difflib.unified_diff(before.splitlines(), self.config.splitlines(), lineterm="", n=0)
            changed = "\n".join(line for line in changes if not line.startswith(("---", "+++", "@@")))
            msg = (
                f"run folder {str(self.path)!r} holds results of another configuration (- its lines, + yours):\n"
                f"{changed}\nGive another --run_folder, or the same configuration as before."
            )
            raise ArgumentError(msg)

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

    def _remove_incomplete_line(self) -> None:
        """Remove a last line that a killed process has not completed."""
        results = self.path / RESULTS
        contents = results.read_bytes() if results.is_file() else b""
        if contents and not contents.endswith(b"\n"):
            with results.open("r+b") as file:
                file.truncate(contents.rfind(b"\n") + 1)

    def _cannot_write(self, error: OSError) -> str:
        return (
            f"run folder {str(self.path)!r} cannot be written: {error}. Results of finished jobs are saved: free disk "
            "space or change the permissions, and run the same command again."
        )


def job_path(run_folder: Path, job_id: str) -> Path:
    """Return the folder of a job's log and predictions."""
    return run_folder / "jobs" / job_id


def read_plan(path: Path) -> list[dict[str, Any]] | None:
    """Return all jobs of a benchmark, done or not, each with its ID as ``job``; None if there is no ``plan.json``.

    Raises:
        DataError: the file is damaged.
    """
    file = path / PLAN
    if not file.is_file():
        return None
    try:
        plan = json.loads(file.read_bytes())
        return [{**job, "job": str(job["job"]), "model": str(job["model"])} for job in plan]
    except (ValueError, TypeError, KeyError) as error:
        msg = f"{str(file)!r} is not the plan of a benchmark: {error!r}. Delete it: the benchmark writes it again."
        raise DataError(msg) from error


def read_results(path: Path) -> list[JobResult]:
    """Return the latest result of each job, in the order of their first results; an incomplete last line is ignored.

    Raises:
        DataError: another line is not a result.
    """
    file = path / RESULTS
    if not file.is_file():
        return []
    latest: dict[str, JobResult] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            result = JobResult.from_json(line)
        except ValueError as error:
            msg = (
                f"line {number} of {str(file)!r} is not a result of a benchmark: {error}. Delete that line, and run "
                "the benchmark again."
            )
            raise DataError(msg) from error
        latest[result.job] = result
    return list(latest.values())
