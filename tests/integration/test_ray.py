"""The benchmark on a Ray cluster of two machines, one of which is lost."""

import threading
import time

import pytest

from anomalib_dskd.benchmark.config import BenchmarkConfig, DatasetSpec, Measurements, ModelSpec, Task, expand
from anomalib_dskd.benchmark.hub_cache import describe_weights, environment, write_hub_cache
from anomalib_dskd.benchmark.runners import RayRunner
from anomalib_dskd.errors import ArgumentError
from tests.conftest import TEACHER

pytestmark = [
    pytest.mark.slow,
    # of Ray's own processes and files, which it leaves to the system
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

ray = pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster  # noqa: PLC0415 - Ray may be missing

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [made.add_node(num_cpus=1), made.add_node(num_cpus=1)]
    made.connect()
    yield made, nodes
    ray.shutdown()
    made.shutdown()


def test_jobs_of_a_lost_machine_are_done_on_another(cluster, magnetic_tile_root, teacher_weights, tmp_path):
    made, (_, lost) = cluster
    teacher = TEACHER.partition(".")[0]
    model = {"class_path": "anomalib_dskd.Dskd", "init_args": {"teacher": teacher, "sigma": 2.0}}
    data = {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(magnetic_tile_root)}}
    config = BenchmarkConfig(
        models=[ModelSpec(model, epochs=3)],
        datasets=[DatasetSpec(data)],
        seeds=[0, 1, 2],
        image_size=64,
        weights={teacher: str(teacher_weights)},
        measure=Measurements(speed=False),
    )
    write_hub_cache(config.weights, tmp_path / "weights")
    tasks = [Task(job, tmp_path / job.id) for job in expand(config, describe_weights(config.weights))]
    for task in tasks:
        task.folder.mkdir()

    def lose_a_machine():
        while ray.available_resources().get("CPU", 0) > 0:  # until both have a job
            time.sleep(0.1)
        time.sleep(2)
        made.remove_node(lost, allow_graceful=False)

    killer = threading.Thread(target=lose_a_machine)
    killer.start()
    runner = RayRunner(environment(tmp_path / "weights"), lambda *_: None, cpus=1)
    records = list(runner.run(tasks))
    killer.join()
    assert sorted(record["seed"] for record in records) == [0, 1, 2]
    assert [record["reason"] for record in records] == [None] * 3
    assert len(made.worker_nodes) == 1
    for task in tasks:
        assert (task.folder / "predictions.npz").is_file(), task.job.title


@pytest.mark.usefixtures("cluster")
def test_a_job_that_fits_no_machine_is_refused():
    runner = RayRunner({}, lambda *_: None, cpus=3)
    with pytest.raises(ArgumentError, match="cpus 3 a job: no machine of the cluster has more than 1. Give --cpus"):
        list(runner.run([]))
