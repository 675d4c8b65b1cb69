"""The result of a benchmark job: a validated dataclass, stored as one line of ``results.jsonl``."""

import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from datetime import datetime, timezone
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from anomalib_dskd.benchmark.config import Job

__all__ = ["ClassMetrics", "Cost", "JobResult", "Machine", "Metrics", "Speed", "Training", "Weights", "failure", "now"]

JOB_ID = "[0-9a-f]{12}"  # also the name of the job's folder
JSON_TYPES: dict[Any, tuple[Any, str]] = {
    str: (str, "a string"),
    int: (int, "an integer"),
    float: (int | float, "a number"),
    dict: (dict, "a mapping"),
    list: (list, "a list"),
}


@dataclass(frozen=True)
class Metrics:
    """Accuracy as fractions; None where the test set lacks normal images, defects or masks, or the model labels.

    ``image_F1`` is that of the best threshold for the test images, ``image_F1_at_threshold`` that of the model's
    labels.
    """

    image_AUROC: float | None = None  # noqa: N815 - anomalib's name
    image_F1: float | None = None  # noqa: N815
    image_F1_at_threshold: float | None = None  # noqa: N815
    pixel_AUROC: float | None = None  # noqa: N815
    AUPRO: float | None = None


@dataclass(frozen=True)
class ClassMetrics(Metrics):
    """Accuracy on one kind of defect and all normal images, and the number of images with this defect."""

    images: int | None = None


@dataclass(frozen=True)
class Training:
    """Duration of the training run, its epochs, the number of training images, and images per second."""

    fit_seconds: float | None = None
    epochs: int | None = None
    images: int | None = None
    images_per_second: float | None = None


@dataclass(frozen=True)
class Speed:
    """Latency in ms per image, and the throughput in images per second at the best batch size."""

    pytorch_ms: float | None = None
    openvino_ms: float | None = None
    openvino_int8_ms: float | None = None
    throughput: float | None = None
    throughput_batch: int | None = None


@dataclass(frozen=True)
class Cost:
    """Peak memory of the training run, parameters, multiply-adds per image, and the size of the exported model.

    ``int8_F1_at_threshold`` is the image F1 score of the labels that an INT8 export gives, a fraction.
    """

    peak_memory_mib: float | None = None
    parameters: int | None = None
    trained_parameters: int | None = None
    macs: int | None = None
    export_mib: float | None = None
    int8_F1_at_threshold: float | None = None  # noqa: N815 - like the other F1 scores


@dataclass(frozen=True)
class Weights:
    """A file of pretrained weights: its architecture, file name and hash."""

    name: str
    file: str
    sha256: str | None = None


@dataclass(frozen=True)
class Machine:
    """Processor, GPU if it was used, platform and versions of packages."""

    cpu: str | None = None
    cores: int | None = None
    threads: int | None = None
    gpu: str | None = None
    platform: str | None = None
    python: str | None = None
    anomalib: str | None = None
    torch: str | None = None
    openvino: str | None = None
    timm: str | None = None
    anomalib_dskd: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class JobResult:
    """Settings of a job, by the names of :class:`Job`, and its measurements; a failed job has a reason instead."""

    job: str
    status: Literal["done", "failed"]
    model: str
    class_path: str
    init_args: dict[str, Any]
    data: str
    category: str | None
    seed: int
    epochs: int | None
    epochs_source: str
    image_size: list[int]
    precision: str
    accelerator: str
    reason: str | None = None
    metrics: Metrics = field(default_factory=Metrics)
    classes: dict[str, ClassMetrics] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    speed: Speed = field(default_factory=Speed)
    cost: Cost = field(default_factory=Cost)
    weights: list[Weights] = field(default_factory=list)
    machine: Machine = field(default_factory=Machine)
    notes: list[str] = field(default_factory=list)
    started: str | None = None
    finished: str | None = None

    @classmethod
    def of(cls, job: Job, /, **values: Any) -> "JobResult":  # noqa: ANN401 - the other fields
        """Return a result with the settings of a job and other values, which take precedence."""
        names = ("model", "class_path", "init_args", "data", "category", "seed", "epochs", "epochs_source")
        settings = {name: getattr(job, name) for name in (*names, "precision", "accelerator")}
        return cls(**{"job": job.id, "image_size": list(job.image_size), **settings, **values})

    @classmethod
    def from_json(cls, text: str | bytes) -> "JobResult":
        """Return the result that :meth:`to_json` has written.

        Raises:
            ValueError: it is not JSON, or a field is unknown, missing or of another type; the message names the field.
        """
        values = json.loads(text)
        if isinstance(values, dict) and not re.fullmatch(JOB_ID, str(values.get("job"))):
            msg = f"job {values.get('job')!r} is not the twelve hexadecimal digits that a benchmark gives"
            raise ValueError(msg)
        result: JobResult = _convert(cls, values, "")
        return result

    def to_json(self) -> str:
        """Return the result as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def failure(job: Job, reason: str, started: str | None = None) -> JobResult:
    """Return the result of a failed job."""
    return JobResult.of(job, status="failed", reason=reason, started=started or now(), finished=now())


def now() -> str:
    """Return the time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _convert(kind: Any, value: Any, name: str) -> Any:  # noqa: ANN401 - types, and values of these types
    """Convert a value from JSON to the type of a field; raise ``ValueError`` if it has another type."""
    is_optional = get_origin(kind) is UnionType  # T | None
    if kind is Any or (is_optional and value is None):
        return value
    kind = get_args(kind)[0] if is_optional else kind
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        if value not in arguments:
            msg = f"{name} {value!r} is not {' or '.join(map(repr, arguments))}"
            raise ValueError(msg)
        return value
    json_type, description = JSON_TYPES[dict if is_dataclass(kind) else origin]
    if not isinstance(value, json_type):
        msg = f"{name} {value!r} is not {description}{' or null' if is_optional else ''}".strip()
        raise ValueError(msg)
    if is_dataclass(kind):
        return _convert_fields(kind, value, f"{name}." if name else "")
    if origin is list:
        return [_convert(arguments[0], item, f"{name}.{index}") for index, item in enumerate(value)]
    if origin is dict:
        return {key: _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    return value


def _convert_fields(kind: Any, values: dict[str, Any], prefix: str) -> Any:  # noqa: ANN401
    known = {item.name for item in fields(kind)}
    required = {item.name for item in fields(kind) if item.default is MISSING and item.default_factory is MISSING}
    problems = [f"{prefix}{name} is missing" for name in sorted(required - values.keys())]
    problems += [f"{prefix}{name} is not a field of a result" for name in sorted(values.keys() - known)]
    if problems:
        raise ValueError("; ".join(problems))
    types = get_type_hints(kind)
    return kind(**{name: _convert(types[name], value, prefix + name) for name, value in values.items()})
