"""The command ``anomalib-dskd``."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from anomalib_dskd.benchmark.config import BenchmarkConfig, expand
from anomalib_dskd.benchmark.hub_cache import environment, write_hub_cache
from anomalib_dskd.benchmark.progress import BenchmarkProgress
from anomalib_dskd.benchmark.run_folder import RunFolder
from anomalib_dskd.benchmark.runners import LocalRunner, RayRunner
from anomalib_dskd.errors import DskdError

__all__ = ["main", "run_benchmark"]

NOT_IN_RESULTS = ("run_folder", "runner", "ray_address", "cpus", "gpus", "config")
"""What may change between the first run of a benchmark and its continuation."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0 if all went well, 1 if a job failed, 2 if the arguments or the folder are wrong."""
    parser, benchmark = _parsers()
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        if options.subcommand == "report":
            return _report(Path(options.report.run_folder), console)
        text = _kept(benchmark, options.benchmark)
        values = vars(benchmark.instantiate_classes(options.benchmark))
        config = BenchmarkConfig(**{name: value for name, value in values.items() if name != "config"})
        return run_benchmark(config, text, console)
    except DskdError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; finished jobs are kept, the same command goes on from there")
        return 130


def run_benchmark(config: BenchmarkConfig, config_text: str, console: Console) -> int:
    """Do all jobs that are not done yet, each result on disk at once; then write the report.

    Args:
        config: what to compare.
        config_text: the same as YAML, to be kept beside the results.
        console: for progress and errors.

    Returns:
        0, or 1 if a job failed.

    Raises:
        ArgumentError: a job cannot be built as it is asked for, or the folder holds other results.
        DataError: the run folder cannot be written.
        TeacherWeightsError: a file of weights is missing, unreadable, or of another architecture.
    """
    from anomalib_dskd.benchmark.run_job import check_job  # noqa: PLC0415 - imports PyTorch

    jobs = expand(config)
    for job in jobs:
        check_job(job)
    with RunFolder(config.run_folder, config_text) as folder:
        cache = folder.path / "weights"
        write_hub_cache(config.weights, cache)
        finished = folder.finished()
        waiting = [(job, folder.job_folder(job.id)) for job in jobs if job.id not in finished]
        failed = 0
        with BenchmarkProgress(len(jobs), len(jobs) - len(waiting), console) as progress:
            runner = _runner(config, environment(cache) if config.weights else {}, progress)
            by_id = {job.id: job for job, _ in waiting}
            for record in runner.run(waiting):
                folder.append(record)
                failed += record["status"] == "failed"
                progress.finish(by_id[record["job"]], _outcome(record))
        _report(folder.path, console)
    return 1 if failed else 0


def _runner(config: BenchmarkConfig, variables: dict[str, str], progress: BenchmarkProgress) -> LocalRunner | RayRunner:
    if config.runner == "local":
        return LocalRunner(variables, progress.update)
    return RayRunner(variables, progress.update, address=config.ray_address, cpus=config.cpus, gpus=config.gpus)


def _outcome(record: dict[str, Any]) -> str:
    if record["status"] == "failed":
        return f"FAILED: {record['reason']}"
    shown = [f"{name} {100 * value:.1f}" for name, value in record["figures"].items() if value is not None]
    return f"{', '.join(shown)}; trained {record['training']['fit_seconds']:.0f} s"


def _report(folder: Path, console: Console) -> int:
    from anomalib_dskd.benchmark.report import write_report  # noqa: PLC0415 - imports matplotlib

    for path in write_report(folder):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def _parsers() -> tuple[ArgumentParser, ArgumentParser]:
    """Return the command's parser, and that of its subcommand ``benchmark``."""
    parser = ArgumentParser(
        prog="anomalib-dskd", description="Compare detectors of anomalib, and of plugins, side by side."
    )
    commands = parser.add_subcommands(required=True)
    benchmark = ArgumentParser(description="Train and test models on data sets, and report them side by side.")
    benchmark.add_argument("--config", action="config", help="YAML file with the options below")
    benchmark.add_class_arguments(BenchmarkConfig)
    commands.add_subcommand("benchmark", benchmark, help="train, test and measure; goes on where it was stopped")
    report = ArgumentParser(description="Write results.csv, report.md and report.html anew from a run folder.")
    report.add_argument("run_folder", type=str, help="folder that `benchmark` wrote")
    commands.add_subcommand("report", report, help="write the report of a run folder anew")
    return parser, benchmark


def _kept(parser: ArgumentParser, options: Namespace) -> str:
    """Return the configuration as YAML, without what may change when a benchmark is continued."""
    kept = Namespace(**{name: value for name, value in vars(options).items() if name not in NOT_IN_RESULTS})
    text: str = parser.dump(kept, skip_validation=True)
    return text


if __name__ == "__main__":
    sys.exit(main())
