"""Where jobs run: here, one after the other, or spread over a Ray cluster."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib_dskd.benchmark.config import Job, Task
from anomalib_dskd.benchmark.run_job import failure, now, run_job
from anomalib_dskd.errors import ArgumentError

__all__ = ["LocalRunner", "RayRunner"]

Progress = Callable[[Job, float, str], None]
"""Takes a job, the fraction of it that is done, and what it is at."""

LOG = "log.txt"
RETRIES = 3  # of a job whose machine was lost


class LocalRunner:
    """Runs jobs one after the other, each in a new process: a crash costs one job, and memory is measured alone.

    Args:
        environment: variables set for the jobs.
        progress: is told how a job gets on.
    """

    def __init__(self, environment: Mapping[str, str], progress: Progress) -> None:
        self.environment = environment
        self.progress = progress

    def run(self, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        """Yield the result of each job, done or failed; its log and predictions go into its folder."""
        for task in tasks:
            yield self.run_one(task)

    def run_one(self, task: Task) -> dict[str, Any]:
        """Return the result of a job, done or failed."""
        job, folder = task.job, task.folder
        self.progress(job, 0.0, "starting")
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(asdict(job), folder, task.training, sender))
        with _set_environment(self.environment):
            process.start()
        sender.close()  # so that the pipe ends with the process
        try:
            record = self._listen(job, receiver)
            process.join()
        except BaseException:  # Ctrl-C too: no job outlives the benchmark
            process.kill()
            process.join()
            raise
        return record if record is not None else failure(job, _death(process.exitcode, folder))

    def _listen(self, job: Job, receiver: Connection) -> dict[str, Any] | None:
        while True:
            try:
                kind, *contents = receiver.recv()
            except (EOFError, OSError):  # it ended, perhaps in the middle of a message
                return None
            if kind == "result":
                record: dict[str, Any] = contents[0]
                return record
            self.progress(job, *contents)


class RayRunner:
    """Runs jobs on a Ray cluster, as many at a time as its processors and GPUs allow.

    Ray does the scheduling, and repeats a job whose worker or machine is lost. The data and the run folder must
    be at the same path on each machine. Each job is trained by itself, whatever it could share.

    Args:
        environment: variables set for the jobs.
        progress: is told when a job has ended.
        address: of the cluster; by default one is started here.
        cpus: cores a job.
        gpus: GPUs a job.

    Raises:
        ArgumentError: Ray is not installed, or no machine has what a job is to get.
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
            import ray  # noqa: PLC0415 - an extra
        except ImportError as error:
            msg = "runner 'ray' needs Ray: pip install \"anomalib-dskd[ray]\". Or use the runner 'local'."
            raise ArgumentError(msg) from error
        self.ray = ray
        self.progress = progress
        self.address = address
        self.environment = environment
        self.resources = {"num_cpus": cpus, "num_gpus": gpus}

    def run(self, tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        """Yield the result of each job as it ends, done or failed; predictions are brought back to its folder."""
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
            waiting = {work.remote(asdict(task.job), dict(self.environment)): task for task in tasks}
            while waiting:
                (ended,), _ = ray.wait(list(waiting), num_returns=1)
                task = waiting.pop(ended)
                yield self._collect(ended, task.job, task.folder)
        finally:
            if started_here:
                ray.shutdown()

    def _nodes(self) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = self.ray.nodes()  # type: ignore[no-untyped-call]
        return nodes

    def _check_machines(self) -> None:
        """Raise if no machine can run a job: Ray would wait for one for ever."""
        machines = [node["Resources"] for node in self._nodes() if node["Alive"]]
        for option, resource in (("cpus", "CPU"), ("gpus", "GPU")):
            asked = self.resources[f"num_{option}"]
            largest = max((machine.get(resource, 0) for machine in machines), default=0)
            if asked > largest:
                msg = f"{option} {asked} a job: no machine of the cluster has more than {largest:g}. Give --{option}."
                raise ArgumentError(msg)

    def _collect(self, reference: Any, job: Job, folder: Path) -> dict[str, Any]:  # noqa: ANN401 - Ray's own type
        try:
            record, files = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            return failure(job, f"failed on the cluster: {error}")
        except self.ray.exceptions.RayError as error:
            return failure(job, f"lost on the cluster, after {RETRIES} retries: {error}")
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
        self.progress(job, 1.0, "done")
        result: dict[str, Any] = record
        return result


@contextmanager
def _set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for processes that are started within the context."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(values: dict[str, Any], folder: Path, training: Path | None, sender: Connection) -> None:
    """Run a job in a new process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (folder / LOG).open("w", encoding="utf-8") as log:
        for stream in (1, 2):  # what libraries write past Python, and what they hold from their import, too
            os.dup2(log.fileno(), stream)
        task = Task(Job.from_dict(values), folder, training)
        sender.send(("result", _attempt(task, lambda *news: sender.send(("progress", *news)))))


def _end_with_parent() -> None:
    """End this process when the benchmark's is gone, however it went: nothing trains beside its continuation."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_remotely(values: dict[str, Any], environment: dict[str, str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Run a job on another machine; return its result, and the contents of the files that it made."""
    with TemporaryDirectory(prefix="anomalib-dskd-") as folder:
        record = LocalRunner(environment, lambda *_: None).run_one(Task(Job.from_dict(values), Path(folder)))
        return record, {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def _attempt(task: Task, report: Callable[[float, str], None]) -> dict[str, Any]:
    started = now()
    try:
        return run_job(task.job, task.folder, report, task.training)
    except Exception as error:  # whatever a foreign model raises is a row in the report
        traceback.print_exc()
        return failure(task.job, f"{type(error).__name__}: {error}", started)


def _death(exit_code: int | None, folder: Path) -> str:
    killed = (
        f"was killed by signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"ended with {exit_code}"
    )
    hint = " (9 is often the system's, out of memory)" if exit_code == -9 else ""  # noqa: PLR2004
    return f"the job's process {killed}{hint} before it had a result; see {folder / LOG}"
