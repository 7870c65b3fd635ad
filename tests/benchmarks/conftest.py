"""One table at the end of a run: ours beside the plain way and beside the floor; and the same as JSON, for the plots."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.measure import ON_GPU, device_name

RESULTS = Path(__file__).parent / "results"
ROWS: list[dict] = []


@pytest.fixture
def record():
    def add(what: str, here: float, floor: float | None = None, plain: float | None = None, **more) -> None:
        """Seconds: ours, the floor's and the plain way's. `more`: stages in seconds, memory, and so on."""
        ROWS.append({"what": what, "here": here, "floor": floor, "plain": plain, **more})
    return add


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section(f"ratios on {device_name()}")
    for row in ROWS:
        plain = f"plain {row['plain']:9.3f} s {row['plain'] / row['here']:6.1f}x" if row["plain"] else " " * 25
        floor = f"floor {row['floor']:8.4f} s, {row['floor'] / row['here']:4.0%} of it reached" if row["floor"] else ""
        more = ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
                         if name not in ("what", "here", "floor", "plain"))
        terminalreporter.write_line(f"{row['what']:50} here {row['here']:8.4f} s  {plain}  {floor}  {more}".rstrip())
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{'gpu' if ON_GPU else 'cpu'}.json"
    path.write_text(json.dumps({"device": device_name(), "rows": ROWS}, indent=1) + "\n")
    terminalreporter.write_line(f"written to {path}")
