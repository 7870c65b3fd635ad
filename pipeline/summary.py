"""What the commands print for people, and what `status` reads."""

import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.checkpoint import is_running, read_manifest, read_progress
from pipeline.errors import UserError
from pipeline.statistics import warnings_of

WATCH_SECONDS = 2


def table(rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _perplexity(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _stages(seconds: dict[str, float]) -> str:
    return ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items() if value >= 0.05)


def describe_run(result: dict) -> str:
    experts = result["num_clusters"]
    rows = [["model", "perplexity"]]
    if result["dense_perplexity"] is not None:
        rows.append(["dense", _perplexity(result["dense_perplexity"])])
    rows.append([f"{experts} expert{'s' if experts > 1 else ''} at {result['sparsity']}", _perplexity(result["perplexity"])])
    lines = [table(rows), ""]
    if result["perplexity"] is not None:
        lines.append(f"Perplexity: {result['measured_on']}.")
    lines += [
        f"Calibrated on {result['calibrated_on']}.",
        f"{result['measured_sparsity']:.2%} of the feed-forward weights are 0; the files are {result['model_bytes'] / 1e6:.1f} MB, "
        f"the dense checkpoint {result['dense_bytes'] / 1e6:.1f} MB.",
        f"{result['seconds']:.1f} s on {', '.join(result['devices'])} ({_stages(result['seconds_by_stage'])}).",
        *(f"Warning: {warning}" for warning in result["warnings"]),
        f"Saved in {result['model_dir']}",
    ]
    if "profile" in result:
        lines += ["", result["profile"], "", f"Timeline, its picture and this table: {result['profile_dir']}"]
    return "\n".join(lines)


def describe_demo(result: dict) -> str:
    rows = [["model", "perplexity", "seconds"], ["dense", _perplexity(result["dense_perplexity"]), ""]]
    rows += [[f"{one['num_clusters']} expert{'s' if one['num_clusters'] > 1 else ''} at {one['sparsity']}", _perplexity(one["perplexity"]),
              f"{one['seconds']:.1f}"] for one in result["runs"]]
    return "\n".join([table(rows), "", f"Perplexity: {result['measured_on']}.", f"Saved in {result['model_dir']}"])


def describe_evaluation(result: dict) -> str:
    return "\n".join([f"{result['model']}: perplexity {result['perplexity']:.4f}", f"Perplexity: {result['measured_on']}.",
                      f"{result['seconds']:.1f} s on {', '.join(result['devices'])}."])


def watch_status(directory: str) -> Iterator[dict]:
    """`read_status` whenever it has changed, until nobody works on the job."""
    last = None
    while True:
        result = read_status(directory)
        if result != last:
            yield result
        if not result["running"]:
            return
        last = result
        time.sleep(WATCH_SECONDS)


def read_status(directory: str) -> dict:
    """What a run directory holds. Raises UserError if it holds no job."""
    path = Path(directory).absolute()
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"{path} holds no job: it has no manifest.json.")
    layers = manifest["layers"]
    left = [index for index in range(manifest["num_blocks"]) if str(index) not in layers]  # of a finished job, too: a damaged layer is made again
    evaluations = {entry["what"]: entry["perplexity"] for entry in manifest["evaluations"].values()}
    shown = next((entry for entry in manifest["evaluations"].values()), {})
    seconds = {stage: round(value, 3) for stage, value in manifest["seconds"].items() if value}
    return {
        "run_dir": str(path), "running": (running := is_running(path)), "progress": read_progress(path) if running else None, "identity": manifest["identity"], "finished": bool(manifest.get("finished")) and not left and "model" in manifest,
        "layers": manifest["num_blocks"], "layers_done": sorted(int(index) for index in layers), "layers_left": left,
        "perplexity": evaluations.get("expanded"), "dense_perplexity": evaluations.get("dense"),
        "windows": shown.get("windows"), "window_length": shown.get("window_length"), "measured_on": shown.get("dataset"),
        "seconds": round(sum(seconds.values()), 3), "seconds_by_stage": seconds,
        "model_dir": str(path / "model") if "model" in manifest else None, "warnings": warnings_of(layers),
    }


def _now(progress: dict | None) -> str:
    if progress is None:
        return "starting."
    left = "" if progress["seconds_left"] is None else f", about {progress['seconds_left']:.0f} s left"
    return f"{progress['stage']}, {progress['done']:.0%}{left} (at {time.strftime('%H:%M:%S', time.localtime(progress['at']))})."


def describe_status(result: dict) -> str:
    done, left = result["layers_done"], result["layers_left"]
    lines = [f"{result['run_dir']}: {'finished' if result['finished'] else 'not finished'}, {len(done)} of {result['layers']} layers done"
             + (f", left: {', '.join(map(str, left))}" if left else ""),
             *([f"Running: {_now(result['progress'])}"] if result["running"] else []),
             *(f"  {name}: {value}" for name, value in result["identity"].items()),
             f"Seconds so far: {result['seconds']:.1f} ({_stages(result['seconds_by_stage'])})."]
    if result["perplexity"] is not None or result["dense_perplexity"] is not None:
        lines.append(f"Perplexity {_perplexity(result['perplexity'])}, dense {_perplexity(result['dense_perplexity'])}: per token, "
                     f"{result['measured_on']}, {result['windows']} windows of {result['window_length']} tokens.")
    lines += [f"Warning: {warning}" for warning in result["warnings"]]
    lines += [f"Saved in {result['model_dir']}"] if result["model_dir"] else []
    return "\n".join(lines)
