"""One job of a benchmark, from construction to figures, in a process of its own."""

import importlib
import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentParser
from lightning import Callback, LightningModule, Trainer, seed_everything

from anomalib_dskd.benchmark.config import OWN, Job
from anomalib_dskd.benchmark.machine import machine
from anomalib_dskd.benchmark.predictions import ScoreRecorder, figures, figures_by_class
from anomalib_dskd.benchmark.run_folder import PREDICTIONS
from anomalib_dskd.benchmark.speed import measure_cost, measure_openvino, measure_pytorch, peak_memory_mib
from anomalib_dskd.data.data_module_checks import check_names
from anomalib_dskd.errors import ArgumentError

__all__ = ["check_job", "failure", "now", "run_job", "training_id"]

Report = Callable[[float, str], None]
"""Takes the fraction of the job that is done, and what it is at."""

TRAINING_SHARE = 0.9  # of a job's time, for the progress bar


def run_job(job: Job, folder: Path, report: Report, training: Path | None = None) -> dict[str, Any]:
    """Build, train, test and measure a model.

    Args:
        job: what to do.
        folder: where the predictions are kept.
        report: is told about the progress.
        training: file that holds the trained weights, or is to hold them for the jobs that share this training.

    Returns:
        The job's line in the results.
    """
    started = now()
    seed_everything(job.seed, workers=True, verbose=False)  # before anything draws random numbers
    data = _build(AnomalibDataModule, job.data_class_path, _data_arguments(job))
    check_names(data)
    model = _build(AnomalibModule, job.class_path, _model_arguments(job))
    seed_everything(job.seed, workers=True, verbose=False)  # constructors draw different numbers
    clock, recorder = _Clock(report), ScoreRecorder()
    with TemporaryDirectory(prefix="anomalib-dskd-") as scratch:
        report(0.0, "preparing")
        trained = _reuse(training, job, model, data, Path(scratch))
        notes = _notes(job, model, is_shared=trained is not None)
        if trained is None:
            trained = _fit(job, model, data, clock, Path(scratch))
            _keep(training, model, trained)
        report(TRAINING_SHARE, "testing")
        _test(job, model, data, recorder, Path(scratch))
    predictions = recorder.predictions(_classes(data))
    predictions.save(folder / PREDICTIONS)
    report(TRAINING_SHARE, "computing figures")
    record = {
        **_identity(job),
        "status": "done",
        "reason": None,
        "figures": figures(predictions),
        "classes": figures_by_class(predictions),
        "training": trained["training"],
        "weights": _weights(job, model),
        "machine": machine(),
        "started": started,
    }
    if _imposes_epochs(job, model):
        record.update(epochs=trained["training"]["epochs"], epochs_source=OWN)
    report(TRAINING_SHARE, "measuring")
    measured = _measure(job, model, data, trained["parameters"])
    measured["cost"]["peak_memory_mib"] = trained["peak_memory_mib"]
    return {**record, **measured, "notes": [*notes, *measured["notes"]], "finished": now()}


def check_job(job: Job) -> None:
    """Raise an error unless the job's classes can be imported and take its arguments.

    Raises:
        ArgumentError: what is wrong, with the model's or data set's name.
    """
    _parser(AnomalibDataModule, job.data_class_path, _data_arguments(job))
    _parser(AnomalibModule, job.class_path, job.init_args)  # before the class is asked what else it takes
    _parser(AnomalibModule, job.class_path, _model_arguments(job))


def training_id(job: Job) -> str | None:
    """Return what jobs have in common that differ only in how a trained model makes its map.

    A model says by an attribute ``map_only`` which of its arguments its training does not depend on. Models that
    say nothing share no training: None.
    """
    map_only = getattr(_import(job.class_path), "map_only", None)
    if map_only is None:
        return None
    arguments = {name: value for name, value in job.init_args.items() if name not in map_only}
    return replace(job, model="", init_args=arguments, measure={}).id


def failure(job: Job, reason: str, started: str | None = None) -> dict[str, Any]:
    """Return the line in the results of a job that failed."""
    return {**_identity(job), "status": "failed", "reason": reason, "started": started or now(), "finished": now()}


def _identity(job: Job) -> dict[str, Any]:
    names = ("model", "class_path", "init_args", "data", "category", "seed", "epochs", "epochs_source")
    values = asdict(job)
    return {
        "job": job.id,
        **{name: values[name] for name in names},
        "image_size": list(job.image_size),
        "precision": job.precision,
        "accelerator": job.accelerator,
    }


# --- building ----------------------------------------------------------------------------------------------------


def _data_arguments(job: Job) -> dict[str, Any]:
    return {**job.data_init_args, **({"category": job.category} if job.category is not None else {})}


def _model_arguments(job: Job) -> dict[str, Any]:
    """Add the image size in the way that the model takes it, and leave out what would only cost time."""
    model_class = _import(job.class_path)
    parameters = inspect.signature(model_class).parameters
    unused = {name: False for name in ("visualizer", "evaluator") if name in parameters}
    arguments = {**unused, **job.init_args}
    if "image_size" in parameters:
        return {**arguments, "image_size": _size_for(job, arguments)}
    # anomalib's models take a size through their own pre-processor alone, which has their authors' normalisation
    return {**arguments, "pre_processor": model_class.configure_pre_processor(image_size=job.image_size)}


def _size_for(job: Job, arguments: dict[str, Any]) -> tuple[int, int] | int:
    """Return height and width, or one side for a model that takes squares alone."""
    try:
        _parser(AnomalibModule, job.class_path, {**arguments, "image_size": job.image_size})
    except ArgumentError:
        height, width = job.image_size
        if height != width:
            raise
        return height
    return job.image_size


def _build(base: type, class_path: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - a model or data module
    """Build what the YAML asks for, as anomalib's own command line does."""
    parser, parsed = _parser(base, class_path, arguments)
    return parser.instantiate_classes(parsed).subject


def _parser(base: type, class_path: str, arguments: dict[str, Any]) -> tuple[ArgumentParser, Any]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--subject", type=base)
    try:
        return parser, parser.parse_object({"subject": {"class_path": class_path, "init_args": arguments}})
    except Exception as error:  # jsonargparse raises many kinds
        what = "model" if base is AnomalibModule else "data module"
        msg = (
            f"{class_path!r} with arguments {arguments} is no {what} that can be built: {error}. Give the class's full "
            "name, such as 'anomalib_dskd.Dskd', and arguments that its constructor takes."
        )
        raise ArgumentError(msg) from error


def _import(class_path: str) -> type[AnomalibModule]:
    module, _, name = class_path.rpartition(".")
    imported: type[AnomalibModule] = getattr(importlib.import_module(module), name)
    return imported


# --- training and testing ----------------------------------------------------------------------------------------


class _Clock(Callback):
    """Measures epochs, and reports progress."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._starts: list[float] = []
        self._seconds: list[float] = []

    @property
    def seconds_an_epoch(self) -> float | None:
        """Median duration of an epoch's training, without the first if there are others."""
        later = self._seconds[1:] or self._seconds
        return statistics.median(later) if later else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._starts.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:  # noqa: ANN401, ARG002
        batch, batches = arguments[-1] + 1, trainer.num_training_batches
        if batch == batches:  # what follows is validation
            self._seconds.append(time.perf_counter() - self._starts[-1])
        epochs = trainer.max_epochs or 1
        done = (trainer.current_epoch + batch / batches) / epochs
        self._report(TRAINING_SHARE * done, f"epoch {trainer.current_epoch + 1} of {epochs}")


def _engine(job: Job, folder: Path, callbacks: list[Callback], **arguments: Any) -> Engine:  # noqa: ANN401
    return Engine(
        default_root_dir=folder,
        callbacks=callbacks,
        accelerator=job.accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def _imposes_epochs(job: Job, model: AnomalibModule) -> bool:
    return job.epochs is None or "max_epochs" in model.trainer_arguments


def _fit(job: Job, model: AnomalibModule, data: AnomalibDataModule, clock: _Clock, folder: Path) -> dict[str, Any]:
    """Train, with one validation at the end: all that thresholds and memory banks need.

    Returns:
        The job's ``training``, the number of trained ``parameters``, and ``peak_memory_mib``.
    """
    arguments: dict[str, Any] = {}
    if not _imposes_epochs(job, model):
        arguments = {"max_epochs": job.epochs, "check_val_every_n_epoch": job.epochs, "precision": job.precision}
    engine = _engine(job, folder, [clock], **arguments)
    start = time.perf_counter()
    engine.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    images, trainer = len(data.train_data), engine.trainer
    return {
        "training": {
            "fit_seconds": seconds,
            "epochs": trainer.current_epoch,
            "images": images,
            "images_per_second": images / clock.seconds_an_epoch if clock.seconds_an_epoch else None,
        },
        "parameters": sum(p.numel() for o in trainer.optimizers for g in o.param_groups for p in g["params"]),
        "peak_memory_mib": peak_memory_mib(),
    }


def _keep(training: Path | None, model: AnomalibModule, trained: dict[str, Any]) -> None:
    if training is not None:
        training.parent.mkdir(parents=True, exist_ok=True)
        part = training.with_suffix(".part")
        torch.save({"state_dict": model.state_dict(), **trained}, part)
        part.replace(training)  # whole or not at all


def _reuse(
    training: Path | None, job: Job, model: AnomalibModule, data: AnomalibDataModule, folder: Path
) -> dict[str, Any] | None:
    """Load weights that another job has trained, and set this job's own thresholds."""
    if training is None or not training.is_file():
        return None
    trained: dict[str, Any] = torch.load(training, weights_only=True)
    model.load_state_dict(trained.pop("state_dict"))
    _engine(job, folder, []).validate(model, datamodule=data, verbose=False)
    return trained


def _test(job: Job, model: AnomalibModule, data: AnomalibDataModule, recorder: Callback, folder: Path) -> None:
    _engine(job, folder, [recorder]).test(model, datamodule=data, verbose=False)
    model.cpu()


def _weights(job: Job, model: AnomalibModule) -> list[dict[str, str]]:
    """Return the pretrained weights that a model has, as far as they are known.

    One of this package knows its teacher's; of another, all its timm networks count as pretrained.
    """
    teacher = getattr(getattr(model, "model", None), "teacher", None)
    origin = getattr(teacher, "weights_origin", None)
    if teacher is not None and origin:
        name = str(teacher.backbone.name).partition(".")[0]
        return [weights for weights in job.weights if weights["name"] == name] or [{"name": name, **origin}]
    configs = [getattr(module, "pretrained_cfg", None) for module in model.modules()]  # timm's
    used = {config["architecture"] for config in configs if isinstance(config, dict) and "architecture" in config}
    return [weights for weights in job.weights if weights["name"] in used]


def _notes(job: Job, model: AnomalibModule, *, is_shared: bool) -> list[str]:
    """Return what a reader of the figures has to know beside them."""
    notes = []
    if is_shared:
        notes.append("trained together with another row: times and memory of the training are that row's")
    if model.input_size is not None and tuple(model.input_size) != job.image_size:
        size = " x ".join(map(str, model.input_size))
        notes.append(f"takes images of {size} pixels, whatever size the benchmark asks for")
    return notes


def _classes(data: AnomalibDataModule) -> dict[str, str]:
    samples = data.test_data.samples
    if "label" not in samples:
        return {}
    return {str(path): str(label) for path, label in zip(samples.image_path, samples.label, strict=True)}


# --- measuring ---------------------------------------------------------------------------------------------------


def _measure(job: Job, model: AnomalibModule, data: AnomalibDataModule, trained: int) -> dict[str, Any]:
    """Measure what was asked for; what cannot be measured is told in the notes and costs no other result."""
    notes: list[str] = []

    def attempt(what: str, measure: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever is measured
        try:
            return measure()
        except Exception as error:  # whatever a foreign model raises
            notes.append(f"{what}: {_one_line(error)}")
            return None

    size, seconds = job.image_size, job.measure["seconds"]
    names = ("pytorch_ms", "openvino_ms", "openvino_int8_ms", "throughput", "throughput_batch")
    speed: dict[str, float | int | None] = dict.fromkeys(names)
    cost = attempt("cost", lambda: measure_cost(model, size, trained)) or {}
    cost["export_mib"] = None
    if job.measure["speed"]:
        speed["pytorch_ms"] = attempt("PyTorch", lambda: measure_pytorch(model, size, seconds=seconds))
        f32 = attempt("OpenVINO", lambda: measure_openvino(model, size, seconds=seconds)) or {}
        speed.update(openvino_ms=f32.get("milliseconds"), throughput=f32.get("throughput"))
        speed["throughput_batch"], cost["export_mib"] = f32.get("batch"), f32.get("mib")
    if job.measure["int8"]:
        ptq = CompressionType.INT8_PTQ
        int8 = attempt(
            "OpenVINO INT8",
            lambda: measure_openvino(model, size, seconds=seconds, compression=ptq, datamodule=data),
        )
        speed["openvino_int8_ms"] = (int8 or {}).get("milliseconds")
    return {"speed": speed, "cost": cost, "notes": notes}


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def now() -> str:
    """Return the time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
