"""Sweeps: the jobs of a grid over one crew. What they share is made once.

Jobs of dense propagation and the same windows go through the blocks together (captures, routers of equal options, Hessians and
factors once); those of sparse propagation one after the other, with the first block's routers in common. Token windows and the
dense model's perplexity serve all. A job that fails with a sentence for the user does not keep the others from their turn.
"""

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from actors.cluster import check_address
from actors.jobs import Performer, performing
from pipeline.checkpoint import read_manifest
from pipeline.config import Job
from pipeline.errors import UserError
from pipeline.grid import name_of, placed, sweep_directory
from pipeline.prepared import Prepared, prepare
from pipeline.sweep import make_rows, write_tables
from pipeline.sweep_plot import draw_sweep


def sweep(grid: list[Job]) -> dict:
    """Perform what is left of a grid's jobs; write the table and the plot. Returns what `--json` prints.

    Raises UserError, before Ray starts, for whatever can be found wrong with any of the jobs.
    """
    started = time.monotonic()
    root, resume = sweep_directory(grid[0]), grid[0].resume
    if grid[0].eval_dataset == "none":
        raise UserError("--eval-dataset is none, but a sweep compares perplexities; give a data set.")
    check_address(grid[0].address)
    jobs = [placed(job, root) for job in grid]
    if resume == "require":
        if not any(read_manifest(job.run_directory) for job in jobs):
            raise UserError(f"--resume is require, but --output-dir {root} holds none of the sweep's jobs; allowed there is auto or never.")
        jobs = [job.model_copy(update={"resume": "auto"}) for job in jobs]  # there may be nothing yet of those whose turn had not come
    prepared = prepare(jobs)
    finished = [] if resume == "never" else [one for one in prepared if one.result()]
    errors, more = _perform([one for one in prepared if one not in finished], finished, root, started)
    results = [one.result() for one in prepared]
    told = [result for result in results if result]
    result = {
        "sweep_dir": str(root), "model": prepared[0].source.described(), "rows": make_rows(jobs, results, errors),
        "measured_on": _distinct(told, "measured_on"), "calibrated_on": _distinct(told, "calibrated_on"),
        "finished_before": len(finished), "seconds": round(time.monotonic() - started, 3), **more}
    write_tables(root, result)
    draw_sweep(result, root / "sweep.png")
    return result


def _perform(left: list[Prepared], finished: list[Prepared], root: Path, started: float) -> tuple[dict[str, str], dict]:
    """Returns the sentences of jobs that failed, by name, and what to tell of the profile, if one is wanted."""
    if not left:
        return {}, {}
    errors, groups = {}, _together(left)
    with performing(groups, started) as performer:
        for one in finished:
            performer.evaluations |= read_manifest(one.job.run_directory)["evaluations"]
        performer.spent()  # the start is no single job's
        waiting = deque(groups)
        while waiting:
            group = waiting.popleft()
            errors |= _try(performer, group, waiting)
        return errors, performer.profile(root) if left[0].job.profile else {}


def _try(performer: Performer, group: Sequence[Prepared], waiting: deque) -> dict[str, str]:
    """Perform jobs together. If that fails, each gets a turn of its own; the sentence of one that fails alone is returned."""
    names = [name_of(one.job) for one in group]
    performer.conductor.reporter.note(f"{', '.join(names)}{' together' * (len(names) > 1)}")
    try:
        performer.perform(group)
    except UserError as error:
        performer.conductor.reporter.note(f"{', '.join(names)} failed: {error}")
        performer.start_over()
        if len(group) == 1:
            return {names[0]: str(error)}
        waiting.extend([one] for one in group)
    return {}


def _together(prepared: Sequence[Prepared]) -> list[list[Prepared]]:
    """Jobs that go through the blocks at the same time. First in a group is one that needs the most memory: room is made for it."""
    groups: dict[str, list[Prepared]] = {}
    for one in prepared:
        groups.setdefault(one.calibration.digest() if one.job.propagation == "dense" else name_of(one.job), []).append(one)
    return [sorted(group, key=lambda one: -one.job.num_clusters) for group in groups.values()]


def _distinct(results: Sequence[dict], name: str) -> list[str]:
    return list(dict.fromkeys(result[name] for result in results))
