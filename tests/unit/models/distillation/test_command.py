"""What a model does only in anomalib's command; tests/integration/test_commands.py runs the command itself."""

import logging
import sys
import warnings

import pytest
from lightning_utilities.core import rank_zero
from rich.logging import RichHandler

from anomalib_dskd import Dskd
from anomalib_dskd.models.distillation import command
from tests.conftest import TEACHER

LOGGERS = ("", *command.NOT_FOR_USERS)


@pytest.fixture
def anomalibs_logging(monkeypatch):
    """Loggers as anomalib's command configures them, and as they were afterwards."""
    root = logging.getLogger()
    before = {name: (logging.getLogger(name).level, list(logging.getLogger(name).handlers)) for name in LOGGERS}
    filters = list(rank_zero.log.filters)
    root.handlers = [logging.StreamHandler(), RichHandler()]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anomalib", "train"])
    with warnings.catch_warnings():
        yield root
    for name, (level, handlers) in before.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).handlers = handlers
    rank_zero.log.filters = filters


def printing(root: logging.Logger) -> list[type]:
    """The handlers that print: pytest adds others."""
    kinds = [type(handler) for handler in root.handlers]
    return [kind for kind in kinds if kind in {logging.StreamHandler, RichHandler}]


def test_a_message_is_printed_once(anomalibs_logging):
    assert printing(anomalibs_logging) == [logging.StreamHandler, RichHandler]
    Dskd(teacher=TEACHER)
    assert printing(anomalibs_logging) == [RichHandler]


@pytest.mark.parametrize("program", ["python", "/usr/bin/anomalib-dskd", "train_anomalib.py"])
def test_nothing_is_changed_outside_the_command(program, anomalibs_logging, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "train"])
    levels, filters = [logging.getLogger(name).level for name in LOGGERS], list(warnings.filters)
    Dskd(teacher=TEACHER)
    assert printing(anomalibs_logging) == [logging.StreamHandler, RichHandler]
    assert [logging.getLogger(name).level for name in LOGGERS] == levels
    assert warnings.filters == filters


@pytest.mark.usefixtures("anomalibs_logging")
def test_what_is_not_for_users_is_left_out_and_the_rest_is_not(caplog):
    command.filter_messages()
    logging.getLogger("anomalib.callbacks.timer").info("Training took 1 second")
    logging.getLogger("anomalib.callbacks.timer").warning("a warning")
    assert [record.getMessage() for record in caplog.records] == ["a warning"]
    seen = []
    rank_zero.log.addFilter(lambda record: seen.append(record.getMessage()))
    rank_zero.rank_zero_info("Tip: ... try installing [litlogger](https://...)")
    rank_zero.rank_zero_info("GPU available: False")
    assert seen == ["GPU available: False"]


@pytest.mark.usefixtures("anomalibs_logging")
def test_warnings_of_others_are_left_out_and_the_rest_is_not():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        command.filter_messages()
        warnings.warn("Found 55 module(s) in eval mode at the start of training.", stacklevel=1)
        warnings.warn("The dataloader does not have many workers", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["The dataloader does not have many workers"]
