"""The command ``anomalib-dskd``: what anomalib's own command has not."""

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

NOT_IN_RESULTS = ("run_folder", "runner", "ray_address", "cpus", "gpus", "config")
"""What may change between the first run of a benchmark and its continuation."""
OF_TRAINING = (
    "model",
    "trainer",
    "optimizer",
    "lr_scheduler",
    "logging",
    "default_root_dir",
    "seed_everything",
    "ckpt_path",
)
"""What a configuration of ``anomalib train`` has beside the data."""
MOST_NAMED = 3  # files named in a row of a table
MOST_ROWS = 5  # of a kind of finding, such as pictures that resemble one another

FAILED, WRONG, STOPPED = 1, 2, 130  # exit codes


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 for failed jobs or faulty data, or 2 for wrong arguments or folders."""
    parser, subcommands = _parsers()
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    name = options.subcommand
    try:
        run = {"benchmark": _benchmark, "report": _report, "check": _check}[name]
        return run(subcommands[name], options[name], console)
    except DskdError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return WRONG
    except KeyboardInterrupt:
        goes_on = ": what is finished is kept, and the same command goes on" if name == "benchmark" else ""
        console.print(f"stopped{goes_on}", soft_wrap=True)
        return STOPPED


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Return the command's parser, and those of its subcommands."""
    parser = ArgumentParser(prog="anomalib-dskd", description="Check data, and compare detectors side by side.")
    commands = parser.add_subcommands(required=True)
    helps = {
        "check": "look at every file of a data set, before any time is spent on it",
        "benchmark": "train, test and measure detectors side by side; goes on where it was stopped",
        "report": "write a benchmark's results.csv, report.md and report.html anew",
    }
    subcommands = {name: ArgumentParser(description=f"{text[:1].upper()}{text[1:]}.") for name, text in helps.items()}
    check = subcommands["check"]
    check.add_argument("--config", action="config", help="YAML file, such as one for `anomalib train`")
    check.add_subclass_arguments(AnomalibDataModule, "data", required=True, help="data module, as for `anomalib train`")
    check.add_argument("--format", type=Literal["table", "json"], default="table", help="for people or for machines")
    for name in OF_TRAINING:
        check.add_argument(f"--{name}", type=Any, help="ignored: a configuration of `anomalib train` has it")
    subcommands["benchmark"].add_argument("--config", action="config", help="YAML file with the options below")
    subcommands["benchmark"].add_class_arguments(BenchmarkConfig)
    report = subcommands["report"]
    report.add_argument("run_folder", type=str, help="folder that `benchmark` wrote")
    report.add_argument("--gallery_images", type=int, default=6, help="images a heading of the gallery; 0 for none")
    for name, subcommand in subcommands.items():
        commands.add_subcommand(name, subcommand, help=helps[name])
    return parser, subcommands


def _benchmark(parser: ArgumentParser, options: Namespace, console: Console) -> int:
    kept = Namespace(**{name: value for name, value in vars(options).items() if name not in NOT_IN_RESULTS})
    values = vars(parser.instantiate_classes(options))
    config = BenchmarkConfig(**{name: value for name, value in values.items() if name != "config"})
    return 0 if run_benchmark(config, parser.dump(kept, skip_validation=True), console) else FAILED


def _report(_: ArgumentParser, options: Namespace, console: Console) -> int:
    for path in write_report(Path(options.run_folder), gallery_images=options.gallery_images):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
    return 0


def _check(parser: ArgumentParser, options: Namespace, console: Console) -> int:
    data = parser.instantiate_classes(Namespace(data=options.data)).data
    findings = check_data(
        data,
        progress=lambda paths: track(paths, "looking at images", console=console, disable=not console.is_terminal),
    )
    counts = Counter(finding.severity for finding in findings)
    if options.format == "json":
        print(json.dumps({"counts": counts, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print_findings(findings, counts)
    return FAILED if counts["error"] else 0


def _print_findings(findings: list[Finding], counts: Mapping[Severity, int]) -> None:
    console = Console()
    # a path that is cut off names no file
    columns = [Column(name, overflow="fold") for name in ("", "what", "files")]
    table = Table(*columns, show_lines=True)
    rows: Counter[str] = Counter()
    for finding in findings:
        rows[finding.kind] += 1
        if rows[finding.kind] > MOST_ROWS:
            continue
        more = len(finding.files) - MOST_NAMED
        named = [*finding.files[:MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]
        table.add_row(finding.severity, Text(finding.message), Text("\n".join(named)))
    for kind, number in rows.items():
        if number > MOST_ROWS:
            table.add_row("", Text(f"{number - MOST_ROWS} more of the kind {kind!r}: --format json names them"), "")
    if findings:
        console.print(table)
    summary = ", ".join(f"{counts[severity]} {severity}s" for severity in get_args(Severity))
    console.print(summary if findings else "nothing to remark", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
