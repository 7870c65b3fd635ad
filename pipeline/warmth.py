"""What a process would else do in the middle of its first block: import libraries, set up cuSOLVER, compile kernels."""

import torch

from pipeline.config import Job
from pipeline.routing import fit
from pipeline.solver import find_grid, inverse_factor, solve

ROWS, COLUMNS = 64, 1024  # columns: more than a factor's leaf and than a block, so that every kernel is met
TOKENS = 256


def warm_up(job: Job, device: torch.device) -> None:
    """A tiny fit and, on a GPU, a tiny solve of the job's own kind."""
    tokens_NC = torch.randn(TOKENS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(device)
    if job.num_clusters > 1:
        fit(tokens_NC[:, :ROWS], 2, 4, restarts=1, seed=0)
    if device.type != "cuda":
        return
    columns = COLUMNS - COLUMNS % job.pattern.m if job.pattern.is_n_of_m else COLUMNS
    weight_RC = tokens_NC[:ROWS, :columns].contiguous()
    hessian_CC = torch.eye(columns, device=device)
    grid = find_grid(weight_RC, job.bits, job.group_size, job.symmetric, job.mse) if job.quantize else None
    solve(weight_RC, inverse_factor(hessian_CC.expand(2, -1, -1)), job.pattern, [ROWS], grid)
    torch.cuda.synchronize()
