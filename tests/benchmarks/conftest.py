"""One table at the end: ours against the textbook and against the floor."""

import pytest

ROWS: list[str] = []


@pytest.fixture
def record():
    def add(what: str, theirs: float, mine: float, floor: float, note: str = "") -> None:
        ROWS.append(f"{what:44} textbook {theirs:9.3f} s  here {mine:8.3f} s  {theirs / mine:6.1f}x  floor {floor:7.3f} s  {floor / mine:5.0%} of it reached  {note}")
    return add


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        terminalreporter.section("ratios")
        for row in ROWS:
            terminalreporter.write_line(row)
