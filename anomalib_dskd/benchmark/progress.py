"""Progress bars of a benchmark: one for all jobs, one for the current job."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import Self

from anomalib_dskd.benchmark.config import Job

__all__ = ["BenchmarkProgress"]


class BenchmarkProgress:
    """Shows progress and remaining time on a terminal; elsewhere it prints one line per finished job.

    Args:
        total: number of jobs.
        done: number of jobs that are already done.
        console: where to print.
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
        self._all_jobs = self._bars.add_task(self._title(), total=total, completed=done)
        self._current_job = self._bars.add_task("", total=1.0)
        self._current_id: str | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, job: Job, fraction: float, text: str) -> None:
        """Show the fraction of a job that is done, and its current step."""
        if self._current_id != job.id:
            self._current_id = job.id
            self._bars.reset(self._current_job, total=1.0)
        self._bars.update(self._current_job, completed=fraction, description=f"{job.title}: {text}")
        self._bars.update(self._all_jobs, completed=self.done + fraction)

    def finish(self, job: Job, outcome: str) -> None:
        """Count a finished job, and print its outcome on one line."""
        self.done += 1
        self._bars.update(self._all_jobs, completed=self.done, description=self._title())
        self.console.print(
            f"{self.done} of {self.total}: {job.title}: {outcome}", markup=False, highlight=False, soft_wrap=True
        )

    def _title(self) -> str:
        return f"{self.done} of {self.total} jobs"
