"""The benchmark on a Ray cluster of two machines, one of which fails."""

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
    # Ray does not close all its processes and files
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

ray = pytest.importorskip("ray", reason="needs the extra `ray`")


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster  # noqa: PLC0415 - Ray may be missing

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    cluster.connect()
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def test_jobs_of_a_failed_machine_are_repeated_on_another(cluster, magnetic_tile_root, teacher_weights, tmp_path):
    running, (_, failing) = cluster
    teacher = TEACHER.partition(".")[0]
    model = {"class_path": "anomalib_dskd.Dskd", "init_args": {"teacher": teacher, "sigma": 2.0}}
    data = {"class_path": "anomalib_dskd.MagneticTile", "init_args": {"root": str(magnetic_tile_root)}}
    config = BenchmarkConfig(
        models=[ModelSpec(model, epochs=1)],
        datasets=[DatasetSpec(data)],
        seeds=[0, 1],
        image_size=64,
        weights={teacher: str(teacher_weights)},
        measure=Measurements(speed=False),
    )
    write_hub_cache(config.weights, tmp_path / "weights")
    tasks = [Task(job, tmp_path / job.id) for job in expand(config, describe_weights(config.weights))]
    for task in tasks:
        task.folder.mkdir()

    def remove_a_machine():
        while ray.available_resources().get("CPU", 0) > 0:  # until both machines have a job
            time.sleep(0.1)
        time.sleep(2)
        running.remove_node(failing, allow_graceful=False)

    remover = threading.Thread(target=remove_a_machine)
    remover.start()
    runner = RayRunner(environment(tmp_path / "weights"), lambda *_: None, cpus=1)
    results = list(runner.run(tasks))
    remover.join()
    assert sorted(result.seed for result in results) == [0, 1]
    assert [result.reason for result in results] == [None] * 2
    assert len(running.worker_nodes) == 1
    for task in tasks:
        assert (task.folder / "predictions.npz").is_file(), task.job.title


@pytest.mark.usefixtures("cluster")
def test_a_job_that_no_machine_can_run_is_an_error():
    runner = RayRunner({}, lambda *_: None, cpus=3)
    with pytest.raises(ArgumentError, match="cpus 3 per job: no machine of the cluster has more than 1. Give --cpus"):
        list(runner.run([]))
