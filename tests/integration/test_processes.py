"""Training in two processes, as Lightning's ``ddp`` starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TEACHER

SCRIPT = """
import sys
import torch
from anomalib.engine import Engine
import anomalib_dskd
from anomalib_dskd import MagneticTile

name, root, weights, folder, teacher = sys.argv[1:]
torch.set_num_threads(1)
arguments = {"assistant": "test_efficientnet"} if name == "Tad" else {}
model = getattr(anomalib_dskd, name)(
    teacher=teacher, teacher_weights=weights, image_size=64, sigma=2.0, seed=0, visualizer=False, **arguments
)
engine = Engine(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, default_root_dir=folder,
    enable_progress_bar=False,
)
engine.fit(model, datamodule=MagneticTile(root, train_batch_size=2, num_workers=0))
parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
print(f"process {engine.trainer.global_rank}: trained {model.model.is_trained}, sum {parameters.double().sum():.9f}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Afkd", "Dskd", "Dtgd", "Tad"])
def test_two_processes_train_one_model(name, magnetic_tile_root: Path, teacher_weights: Path, tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = [name, magnetic_tile_root, teacher_weights, tmp_path / "results", TEACHER]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    # not line by line: what the processes print at once may share a line
    told = sorted(re.findall(r"process (\d): trained (\w+), sum ([-\d.]+)", result.stdout))
    assert [process for process, *_ in told] == ["0", "1"], result.stdout + result.stderr
    assert {trained for _, trained, _ in told} == {"True"}
    assert len({total for *_, total in told}) == 1  # the same weights
