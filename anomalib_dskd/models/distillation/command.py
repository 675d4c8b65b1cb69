"""anomalib's command, ``anomalib train|test|predict|export``: what a model does only when it is run by it.

anomalib has no place for this: its command builds the model, then the Trainer. The process is recognized by its name.
In Python nothing here takes effect.
"""

import logging
import sys
import warnings
from pathlib import Path

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core import rank_zero
from rich.logging import RichHandler

__all__ = ["filter_messages", "given_arguments", "prepare_saved_config", "runs_in_command"]

NOT_FOR_USERS = {
    "anomalib.callbacks": "steps of the program, and times that the progress bar shows",
    "anomalib.models": "steps of the program",
    "onnx_ir": "rewrites of the graph in an export to ONNX",
    "onnxscript": "the same",
}
"""Loggers whose INFO messages are left out, and what they say."""
MESSAGES = (
    "will override existing callbacks",  # the model's callbacks, in the second stage of `anomalib train`
    "litlogger",  # an advertisement
    "TPU available",
)
"""Parts of Lightning's log messages that are left out."""
WARNINGS = (
    "Found .* module.* in eval mode",  # the teacher, which is frozen on purpose
    ".*isinstance.treespec, LeafSpec",  # deprecations, of Lightning's own code
    "The ``compute`` method of metric .* before the ``update`` method",  # pixel metrics of data without masks
    "The number of training batches .* logging interval",  # there is no logger by default
    "The dirpath has changed from",  # the folder of checkpoints, of which a test or a prediction writes none
    "'pin_memory' argument is set as true",  # anomalib's loaders, without a GPU
)
"""Beginnings of warnings, as regular expressions, that are left out."""


def runs_in_command() -> bool:
    """Whether this process is anomalib's command."""
    return Path(sys.argv[0]).stem == "anomalib"


def filter_messages() -> None:
    """In anomalib's command, let the screen show progress, metrics and where results are; elsewhere do nothing.

    anomalib's command prints each message twice: its root logger has a plain handler and one of rich. What is printed
    before the model is built, such as deprecation warnings at the import of anomalib, cannot be left out here.
    """
    if not runs_in_command():
        return
    root = logging.getLogger()
    if any(isinstance(handler, RichHandler) for handler in root.handlers):
        for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
            root.removeHandler(handler)
    for name in NOT_FOR_USERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    rank_zero.log.addFilter(_is_for_users)  # the logger of all of Lightning's messages
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _is_for_users(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in MESSAGES)


def prepare_saved_config(trainer: Trainer) -> None:
    """Let the ``config.yaml`` that anomalib's command saves be one of the training run, which all its commands accept.

    ``optimizer`` and ``lr_scheduler`` are left out where they are not given: `predict` and `export` do not know them.
    `test` and `predict` do not replace the file of a training run.
    """
    callback = _config_callback(trainer)
    if callback is None:
        return
    if trainer.state.fn == TrainerFn.FITTING:
        callback.config = callback.config.clone()
        for name in ("optimizer", "lr_scheduler"):
            if callback.config.get(name, "") is None:
                del callback.config[name]
    elif (Path(trainer.log_dir or ".") / callback.config_filename).exists():
        callback.already_saved = True


def given_arguments(trainer: Trainer) -> set[str] | None:
    """Return the names of the model's arguments that anomalib's command was given; None elsewhere.

    A model cannot tell them from defaults, with which jsonargparse calls its constructor, too. The command line is read
    again without defaults; only the default of the folder of results is needed, from which another argument is set.
    """
    callback = _config_callback(trainer)
    if callback is None or not runs_in_command():
        return None
    arguments = ["--default_root_dir", str(trainer.default_root_dir), *sys.argv[2:]]
    config = callback.parser.parse_args(arguments, defaults=False)
    return set(vars(config.model.get("init_args", Namespace())))


def _config_callback(trainer: Trainer) -> SaveConfigCallback | None:
    """Return the callback of anomalib's command that saves its configuration; there is none in Python."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, SaveConfigCallback)), None)
