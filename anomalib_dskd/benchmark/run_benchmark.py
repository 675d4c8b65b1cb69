"""A whole benchmark: jobs that are not done yet, then the report."""

from collections import Counter
from typing import Any

from rich.console import Console

from anomalib_dskd.benchmark.config import BenchmarkConfig, Job, Task, expand
from anomalib_dskd.benchmark.hub_cache import describe_weights, environment, write_hub_cache
from anomalib_dskd.benchmark.progress import BenchmarkProgress
from anomalib_dskd.benchmark.report.write_report import write_report
from anomalib_dskd.benchmark.run_folder import RunFolder
from anomalib_dskd.benchmark.run_job import check_job, training_id
from anomalib_dskd.benchmark.runners import LocalRunner, RayRunner
from anomalib_dskd.errors import DataError

__all__ = ["run_benchmark"]


def run_benchmark(config: BenchmarkConfig, config_text: str, console: Console) -> bool:
    """Do all jobs that are not done yet, each result on disk at once; then write the report.

    Args:
        config: what to compare.
        config_text: the same as YAML, to be kept beside the results.
        console: for progress and errors.

    Returns:
        Whether no job failed.

    Raises:
        ArgumentError: a job cannot be built as it is asked for, or the folder holds other results.
        DataError: the run folder cannot be written.
        TeacherWeightsError: a file of weights is missing, unreadable, or of another architecture.
    """
    jobs = expand(config, describe_weights(config.weights))
    for job in jobs:
        if job.seed == config.seeds[0]:  # the others differ in the seed alone
            check_job(job)
    try:
        return _run(config, config_text, jobs, console)
    except OSError as error:
        msg = f"run folder {str(config.run_folder)!r}: {error}. Finished results are kept; the same command goes on."
        raise DataError(msg) from error


def _run(config: BenchmarkConfig, config_text: str, jobs: list[Job], console: Console) -> bool:
    with RunFolder(config.run_folder, config_text) as folder:
        cache = folder.path / "weights"
        folder.keep_plan(jobs)
        finished = folder.finished()
        waiting = _tasks(jobs, finished, folder)
        if waiting:
            write_hub_cache(config.weights, cache)
        by_id = {task.job.id: task.job for task in waiting}
        failed = 0
        with BenchmarkProgress(len(jobs), len(jobs) - len(waiting), console) as progress:
            runner = _runner(config, environment(cache) if config.weights else {}, progress)
            for record in runner.run(waiting):
                folder.append(record)
                failed += record["status"] == "failed"
                progress.finish(by_id[record["job"]], _outcome(record))
        if not failed:
            folder.drop_trainings()
        for path in write_report(folder.path):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return not failed


def _tasks(jobs: list[Job], finished: set[str], folder: RunFolder) -> list[Task]:
    """List the jobs that are not done, with a file for a training that others of the run, done or not, have too."""
    trainings = {job.id: training_id(job) for job in jobs}
    uses = Counter(trainings.values())
    tasks = []
    for job in jobs:
        if job.id not in finished:
            name = trainings[job.id]
            shared = name is not None and uses[name] > 1
            tasks.append(Task(job, folder.job_folder(job.id), folder.training(str(name)) if shared else None))
    return tasks


def _runner(config: BenchmarkConfig, variables: dict[str, str], progress: BenchmarkProgress) -> LocalRunner | RayRunner:
    if config.runner == "local":
        return LocalRunner(variables, progress.update)
    return RayRunner(variables, progress.update, address=config.ray_address, cpus=config.cpus, gpus=config.gpus)


def _outcome(record: dict[str, Any]) -> str:
    if record["status"] == "failed":
        return f"FAILED: {record['reason']}"
    shown = [f"{name} {100 * value:.1f}" for name, value in record["figures"].items() if value is not None]
    return f"{', '.join(shown)}; trained {record['training']['fit_seconds']:.0f} s"
