"""The inner loop of a block as one Triton kernel: every row of every expert at once. Its plain twin is `solve._solve_columns`.

A program owns a tile of rows of one expert and all columns of the block, which stay in registers while it goes through them
left to right. Rows never meet: the unstructured mask is known when the block starts, and an N:M mask is a row's own.

Runs without a GPU too, in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests compare it with the twin.
Shapes: E experts, R rows (out features), B columns of the block, G groups of columns that share a scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.pattern import Pattern
from pipeline.solver.quantizer import Grid

TILES = {False: (32, 2), True: (8, 2)}  # rows and warps of a program, by whether the pattern is N:M; measured on an H100
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest integer, ties to even


@triton.jit
def _block_kernel(weight, upper, mask, error, scale, zero, rows, start, top,
                  weight_stride_e, weight_stride_c, upper_stride_e, upper_stride_c, groups, width,
                  BLOCK: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GRID: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)  # the block's columns, up to the next power of two
    real = (column < BLOCK)[:, None] & (row < rows)[None, :]
    at_weight = weight + expert * weight_stride_e + column.to(tl.int64)[:, None] * weight_stride_c + row[None, :]
    at_row = expert * BLOCK * rows + row  # in mask and errors, which are (E, B, R)
    upper += expert * upper_stride_e
    w = tl.load(at_weight, mask=real, other=0.0)
    if M > 0:
        pruned = tl.zeros((COLUMNS, TILE), tl.int32)
        diagonal = tl.load(upper + column * upper_stride_c + column, mask=column < BLOCK, other=1.0)
    for i in range(BLOCK):
        here = column == i
        if M > 0:  # noqa: SIM102 (M is known when the kernel is compiled, i only when it runs)
            if i % M == 0:
                score = tl.div_rn(w, diagonal[:, None] + tl.zeros_like(w))
                score = score * score
                smaller = tl.zeros((COLUMNS, TILE), tl.int32)
                for k in range(i, i + M):
                    other = tl.sum(tl.where((column == k)[:, None], score, 0.0), axis=0)[None, :]
                    smaller += ((other < score) | ((other == score) & (k < column)[:, None])).to(tl.int32)
                inside = (column >= i) & (column < i + M)
                pruned = tl.where(inside[:, None], (smaller < M - N).to(tl.int32), pruned)
        dense = tl.sum(tl.where(here[:, None], w, 0.0), axis=0)
        if M > 0:  # noqa: SIM108
            gone = tl.sum(tl.where(here[:, None], pruned, 0), axis=0)
        else:
            gone = tl.load(mask + at_row + i * rows, mask=row < rows, other=0).to(tl.int32)
        solved = tl.where(gone > 0, 0.0, dense)
        if GRID:
            group = (start + i) // width
            s = tl.load(scale + row * groups + group, mask=row < rows, other=1.0)
            z = tl.load(zero + row * groups + group, mask=row < rows, other=0.0)
            level = tl.minimum(tl.maximum(tl.div_rn(solved, s), -1e6), 1e6)
            level = (level + NEAREST) - NEAREST
            solved = s * (tl.minimum(tl.maximum(level + z, 0.0), top) - z)
        e = tl.div_rn(dense - solved, tl.load(upper + i * upper_stride_c + i) + tl.zeros_like(dense))
        u = tl.load(upper + i * upper_stride_c + column, mask=(column > i) & (column < BLOCK), other=0.0)
        w = tl.where(here[:, None], solved[None, :], w - u[:, None] * e[None, :])
        tl.store(error + at_row + i * rows, e, mask=row < rows)
    tl.store(at_weight, w, mask=real)


def solve_block(weight_EBR: Tensor, upper_EBB: Tensor, pruned_EBR: Tensor | None, pattern: Pattern, grid: Grid | None, start: int) -> Tensor:
    """Solve the columns of one block in place; returns the scaled errors (E, B, R). float32; R and B are contiguous in their tensors.

    pruned_EBR: which weights go, where the pattern is unstructured; with N:M the kernel decides.
    start: the first column's place in the whole weight, for the grid's groups.
    """
    experts, block, rows = weight_EBR.shape
    assert weight_EBR.stride(2) == upper_EBB.stride(2) == 1
    error_EBR = torch.empty(experts, block, rows, dtype=torch.float32, device=weight_EBR.device)
    tile, warps = TILES[pattern.is_n_of_m]
    none = error_EBR  # a pointer that is not followed
    _block_kernel[(triton.cdiv(rows, tile), experts)](
        weight_EBR, upper_EBB, none if pruned_EBR is None else pruned_EBR.to(torch.int8).contiguous(), error_EBR,
        none if grid is None else grid.scale_RG.contiguous(), none if grid is None else grid.zero_RG.contiguous(),
        rows, start, 0.0 if grid is None else float(grid.top),
        weight_EBR.stride(0), weight_EBR.stride(1), upper_EBB.stride(0), upper_EBB.stride(1),
        1 if grid is None else grid.scale_RG.shape[1], 1 if grid is None else grid.width,
        num_warps=warps, BLOCK=block, COLUMNS=triton.next_power_of_2(block), TILE=tile, N=pattern.n, M=pattern.m, GRID=grid is not None)
    return error_EBR
