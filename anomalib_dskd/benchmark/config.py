"""What a benchmark compares: the command's configuration, and the jobs that it means."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from anomalib_dskd.errors import ArgumentError

__all__ = ["OWN", "BenchmarkConfig", "DatasetSpec", "Job", "Measurements", "ModelSpec", "Task", "expand"]

EXAMPLE_EPOCHS = {"Stfpm": 100, "ReverseDistillation": 200}
"""Epochs in the example configurations of anomalib 2.7. Those also stop early on test figures, which is left out."""
PAPER_EPOCHS = {"Dskd": 200}  # section 4.1.2
OWN_EPOCHS = ("AnomalyDino", "Dfkde", "Dfm", "MHPatchcore", "Padim", "Patchcore", "Rad", "SuperAdd")
"""Models of anomalib that impose a number of epochs, mostly one, whatever they are told."""
OWN = "the model's own"


@dataclass
class ModelSpec:
    """A detector.

    Args:
        model: ``class_path`` of anything importable that is an anomalib model, such as ``anomalib_dskd.Dskd``, and
            the ``init_args`` of its constructor.
        name: what the report calls it. Default: the class's name.
        epochs: epochs to train it. Default: the benchmark's.
    """

    model: dict[str, Any]
    name: str | None = None
    epochs: int | None = None


@dataclass
class DatasetSpec:
    """A data set.

    Args:
        data: ``class_path`` of anything importable that is an anomalib data module, such as
            ``anomalib.data.MVTecAD``, and the ``init_args`` of its constructor.
        categories: values for its argument ``category``, one job each. Default: one job without.
        image_size: height and width for all models. Default: the benchmark's.
        name: what the report calls it. Default: the class's name.
    """

    data: dict[str, Any]
    categories: list[str] | None = None
    image_size: int | None = None
    name: str | None = None


@dataclass
class Measurements:
    """What is measured beside accuracy.

    Args:
        speed: latency and throughput, in PyTorch and, if it is installed, in OpenVINO.
        int8: OpenVINO with quantised activations too.
        seconds: how long each latency is measured.
    """

    speed: bool = True
    int8: bool = False
    seconds: float = 5.0


@dataclass
class BenchmarkConfig:
    """Train and test models on data sets, and report them side by side.

    Args:
        models: detectors to compare.
        datasets: data sets to compare them on.
        run_folder: where results go. A run that was stopped is continued from there.
        seeds: each job is done once for each.
        epochs: of every model that trains in epochs and gives no number of its own. Default: those of anomalib's
            example configurations, and of the paper for DSKD.
        image_size: height and width of the images, for all models.
        accelerator: as in Lightning's Trainer; each job has one device.
        precision: of the training of models that train in epochs, as in Lightning's Trainer. Everything else is
            done in 32-bit floating point.
        weights: files with pretrained weights, by architecture, such as ``{resnet18: resnet18.safetensors}``. All
            models that take them from timm get these, whatever tag they ask for, and the model hub is off. Default:
            what each model finds or downloads by itself.
        measure: what is measured beside accuracy.
        runner: ``local``, one job after the other, or ``ray``, spread over a Ray cluster (extra ``ray``).
        ray_address: of the cluster, as in ``ray.init``. Default: start one here.
        cpus: processor cores that a job gets on the cluster.
        gpus: GPUs that a job gets on the cluster.
    """

    models: list[ModelSpec]
    datasets: list[DatasetSpec]
    run_folder: Path = Path("runs/benchmark")
    seeds: list[int] = field(default_factory=lambda: [0])
    epochs: int | None = None
    image_size: int = 256
    accelerator: str = "cpu"
    precision: str = "32-true"
    weights: dict[str, str] = field(default_factory=dict)
    measure: Measurements = field(default_factory=Measurements)
    runner: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    cpus: int = 2
    gpus: int = 0


@dataclass(frozen=True)
class Job:
    """One model trained and tested on one data set, once: everything that its result depends on.

    Plain values only, so that it can be written down and sent to another process or machine.
    """

    model: str
    class_path: str
    init_args: dict[str, Any]
    data: str
    data_class_path: str
    data_init_args: dict[str, Any]
    category: str | None
    image_size: tuple[int, int]
    seed: int
    epochs: int | None
    epochs_source: str
    accelerator: str
    precision: str
    weights: list[dict[str, str]]
    measure: dict[str, Any]

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the job's contents."""
        contents = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(contents.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Short text for people."""
        where = f"{self.data} {self.category}" if self.category else self.data
        return f"{self.model} on {where}, seed {self.seed}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Job":
        """Return the job that :func:`dataclasses.asdict`, and JSON, made ``values`` of."""
        return cls(**{**values, "image_size": tuple(values["image_size"])})


@dataclass(frozen=True)
class Task:
    """A job, and where its files are.

    Args:
        job: what to do.
        folder: for its log and predictions.
        training: file for the trained weights, where other jobs of the run share this one's training.
    """

    job: Job
    folder: Path
    training: Path | None = None


def expand(config: BenchmarkConfig, weights: list[dict[str, str]] | None = None) -> list[Job]:
    """List the jobs of a benchmark: seeds outermost, so that a whole comparison is there early.

    Args:
        config: what to compare.
        weights: name and hash of each file of ``config.weights``.

    Raises:
        ArgumentError: nothing to compare, a name given twice, a number out of range, or epochs unknown.
    """
    _check(config)
    weights = weights or []
    return [
        Job(
            model=_name(model),
            class_path=model.model["class_path"],
            init_args=model.model.get("init_args", {}),
            data=_name(data),
            data_class_path=data.data["class_path"],
            data_init_args=data.data.get("init_args", {}),
            category=category,
            image_size=(data.image_size or config.image_size,) * 2,
            seed=seed,
            epochs=epochs,
            epochs_source=source,
            accelerator=config.accelerator,
            precision=config.precision,
            weights=weights,
            measure=asdict(config.measure),
        )
        for seed in config.seeds
        for data, category in _data_and_categories(config.datasets)
        for model in config.models
        for epochs, source in [_epochs(model, config.epochs)]
    ]


def _name(spec: ModelSpec | DatasetSpec) -> str:
    return spec.name or _class_name(spec)


def _described(spec: ModelSpec | DatasetSpec) -> dict[str, Any]:
    return spec.model if isinstance(spec, ModelSpec) else spec.data


def _class_name(spec: ModelSpec | DatasetSpec) -> str:
    return str(_described(spec)["class_path"]).rpartition(".")[2]


def _data_and_categories(data: Sequence[DatasetSpec]) -> Iterator[tuple[DatasetSpec, str | None]]:
    for spec in data:
        if not spec.categories:
            yield spec, None
        for category in spec.categories or ():
            yield spec, category


def _epochs(model: ModelSpec, default: int | None) -> tuple[int | None, str]:
    """Return the number of epochs, and where it comes from."""
    class_name = _class_name(model)
    if class_name in OWN_EPOCHS:
        return None, OWN
    if model.epochs is not None or default is not None:
        return model.epochs or default, "this configuration"
    if class_name in EXAMPLE_EPOCHS:
        return EXAMPLE_EPOCHS[class_name], "anomalib's example configuration, without its stop on test figures"
    if class_name in PAPER_EPOCHS:
        return PAPER_EPOCHS[class_name], "the paper"
    msg = f"model {_name(model)!r} says no number of epochs. Give `epochs`, for it or for the whole benchmark."
    raise ArgumentError(msg)


def _check_description(spec: ModelSpec | DatasetSpec) -> None:
    described = _described(spec)
    class_path, arguments = described.get("class_path"), described.get("init_args", {})
    unknown = set(described) - {"class_path", "init_args"}
    if not isinstance(class_path, str) or "." not in class_path or not isinstance(arguments, dict) or unknown:
        msg = (
            f"{described} describes no class. Give `class_path`, its full name such as 'anomalib_dskd.Dskd', and, "
            "if its constructor needs any, `init_args`, arguments by name."
        )
        raise ArgumentError(msg)


def _check_is_comparable(spec: ModelSpec, *, has_weights: bool) -> None:
    """Raise if a model would go its own way in what the benchmark sets for all."""
    common = {"image_size": "image_size", "pre_processor": "image_size", "seed": "seeds"}
    if has_weights:
        common["teacher_weights"] = "weights"
    own = sorted(common.keys() & spec.model.get("init_args", {}).keys())
    if own:
        instead = " and ".join(dict.fromkeys(f"`{common[name]}`" for name in own))
        msg = (
            f"model {_name(spec)!r} has {' and '.join(own)} among its init_args, which is to be the same for all "
            f"models. Leave it out, and give the benchmark's {instead}."
        )
        raise ArgumentError(msg)


def _check(config: BenchmarkConfig) -> None:
    for what, specs in (("models", config.models), ("datasets", config.datasets)):
        for spec in specs:
            _check_description(spec)
        names = [_name(spec) for spec in specs]
        if not names:
            msg = f"{what} is empty: give at least one class_path."
            raise ArgumentError(msg)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"{what} {', '.join(twice)} given more than once: give each a `name` of its own."
            raise ArgumentError(msg)
    for model in config.models:
        _check_is_comparable(model, has_weights=bool(config.weights))
    if not config.seeds or len(set(config.seeds)) != len(config.seeds) or min(config.seeds) < 0:
        msg = f"seeds {config.seeds} must be one or more different whole numbers, 0 or larger."
        raise ArgumentError(msg)
    for data in config.datasets:
        if len(set(data.categories or ())) != len(data.categories or ()):
            msg = f"categories {data.categories} of {_name(data)} must be different ones."
            raise ArgumentError(msg)
    numbers = [("epochs", config.epochs), ("image_size", config.image_size)]
    numbers += [(f"epochs of {_name(model)}", model.epochs) for model in config.models]
    numbers += [(f"image_size of {_name(data)}", data.image_size) for data in config.datasets]
    for name, number in numbers:
        if number is not None and number < 1:
            msg = f"{name} {number} must be 1 or larger."
            raise ArgumentError(msg)
    if not 0 < config.measure.seconds < math.inf:
        msg = f"measure.seconds {config.measure.seconds} must be a finite number larger than 0."
        raise ArgumentError(msg)
