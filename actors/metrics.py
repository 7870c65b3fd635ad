"""What an actor counts: for Ray's dashboard and its Prometheus port, and for the driver's sums at the end of a job."""

import contextlib
import time
from collections.abc import Iterator, Sequence
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
    activations: dict[str, int] = field(default_factory=dict)  # bytes kept now, by place
    device_peak: int = 0  # bytes of a GPU at most, without what libraries take for themselves


def usage(before: Sequence[Counts], after: Sequence[Counts], seconds: float) -> dict:
    """What a crew did in `seconds`: the share of that time in which its actors computed, the bytes that they handed on, where
    their activations lay, and the most that one of them took of its GPU. before: none of actors that were new."""
    def grown(name: str) -> float:
        return max(0, sum(getattr(counts, name) for counts in after) - sum(getattr(counts, name) for counts in before))

    peak = max((counts.device_peak for counts in after), default=0)
    places = {place for counts in after for place in counts.activations}
    return {"busy_share": grown("busy_seconds") / (seconds * max(1, len(after))), "bytes_exchanged": int(grown("bytes_sent")),
            "activations": {place: sum(counts.activations.get(place, 0) for counts in after) for place in sorted(places)}} | ({"device_peak": peak} if peak else {})


class Meter:
    """Keeps `counts` and reports them as metrics: sparse_expansion_tokens, _solves and _bytes_sent (counters; Prometheus makes
    rates of them), and _busy_seconds, whose rate is the share of time that the actor computes."""

    def __init__(self, rank: int):
        self.counts, self._tags = Counts(), {"actor": str(rank)}
        self._counters = {name: Counter(f"sparse_expansion_{name}", description=text, tag_keys=TAGS) for name, text in (
            ("busy_seconds", "Seconds in calls that compute."), ("tokens", "Tokens that went through a block."),
            ("solves", "Experts solved, by linear."), ("bytes_sent", "Bytes handed to others."))}

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
