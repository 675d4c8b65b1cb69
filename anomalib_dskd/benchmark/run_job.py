"""Run of one benchmark job: build, train, test and measure a model."""

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import DirType
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning import Callback, LightningModule, Trainer, seed_everything

from anomalib_dskd.benchmark.build_job import build_data_module, build_model, import_model_class
from anomalib_dskd.benchmark.config import SET_BY_MODEL, Job, Measurements
from anomalib_dskd.benchmark.job_result import (
    Cost,
    JobResult,
    Speed,
    Training,
    Weights,
    now,
)
from anomalib_dskd.benchmark.machine import describe_machine
from anomalib_dskd.benchmark.predictions import (
    Predictions,
    ScoreRecorder,
    compute_metrics,
    compute_metrics_by_class,
    predict_labels,
)
from anomalib_dskd.benchmark.run_folder import PREDICTIONS
from anomalib_dskd.benchmark.speed import measure_cost, measure_openvino, measure_pytorch, peak_memory_mib
from anomalib_dskd.data.links import check_data_links
from anomalib_dskd.data.mask_pairs import check_mask_pairs
from anomalib_dskd.file_writing import write_file

__all__ = ["kinds_of_defects", "run_job", "training_run_id"]

Report = Callable[[float, str], None]
"""Receives the fraction of the job that is done, and its current step."""

TRAINING_SHARE = 0.9  # of a job's duration, for the progress bar


def run_job(job: Job, folder: Path, report: Report, checkpoint: Path | None = None) -> JobResult:
    """Build, train, test and measure a model.

    Args:
        job: what to run.
        folder: for the predictions.
        report: called with the progress.
        checkpoint: file of the trained weights if jobs share a training run: it is loaded if it exists, else written.
    """
    started = now()
    seed_everything(job.seed, workers=True, verbose=False)  # before the first random number
    data = build_data_module(job)
    model = build_model(job)
    seed_everything(job.seed, workers=True, verbose=False)  # constructors of models draw different numbers
    report(0.0, "preparing")
    with TemporaryDirectory(prefix="anomalib-dskd-", ignore_cleanup_errors=True) as scratch:
        loaded = _load(checkpoint, job, model, data, Path(scratch))
        training, cost = loaded or _fit(job, model, data, report, Path(scratch))
        if checkpoint is not None and loaded is None:
            _save(checkpoint, model, training, cost)
        report(TRAINING_SHARE, "testing")
        predictions = _test(job, model, data, Path(scratch))
        predictions.save(folder / PREDICTIONS)
        report(TRAINING_SHARE, "computing metrics")
        metrics, classes = compute_metrics(predictions), compute_metrics_by_class(predictions)
        del predictions  # whose maps are in a file of this folder
    result = JobResult.of(
        job,
        status="done",
        metrics=metrics,
        classes=classes,
        training=training,
        weights=_weights(job, model),
        machine=describe_machine(job.accelerator),
        started=started,
        **({"epochs": training.epochs, "epochs_source": SET_BY_MODEL} if _sets_epochs(job, model) else {}),
    )
    report(TRAINING_SHARE, "measuring")
    speed, cost, problems = _measure(job, model, data, cost)
    notes = [*_notes(job, model, is_shared=loaded is not None), *problems]
    return replace(result, speed=speed, cost=cost, notes=notes, finished=now())


def training_run_id(job: Job) -> str | None:
    """Return an identifier that is equal for jobs that can share a training run, or None if the model shares none.

    Such jobs differ only in arguments that have no effect on training, which a model lists in its attribute
    ``map_only``. A model without this attribute shares no training runs.
    """
    map_only = getattr(import_model_class(job.class_path), "map_only", None)
    if map_only is None:
        return None
    arguments = {name: value for name, value in job.init_args.items() if name not in map_only}
    return replace(job, model="", init_args=arguments, measure=Measurements()).id


# --- training and testing ----------------------------------------------------------------------------------------


class _DataChecks(Callback):
    """Refuses data with which models of anomalib too would have wrong results."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Check links to images, and pairs of images and masks."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        check_data_links(data)
        check_mask_pairs(data)


class _EpochTimer(Callback):
    """Measures the duration of epochs, and reports progress."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._start = 0.0
        self._seconds: list[float] = []

    @property
    def seconds_per_epoch(self) -> float | None:
        """Median duration of an epoch without validation; the first epoch counts only if it is the only one."""
        later = self._seconds[1:] or self._seconds
        return statistics.median(later) if later else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:  # noqa: ANN401, ARG002
        batch, batches = arguments[-1] + 1, trainer.num_training_batches
        if batch == batches:  # validation follows
            self._seconds.append(time.perf_counter() - self._start)
        epochs = trainer.max_epochs or 1
        done = (trainer.current_epoch + batch / batches) / epochs
        self._report(TRAINING_SHARE * done, f"epoch {trainer.current_epoch + 1} of {epochs}")


def _engine(job: Job, folder: Path, callbacks: list[Callback], **arguments: Any) -> Engine:  # noqa: ANN401
    return Engine(
        default_root_dir=folder,
        callbacks=[_DataChecks(), *callbacks],
        accelerator=job.accelerator,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def _sets_epochs(job: Job, model: AnomalibModule) -> bool:
    return job.epochs is None or "max_epochs" in model.trainer_arguments


def _fit(
    job: Job, model: AnomalibModule, data: AnomalibDataModule, report: Report, folder: Path
) -> tuple[Training, Cost]:
    """Train, with one validation at the end, which sets thresholds and fills memory banks."""
    arguments: dict[str, Any] = {}
    if not _sets_epochs(job, model):
        arguments = {"max_epochs": job.epochs, "check_val_every_n_epoch": job.epochs, "precision": job.precision}
    timer = _EpochTimer(report)
    engine = _engine(job, folder, [timer], **arguments)
    start = time.perf_counter()
    engine.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    images, trainer = len(data.train_data), engine.trainer
    training = Training(
        fit_seconds=seconds,
        epochs=trainer.current_epoch,
        images=images,
        images_per_second=images / timer.seconds_per_epoch if timer.seconds_per_epoch else None,
    )
    trained = sum(p.numel() for o in trainer.optimizers for g in o.param_groups for p in g["params"])
    return training, Cost(trained_parameters=trained, peak_memory_mib=peak_memory_mib())


def _save(checkpoint: Path, model: AnomalibModule, training: Training, cost: Cost) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "training": asdict(training), "cost": asdict(cost)}, buffer)
    write_file(checkpoint, buffer.getbuffer())


def _load(
    checkpoint: Path | None, job: Job, model: AnomalibModule, data: AnomalibDataModule, folder: Path
) -> tuple[Training, Cost] | None:
    """Load the weights of a shared training run, if there are any, and compute thresholds for this job's maps."""
    if checkpoint is None or not checkpoint.is_file():
        return None
    saved = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(saved["state_dict"])
    _engine(job, folder, []).validate(model, datamodule=data, verbose=False)
    return Training(**saved["training"]), Cost(**saved["cost"])


def _test(job: Job, model: AnomalibModule, data: AnomalibDataModule, folder: Path) -> Predictions:
    recorder = ScoreRecorder(folder)
    _engine(job, folder, [recorder]).test(model, datamodule=data, verbose=False)
    model.cpu()
    predictions = recorder.predictions(kinds_of_defects(data.test_data.samples))
    return replace(predictions, predicted_labels=predict_labels(model.post_processor, predictions.scores))


def kinds_of_defects(samples: pd.DataFrame) -> dict[str, str]:
    """Return the kind of defect by image path: the data set's label or, where this is only a role, the folder's name.

    Args:
        samples: of an anomalib data set; ``Folder`` and ``Tabular`` label defects of all kinds ``DirType.ABNORMAL``,
            which pandas stores as a plain string if pyarrow is installed.
    """
    labels = samples.label if "label" in samples else [""] * len(samples)
    return {
        str(path): Path(path).parent.name if label in tuple(DirType) else str(label)
        for path, label in zip(samples.image_path, labels, strict=True)
    }


# --- measurements and notes --------------------------------------------------------------------------------------


def _measure(job: Job, model: AnomalibModule, data: AnomalibDataModule, cost: Cost) -> tuple[Speed, Cost, list[str]]:
    """Measure what the job asks for; a measurement that fails becomes a note, and the others are still made."""
    size, seconds = job.image_size, job.measure.seconds
    problems: list[str] = []

    def attempt(name: str, measure: Callable[[], Any]) -> Any:  # noqa: ANN401 - the result of ``measure``
        try:
            return measure()
        except Exception as error:  # third-party models raise errors of any type
            problems.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return None

    speed, costs = {}, attempt("cost", lambda: measure_cost(model, size)) or {}
    if job.measure.speed:
        speed["pytorch_ms"] = attempt("PyTorch", lambda: measure_pytorch(model, size, seconds=seconds))
        fp32 = attempt("OpenVINO", lambda: measure_openvino(model, size, seconds=seconds))
        if fp32 is not None:
            speed["openvino_ms"], costs["export_mib"] = fp32["milliseconds"], fp32["mib"]
            speed["throughput"], speed["throughput_batch"] = fp32["throughput"], fp32["batch"]
    if job.measure.int8:
        ptq = CompressionType.INT8_PTQ
        int8 = attempt(
            "OpenVINO INT8",
            lambda: measure_openvino(model, size, seconds=seconds, compression=ptq, datamodule=data),
        )
        if int8 is not None:
            speed["openvino_int8_ms"], costs["int8_F1_at_threshold"] = int8["milliseconds"], int8["label_f1"]
    return Speed(**speed), replace(cost, **costs), problems


def _weights(job: Job, model: AnomalibModule) -> list[Weights]:
    """Return the pretrained weights of a model, as far as they are known.

    A model of this package has the origin of its teacher's weights; all timm networks of other models are assumed to be
    pretrained.
    """
    given = [Weights(**weights) for weights in job.weights]
    teacher = getattr(getattr(model, "model", None), "teacher", None)
    origin = getattr(teacher, "weights_origin", None)
    if teacher is not None and origin:
        name = str(teacher.backbone.name).partition(".")[0]
        return [weights for weights in given if weights.name == name] or [Weights(name=name, **origin)]
    configs = [getattr(module, "pretrained_cfg", None) for module in model.modules()]  # timm's
    used = {config["architecture"] for config in configs if isinstance(config, dict) and "architecture" in config}
    return [weights for weights in given if weights.name in used]


def _notes(job: Job, model: AnomalibModule, *, is_shared: bool) -> list[str]:
    """Return remarks on the results, for the report."""
    notes = []
    if is_shared:
        notes.append("shares the training run of another row: training time and memory are those of that row")
    if model.input_size is not None and tuple(model.input_size) != job.image_size:
        size = " x ".join(map(str, model.input_size))
        notes.append(f"uses images of {size} pixels instead of the benchmark's image size")
    return notes
