"""Draw what `pipeline.scaling` predicts for Llama 2 7B and 70B, 16 experts, 128 x 4096 tokens, on 1 to 64 GPUs. Nothing is measured here.

    python -m tests.benchmarks.scaling        # -> results/scaling.png, and the numbers as a table
"""

from dataclasses import replace

import torch
from matplotlib.figure import Figure
from transformers import AutoConfig

from pipeline.config import Job
from pipeline.memory import Work
from pipeline.model_shape import ModelShape
from pipeline.plan_text import duration
from pipeline.rates import H100
from pipeline.scaling import Point, predicted
from pipeline.summary import table
from tests.benchmarks.conftest import RESULTS

COUNTS = (1, 2, 4, 8, 64)
WINDOWS, LENGTH = 128, 4096
NETWORK = 5e9  # bytes/s between machines: assumed, of the 100 Gbit/s that such machines have at the least
RATES = replace(H100, network=NETWORK)
MODELS = {
    "Llama 2 7B": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
    "Llama 2 70B": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
}
COLORS, STYLES = dict(zip(MODELS, ("#4c78a8", "#f58518"))), {"sparse": "-", "dense": "--"}
PANELS = {True: f"with a disk of {H100.file / 1e9:g} GB/s on each machine", False: "computing and exchange alone, disks not counted"}


def lines(writing: bool) -> dict[tuple[str, str], list[Point]]:
    """By model and propagation."""
    found = {}
    for name, sizes in MODELS.items():
        shape = ModelShape.of(AutoConfig.for_model("llama", vocab_size=32000, max_position_embeddings=LENGTH, **sizes))
        for propagation in STYLES:
            job = Job(model=name, num_clusters=16, pca_reduction_factor=32, propagation=propagation)
            found[name, propagation] = predicted(Work(job, shape, torch.bfloat16, WINDOWS, LENGTH, 0, LENGTH), RATES, COUNTS, writing)
    return found


def draw() -> Figure:
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    figure.suptitle("Prediction, not a measurement: times faster than one GPU at making the experts\n"
                    f"16 experts, 50 %, PCA / 32, {WINDOWS} x {LENGTH} tokens, bf16; H100, 8 a machine, {NETWORK / 1e9:g} GB/s between machines", fontsize=11)
    for axes, (writing, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items()):
        axes.plot(COUNTS, COUNTS, color="#bbbbbb", linewidth=1)
        axes.annotate("ideal", (COUNTS[-1], COUNTS[-1]), color="#888888", ha="right", va="bottom")
        for (name, propagation), points in lines(writing).items():
            ratio = [points[0].seconds / point.seconds for point in points]
            axes.plot(COUNTS, ratio, STYLES[propagation], color=COLORS[name], label=f"{name}, {propagation}: {duration(points[0].seconds)} on one")
            for point, value in zip(points, ratio):
                axes.plot(point.gpus, value, "o", color=COLORS[name], markerfacecolor=COLORS[name] if point.fits else "white")
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=title)
        axes.set_xticks(COUNTS, map(str, COUNTS))
        axes.set_yticks(COUNTS, map(str, COUNTS))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
    figure.axes[0].set_ylabel("times faster than one GPU")
    figure.text(0.995, 0.005, "a hollow point does not fit into 80 GB", ha="right", fontsize=8, color="#555555")
    return figure


def numbers() -> str:
    rows = [["prediction", "disks", *(f"{count} GPUs" for count in COUNTS)]]
    for writing in PANELS:
        rows += [[f"{name}, {propagation}", "counted" if writing else "not counted",
                  *(f"{duration(point.seconds)} ({points[0].seconds / point.seconds:.1f}x){'' if point.fits else ' too large'}" for point in points)]
                 for (name, propagation), points in lines(writing).items()]
    return table(rows)


if __name__ == "__main__":
    draw().savefig(RESULTS / "scaling.png", dpi=110)
    print(numbers())
