"""Will it fit, and how long will it take: what the `plan` command calls, and what `run` refuses before a model is loaded.

A cluster is the one at hand, measured by a task on every kind of node, or one that is only described.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster import CrewSize, connected, size_crew
from pipeline.config import Job
from pipeline.devices import device_name, prepare_device
from pipeline.errors import UserError
from pipeline.estimate import estimate
from pipeline.memory import Cluster, device_memory, disk_bytes
from pipeline.model_shape import find_config
from pipeline.plan_text import as_dict, describe
from pipeline.prepared import Prepared
from pipeline.rates import H100, Rates, measure
from pipeline.verdict import problems, too_little_device_memory, too_little_disk
from pipeline.work import certain_work, work_of

GIB = 1 << 30
RESERVED = 0.01  # of a card's memory, as vendors print it, that no program gets
STORE_SHARE, STORE_MOST = 0.3, 200 * 10**9  # of a node's memory that Ray's object store takes, unless told otherwise
HOST_SHARE = 2  # of host memory for each byte of GPU memory, where it is not given
STORED = 1 << 26  # bytes put into the object store to measure it


@dataclass(frozen=True)
class Described:
    """A cluster of `gpus` cards of `gpu_memory` GB each on `nodes` nodes of `host_memory` GB each; all None: the one at hand."""

    gpus: int | None = None
    gpu_memory: float | None = None
    nodes: int | None = None
    host_memory: float | None = None

    def check(self, job: Job) -> None:
        """Raises UserError."""
        given = {"--gpus": self.gpus, "--gpu-memory": self.gpu_memory, "--nodes": self.nodes, "--host-memory": self.host_memory}
        for option, value in given.items():
            if value is not None and value <= 0:
                raise UserError(f"{option} is {value:g}; allowed is a number above 0.")
        if (self.gpus is None) != (self.gpu_memory is None) or self.gpus is None and (self.nodes or self.host_memory):
            raise UserError("--gpus and --gpu-memory describe a cluster together (--nodes and --host-memory beside them); give both, or neither for the cluster at hand.")
        if self.gpus is None:
            return
        if job.address:
            raise UserError(f"--address {job.address} is a cluster at hand, and --gpus describes another one; give one of the two.")
        if self.gpus % (self.nodes or 1):
            raise UserError(f"--nodes is {self.nodes}, but it does not divide --gpus {self.gpus}: nodes are taken to be alike.")
        most = self.gpus * int(1 / (job.gpus_per_actor or 1))
        if job.actors and job.actors > most:
            raise UserError(f"--actors is {job.actors}, but --gpus {self.gpus} hold {most} at most; allowed is 1 to {most}.")

    def cluster(self, job: Job) -> Cluster:
        share, nodes = job.gpus_per_actor or 1.0, self.nodes or 1
        actors = job.actors or self.gpus * int(1 / share)
        host = int(self.host_memory * GIB) if self.host_memory else int(HOST_SHARE * self.gpus / nodes * self.gpu_memory * GIB)
        name = f"{actors} actor{'s' if actors > 1 else ''} on {self.gpus} x {self.gpu_memory:g} GB, {nodes} node{'s' if nodes > 1 else ''} of {host / GIB:.0f} GB"
        return Cluster(actors, min(nodes, actors), int(self.gpu_memory * GIB * (1 - RESERVED) * share), host, int(min(STORE_SHARE * host, STORE_MOST)),
                       job.threads or 8, _free(job.run_directory), name)


def plan(job: Job, described: Described) -> dict:
    """What `--json` prints, and as `text` what is shown. Raises UserError for what the user can put right."""
    described.check(job)
    source = find_config(job.model, job.model_size, job.revision, job.cache_dir)
    if described.gpus:
        work, cluster, rates = work_of(job, source, "cuda"), described.cluster(job), H100
    else:
        with connected(job.address, job.verbose):
            crew = size_crew(job.actors, job.threads, job.gpus_per_actor)
            work = work_of(job, source, crew.device_type)
            cluster, rates = _measured(crew, job)
    made = estimate(work, cluster, rates)
    found = problems(made)
    return as_dict(made, found) | {"text": describe(made, found)}


def check_fits(jobs: Sequence[Prepared], crew: CrewSize, dtype: str) -> None:
    """Raises UserError for jobs that must fail for want of memory or disk, whatever they fall back on. From sizes alone, and only what
    is certain of them."""
    works = [certain_work(one.job, one.source, one.architecture, dtype, one.calibration.count, one.calibration.length) for one in jobs]
    cluster = _cluster(crew, int(_card_bytes() * crew.gpus) if crew.gpus else 0, jobs[0].job.run_directory)
    disk, there = {}, 0
    for work in works:
        there += sum(file.stat().st_size for folder in ("layers", "model") for file in (work.job.run_directory / folder).glob("*.safetensors"))
        for name, size in disk_bytes(work, device_memory(work, cluster), 0).items():
            disk[name] = disk.get(name, 0) + size
    lacking = [too_little_disk(disk, cluster.disk_bytes, there)]
    if cluster.gpu_bytes or not crew.gpus:  # else no driver tells how large the cards are
        lacking += [too_little_device_memory(work, cluster) for work in works]
    for problem in lacking:
        if problem and problem.fatal:
            raise UserError(problem.sentence)


def _cluster(crew: CrewSize, gpu_bytes: int, target: Path, name: str = "") -> Cluster:
    """The cluster at hand: its smallest node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    able = [node for node in nodes if not crew.gpus or node.get("GPU")]
    store = int(min(node.get("object_store_memory", 0) for node in able))
    return Cluster(crew.actors, min(len(able), crew.actors), gpu_bytes, int(min(node.get("memory", 0) for node in able)) + store, store, crew.threads,
                   _free(target), name)


def _measured(crew: CrewSize, job: Job) -> tuple[Cluster, Rates]:
    """A short measurement on every kind of node that an actor could be on."""
    kinds = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) >= crew.cpus and (not crew.gpus or node["Resources"].get("GPU")):
            what = tuple(sorted(key for key in node["Resources"] if key.startswith("accelerator_type"))), node["Resources"].get("CPU")
            kinds.setdefault(what, node["NodeID"])
    folder = _existing(job.run_directory)
    task = ray.remote(num_cpus=crew.cpus, num_gpus=crew.gpus, max_calls=1)(_look_at)
    found = ray.get([task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(crew.threads, crew.gpus, folder)
                     for node in kinds.values()])
    gpu_bytes = min(size for _, size in found)
    return _cluster(crew, gpu_bytes, job.run_directory, crew.described()), Rates.slowest([rates for rates, _ in found])


def _look_at(threads: int, gpu_share: float, folder: Path) -> tuple[Rates, int]:
    """Rates, and bytes of an actor's share of the card."""
    device = prepare_device(gpu_share, threads)
    rates = measure(device, folder if folder.is_dir() else Path(os.getcwd()), device_name(device))
    ones = np.ones(STORED // 8)
    start = time.perf_counter()
    stored = ray.put(ones)
    seconds = time.perf_counter() - start
    del stored
    size = torch.cuda.get_device_properties(device).total_memory * gpu_share if device.type == "cuda" else 0
    return replace(rates, store=STORED / seconds), int(size)


def _card_bytes() -> int:
    """Of the smallest card in the cluster, as its driver tells; 0: not known."""
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    task = ray.remote(num_cpus=0)(_smallest_card)
    sizes = ray.get([task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes])
    return min(sizes, default=0)


def _smallest_card() -> int:
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20, check=True)
        return min(int(line) << 20 for line in asked.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free
