"""The command ``anomalib-dskd`` with its subcommands ``check``, ``benchmark`` and ``report``."""

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from anomalib_dskd.benchmark.config import BenchmarkConfig
from anomalib_dskd.benchmark.report.write_report import write_report
from anomalib_dskd.benchmark.run_benchmark import run_benchmark
from anomalib_dskd.check.check_data import check_data
from anomalib_dskd.check.finding import Finding, Severity
from anomalib_dskd.errors import DskdError

__all__ = ["main"]

EXECUTION_OPTIONS = ("run_folder", "runner", "ray_address", "cpus", "gpus", "config")
"""Options of a benchmark that do not affect results, so that they may change when it is resumed."""
TRAINING_OPTIONS = (
    "model",
    "trainer",
    "optimizer",
    "lr_scheduler",
    "logging",
    "default_root_dir",
    "seed_everything",
    "ckpt_path",
)
"""Sections of a configuration of ``anomalib train`` that ``check`` ignores."""
MAX_FILES = 3  # listed per finding in the table
MAX_ROWS = 5  # per kind of finding in the table
FAILED, INVALID, INTERRUPTED = 1, 2, 130  # exit codes
HELP = {
    "check": "check all files of a data set before training",
    "benchmark": "train, test and measure detectors; resumes an interrupted benchmark",
    "report": "regenerate a benchmark's results.csv, report.md and report.html",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 for failed jobs or errors in the data, or 2 for wrong arguments or folders."""
    parser, subcommands = _parsers()
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    name = options.subcommand
    try:
        run = {"benchmark": _benchmark, "report": _report, "check": _check}[name]
        return run(subcommands[name], options[name], console)
    except DskdError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return INVALID
    except KeyboardInterrupt:
        resume = "; finished jobs are saved, and the same command resumes the benchmark" if name == "benchmark" else ""
        console.print(f"interrupted{resume}", soft_wrap=True)
        return INTERRUPTED


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Return the command's parser, and those of its subcommands."""
    parser = ArgumentParser(prog="anomalib-dskd", description="Check data sets, and compare detectors.")
    commands = parser.add_subcommands(required=True)
    subcommands = {name: ArgumentParser(description=f"{text.capitalize()}.") for name, text in HELP.items()}
    check = subcommands["check"]
    check.add_argument("--config", action="config", help="YAML file, such as one for `anomalib train`")
    check.add_subclass_arguments(AnomalibDataModule, "data", required=True, help="data module, as for `anomalib train`")
    check.add_argument("--format", type=Literal["table", "json"], default="table", help="output format")
    for name in TRAINING_OPTIONS:
        check.add_argument(f"--{name}", type=Any, help="ignored, so that a configuration of `anomalib train` is valid")
    subcommands["benchmark"].add_argument("--config", action="config", help="YAML file with the options below")
    subcommands["benchmark"].add_class_arguments(BenchmarkConfig)
    report = subcommands["report"]
    report.add_argument("run_folder", type=str, help="folder that `benchmark` wrote")
    report.add_argument("--gallery_images", type=int, default=6, help="images per section of the gallery; 0 for none")
    for name, subcommand in subcommands.items():
        commands.add_subcommand(name, subcommand, help=HELP[name])
    return parser, subcommands


def _benchmark(parser: ArgumentParser, options: Namespace, console: Console) -> int:
    recorded = Namespace(**{name: value for name, value in vars(options).items() if name not in EXECUTION_OPTIONS})
    values = vars(parser.instantiate_classes(options))
    config = BenchmarkConfig(**{name: value for name, value in values.items() if name != "config"})
    return 0 if run_benchmark(config, parser.dump(recorded, skip_validation=True), console) else FAILED


def _report(_: ArgumentParser, options: Namespace, console: Console) -> int:
    for path in write_report(Path(options.run_folder), gallery_images=options.gallery_images):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def _check(parser: ArgumentParser, options: Namespace, console: Console) -> int:
    data = parser.instantiate_classes(Namespace(data=options.data)).data
    findings = check_data(
        data,
        progress=lambda paths: track(paths, "checking images", console=console, disable=not console.is_terminal),
    )
    counts = Counter(finding.severity for finding in findings)
    if options.format == "json":
        print(json.dumps({"counts": counts, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print_findings(findings, counts)
    return FAILED if counts["error"] else 0


def _print_findings(findings: list[Finding], counts: Mapping[Severity, int]) -> None:
    console = Console()
    if not findings:
        console.print("no issues found")
        return
    columns = [Column(name, overflow="fold") for name in ("severity", "finding", "files")]  # no path is cut off
    table = Table(*columns, show_lines=True)
    rows: Counter[str] = Counter()
    for finding in findings:
        rows[finding.kind] += 1
        if rows[finding.kind] <= MAX_ROWS:
            more = len(finding.files) - MAX_FILES
            files = [*finding.files[:MAX_FILES], *([f"and {more} more"] if more > 0 else [])]
            table.add_row(finding.severity, Text(finding.message), Text("\n".join(files)))
    for kind, number in rows.items():
        if number > MAX_ROWS:
            table.add_row("", Text(f"{number - MAX_ROWS} more of kind {kind!r}: --format json lists them"), "")
    console.print(table)
    summary = ", ".join(f"{counts[severity]} {severity}s" for severity in get_args(Severity))
    console.print(summary, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
