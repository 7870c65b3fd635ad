"""A job's sizes before anything is loaded: from its options, the model's configuration, and the headers or sizes of data files."""

from pathlib import Path

import numpy as np
import torch

from pipeline.architectures import Architecture
from pipeline.config import Job
from pipeline.errors import UserError
from pipeline.footprint import BlockShape
from pipeline.memory import Work
from pipeline.model_shape import ModelShape
from pipeline.preflight import Source, calibration_request, evaluation_request, router_shapes
from pipeline.texts import HUB_SETS
from pipeline.windows import C4_EVAL_WINDOWS, HELD_OUT, Request

BYTES_PER_TOKEN = 4  # of text, about
TEST_TOKENS = {"wikitext2": 320_000, "ptb": 110_000}  # about: it is the tokenizer that decides


def work_of(job: Job, source: Source, device_type: str) -> Work:
    """Raises UserError where an option does not fit the model's widths, or a .npy of windows is none."""
    calibration = calibration_request(job, source)
    windows, length = _size(calibration)
    evaluation = evaluation_request(job, source, length)
    judged, judged_length = _size(evaluation) if evaluation else (0, length)
    shape = ModelShape.of(source.config)
    narrowest = min(columns for _, columns in shape.block.groups)
    if job.components(narrowest) == 0:
        raise UserError(f"--pca-reduction-factor is {job.pca_reduction_factor}, but the narrowest expanded linear has {narrowest} in features; allowed is 1 to {narrowest}.")
    dtype = getattr(torch, job.dtype_on(device_type, source.checkpoint_dtype))
    return Work(job, shape, dtype, windows, length, judged, judged_length)


def certain_work(job: Job, source: Source, architecture: Architecture, dtype: str, windows: int, length: int) -> Work:
    """What is certain from the headers of the weights, without a skeleton, which takes seconds: attention and embeddings are left out."""
    groups = router_shapes(source, architecture)
    block = BlockShape(groups[0][1], groups, sum(rows * columns for rows, columns in groups))
    shape = ModelShape(source.num_blocks, block, tuple(map(len, architecture.router_groups)), 0, source.text_config.vocab_size, 0)
    return Work(job, shape, getattr(torch, dtype), windows, length, 0, length)


def _size(request: Request) -> tuple[int, int]:
    """Windows and their tokens; of text, about."""
    if request.name.endswith(".npy"):
        return _size_of_array(request)
    if request.count is not None:
        return request.count, request.length
    if request.name == "c4":
        return C4_EVAL_WINDOWS, request.length
    path = Path(request.name)
    if request.name in HUB_SETS:
        tokens = TEST_TOKENS[request.name]
    elif path.exists():
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
        tokens = int(size / BYTES_PER_TOKEN * (HELD_OUT if request.held_out else 1))
    else:
        raise UserError(f"{request.option} {request.name} is no file on this machine and no known data set.")
    return max(1, tokens // request.length), request.length


def _size_of_array(request: Request) -> tuple[int, int]:
    """From the file's header."""
    try:
        count, length = np.load(request.name, mmap_mode="r", allow_pickle=False).shape
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{request.option} {request.name} holds no token windows: {' '.join(str(error).split())[:150]}.") from None
    if request.held_out:
        cut = int(count * (1 - HELD_OUT))
        count = count - cut if request.test else cut
    return min(count, request.count or count), length
