"""A plan for people, and as what `--json` prints."""

from pipeline.estimate import Plan
from pipeline.summary import table
from pipeline.verdict import Problem


def as_dict(plan: Plan, found: list[Problem]) -> dict:
    """Bytes and seconds."""
    return {
        "fits": not any(problem.fatal for problem in found), "problems": [problem.sentence for problem in found], "seconds": round(plan.seconds, 1),
        "actors": plan.cluster.actors, "nodes": plan.cluster.nodes, "device": plan.cluster.device_type, "rates": plan.rates.name,
        "windows": plan.work.windows, "window_length": plan.work.length, "evaluation_windows": plan.work.evaluation,
        "dtype": str(plan.work.dtype).removeprefix("torch."), "dense_parameters": plan.work.shape.parameters,
        "stages": {name: {"seconds": round(stage.seconds, 2), "device_bytes": stage.device, "host_bytes": stage.host, "object_store_bytes": stage.store, "moved_bytes": stage.moved,
                          "disk_bytes": stage.disk}
                   for name, stage in plan.stages.items()},
        "device_bytes": plan.device.of(plan.device.peak), "device_has_bytes": plan.cluster.gpu_bytes, "least_device_bytes": plan.least,
        "device_parts": plan.device.stages[plan.device.peak], "peak_stage": plan.device.peak, "activation_bytes": plan.device.placed,
        "host_bytes": plan.host, "host_has_bytes": plan.cluster.host_bytes, "disk_bytes": plan.disk, "disk_has_bytes": plan.cluster.disk_bytes,
    }


def describe(plan: Plan, found: list[Problem]) -> str:
    work, cluster, device = plan.work, plan.cluster, plan.device
    what = "GPU" if cluster.gpu_bytes else "process"
    rows = [["stage", "seconds", f"memory of a {what}", "of a node", "object store of a node", "handed over", "left on disk"]]
    rows += [[name, f"{stage.seconds:.1f}", *map(_size, (stage.device, stage.host, stage.store, stage.moved, stage.disk))] for name, stage in plan.stages.items()]
    parts = [[f"part, at its peak ({device.peak})", f"memory of a {what}"]] + [[name, _size(size)] for name, size in device.stages[device.peak].items()]
    parts.append(["together", _size(device.of(device.peak)) + (f" of {_size(cluster.gpu_bytes)}" if cluster.gpu_bytes else "")])
    places = ", ".join(f"{_size(size)} {'on the GPU' if place == 'device' else 'in host memory' if place == 'host' else 'on disk'}"
                       for place, size in device.placed.items() if size)
    host = ", ".join(f"{name} {_size(size)}" for name, size in plan.host.items() if size)
    disk = ", ".join(f"{name} {_size(size)}" for name, size in plan.disk.items() if size)
    return "\n".join([
        f"{work.shape.parameters / 1e9:.3g} billion parameters, {work.shape.blocks} blocks, {work.job.num_clusters} experts, {work.windows} x {work.length} tokens, "
        f"{str(work.dtype).removeprefix('torch.')}; {cluster.name}.", "", table(rows), "", table(parts), "",
        f"Activations of an actor: {places}.",
        f"Host memory of a node: {_size(sum(plan.host.values()))} of {_size(cluster.host_bytes)} ({host}).",
        f"Disk: {_size(sum(plan.disk.values()))}{f' of {_size(cluster.disk_bytes)} free' if cluster.disk_bytes is not None else ''} ({disk}).",
        f"Time: about {duration(plan.seconds)}, by the rates of {plan.rates.name}. A prediction: data decide how long KMeans takes.", "",
        *(problem.sentence for problem in found), *([] if any(problem.fatal for problem in found) else ["It fits."])])


def describe_comparison(rows: list[tuple[str, float, float]]) -> str:
    """Of `estimate.compared`."""
    return table([["stage", "predicted", "measured", "ratio"]]
                 + [[name, f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured:.2f}" if measured else ""] for name, predicted, measured in rows])


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size: float) -> str:
    if not size:
        return ""
    for unit, factor in (("TB", 1e12), ("GB", 1e9)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e6:.3g} MB"
