import io

from rich.console import Console

from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, Job, ModelSpec, expand
from anomalib_dskd.benchmark.progress import BenchmarkProgress

NAME = "A [v2] [/x]"  # which would be markup


def job() -> Job:
    model = ModelSpec({"class_path": "anomalib_dskd.Dskd"}, name=NAME)
    data = DatasetSpec({"class_path": "anomalib_dskd.MagneticTile"}, name="tiles")
    return expand(BenchmarkConfig([model], [data], epochs=2))[0]


def shown(*, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200)
    with BenchmarkProgress(3, 1, console) as progress:
        progress.update(job(), 0.5, "epoch 1 of 2")
        progress._bars.refresh()
        progress.finish(job(), "image_AUROC 88.5")
    return text.getvalue()


def test_a_terminal_shows_all_jobs_and_the_current_one_by_its_name_without_markup():
    text = shown(terminal=True)
    assert "1 of 3 jobs" in text
    assert f"{NAME} on tiles, seed 0: epoch 1 of 2" in text


def test_without_a_terminal_there_is_only_one_line_per_finished_job():
    assert shown(terminal=False) == f"2 of 3: {NAME} on tiles, seed 0: image_AUROC 88.5\n"
