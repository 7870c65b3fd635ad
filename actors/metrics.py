"""What an actor counts: for Ray's dashboard and its Prometheus port, and for the driver's sums at the end of a job."""

import time
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge

TAGS = ("actor",)


@dataclass
class Counts:
    """Of one actor since it started. `doing`: the call that computes now, and since when (seconds since the epoch)."""

    busy_seconds: float = 0.0
    tokens: int = 0
    solves: int = 0
    bytes_sent: int = 0
    doing: str = ""
    since: float = 0.0


class Meter:
    """Keeps `counts` and reports them as metrics: sparse_expansion_tokens, _solves and _bytes_sent (counters; Prometheus makes
    rates of them), _busy_seconds (a counter: its rate is the share of time that the device computes), _busy (a gauge: 0 or 1)."""

    def __init__(self, rank: int):
        self.counts, self._tags = Counts(), {"actor": str(rank)}
        self._counters = {name: Counter(f"sparse_expansion_{name}", description=text, tag_keys=TAGS) for name, text in (
            ("busy_seconds", "Seconds in calls that compute."), ("tokens", "Tokens that went through a block."),
            ("solves", "Experts solved, by linear."), ("bytes_sent", "Bytes handed to Ray's object store for others."))}
        self._busy = Gauge("sparse_expansion_busy", description="1 while a call computes.", tag_keys=TAGS)

    def add(self, name: str, value: float) -> None:
        setattr(self.counts, name, getattr(self.counts, name) + value)
        if value:
            self._counters[name].inc(value, tags=self._tags)

    def begin(self, call: str) -> None:
        self.counts.doing, self.counts.since = call, time.time()
        self._busy.set(1, tags=self._tags)

    def end(self) -> None:
        self.add("busy_seconds", time.time() - self.counts.since)
        self.counts.doing = ""
        self._busy.set(0, tags=self._tags)
