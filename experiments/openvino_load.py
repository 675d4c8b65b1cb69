"""Load test of one compiled OpenVINO model from several threads: counts wrong predictions and measures memory growth.

Each thread has its own infer request, as OpenVINO requires; the compiled model itself refuses calls from several
threads. Each result must equal, bit for bit, the result of a single thread for the same image.

    python experiments/openvino_load.py                      # an untrained DSKD: the weights do not matter
    python experiments/openvino_load.py --model model.xml --size 256
"""

import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import openvino

FP32 = {"INFERENCE_PRECISION_HINT": "f32"}
WARM_UP = 0.1  # fraction of the predictions before the first measurement of memory


@dataclass(frozen=True)
class Load:
    """Results of a load test.

    Attributes:
        predictions: number of predictions.
        wrong: number of predictions that differ from a single thread's.
        seconds: time for all predictions.
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
    """Return the resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def predict(request: Any, image: np.ndarray) -> list[np.ndarray]:  # noqa: ANN401 - OpenVINO has no public type
    """Return copies of all outputs for an image ``(1, 3, H, W)``."""
    return [np.array(output) for output in request.infer([image]).to_tuple()]


def run_under_load(compiled: Any, images: list[np.ndarray], *, predictions: int, threads: int) -> Load:  # noqa: ANN401
    """Predict the images repeatedly from several threads, and compare with the predictions of one thread.

    Args:
        compiled: OpenVINO model.
        images: each ``(1, 3, H, W)``.
        predictions: number of predictions of all threads together.
        threads: number of threads.
    """
    request = compiled.create_infer_request()
    expected = [predict(request, image) for image in images]
    requests = [compiled.create_infer_request() for _ in range(threads)]

    def count_wrong(thread: int, indices: range) -> int:
        chosen = [(index + thread) % len(images) for index in indices]
        return sum(not all(map(np.array_equal, predict(requests[thread], images[i]), expected[i])) for i in chosen)

    def count_all_wrong(start: int, stop: int) -> int:
        indices = [range(start + thread, stop, threads) for thread in range(threads)]
        return sum(pool.map(count_wrong, range(threads), indices))

    begin, warm_up = time.perf_counter(), int(WARM_UP * predictions)
    with ThreadPoolExecutor(threads) as pool:
        wrong = count_all_wrong(0, warm_up)
        warm_mib = resident_mib()
        wrong += count_all_wrong(warm_up, predictions)
    return Load(predictions, wrong, time.perf_counter() - begin, warm_mib, resident_mib())


def export(size: int, folder: Path) -> Path:
    """Export an untrained DSKD with ResNet18."""
    from anomalib_dskd import Dskd  # noqa: PLC0415 - takes seconds, and is not needed with --model

    model = Dskd(image_size=size, seed=0)
    model.model.teacher.weights_origin = {"file": "random, for the load test"}
    model.model.is_trained = True
    return model.to_openvino(folder)


def main() -> None:
    parser = common.option_parser(__doc__, "--size")
    parser.add_argument("--model", type=Path, help="exported model.xml; default: an untrained DSKD")
    parser.add_argument("--predictions", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    images = [random.random((1, 3, options.size, options.size), dtype=np.float32) for _ in range(50)]
    with tempfile.TemporaryDirectory() as folder:
        path = options.model or export(options.size, Path(folder))
        compiled = openvino.Core().compile_model(path, "CPU", FP32)
        load = run_under_load(compiled, images, predictions=options.predictions, threads=options.threads)
    print(f"predictions: {load.predictions} of {options.size}x{options.size} from {options.threads} threads")
    print(f"different from a single thread's: {load.wrong}")
    print(f"time: {load.seconds:.0f} s, {load.predictions / load.seconds:.0f} images per second")
    print(f"memory: {load.warm_mib:.0f} MiB after warm-up, {load.end_mib:.0f} MiB at the end, {load.growth:+.1%}")


if __name__ == "__main__":
    main()
