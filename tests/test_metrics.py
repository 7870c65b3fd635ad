"""What an actor counts, read where Prometheus would read it."""

import time
import urllib.request

import pytest
import ray

from actors.metrics import Meter

pytestmark = pytest.mark.usefixtures("one_ray")
PATIENCE = 40  # seconds; workers hand their counts on every ten


@ray.remote
class Counting:
    def __init__(self):
        self.meter = Meter(7)

    def work(self) -> None:
        self.meter.add("solves", 5)
        self.meter.add("bytes_sent", 1000)
        with self.meter.during("solve", computes=True):
            assert set(self.meter.counts.doing) == {"solve"}
            time.sleep(0.2)


def test_prometheus_port_has_the_counts_by_actor():
    actor = Counting.remote()
    ray.get([actor.work.remote(), actor.work.remote()])
    node = ray.nodes()[0]
    until, found = time.monotonic() + PATIENCE, {}
    while time.monotonic() < until and "solves" not in found:
        time.sleep(1)
        text = urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10).read().decode()
        for line in text.splitlines():
            if line.startswith("ray_sparse_expansion_") and 'actor="7"' in line:
                found[line.removeprefix("ray_sparse_expansion_").split("_total{")[0]] = float(line.rsplit(" ", 1)[1])
    assert found["solves"] == 10 and found["bytes_sent"] == 2000 and 0.4 <= found["busy_seconds"] < 5
