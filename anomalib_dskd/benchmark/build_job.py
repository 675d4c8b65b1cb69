"""Construction of a job's data module and model by jsonargparse, as in anomalib's command line."""

import importlib
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentParser

from anomalib_dskd.benchmark.config import Job
from anomalib_dskd.data.data_module_checks import check_names
from anomalib_dskd.errors import ArgumentError

__all__ = ["build_data_module", "build_model", "check_job", "import_model_class", "parameter_names"]


def check_job(job: Job) -> None:
    """Raise an error unless the job's classes can be imported and accept their arguments.

    Raises:
        ArgumentError: the message names the class and its arguments.
    """
    _parse(AnomalibDataModule, job.data_class_path, _data_arguments(job))
    _parse(AnomalibModule, job.class_path, job.init_args)  # first: only then can the class's parameters be listed
    _parse(AnomalibModule, job.class_path, _model_arguments(job))


def build_data_module(job: Job) -> AnomalibDataModule:
    """Return the data module of a job.

    Raises:
        ArgumentError: its name or category would place results outside of their folder.
    """
    data: AnomalibDataModule = _build(AnomalibDataModule, job.data_class_path, _data_arguments(job))
    check_names(data)
    return data


def build_model(job: Job) -> AnomalibModule:
    """Return the untrained model of a job."""
    model: AnomalibModule = _build(AnomalibModule, job.class_path, _model_arguments(job))
    return model


def import_model_class(class_path: str) -> type[AnomalibModule]:
    """Return the class with this full name."""
    module, _, name = class_path.rpartition(".")
    imported: type[AnomalibModule] = getattr(importlib.import_module(module), name)
    return imported


def parameter_names(model_class: type[AnomalibModule]) -> set[str]:
    """Return the arguments that a constructor accepts, including those that it passes on to a base by ``**kwargs``."""
    return set(ArgumentParser(exit_on_error=False).add_class_arguments(model_class, fail_untyped=False))


def _data_arguments(job: Job) -> dict[str, Any]:
    return {**job.data_init_args, **({"category": job.category} if job.category is not None else {})}


def _model_arguments(job: Job) -> dict[str, Any]:
    """Add the image size by the argument that the model has for it, and disable components that are not used."""
    model_class = import_model_class(job.class_path)
    parameters = parameter_names(model_class)
    arguments: dict[str, Any] = dict.fromkeys({"visualizer", "evaluator"} & parameters, False) | job.init_args
    if "image_size" in parameters:
        return {**arguments, "image_size": _image_size(job, arguments)}
    # other models of anomalib take a size only by their own pre-processor, which has their authors' normalization
    return {**arguments, "pre_processor": model_class.configure_pre_processor(image_size=job.image_size)}


def _image_size(job: Job, arguments: dict[str, Any]) -> tuple[int, int] | int:
    """Return height and width, or one side for a model that accepts only squares."""
    height, width = job.image_size
    try:
        _parse(AnomalibModule, job.class_path, {**arguments, "image_size": job.image_size})
    except ArgumentError:
        if height != width:
            raise
        return height
    return job.image_size


def _build(base: type, class_path: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401 - an instance of ``base``
    parser, parsed = _parse(base, class_path, arguments)
    return parser.instantiate_classes(parsed).subject


def _parse(base: type, class_path: str, arguments: dict[str, Any]) -> tuple[ArgumentParser, Any]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--subject", type=base)
    try:
        return parser, parser.parse_object({"subject": {"class_path": class_path, "init_args": arguments}})
    except Exception as error:  # jsonargparse raises errors of many types
        kind = "model" if base is AnomalibModule else "data module"
        msg = (
            f"{class_path!r} with arguments {arguments} is not a {kind} that can be built: {error}. Give the class's "
            "full name, such as 'anomalib_dskd.Dskd', and arguments that its constructor accepts."
        )
        raise ArgumentError(msg) from error
