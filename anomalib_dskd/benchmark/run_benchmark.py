"""Run of a whole benchmark: all jobs that are not done yet, then the report."""

from collections import Counter
from dataclasses import replace

from rich.console import Console

from anomalib_dskd.benchmark.build_job import check_job
from anomalib_dskd.benchmark.config import BenchmarkConfig, Job, Task, expand
from anomalib_dskd.benchmark.hub_cache import describe_weights, environment, write_hub_cache
from anomalib_dskd.benchmark.job_result import JobResult
from anomalib_dskd.benchmark.progress import BenchmarkProgress
from anomalib_dskd.benchmark.report.write_report import write_report
from anomalib_dskd.benchmark.run_folder import RunFolder
from anomalib_dskd.benchmark.run_job import training_run_id
from anomalib_dskd.benchmark.runners import LocalRunner, RayRunner
from anomalib_dskd.errors import DataError

__all__ = ["run_benchmark"]


def run_benchmark(config: BenchmarkConfig, config_text: str, console: Console) -> bool:
    """Run all jobs that are not done yet, saving each result at once; then write the report.

    Args:
        config: what to compare.
        config_text: the same as YAML, to be saved with the results.
        console: for progress and errors.

    Returns:
        Whether no job failed.

    Raises:
        ArgumentError: the model or data of a job cannot be built, or the folder holds other results.
        DataError: the run folder cannot be written.
        TeacherWeightsError: a file of weights is missing, unreadable, or of another architecture.
    """
    jobs = expand(config, describe_weights(config.weights))
    for job in {replace(job, seed=0).id: job for job in jobs}.values():  # one of those that differ only in the seed
        check_job(job)
    try:
        return _run(config, config_text, jobs, console)
    except OSError as error:
        msg = (
            f"run folder {str(config.run_folder)!r}: {error}. Results of finished jobs are saved: run the same command "
            "again."
        )
        raise DataError(msg) from error


def _run(config: BenchmarkConfig, config_text: str, jobs: list[Job], console: Console) -> bool:
    with RunFolder(config.run_folder, config_text) as folder:
        cache = folder.path / "weights"
        folder.write_plan(jobs)
        tasks = _tasks(jobs, folder.finished(), folder)
        if tasks:
            write_hub_cache(config.weights, cache)
        by_id = {task.job.id: task.job for task in tasks}
        failed = 0
        with BenchmarkProgress(len(jobs), len(jobs) - len(tasks), console) as progress:
            runner = _runner(config, environment(cache) if config.weights else {}, progress)
            for result in runner.run(tasks):
                folder.append(result)
                failed += result.status == "failed"
                progress.finish(by_id[result.job], _outcome(result))
        if not failed:
            folder.delete_checkpoints()
        for path in write_report(folder.path):
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return not failed


def _tasks(jobs: list[Job], finished: set[str], folder: RunFolder) -> list[Task]:
    """List the jobs that are not done, with a checkpoint for each training run that jobs, done or not, share."""
    run_ids = {job.id: training_run_id(job) for job in jobs}
    uses = Counter(run_ids.values())
    tasks = []
    for job in jobs:
        run_id = run_ids[job.id]
        checkpoint = folder.checkpoint(run_id) if run_id is not None and uses[run_id] > 1 else None
        if job.id not in finished:
            tasks.append(Task(job, folder.job_folder(job.id), checkpoint))
    return tasks


def _runner(config: BenchmarkConfig, variables: dict[str, str], progress: BenchmarkProgress) -> LocalRunner | RayRunner:
    if config.runner == "local":
        return LocalRunner(variables, progress.update)
    return RayRunner(variables, progress.update, address=config.ray_address, cpus=config.cpus, gpus=config.gpus)


def _outcome(result: JobResult) -> str:
    if result.status == "failed":
        return f"FAILED: {result.reason}"
    shown = [f"{name} {100 * value:.1f}" for name, value in vars(result.metrics).items() if value is not None]
    return f"{', '.join(shown)}; trained {result.training.fit_seconds or 0:.0f} s"
