"""Configuration of ``anomalib-dskd benchmark``, and the jobs that it stands for."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from anomalib_dskd.errors import ArgumentError

__all__ = ["SET_BY_MODEL", "BenchmarkConfig", "DatasetSpec", "Job", "Measurements", "ModelSpec", "Task", "expand"]

EXAMPLE_EPOCHS = {"Stfpm": 100, "ReverseDistillation": 200}
"""Epochs in anomalib 2.7's example configurations, whose early stopping on test metrics is left out."""
PAPER_EPOCHS = {"Dskd": 200}  # section 4.1.2
MODELS_THAT_SET_EPOCHS = ("AnomalyDino", "Dfkde", "Dfm", "MHPatchcore", "Padim", "Patchcore", "Rad", "SuperAdd")
"""Models of anomalib that override the Trainer's number of epochs, most of them with 1."""
SET_BY_MODEL = "the model's own"
"""Source of the number of epochs of such a model."""


@dataclass
class ModelSpec:
    """A model to compare.

    Args:
        model: ``class_path`` of an anomalib model, such as ``anomalib_dskd.Dskd``, and its ``init_args``.
        name: name in the report. Default: the name of the class.
        epochs: number of training epochs. Default: that of the benchmark.
        seeds: random seeds, such as ``[0]`` for a model whose results hardly depend on them. Default: those of the
            benchmark.
    """

    model: dict[str, Any]
    name: str | None = None
    epochs: int | None = None
    seeds: list[int] | None = None


@dataclass
class DatasetSpec:
    """A data set to compare models on.

    Args:
        data: ``class_path`` of an anomalib data module, such as ``anomalib.data.MVTecAD``, and its ``init_args``.
        categories: values of its argument ``category``, with one job each. Default: one job without a category.
        image_size: height and width of the images, for all models. Default: that of the benchmark.
        name: name in the report. Default: the data module's own argument ``name``, such as that of ``Folder``, or the
            name of the class.
    """

    data: dict[str, Any]
    categories: list[str] | None = None
    image_size: int | None = None
    name: str | None = None


@dataclass
class Measurements:
    """What to measure in addition to accuracy.

    Args:
        speed: measure latency and throughput, with PyTorch and, if it is installed, with OpenVINO.
        int8: also measure an OpenVINO export that is quantized to INT8.
        seconds: duration of each latency measurement.
    """

    speed: bool = True
    int8: bool = False
    seconds: float = 5.0


@dataclass
class BenchmarkConfig:
    """Train and test models on data sets, and write a report that compares them.

    Args:
        models: models to compare.
        datasets: data sets to compare them on.
        run_folder: folder for the results. If it holds results of this configuration, only missing jobs are run.
        seeds: random seeds of models without their own; each model is trained on each data set once per seed.
        epochs: number of training epochs of models without a number of their own. Default: that of anomalib's example
            configuration, or of the paper for DSKD.
        image_size: height and width of the images, for all models.
        accelerator: as in Lightning's Trainer; each job uses one device.
        precision: precision of the training of models that train in epochs, as in Lightning's Trainer. Everything else
            runs in FP32.
        weights: files of pretrained weights by architecture, such as ``{resnet18: resnet18.safetensors}``. All models
            that load this architecture from timm get this file, whatever pretrained tag they request, and the model hub
            is not used. Default: each model finds or downloads its weights.
        measure: what to measure in addition to accuracy.
        runner: ``local`` runs one job after the other, ``ray`` runs them on a Ray cluster (needs the extra ``ray``).
        ray_address: address of the cluster, as in ``ray.init``. Default: start a cluster on this machine.
        cpus: CPU cores per job on the cluster.
        gpus: GPUs per job on the cluster.
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
    """One training and test of a model on a data set: all values that the result depends on, each of a JSON type."""

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
    measure: Measurements

    @property
    def id(self) -> str:
        """Hash of the job's values: twelve hexadecimal digits."""
        contents = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(contents.encode()).hexdigest()[:12]

    @property
    def title(self) -> str:
        """Model, data and seed, for progress messages."""
        where = f"{self.data} {self.category}" if self.category else self.data
        return f"{self.model} on {where}, seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """A job and its files.

    Args:
        job: what to run.
        folder: for the log and the predictions.
        checkpoint: file of the trained weights, if other jobs share the training run.
    """

    job: Job
    folder: Path
    checkpoint: Path | None = None


def expand(config: BenchmarkConfig, weights: list[dict[str, str]] | None = None) -> list[Job]:
    """List the jobs of a benchmark. All jobs of a seed precede those of the next, for a complete comparison early on.

    Args:
        config: what to compare.
        weights: name and hash of each file of ``config.weights``.

    Raises:
        ArgumentError: nothing to compare, a name is used twice, a number is out of range, or epochs are unknown.
    """
    _check(config)
    seeds_by_model = [config.seeds if model.seeds is None else model.seeds for model in config.models]
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
            weights=weights or [],
            measure=config.measure,
        )
        for seed in dict.fromkeys(chain(*seeds_by_model))
        for data in config.datasets
        for category in data.categories or (None,)
        for model, seeds in zip(config.models, seeds_by_model, strict=True)
        if seed in seeds
        for epochs, source in [_epochs(model, config.epochs)]
    ]


def _class_and_arguments(spec: ModelSpec | DatasetSpec) -> dict[str, Any]:
    return spec.model if isinstance(spec, ModelSpec) else spec.data


def _class_name(spec: ModelSpec | DatasetSpec) -> str:
    return str(_class_and_arguments(spec)["class_path"]).rpartition(".")[2]


def _name(spec: ModelSpec | DatasetSpec) -> str:
    own = spec.data.get("init_args", {}).get("name") if isinstance(spec, DatasetSpec) else None
    return spec.name or own or _class_name(spec)


def _epochs(model: ModelSpec, default: int | None) -> tuple[int | None, str]:
    """Return the number of epochs and its source."""
    class_name = _class_name(model)
    if class_name in MODELS_THAT_SET_EPOCHS:
        return None, SET_BY_MODEL
    if model.epochs is not None or default is not None:
        return model.epochs or default, "this configuration"
    if class_name in EXAMPLE_EPOCHS:
        return EXAMPLE_EPOCHS[
            class_name
        ], "anomalib's example configuration, without its early stopping on test metrics"
    if class_name in PAPER_EPOCHS:
        return PAPER_EPOCHS[class_name], "the paper"
    msg = f"model {_name(model)!r} has no default number of epochs. Give `epochs`, for it or for the whole benchmark."
    raise ArgumentError(msg)


# --- checks ------------------------------------------------------------------------------------------------------


def _check(config: BenchmarkConfig) -> None:
    _check_specs("models", config.models)
    _check_specs("datasets", config.datasets)
    for model in config.models:
        _check_shared_arguments(model, has_weights=bool(config.weights))
    for data in config.datasets:
        if len(set(data.categories or ())) != len(data.categories or ()):
            msg = f"categories {data.categories} of {_name(data)} must be different from one another."
            raise ArgumentError(msg)
    own_seeds = {f"seeds of {_name(model)}": model.seeds for model in config.models if model.seeds is not None}
    for name, seeds in {"seeds": config.seeds, **own_seeds}.items():
        if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
            msg = f"{name} {seeds} must be one or more different integers, 0 or larger."
            raise ArgumentError(msg)
    numbers = {
        "epochs": config.epochs,
        "image_size": config.image_size,
        **{f"epochs of {_name(model)}": model.epochs for model in config.models},
        **{f"image_size of {_name(data)}": data.image_size for data in config.datasets},
    }
    for name, number in numbers.items():
        if number is not None and number < 1:
            msg = f"{name} {number} must be 1 or larger."
            raise ArgumentError(msg)
    if not 0 < config.measure.seconds < math.inf:
        msg = f"measure.seconds {config.measure.seconds} must be a finite number larger than 0."
        raise ArgumentError(msg)


def _check_specs(argument: str, specs: Sequence[ModelSpec | DatasetSpec]) -> None:
    """Raise unless there are specs, each with a class, and their names differ."""
    if not specs:
        msg = f"{argument} is empty: give at least one class_path."
        raise ArgumentError(msg)
    for spec in specs:
        described = _class_and_arguments(spec)
        class_path, arguments = described.get("class_path"), described.get("init_args", {})
        unknown = set(described) - {"class_path", "init_args"}
        if not isinstance(class_path, str) or "." not in class_path or not isinstance(arguments, dict) or unknown:
            msg = (
                f"{described} describes no class. Give `class_path`, its full name such as 'anomalib_dskd.Dskd', and, "
                "if its constructor needs any, `init_args`, arguments by name."
            )
            raise ArgumentError(msg)
    names = [_name(spec) for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        key = "model" if isinstance(specs[0], ModelSpec) else "data"
        msg = (
            f"{argument} {', '.join(repeated)} given more than once. Give each entry a `name` of its own, at the same "
            f"level as `{key}`: it tells their results apart."
        )
        raise ArgumentError(msg)


def _check_shared_arguments(spec: ModelSpec, *, has_weights: bool) -> None:
    """Raise if a model has an argument that the benchmark sets for all models."""
    shared = {"image_size": "image_size", "pre_processor": "image_size", "seed": "seeds"}
    if has_weights:
        shared["teacher_weights"] = "weights"
    given = sorted(shared.keys() & spec.model.get("init_args", {}).keys())
    if given:
        instead = " and ".join(dict.fromkeys(f"`{shared[name]}`" for name in given))
        msg = (
            f"model {_name(spec)!r} has {' and '.join(given)} among its init_args, which must be the same for all "
            f"models. Remove it, and give the benchmark's {instead}."
        )
        raise ArgumentError(msg)
