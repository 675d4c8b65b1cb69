"""Runners of benchmark jobs: sequentially on this machine, or in parallel on a Ray cluster."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib_dskd.benchmark.config import Job, Task
from anomalib_dskd.benchmark.job_result import JobResult, failure, now
from anomalib_dskd.benchmark.run_job import run_job
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.file_writing import write_file

__all__ = ["LocalRunner", "RayRunner"]

Progress = Callable[[Job, float, str], None]
"""Receives a job, the fraction of it that is done, and its current step."""

LOG = "log.txt"
RETRIES = 3  # of a job whose worker or machine failed


class LocalRunner:
    """Runs jobs sequentially, each in a new process: a crash affects one job, and memory is measured per job.

    Args:
        environment: environment variables of the jobs.
        progress: called with the progress of the current job.
    """

    def __init__(self, environment: Mapping[str, str], progress: Progress) -> None:
        self.environment = environment
        self.progress = progress

    def run(self, tasks: Sequence[Task]) -> Iterator[JobResult]:
        """Yield the result of each job, done or failed; log and predictions are written to the job's folder."""
        for task in tasks:
            yield self.run_one(task)

    def run_one(self, task: Task) -> JobResult:
        """Return the result of a job, done or failed."""
        job = task.job
        self.progress(job, 0.0, "starting")
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(task, sender))
        with _set_environment(self.environment):
            process.start()
        sender.close()  # the pipe then closes when the process ends
        try:
            result = self._listen(job, receiver)
            process.join()
        except BaseException:  # including Ctrl-C: no job outlives the benchmark
            process.kill()
            process.join()
            raise
        return result if result is not None else failure(job, _exit_reason(process.exitcode, task.folder))

    def _listen(self, job: Job, receiver: Connection) -> JobResult | None:
        while True:
            try:
                kind, *contents = receiver.recv()
            except (EOFError, OSError):  # the process ended, possibly within a message
                return None
            if kind == "result":
                result: JobResult = contents[0]
                return result
            self.progress(job, *contents)


class RayRunner:
    """Runs jobs on a Ray cluster, as many in parallel as its CPU cores and GPUs allow.

    Ray schedules the jobs, and repeats a job whose worker or machine failed. The data and the run folder must have the
    same path on each machine. Jobs do not share training runs.

    Args:
        environment: environment variables of the jobs.
        progress: called when a job has ended.
        address: of the cluster; by default one is started on this machine.
        cpus: cores per job.
        gpus: GPUs per job.

    Raises:
        ArgumentError: Ray is not installed.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        progress: Progress,
        *,
        address: str | None = None,
        cpus: int = 2,
        gpus: int = 0,
    ) -> None:
        try:
            import ray  # noqa: PLC0415 - optional dependency
        except ImportError as error:
            msg = "runner 'ray' needs Ray: pip install \"anomalib-dskd[ray]\". Or use the runner 'local'."
            raise ArgumentError(msg) from error
        self.ray = ray
        self.progress = progress
        self.address = address
        self.environment = environment
        self.resources = {"num_cpus": cpus, "num_gpus": gpus}

    def run(self, tasks: Sequence[Task]) -> Iterator[JobResult]:
        """Yield the result of each job as it ends, done or failed; predictions are copied to the job's folder.

        Raises:
            ArgumentError: the cluster cannot be reached, or no machine has the cores and GPUs of a job.
        """
        ray = self.ray
        started_here = not ray.is_initialized()
        if started_here:
            try:
                ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
            except (OSError, ValueError) as error:
                where = "started here" if self.address is None else f"reached at {self.address!r}"
                msg = (
                    f"a Ray cluster cannot be {where}: {error}. Start one with `ray start --head` and give its "
                    "--ray_address, or use --runner local."
                )
                raise ArgumentError(msg) from error
        try:
            self._check_machines()
            work = ray.remote(_work_remotely).options(**self.resources, max_retries=RETRIES)
            waiting = {work.remote(task.job, dict(self.environment)): task for task in tasks}
            while waiting:
                (ended,), _ = ray.wait(list(waiting), num_returns=1)
                task = waiting.pop(ended)
                yield self._collect(ended, task.job, task.folder)
        finally:
            if started_here:
                ray.shutdown()

    def _check_machines(self) -> None:
        """Raise if no machine can run a job: Ray would wait forever."""
        nodes = self.ray.nodes()  # type: ignore[no-untyped-call]
        machines = [node["Resources"] for node in nodes if node["Alive"]]
        for option, resource in (("cpus", "CPU"), ("gpus", "GPU")):
            asked = self.resources[f"num_{option}"]
            largest = max((machine.get(resource, 0) for machine in machines), default=0)
            if asked > largest:
                msg = f"{option} {asked} per job: no machine of the cluster has more than {largest:g}. Give --{option}."
                raise ArgumentError(msg)

    def _collect(self, reference: Any, job: Job, folder: Path) -> JobResult:  # noqa: ANN401 - Ray's own type
        try:
            result, files = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            return failure(job, f"failed on the cluster: {error}")
        except self.ray.exceptions.RayError as error:
            return failure(job, f"lost on the cluster, after {RETRIES} retries: {error}")
        for name, contents in files.items():
            write_file(folder / name, contents)
        self.progress(job, 1.0, "done")
        collected: JobResult = result
        return collected


@contextmanager
def _set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started within the context."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(task: Task, sender: Connection) -> None:
    """Run a job in a new process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (task.folder / LOG).open("w", encoding="utf-8") as log:
        for stream in (1, 2):  # including the output of native code and of streams opened at import
            os.dup2(log.fileno(), stream)
        sender.send(("result", _attempt(task, lambda *progress: sender.send(("progress", *progress)))))


def _end_with_parent() -> None:
    """End this process with its parent, however that ended: no job may still train when the benchmark is resumed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_remotely(job: Job, environment: dict[str, str]) -> tuple[JobResult, dict[str, bytes]]:
    """Run a job on another machine; return its result, and the contents of its files."""
    with TemporaryDirectory(prefix="anomalib-dskd-") as folder:
        result = LocalRunner(environment, lambda *_: None).run_one(Task(job, Path(folder)))
        return result, {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _attempt(task: Task, report: Callable[[float, str], None]) -> JobResult:
    started = now()
    try:
        return run_job(task.job, task.folder, report, task.checkpoint)
    except Exception as error:  # any error of a third-party model becomes a row of the report
        traceback.print_exc()
        return failure(task.job, f"{type(error).__name__}: {error}", started)


def _exit_reason(exit_code: int | None, folder: Path) -> str:
    ended = f"ended with exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        ended = f"was killed by signal {-exit_code}"
    hint = " (often sent by the system when memory runs out)" if exit_code == -9 else ""  # noqa: PLR2004
    return f"the job's process {ended}{hint} before it had a result; see {folder / LOG}"
