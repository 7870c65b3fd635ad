"""Does it fit, and what to change if not: one sentence for each thing that is too small."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pipeline.estimate import Plan
from pipeline.memory import Cluster, Shares, Work, least_device_memory

MARGIN = 0.85  # of the least that is predicted: what is refused must lack more than a prediction may err by


@dataclass(frozen=True)
class Problem:
    """`fatal`: nothing makes up for it, so the job would fail."""

    sentence: str
    fatal: bool


def problems(plan: Plan) -> list[Problem]:
    found = [too_little_device_memory(plan.work, plan.cluster), too_little_disk(plan.disk, plan.cluster.disk_bytes)]
    found += [_more_than_expected(plan), _host(plan), _idle(plan)]
    return [problem for problem in found if problem]


def too_little_device_memory(work: Work, cluster: Cluster) -> Problem | None:
    """Of a GPU; on a CPU of the node. Activations on disk are no way out here: they are counted as if they lay there."""
    least, has = least_device_memory(work, cluster), cluster.gpu_bytes or cluster.host_bytes
    needed = least if cluster.gpu_bytes else least * cluster.actors_on_node
    if needed <= has:
        return None
    what = "a GPU" if cluster.gpu_bytes else "a node"
    changes = [words for words, changed, on in _changes(work, cluster) if _fits(changed, on)]
    advice = f"it would fit with {' or '.join(changes[:3])}" if changes else "nothing that could be changed alone makes it fit: take larger ones"
    return Problem(f"{what[0].upper()}{what[1:]} has {_gb(has)}, but even with activations on disk {_gb(needed)} are needed; {advice}.", MARGIN * needed > has)


def too_little_disk(disk: dict[str, int], free: int | None, there: int = 0) -> Problem | None:
    """there: bytes of the job that lie there already."""
    needed = sum(disk.values()) - there
    if free is None or needed <= free:
        return None
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in disk.items() if size)
    return Problem(f"--output-dir has {_gb(free)} free, but {_gb(needed)} are needed ({parts}); give a directory with more room, "
                   "--storage for the layer shards, or fewer --num-clusters.", 0.97 * needed > free)


def _fits(work: Work, cluster: Cluster) -> bool:
    needed = least_device_memory(work, cluster) * (1 if cluster.gpu_bytes else cluster.actors_on_node)
    return needed <= (cluster.gpu_bytes or cluster.host_bytes)


def _changes(work: Work, cluster: Cluster) -> Iterator[tuple[str, Work, Cluster]]:
    """One option or number at a time, the mildest step of each that helps first."""
    job = work.job
    if work.dtype.itemsize > 2:
        yield "--dtype bfloat16", replace(work, dtype=torch.bfloat16), cluster
    for number in _halves(job.num_clusters):
        changed = replace(work, job=job.model_copy(update={"num_clusters": number}))
        if _fits(changed, cluster):
            yield f"--num-clusters {number}", changed, cluster
            break
    for factor in (2, 4, 8):
        reduction = job.pca_reduction_factor * factor
        changed = replace(work, job=job.model_copy(update={"pca_reduction_factor": reduction}))
        if not job.no_pca and reduction <= min(columns for _, columns in work.groups) and _fits(changed, cluster):
            yield f"--pca-reduction-factor {reduction}", changed, cluster
            break
    for number in _halves(work.windows):
        changed = replace(work, windows=number)
        if number * work.length >= job.num_clusters and _fits(changed, cluster):
            yield f"--dataset-size {number}", changed, cluster
            break
    for actors in (*(cluster.actors * factor for factor in (2, 4, 8)), *_halves(cluster.actors)[:-1]):
        others = replace(cluster, actors=actors, nodes=min(actors, cluster.nodes * max(1, actors // cluster.actors)))
        if _fits(work, others):
            yield f"{actors} actor{'s' if actors > 1 else ''}{' (more GPUs)' if actors > cluster.actors and cluster.gpu_bytes else ''}", work, others
            break


def _halves(number: int) -> list[int]:
    return [number >> shift for shift in range(1, number.bit_length()) if number >> shift]


def _more_than_expected(plan: Plan) -> Problem | None:
    """Of the device at its peak; activations move from it to host memory by themselves."""
    peak, has = plan.device.of(plan.device.peak), plan.cluster.gpu_bytes
    if not has or peak <= has or too_little_device_memory(plan.work, plan.cluster):
        return None
    return Problem(f"At {plan.device.peak} a GPU would need {_gb(peak)} of its {_gb(has)}: activations will move to host memory while the job runs; "
                   "--activations host spares it the attempt.", False)


def _host(plan: Plan) -> Problem | None:
    needed, store = sum(plan.host.values()), max(stage.store for stage in plan.stages.values())
    if needed > plan.cluster.host_bytes:
        return Problem(f"A node has {_gb(plan.cluster.host_bytes)} of memory, but {_gb(needed)} would be in use; --activations disk, more nodes, or fewer "
                       "--dataset-size windows take less.", False)
    if store > plan.cluster.store_bytes:
        return Problem(f"A node's object store holds {_gb(plan.cluster.store_bytes)}, but {_gb(store)} pass through it at a time: Ray spills the rest to disk, "
                       "which is slow; ray start --object-store-memory makes it larger.", False)
    return None


def _idle(plan: Plan) -> Problem | None:
    """Window groups, or with dense propagation blocks, are dealt whole."""
    dense = plan.work.job.propagation == "dense"
    shares = plan.work.shape.blocks if dense else len(Shares(plan.work, plan.cluster).group_tokens)
    if plan.cluster.actors <= shares:
        return None
    return Problem(f"{plan.cluster.actors} actors share {shares} {'blocks' if dense else 'groups of windows'}: {plan.cluster.actors - shares} of them have none"
                   f"{'' if dense else ', and only solve'}; {'take fewer' if dense else 'more --dataset-size windows or fewer actors'} waste less.", False)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size < 1e12 else f"{size / 1e12:.3g} TB"
