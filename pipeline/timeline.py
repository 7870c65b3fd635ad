"""Where a job's time went, for people: a timeline to zoom into, a picture of it, and a table of stages."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.files import replacing
from pipeline.summary import table

DRIVER = "driver"


@dataclass(frozen=True)
class Span:
    """One piece of work. `row`: who did it; the driver's spans are the stages. `start`: seconds since the epoch."""

    row: str
    name: str
    detail: str
    start: float
    seconds: float


@dataclass
class Clock:
    """Seconds by stage, and the stages as they went by."""

    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, stage: str, layer: str = "", *more: dict[str, float]) -> Iterator[None]:
        """Adds the seconds up by stage, in `seconds` and in `more`."""
        start = time.time()
        try:
            yield
        finally:
            span = Span(DRIVER, stage, layer, start, time.time() - start)
            self.spans.append(span)
            for seconds in (self.seconds, *more):
                seconds[stage] = seconds.get(stage, 0.0) + span.seconds


def write_profile(directory: Path, spans: list[Span]) -> str:
    """timeline.json (Chrome's trace format: ui.perfetto.dev opens it), timeline.png and stages.txt, whose text is returned."""
    directory.mkdir(parents=True, exist_ok=True)
    text = stage_table(spans)
    with replacing(directory / "stages.txt") as temporary:
        temporary.write_text(text + "\n")
    with replacing(directory / "timeline.json") as temporary:
        temporary.write_text(json.dumps(_trace(spans)) + "\n")
    with replacing(directory / "timeline.png") as temporary:
        _draw(spans, temporary)
    return text


def stage_table(spans: list[Span]) -> str:
    """A line for each stage, in the order in which they were first met."""
    stages = defaultdict(list)
    for span in spans:
        if span.row == DRIVER:
            stages[span.name].append(span.seconds)
    whole = sum(map(sum, stages.values()))
    rows = [["stage", "times", "seconds", "share", "longest"]]
    rows += [[name, str(len(times)), f"{sum(times):.2f}", f"{sum(times) / whole:.0%}", f"{max(times):.2f}"] for name, times in stages.items()]
    return table(rows)


def _trace(spans: list[Span]) -> dict:
    numbers = {row: number for number, row in enumerate(_rows(spans))}
    names = [{"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}} for row, number in numbers.items()]
    return {"traceEvents": names + [
        {"ph": "X", "pid": 0, "tid": numbers[span.row], "name": span.name, "ts": span.start * 1e6, "dur": span.seconds * 1e6, "args": {"of": span.detail}}
        for span in spans]}


def _rows(spans: list[Span]) -> list[str]:
    return [DRIVER, *sorted({span.row for span in spans} - {DRIVER})]


def _draw(spans: list[Span], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows, names = _rows(spans), list(dict.fromkeys(span.name for span in spans))
    began = min(span.start for span in spans)
    figure = Figure(figsize=(14, max(1.6 + 0.45 * len(rows), 0.15 * len(names))), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        color = colormaps["tab20"](number % 20)
        for place, row in enumerate(rows):
            bars = [(span.start - began, span.seconds) for span in spans if span.row == row and span.name == name]
            axes.broken_barh(bars, (place - 0.4, 0.8), color=color, label=name if row == next(span.row for span in spans if span.name == name) else None)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.margins(x=0.01)
    figure.legend(loc="outside right upper", frameon=False, ncols=2, fontsize=8)
    figure.savefig(path, format="png", dpi=110)
