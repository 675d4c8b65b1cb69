"""anomalib's command in processes of their own that start quickly, and can be killed.

Importing anomalib takes longer than a tiny training. A server imports it once, and forks a process for each command.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["anomalib.cli.cli", "anomalib_dskd", "tests.commands"])
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


def start_server() -> None:
    """Import what commands need, which takes seconds the first time."""
    process = CONTEXT.Process(target=time.sleep, args=(0,))
    process.start()
    process.join()


def start(*arguments: str | Path, folder: Path, prepare: Callable[[], None] | None = None) -> BaseProcess:
    """Start ``anomalib ARGUMENTS`` in ``folder``; what it prints replaces the folder's ``output.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    process = CONTEXT.Process(target=_run, args=(list(map(str, arguments)), folder, prepare))
    process.start()
    return process


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text(errors="replace")


def run(*arguments: str | Path, folder: Path, fails: bool = False, prepare: Callable[[], None] | None = None) -> str:
    """Run a command to its end; return what it printed."""
    process = start(*arguments, folder=folder, prepare=prepare)
    process.join(timeout=180)
    is_stuck = process.is_alive()
    if is_stuck:
        process.kill()
    assert not is_stuck, output(folder)
    assert (process.exitcode != 0) == fails, output(folder)
    return output(folder)


def wait_until(condition: Callable[[], bool], process: BaseProcess, *, seconds: float = 120) -> bool:
    """Wait for a condition; return whether it came true before the process ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        if condition():
            return True
        time.sleep(0.001)
    return condition()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints below a folder, the newest last."""
    return sorted(folder.rglob("v*/**/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def _run(arguments: list[str], folder: Path, prepare: Callable[[], None] | None) -> None:
    os.chdir(folder)
    file = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch  # noqa: PLC0415 - once the output goes where it should
    from anomalib.cli.cli import main  # noqa: PLC0415

    multiprocessing.set_start_method("fork", force=True)  # for what the command starts, as if a shell had started it
    torch.cuda._is_in_bad_fork = lambda: False  # the server has looked for a GPU, and used none
    torch.set_num_threads(1)
    sys.argv = ["anomalib", *arguments]
    if prepare is not None:
        prepare()
    main()
