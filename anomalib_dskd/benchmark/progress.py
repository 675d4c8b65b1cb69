"""Two lines on a terminal: the whole benchmark, and the job in hand."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import Self

from anomalib_dskd.benchmark.config import Job

__all__ = ["BenchmarkProgress"]


class BenchmarkProgress:
    """Shows how far the benchmark is, with the time left; where there is no terminal, a line for each job's end.

    Args:
        total: number of jobs.
        done: number of those that are done already.
        console: where to.
    """

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.console = console
        self.total, self.done = total, done
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._sweep = self._bars.add_task(self._title(), total=total, completed=done)
        self._job = self._bars.add_task("", total=1.0)
        self._shown: str | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, job: Job, fraction: float, text: str) -> None:
        """Show how far a job is."""
        if self._shown != job.id:
            self._shown = job.id
            self._bars.reset(self._job, total=1.0)
        self._bars.update(self._job, completed=fraction, description=f"{job.title}: {text}")
        self._bars.update(self._sweep, completed=self.done + fraction)

    def finish(self, job: Job, outcome: str) -> None:
        """Count a job, and say in a line what came of it."""
        self.done += 1
        self._bars.update(self._sweep, completed=self.done, description=self._title())
        self.console.print(
            f"{self.done} of {self.total}: {job.title}: {outcome}", markup=False, highlight=False, soft_wrap=True
        )

    def _title(self) -> str:
        return f"{self.done} of {self.total} jobs"
