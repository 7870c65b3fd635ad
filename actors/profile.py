"""What every actor did when, from the events that Ray keeps of its tasks."""

import time

import ray

from pipeline.timeline import DRIVER, Span

FLUSH_SECONDS = 2  # workers hand in their events once a second
FILES = ("publish", "hand_over", "write", "write_whole")  # methods that run beside the others: a row of their own


def actor_spans(workers: dict[str, int], stages: list[Span]) -> list[Span]:
    """`workers`: rank by Ray's worker id. A call belongs to the layer of the driver's stage in which it began."""
    time.sleep(FLUSH_SECONDS)
    spans = []
    for event in ray.timeline():
        rank = workers.get(event["tid"].removeprefix("worker:"))
        if rank is None or not event["cat"].startswith("task::"):
            continue
        start, name = event["ts"] / 1e6, event["name"]
        detail = next((stage.detail for stage in stages if stage.row == DRIVER and stage.start <= start < stage.start + stage.seconds), "")
        spans.append(Span(f"actor {rank}, files" if name in FILES else f"actor {rank}", name, detail, start, event["dur"] / 1e6))
    return spans
