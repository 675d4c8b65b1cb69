"""Command-line options, a quiet engine and Markdown tables that the experiment scripts share.

Scripts import this module first: it hides the warnings of the libraries that are imported after it.
"""

import argparse
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest import mock

import yaml

if TYPE_CHECKING:
    from anomalib.engine import Engine
    from anomalib.models.components import AnomalibModule

    from anomalib_dskd.benchmark.job_result import Metrics

warnings.simplefilter("ignore")

CONFIGS = Path(__file__).parents[1] / "configs"
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")  # of `anomalib test`
BENCHMARK_METRICS = {
    "image_AUROC": "image AUROC",
    "image_F1": "image F1",
    "pixel_AUROC": "pixel AUROC",
    "AUPRO": "AUPRO",
}  # of the benchmark, and how tables name them
NO_EVALUATION = {"visualizer": False, "evaluator": False}
OPTIONS: dict[str, dict[str, object]] = {
    "--root": {"type": Path, "required": True, "help": "folder of the Magnetic Tile Defects data set"},
    "--weights": {"required": True, "help": "file with the weights of resnet18.tv_in1k"},
    "--checkpoint": {"type": Path, "required": True, "help": "checkpoint of a trained anomalib_dskd.Dskd"},
    "--size": {"type": int, "default": 128, "help": "image height and width"},
    "--seeds": {"type": int, "nargs": "+", "default": [0], "help": "one training run for each"},
    "--epochs": {"type": int, "default": 40},
    "--every": {"type": int, "default": 10, "help": "epochs between two validations"},
    "--learning-rate": {"type": float, "default": 1e-3},
    "--precision": {"default": "bf16-mixed", "help": "training precision"},
    "--batch": {"type": int, "default": 16, "help": "batch size"},
    "--rounds": {"type": int, "default": 10, "help": "repetitions"},
}

RECOMMENDED: dict[str, object] = {
    name: value
    for name, value in yaml.safe_load((CONFIGS / "recommended.yaml").read_text())["model"]["init_args"].items()
    if name not in {"teacher", "image_size", "seed"}
}
"""Arguments of the recommended configuration, without those that the scripts set."""
TRAINING_OPTIONS = ("--root", "--weights", "--size", "--seeds", "--epochs", "--every", "--learning-rate", "--precision")


def option_parser(description: str | None, *names: str, **defaults: object) -> argparse.ArgumentParser:
    """Create a parser with some of ``OPTIONS``.

    Args:
        description: of the script, shown as it is.
        names: of the options, such as ``--root``.
        defaults: values that replace those of ``OPTIONS``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(name, **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser


def quiet_engine(folder: Path | str, **arguments: object) -> "Engine":
    """Create an engine that runs on the CPU, without logger, progress bar and model summary."""
    from anomalib.engine import Engine  # noqa: PLC0415 - takes seconds, and not every script needs it

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, accelerator="cpu", devices=1, **quiet, **arguments)


def build_peer(model_class: "type[AnomalibModule]", size: int) -> "AnomalibModule":
    """Create a model of anomalib with ResNet18 for images of ``size`` x ``size`` pixels."""
    pre_processor = model_class.configure_pre_processor(image_size=(size, size))
    return model_class(backbone="resnet18", pre_processor=pre_processor, **NO_EVALUATION)


@contextmanager
def offline_resnet18(weights: str) -> Iterator[None]:
    """Serve ResNet18's weights from a file to models that would download them from the Hugging Face hub."""
    from anomalib_dskd.benchmark.hub_cache import write_hub_cache  # noqa: PLC0415 - takes seconds, as above

    with TemporaryDirectory(prefix="anomalib-dskd-") as folder:
        write_hub_cache({"resnet18": weights}, Path(folder))
        with mock.patch.multiple("huggingface_hub.constants", HF_HUB_CACHE=folder, HF_HUB_OFFLINE=True):
            yield


class MemorySampler(threading.Thread):
    """Context manager that samples the memory of this process ten times per second: anonymous and shared pages (Linux).

    Pages of files on disk are not counted: the system reclaims them when other processes need memory.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_mib = 0.0
        self.stopped = threading.Event()

    def __enter__(self) -> "MemorySampler":
        self.sample()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.sample()
        self.stopped.set()
        self.join()

    def run(self) -> None:
        while not self.stopped.wait(0.1):
            self.sample()

    def sample(self) -> None:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        self.peak_mib = max(self.peak_mib, kib / 1024)


def percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage, and None as ``n/a``."""
    return "n/a" if value is None else f"{100 * value:.{digits}f}"


def metric_cells(metrics: "Metrics", digits: int = 1) -> list[str]:
    """Return the cells of a table for ``BENCHMARK_METRICS``."""
    return [percent(getattr(metrics, name), digits) for name in BENCHMARK_METRICS]


def print_row(*cells: object) -> None:
    """Print a row of a Markdown table at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_header(*columns: str) -> None:
    """Print the first two lines of a Markdown table."""
    print_row(*columns)
    print(f"|{'---|' * len(columns)}", flush=True)
