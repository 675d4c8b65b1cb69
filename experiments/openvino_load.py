"""Thousands of predictions through one compiled OpenVINO model from several threads: are all right, does memory grow?

Each thread has an infer request of its own, as OpenVINO asks for; calling the compiled model itself from several
threads is refused there. Each result must equal, bit by bit, the one that a single thread had for the same image.

    python experiments/openvino_load.py                      # an untrained DSKD: what it has learnt does not matter
    python experiments/openvino_load.py --model model.xml --size 256
"""

import argparse
import resource
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
WARM_UP = 0.1  # share of the predictions after which memory is first measured


@dataclass(frozen=True)
class Load:
    """What a run under load has shown.

    Attributes:
        predictions: how many were made.
        wrong: how many of them differ from the single thread's.
        seconds: for all of them.
        warm_mib: resident memory after the warm-up.
        end_mib: resident memory at the end.
    """

    predictions: int
    wrong: int
    seconds: float
    warm_mib: float
    end_mib: float

    @property
    def growth(self) -> float:
        """Growth of the memory after the warm-up, as a fraction."""
        return self.end_mib / self.warm_mib - 1


def resident_mib() -> float:
    """Return the memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def predict(request: Any, image: np.ndarray) -> list[np.ndarray]:  # noqa: ANN401 - OpenVINO's
    """Return copies of all outputs for an image ``(1, 3, H, W)``."""
    return [np.array(output) for output in request.infer([image]).to_tuple()]


def run_under_load(compiled: Any, images: list[np.ndarray], *, predictions: int, threads: int) -> Load:  # noqa: ANN401
    """Predict the images in turn from several threads, and compare with what one thread says of them.

    Args:
        compiled: OpenVINO model.
        images: each ``(1, 3, H, W)``.
        predictions: how many in all.
        threads: how many at the same time.
    """
    request = compiled.create_infer_request()
    expected = [predict(request, image) for image in images]
    wrong = [0] * threads
    failures: list[BaseException] = []
    warm = threading.Barrier(threads + 1)

    def work(number: int) -> None:
        try:
            mine = compiled.create_infer_request()
            todo = range(number, predictions, threads)
            for done, index in enumerate(todo):
                if done == int(WARM_UP * len(todo)):
                    warm.wait()  # for the measurement
                    warm.wait()
                which = (index + number) % len(images)
                same = all(map(np.array_equal, predict(mine, images[which]), expected[which]))
                wrong[number] += not same
        except BaseException as error:
            failures.append(error)
            warm.abort()

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    warm_mib = 0.0
    try:
        warm.wait()
        warm_mib = resident_mib()
        warm.wait()
    except threading.BrokenBarrierError:
        pass
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return Load(predictions, sum(wrong), time.perf_counter() - start, warm_mib, resident_mib())


def export(size: int, folder: Path) -> Path:
    """Export an untrained DSKD with ResNet18."""
    from anomalib_dskd import Dskd  # noqa: PLC0415 - takes seconds, and a model that is given needs none

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Dskd(image_size=size, seed=0)
        model.model.teacher.weights_origin = {"file": "random, for the measurement"}
        model.model.is_trained = True
        return model.to_openvino(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="exported model.xml; default: an untrained DSKD")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--predictions", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    images = [random.random((1, 3, options.size, options.size), dtype=np.float32) for _ in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or export(options.size, Path(folder))
        compiled = openvino.Core().compile_model(path, "CPU", F32)
        load = run_under_load(compiled, images, predictions=options.predictions, threads=options.threads)
    print(f"predictions: {load.predictions} of {options.size}x{options.size} from {options.threads} threads")
    print(f"different from the single thread's: {load.wrong}")
    print(f"seconds: {load.seconds:.0f}, {load.predictions / load.seconds:.0f} a second")
    print(f"memory: {load.warm_mib:.0f} MiB after warm-up, {load.end_mib:.0f} MiB at the end, {load.growth:+.1%}")


if __name__ == "__main__":
    main()
