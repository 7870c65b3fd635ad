"""A sweep's picture: perplexity against sparsity, a line for each number of experts."""

from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter

from pipeline.files import replacing

MARKERS = "osD^vPXph*"
# Where N of every M weights are kept there is no line, so the marker tells the propagation.
KEPT = {"sparse": dict(markerfacecolor="white", markeredgewidth=1.6), "dense": dict(fillstyle="left", markerfacecoloralt="white", markeredgewidth=1.6)}
LOG_FROM = 4  # times between the least and the greatest perplexity


def draw_sweep(result: dict, path: Path) -> None:
    """`result`: what `sweep --json` prints."""
    with replacing(path) as temporary:
        sweep_figure(result).savefig(temporary, format="png", dpi=150, bbox_inches="tight")


def sweep_figure(result: dict) -> Figure:
    """A panel for each number of bits, where there are several."""
    rows = [row for row in result["rows"] if row["perplexity"] is not None]
    bits = sorted({row["bits"] for row in rows}, key=lambda bits: (bits is not None, -(bits or 0))) or [None]
    figure = Figure(figsize=(3.2 + 5.0 * len(bits), 5.2), layout="constrained")
    panels = figure.subplots(1, len(bits), sharey=True, squeeze=False)[0]
    experts = sorted({row["num_clusters"] for row in rows})
    for panel, some in zip(panels, bits):
        _draw([row for row in rows if row["bits"] == some], experts, panel)
        panel.set_xlabel("share of feed-forward weights pruned")
        if len(bits) > 1:
            panel.set_title("not quantized" if some is None else f"{some} bits", fontsize=10)
    panels[0].set_ylabel("perplexity per token (exp of the mean window loss)")
    found = [row[name] for row in rows for name in ("perplexity", "dense_perplexity") if row[name] is not None]
    if found and max(found) > LOG_FROM * min(found):
        panels[0].set_yscale("log")
        for axis in (panels[0].yaxis.set_major_formatter, panels[0].yaxis.set_minor_formatter):
            axis(ScalarFormatter())
    figure.suptitle(result["model"], fontsize=11, x=0.01, ha="left")
    figure.legend(handles=_legend(rows, experts), loc="outside center right", frameon=False, fontsize=9)
    figure.text(0.01, -0.01, "\n".join(f"Perplexity: {what}." for what in result["measured_on"][:2]), fontsize=7, va="top")
    return figure


def _draw(rows: list[dict], experts: list[int], panel: Axes) -> None:
    dense = [row["dense_perplexity"] for row in rows if row["dense_perplexity"] is not None]
    if dense:
        panel.axhline(mean(dense), color="0.35", linewidth=1, linestyle=":")
    for place, count in enumerate(experts):
        for propagation, line in (("sparse", "-"), ("dense", "--")):
            found = [row for row in rows if row["num_clusters"] == count and row["propagation"] == propagation]
            look = dict(color=_color(place, experts), marker=MARKERS[place % len(MARKERS)], capsize=3, linewidth=1.6, markersize=6)
            _errorbar(panel, [row for row in found if ":" not in row["sparsity"]], linestyle=line, **look)
            _errorbar(panel, [row for row in found if ":" in row["sparsity"]], linestyle="", **KEPT[propagation], **look)
    highest: dict[str, dict] = {}
    for row in rows:
        if ":" in row["sparsity"]:
            highest[row["sparsity"]] = max(row, highest.get(row["sparsity"], row), key=lambda row: row["perplexity"])
    for pattern, row in highest.items():
        panel.annotate(pattern, (row["fraction"], row["perplexity"]), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
    panel.grid(alpha=0.3, which="both")
    panel.margins(y=0.1)


def _errorbar(panel: Axes, rows: list[dict], **look) -> None:
    """The seeds' mean; the bars reach from the least to the greatest."""
    by_sparsity = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["fraction"]):
        by_sparsity[row["sparsity"], row["fraction"]].append(row["perplexity"])
    if by_sparsity:
        means = [mean(values) for values in by_sparsity.values()]
        bars = [[middle - min(values) for middle, values in zip(means, by_sparsity.values())],
                [max(values) - middle for middle, values in zip(means, by_sparsity.values())]]
        several = any(len(values) > 1 for values in by_sparsity.values())
        panel.errorbar([fraction for _, fraction in by_sparsity], means, yerr=bars if several else None, **look)


def _color(place: int, experts: list[int]):
    """From dark to light, for print in black and white, in colours that colour-blind eyes tell apart."""
    return colormaps["viridis"](0.75 * place / max(1, len(experts) - 1))


def _legend(rows: list[dict], experts: list[int]) -> list[Line2D]:
    handles = [Line2D([], [], color=_color(place, experts), marker=MARKERS[place % len(MARKERS)], label=f"{count} expert{'s' if count > 1 else ''}")
               for place, count in enumerate(experts)]
    dense = {f"{row['dense_perplexity']:.2f}" for row in rows if row["dense_perplexity"] is not None}
    kept = {row["propagation"] for row in rows if ":" in row["sparsity"]}
    extra = [
        (any(row["propagation"] == "dense" and ":" not in row["sparsity"] for row in rows), dict(linestyle="--", label="dense propagation")),
        ("sparse" in kept, dict(marker="o", linestyle="", label="N kept of every M", **KEPT["sparse"])),
        ("dense" in kept, dict(marker="o", linestyle="", label="N kept of every M, dense propagation", **KEPT["dense"])),
        (dense, dict(linestyle=":", label=f"dense model, {next(iter(dense))}" if len(dense) == 1 else "dense model, mean of the seeds")),
        (len({row["seed"] for row in rows}) > 1, dict(marker="|", linestyle="", label="least to greatest of the seeds")),
    ]
    return handles + [Line2D([], [], color="0.35", **look) for wanted, look in extra if wanted]
