"""Blocks on 1, 2, ... GPUs: seconds by stage, busy share, bytes exchanged, parallel efficiency, and whether the shards are the same.

    python -m tests.benchmarks.several_gpus --directory /dev/shm/several --shape "Llama 2 7B" --actors 1 2

Models of random weights (4 blocks), 16 experts at 0.5, 128 windows, calibration alone: nothing is assembled or evaluated. Shards go to
`directory`; in memory (/dev/shm), so that a disk is not what is measured. With --kill one actor is killed in the middle of the third block at
the largest count.
"""

import argparse
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from actors.cluster import connected, size_crew
from actors.conductor import Conductor
from actors.progress import Bar
from pipeline import preflight
from pipeline.checkpoint import RunDirectory
from pipeline.config import Job
from pipeline.estimate import estimate
from pipeline.memory import CONTEXT, Cluster, Work
from pipeline.model_shape import ModelShape
from pipeline.packed_experts import Form, unpack
from pipeline.packing import joined
from pipeline.rates import H100
from pipeline.scaling import CARD, MAKING, NODE, STORE
from pipeline.windows import Windows
from tests.benchmarks.bench_block import MINI, SHAPES, Shape
from tests.benchmarks.conftest import RESULTS
from tests.benchmarks.measure import DEVICE, device_name

BLOCKS, VOCABULARY = 4, 512


def make_model(shape: Shape, directory: Path) -> Path:
    config = AutoConfig.for_model(shape.model_type, vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=shape.wide, num_hidden_layers=BLOCKS,
                                  num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.length)
    torch.manual_seed(0)
    with DEVICE:
        AutoModelForCausalLM.from_config(config, dtype=shape.dtype).save_pretrained(directory)
    return directory


def expand(shape: Shape, model: Path, directory: Path, actors: int, propagation: str, kill: bool = False) -> dict:
    """A job's blocks by so many actors; its shards stay in `directory`."""
    job = Job(model=str(model), num_clusters=16, pca_reduction_factor=shape.pca, propagation=propagation, dtype=str(shape.dtype)[6:])
    source = preflight.find_model(job.model, None, None, None)
    architecture = preflight.check_shapes(job, source)
    windows = Windows(torch.randint(VOCABULARY, (shape.windows, shape.length), generator=torch.Generator().manual_seed(1)), "random")
    size = size_crew(actors, 1 if DEVICE.type == "cpu" else None, None)
    killed: list[str] = []

    class Watching(Bar):
        def stage(self, name: str, detail: str = "") -> None:
            super().stage(name, detail)
            if kill and not killed and detail.startswith("layer 3 ") and name in ("solve", "expand"):
                killed.append(name)
                threading.Timer(0.3, lambda: os.kill(conductor.crew.seats[-1].place.process, signal.SIGKILL)).start()

    conductor = Conductor(size, job.dtype, Watching(BLOCKS, verbose=False))
    try:
        conductor.start()
        with RunDirectory(directory) as run:
            run.open_job({"benchmark": True}, BLOCKS, "never")
            start = time.time()
            conductor.expand([(job, run)], source, architecture, windows)
            whole = time.time() - start
            manifest = run.manifest["layers"]
    finally:
        conductor.stop()
    stages = {stage: round(seconds, 3) for stage, seconds in conductor.clock.seconds.items()}
    around = {"start", "embed", "replay"} | ({"write"} if propagation == "dense" else set())  # there writing goes on within `expand`
    seconds = sum(seconds for stage, seconds in stages.items() if stage not in around)
    return {"shape": shape.name, "actors": actors, "propagation": propagation, "killed": bool(killed), "seconds": seconds, "whole": whole, "stages": stages,
            **conductor.usage, "predicted": prediction(job, source, actors, shape), "hashes": [manifest[str(index)]["hash"][:12] for index in range(BLOCKS)]}


def prediction(job: Job, source: preflight.Source, actors: int, shape: Shape) -> dict:
    """What `plan` says about the same job on as many of these cards, with its built-in rates."""
    work = Work(job, ModelShape.of(source.config), shape.dtype, shape.windows, shape.length, 0, shape.length)
    made = estimate(work, Cluster(actors, 1, CARD, NODE, STORE, 8), H100)
    stages = {name: round(stage.seconds, 3) for name, stage in made.stages.items() if name in MAKING}
    return {"seconds": sum(stages.values()), "stages": stages, "device_peak": max(stage.device for stage in made.stages.values()) - CONTEXT}


def difference(one: Path, other: Path) -> dict:
    """Of two runs' shards, in the first and in the last block: the share of tokens with the same expert, of weights with the same place in the
    mask, and the relative difference of the weights."""
    found = {}
    for index in (0, BLOCKS - 1):
        ours, theirs = (load_file(directory / "layers" / f"layer_{index:03d}.safetensors") for directory in (one, other))
        same = {"labels": [], "mask": [], "weights": []}
        for name, tensor in ours.items():
            if name.startswith("labels."):
                same["labels"].append(float((tensor == theirs[name]).double().mean()))
            elif name.endswith((".0.mask", ".1.mask")):  # two experts tell as much as all
                left, right = (_weights(tensors, name.removesuffix(".mask")) for tensors in (ours, theirs))
                same["mask"].append(float(((left == 0) == (right == 0)).double().mean()))
                same["weights"].append(float((left - right).norm() / left.norm()))
        found[f"block {index}"] = {"labels": min(same["labels"]), "mask": min(same["mask"]), "weights": max(same["weights"])}
    return found


def _weights(tensors: dict[str, torch.Tensor], expert: str) -> torch.Tensor:
    """An expert's weights (1, R C)."""
    own = {part: tensors[f"{expert}.{part}"].to(DEVICE) for part in ("mask", "values")}
    form = Form("mask", 1, 1, 8 * len(own["mask"]))
    return unpack(form, joined(form, [own], {}), 0, torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--shape", default=MINI.name, choices=[shape.name for shape in SHAPES])
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--propagation", nargs="+", default=["sparse", "dense"])
    parser.add_argument("--kill", nargs="*", default=[], choices=["sparse", "dense"])
    options = parser.parse_args()
    shape = next(shape for shape in SHAPES if shape.name == options.shape)
    model, rows = make_model(shape, options.directory / "model"), []
    with connected(None, False):
        # What is read, compiled and loaded for the first time on a machine is not to be the first row's.
        expand(shape, model, options.directory / "other", options.actors[-1], "sparse")
        shutil.rmtree(options.directory / "other")
        for propagation in options.propagation:
            first = options.directory / "first"
            for actors in options.actors:
                directory = first if actors == options.actors[0] else options.directory / "other"
                row = expand(shape, model, directory, actors, propagation)
                row["efficiency"] = 1.0 if directory is first else rows_of(rows, propagation)["seconds"] * options.actors[0] / (row["seconds"] * actors)
                row |= {"differs": difference(first, directory)} if directory is not first else {}
                rows.append(row)
                print(json.dumps(row), flush=True)
                shutil.rmtree(options.directory / "other", ignore_errors=True)
            if propagation in options.kill:
                row = expand(shape, model, options.directory / "other", options.actors[-1], propagation, kill=True)
                row["differs"] = difference(first, options.directory / "other")
                rows.append(row)
                print(json.dumps(row), flush=True)
                shutil.rmtree(options.directory / "other")
            shutil.rmtree(first)
    shutil.rmtree(options.directory)
    path = RESULTS / f"several-{shape.name.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps({"device": device_name(), "rows": rows}, indent=1) + "\n")


def rows_of(rows: list[dict], propagation: str) -> dict:
    return next(row for row in rows if row["propagation"] == propagation)


if __name__ == "__main__":
    main()
