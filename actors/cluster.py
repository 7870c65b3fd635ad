"""Connecting to Ray or starting it, what it has, and how many actors of what size a job gets."""

import contextlib
import importlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ray

from pipeline.errors import UserError

CONNECT_SECONDS = 5


@dataclass(frozen=True)
class CrewSize:
    """How many actors, and the share of the machine each asks Ray for."""

    actors: int
    cpus: int
    gpus: float  # 1, or less where several actors share a GPU
    threads: int  # that an actor computes with; its share of the CPUs, or fewer if so asked

    @property
    def device_type(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def runs_at_once(self) -> int:
        """KMeans runs that one actor makes at a time."""
        return 1 if self.gpus else self.threads

    def of(self, actors: int) -> "CrewSize":
        return replace(self, actors=actors)

    def described(self) -> str:
        what = f"{self.threads} CPU thread{'s' if self.threads > 1 else ''}" if not self.gpus else "a GPU" if self.gpus == 1 else f"{self.gpus:g} of a GPU"
        return f"{self.actors} actor{'s' if self.actors > 1 else ''} of {what}"


def check_address(address: str | None) -> None:
    """Before anything is loaded: does anybody listen there?"""
    if address in (None, "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if address.startswith("ray://") or not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--address is {address!r}; allowed is HOST:PORT of a Ray head, or auto. From outside a cluster, use sparse-expansion submit.")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"--address {address} cannot be reached: {error}.") from None


@contextlib.contextmanager
def connected(address: str | None, verbose: bool) -> Iterator[None]:
    """Use the cluster at `address` (or the one this driver was submitted to), or else start Ray on this machine for as
    long as this lasts. Inside another `connected`, that one's connection serves."""
    if ray.is_initialized():
        yield
        return
    check_address(address)
    address = address or os.environ.get("RAY_ADDRESS")
    # What computes takes as long to import as Ray to start, which is mostly waiting.
    loading = threading.Thread(target=importlib.import_module, args=("actors.conductor",))
    loading.start()
    # A worker without GPUs must not see all of them.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of calls that nobody waits for any more, since an actor was lost
    quiet = dict(logging_level=logging.WARNING if verbose else logging.ERROR, log_to_driver=verbose)
    try:
        if address:
            offer_token()
            ray.init(address=address, runtime_env=_code_for(address), **quiet)
        else:
            ray.init(address="local", num_cpus=len(os.sched_getaffinity(0)), include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        what = f"--address {address} could not be joined" if address else "Ray could not be started on this machine"
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}") from None
    finally:
        loading.join()
    try:
        yield
    finally:
        ray.shutdown()


def offer_token() -> None:
    """A head started where a token lies asks for it, but Ray offers one only to a cluster that it found by itself."""
    try:
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    except ImportError:
        return  # a Ray without tokens
    logging.getLogger("ray").setLevel(logging.ERROR)  # it would warn that the cluster asks for one
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _submitted() -> bool:
    """Is this the driver of a job that ray job submit started?"""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _code_for(address: str) -> dict | None:
    """Another machine's workers need this project's code; a submitted job has brought it already."""
    if _submitted():
        return None
    import actors
    import pipeline

    return {"py_modules": [actors, pipeline]}


def size_crew(requested: int | None, threads: int | None, gpus_per_actor: float | None) -> CrewSize:
    """An actor for each GPU (or for each `gpus_per_actor` of one); without GPUs one for each node. CPUs are shared out evenly.
    Raises UserError for more actors or threads than there are resources for, naming both."""
    nodes = _alive()
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if gpus:
        share = gpus_per_actor or 1.0
        most = gpus * int(1 / share)
        actors = requested or most
        if actors > most:
            raise UserError(f"--actors is {actors}, but Ray has {gpus} GPUs{f', of which each holds {int(1 / share)} actors' if share < 1 else ''}; "
                            f"allowed is 1 to {most}.")
        return _crew(actors, max(1, cpus // actors // 2), share, threads)
    if gpus_per_actor is not None:
        raise UserError(f"--gpus-per-actor is {gpus_per_actor:g}, but Ray has no GPU; leave it out.")
    if cpus == 0:
        raise UserError("Ray has neither GPUs nor CPUs for actors yet; wait until ray status lists the workers.")
    actors = requested or len([node for node in nodes if node.get("CPU", 0) >= 1])
    if actors > cpus:
        raise UserError(f"--actors is {actors}, but Ray has {cpus} CPUs and no GPU; allowed is 1 to {cpus}.")
    smallest = int(min(node["CPU"] for node in nodes if node.get("CPU", 0) >= 1))
    return _crew(actors, max(1, min(smallest, cpus // actors)), 0, threads)


def _alive() -> list[dict]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _crew(actors: int, cpus: int, gpus: float, threads: int | None) -> CrewSize:
    if threads is not None and threads > cpus:
        raise UserError(f"--threads is {threads}, but {actors} actor{'s' if actors > 1 else ''} can have {cpus} CPUs each; allowed is 1 to {cpus}.")
    inherited = os.environ.get("OMP_NUM_THREADS", "")
    if threads is None and inherited.isdigit() and not _submitted():  # Ray sets it to 1 for the driver of a submitted job
        threads = min(int(inherited), cpus)
    return CrewSize(actors, cpus, gpus, threads or cpus)


def capacity(size: CrewSize) -> int:
    """How many such actors the nodes that are alive have room for, if nobody else uses them."""
    def of(node: dict) -> int:
        by_gpu = int(node.get("GPU", 0)) * int(1 / size.gpus) if size.gpus else float("inf")
        return int(min(node.get("CPU", 0) // size.cpus, by_gpu))
    return sum(of(node) for node in _alive())


def host_bytes(node_id: str, actors: int) -> float:
    """Host memory for the activations of each of `actors` actors on a node: half of what Ray counts there, the rest being for
    what they compute."""
    found = next((node["Resources"].get("memory", 0) for node in ray.nodes() if node["NodeID"] == node_id), 0)
    return found / 2 / max(1, actors)


def stop_actors(actors: list) -> None:
    for actor in actors:
        ray.kill(actor)
    actors.clear()
