"""Draw what `make bench` measured, on every device that it ran on.

    python -m tests.benchmarks.plot        # results/*.json -> results/speed.png, results/growth.png
"""

import json

from matplotlib.figure import Figure

from tests.benchmarks.conftest import RESULTS

STAGES = {"capture": "#4c78a8", "cluster": "#f58518", "solve": "#54a24b", "propagate": "#b279a2"}


def read() -> dict[str, list[dict]]:
    """Rows by device."""
    found = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"), reverse=True)]
    return {result["device"]: result["rows"] for result in found}


def draw_ratios(results: dict[str, list[dict]]) -> Figure:
    """How many times faster than the plain way, and how much of the floor is reached."""
    rows = [(device, row) for device, rows in results.items() for row in rows if row["plain"]]
    figure = Figure(figsize=(11, 1 + 0.38 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    colors = dict(zip(results, ("#4c78a8", "#f58518")))
    for place, (device, row) in enumerate(rows):
        ratio = row["plain"] / row["here"]
        first = device not in [other for other, _ in rows[:place]]
        axes.barh(place, ratio, color=colors[device], label=device if first else None)
        axes.text(ratio * 1.06, place, f"{ratio:.1f}x, {row['here']:.3g} s, {row['floor'] / row['here']:.0%} of the floor", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["what"] for _, row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, 12 * max(row["plain"] / row["here"] for _, row in rows))
    axes.set_xlabel("times faster than the plain way on the same device")
    axes.legend(loc="lower right", frameon=False)
    return figure


def draw_growth(results: dict[str, list[dict]]) -> Figure:
    """Seconds of a whole block by number of experts, stage by stage."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for panel, (device, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items()):
        grown = [row for row in rows if row["what"].startswith("growth")]
        bottom = [0.0] * len(grown)
        for stage, color in STAGES.items():
            heights = [row[stage] for row in grown]
            panel.bar([row["what"].split()[-2] for row in grown], heights, bottom=bottom, color=color, label=stage)
            bottom = [low + height for low, height in zip(bottom, heights)]
        for place, top in enumerate(bottom):
            panel.text(place, top, f"{top:.2f} s", ha="center", va="bottom", fontsize=9)
        panel.set_title(f"{grown[0]['what'].split(', ')[1]}\n{device}", fontsize=10)
        panel.set_xlabel("experts")
        panel.set_ylabel("seconds of one block")
        panel.margins(y=0.1)
        panel.legend(frameon=False)
    return figure


if __name__ == "__main__":
    measured = read()
    draw_ratios(measured).savefig(RESULTS / "speed.png", dpi=110)
    draw_growth(measured).savefig(RESULTS / "growth.png", dpi=110)
