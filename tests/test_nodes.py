"""Several nodes: a node that is lost, and nodes that do not see the driver's files."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.jobs import LAYERS, make_inputs, shard_hashes
from tests.test_faults import run, saboteur  # noqa: F401 (a fixture)

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster():
    """A head of one CPU, to be joined by others; this process is its driver."""
    os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def wait_for_cpus(count: int) -> None:
    deadline = time.monotonic() + 60
    while sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]) != count and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]) == count


def test_nodes_that_are_lost(cluster, job, undisturbed, saboteur, tmp_path):  # noqa: F811
    """Two actors on two nodes give what one gives. A third node is there: when one of the two goes, it takes over; when that one goes, too, the crew
    gets smaller."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    wait_for_cpus(3)

    def lose(rank: int) -> None:
        """The node of an actor that is not on the head."""
        mine = {node.node_id: node for node in nodes}
        actors = [state["NodeID"] if "NodeID" in state else state["Address"]["NodeID"] for state in ray._private.state.actors().values() if state["State"] == "ALIVE"]
        lost = next(mine[node] for node in actors if node in mine)
        nodes.remove(lost)
        cluster.remove_node(lost, allow_graceful=False)

    saboteur.at = {("solve", 2): lambda: lose(0), ("evaluate expanded", 2): lambda: lose(1)}
    result = run(*job, "--actors", 2, "--output-dir", tmp_path / "run")
    assert not saboteur.at and not nodes and any("1 of 2, since Ray has room for no more" in note for note in saboteur.notes), saboteur.notes
    assert shard_hashes(tmp_path / "run") == shard_hashes(undisturbed[0]) and result["perplexity"] == undisturbed[1]["perplexity"]


@pytest.fixture
def blind_node(cluster, tmp_path):
    """A node on which `hidden` is another, empty directory. The head's CPU is taken, so that actors go to the node."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    join = f"mount -t tmpfs none {hidden} && exec {RAY} start --address={cluster.address} --num-cpus=1 --block --disable-usage-stats"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a file system cannot be hidden here")
    process = subprocess.Popen(["unshare", "--mount", "sh", "-c", join], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_cpus(2)
    holder = ray.remote(num_cpus=1)(type("Holder", (), {"node": lambda self: ray.get_runtime_context().get_node_id()})).options(
        scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(cluster.head_node.node_id, soft=False)).remote()
    ray.get(holder.node.remote())
    yield hidden, holder
    ray.kill(holder)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_cpus(1)


@pytest.mark.slow
def test_a_node_that_sees_no_files(blind_node, undisturbed, tmp_path):
    """Neither the model nor the run directory: weights and shards travel through the object store; resumed there, finished shards do, too. With
    --storage the shards are written where they are made."""
    hidden, holder = blind_node
    options = make_inputs(hidden)
    result = run(*options, "--actors", 1, "--output-dir", hidden / "run")
    assert shard_hashes(hidden / "run") == shard_hashes(undisturbed[0]) and result["perplexity"] == undisturbed[1]["perplexity"]
    (hidden / "run" / "layers" / f"layer_{LAYERS - 1:03d}.safetensors").unlink()  # so that the layers before it are replayed
    shutil.rmtree(hidden / "run" / "model")
    assert run(*options, "--actors", 1, "--output-dir", hidden / "run")["layers_resumed"] == LAYERS - 1
    assert shard_hashes(hidden / "run") == shard_hashes(undisturbed[0])
    ray.kill(holder)  # two actors, of which one sees everything
    dense = run(*options, "--actors", 2, "--propagation", "dense", "--output-dir", hidden / "dense")
    stored = run(*options, "--actors", 2, "--propagation", "dense", "--output-dir", hidden / "stored", "--storage", f"file://{tmp_path}/storage")
    assert stored["perplexity"] == dense["perplexity"]
    assert sorted((tmp_path / "storage" / "layers").iterdir()) and not (hidden / "stored" / "layers").exists()
