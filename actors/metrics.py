"""What an actor counts: for Ray's dashboard and its Prometheus port, and for the driver's sums at the end of a job."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ray.util.metrics import Counter

TAGS = ("actor",)


@dataclass
class Counts:
    """Of one actor since it started. doing: the calls that are running, and since when (seconds since the epoch)."""

    busy_seconds: float = 0.0
    tokens: int = 0
    solves: int = 0
    bytes_sent: int = 0
    doing: dict[str, float] = field(default_factory=dict)


class Meter:
    """Keeps `counts` and reports them as metrics: sparse_expansion_tokens, _solves and _bytes_sent (counters; Prometheus makes
    rates of them), and _busy_seconds, whose rate is the share of time that the actor computes."""

    def __init__(self, rank: int):
        self.counts, self._tags = Counts(), {"actor": str(rank)}
        self._counters = {name: Counter(f"sparse_expansion_{name}", description=text, tag_keys=TAGS) for name, text in (
            ("busy_seconds", "Seconds in calls that compute."), ("tokens", "Tokens that went through a block."),
            ("solves", "Experts solved, by linear."), ("bytes_sent", "Bytes handed to Ray's object store for others."))}

    def add(self, name: str, value: float) -> None:
        setattr(self.counts, name, getattr(self.counts, name) + value)
        if value:
            self._counters[name].inc(value, tags=self._tags)

    @contextlib.contextmanager
    def during(self, call: str, computes: bool) -> Iterator[None]:
        """A call of the actor is running."""
        start = self.counts.doing[call] = time.time()
        try:
            yield
        finally:
            del self.counts.doing[call]
            if computes:
                self.add("busy_seconds", time.time() - start)
