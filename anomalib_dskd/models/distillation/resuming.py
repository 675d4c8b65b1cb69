"""Comparison of a checkpoint's arguments with a model's, before it is tested or its training is resumed."""

import inspect
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.utils.serialization import anomalib_safe_globals

from anomalib_dskd.components.backbone import full_name
from anomalib_dskd.errors import ArgumentError
from anomalib_dskd.models.distillation.command import given_arguments
from anomalib_dskd.models.distillation.image_size import height_and_width
from anomalib_dskd.models.distillation.training_options import TRAINING_ONLY

if TYPE_CHECKING:
    from anomalib_dskd.models.distillation.checkpoints import CheckpointMixin

__all__ = [
    "CHECKPOINT_KEY",
    "add_arguments",
    "adopt_arguments",
    "canonical_value",
    "check_arguments",
    "constructor_defaults",
    "resume_training",
    "without_unknown_arguments",
]

logger = logging.getLogger(__name__)

CHECKPOINT_KEY = "anomalib_dskd"
"""Key in a checkpoint of what this package adds to it."""


def constructor_defaults(model_class: type) -> dict[str, Any]:
    """Return the defaults of all arguments that a model's constructor takes, its own and the shared ones."""
    constructors = [vars(base)["__init__"] for base in model_class.__mro__ if "__init__" in vars(base)]
    named = {}
    for constructor in reversed(constructors):
        for parameter in inspect.signature(constructor).parameters.values():
            if parameter.name != "self" and parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}:
                named[parameter.name] = parameter.default
    return named


def canonical_value(model_class: type["CheckpointMixin"], name: str, arguments: Mapping[str, Any]) -> object:
    """Return the same value for spellings that mean the same: defaults, a backbone's default tag, lists and tuples."""
    value = arguments[name]
    if name in model_class.backbones and value is not None:
        return full_name(value)
    if name in model_class.layers_by_default and value is None:
        value = arguments["layers"]
    if name == "image_size":
        return height_and_width(value)
    return list(value) if isinstance(value, (list, tuple)) else value


def add_arguments(model: "CheckpointMixin", checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint the arguments that results depend on, and the training run's epochs and steps.

    Lightning's own copy of the arguments is merged with those that ``load_from_checkpoint`` is given.
    """
    arguments = {name: value for name, value in model.hparams.items() if name not in TRAINING_ONLY}
    max_epochs = getattr(model._trainer, "max_epochs", None)
    checkpoint.setdefault(CHECKPOINT_KEY, {}).update(
        arguments=arguments, max_epochs=max_epochs, steps=model.planned_steps
    )


def adopt_arguments(model: "CheckpointMixin", checkpoint: Mapping[str, Any]) -> None:
    """Rebuild a model's networks with the checkpoint's arguments in place of those that were not given.

    Which were given is known in anomalib's command; in Python an argument that has its default value counts as not
    given. Arguments that were given are left as they are, for :func:`check_arguments` to compare.

    Args:
        model: attached to a Trainer that is going to validate, test or predict.
        checkpoint: the checkpoint that the Trainer loads.
    """
    saved, kind = _saved_arguments(checkpoint), type(model)
    defaults, given = constructor_defaults(kind), given_arguments(model.trainer)
    if given is None:
        given = {name for name, value in model.hparams.items() if value != defaults.get(name)}
    adopted = {name: saved[name] for name in _changed_arguments(model, saved) if name not in given}
    if not adopted:
        return
    known = {name: value for name, value in model.hparams.items() if name in defaults}
    rebuilt = kind(**{**known, **adopted}).to(model.device)
    rebuilt.model.tiler = model.model.tiler  # of a callback, which has been set up before the checkpoint is loaded
    names = {name for each in (model, rebuilt) for name, _ in each.named_children()}
    for name in names - {"pre_processor", "post_processor", "evaluator"}:  # which anomalib restores itself
        setattr(model, name, getattr(rebuilt, name, None))
    model.network_arguments = rebuilt.network_arguments
    model.hparams.update(adopted)
    logger.info("From the checkpoint: %s", ", ".join(f"{name} {value!r}" for name, value in adopted.items()))


def check_arguments(model: "CheckpointMixin", checkpoint: Mapping[str, Any]) -> None:
    """Raise if an argument that results depend on differs between a checkpoint and the model that loads it.

    Raises:
        ArgumentError: the arguments that differ, with both values.
    """
    saved = _saved_arguments(checkpoint)
    changed = _changed_arguments(model, saved)
    if changed:
        msg = (
            f"the checkpoint was trained with other arguments: {_differences(changed, saved, model.hparams)}. Give the "
            "same arguments. To test, predict or export, give none of them: they then come from the checkpoint."
        )
        raise ArgumentError(msg)


def _saved_arguments(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    saved: Mapping[str, Any] = checkpoint.get(CHECKPOINT_KEY, {}).get("arguments")
    return saved or checkpoint.get("hyper_parameters", {})


def _changed_arguments(model: "CheckpointMixin", saved: Mapping[str, Any]) -> list[str]:
    """Return the names of the arguments that results depend on and that differ."""
    given, kind = dict(model.hparams), type(model)
    names = [name for name in saved if name in given and name not in model.training_only]
    return [name for name in names if canonical_value(kind, name, saved) != canonical_value(kind, name, given)]


def resume_training(model: "CheckpointMixin", checkpoint: dict[str, Any]) -> None:
    """Prepare for resuming: the optimizer gets the model's settings where these may be changed, the model the steps.

    Raises:
        ArgumentError: the learning-rate schedule, or what else depends on the length of training, would not continue.
    """
    saved_arguments, defaults = checkpoint.get("hyper_parameters", {}), constructor_defaults(type(model))
    names = sorted({"schedule", "hard_mining"} | model.schedule_arguments)
    given: dict[str, Any] = {name: model.hparams[name] for name in names}
    saved = {name: saved_arguments.get(name, defaults[name]) for name in names}  # an older version lacks some
    if model.schedule_arguments and CHECKPOINT_KEY in checkpoint:
        saved["max_epochs"], given["max_epochs"] = checkpoint[CHECKPOINT_KEY]["max_epochs"], model.trainer.max_epochs
    if saved.get("max_epochs") == -1:
        msg = "the checkpoint's training run ends by max_steps only, and cannot be resumed: start a new one."
        raise ArgumentError(msg)
    changed = [name for name in saved if saved[name] != given[name]]
    if changed:
        msg = (
            f"the checkpoint's training run has other arguments: {_differences(changed, saved, given)}. Give the same, "
            "or start a new one."
        )
        raise ArgumentError(msg)
    model.planned_steps = _planned_steps(checkpoint)
    options = model.options
    for group in (group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]):
        group.update(betas=options.betas, weight_decay=options.weight_decay)
        if options.schedule == "constant":
            group["lr"] = options.learning_rate


def without_unknown_arguments(model_class: type["CheckpointMixin"], path: str | Path) -> str | Path | io.BytesIO:
    """Return a checkpoint without arguments that the model does not have, such as those of another version.

    Lightning drops them only for constructors without ``**kwargs``.

    Args:
        model_class: class of the model that is to be loaded.
        path: checkpoint file.

    Returns:
        The path if there are none, else a copy of the file in memory.
    """
    if not Path(path).is_file():
        return path  # a URL, or a missing file that Lightning names
    with anomalib_safe_globals(extra=model_class.checkpoint_safe_globals()):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    arguments = checkpoint.get("hyper_parameters", {})
    # names with an underscore are Lightning's own, which it checks itself
    known = constructor_defaults(model_class).keys()
    unknown = {name for name in arguments if name not in known and not name.startswith("_")}
    if not unknown:
        return path
    checkpoint["hyper_parameters"] = {name: value for name, value in arguments.items() if name not in unknown}
    copy = io.BytesIO()
    torch.save(checkpoint, copy)
    copy.seek(0)
    return copy


def _planned_steps(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of steps of a checkpoint's training run; one of 0.2.0 contains only that of a schedule."""
    of_schedule = sum(schedule.get("total_steps", 0) for schedule in checkpoint.get("lr_schedulers", []))
    return int(checkpoint.get(CHECKPOINT_KEY, {}).get("steps", of_schedule))


def _differences(names: list[str], saved: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: checkpoint has {saved[name]!r}, model has {given[name]!r}" for name in names)
