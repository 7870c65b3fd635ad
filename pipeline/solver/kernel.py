"""The inner loop of a block as one Triton kernel: every row of every expert at once. Its plain twin is `solve._solve_columns`.

A program owns a tile of rows of one expert and goes through the block in strips of columns. A strip first takes what the
finished strips of the block carry to it, by small matrix products; then it is solved column by column in registers. Rows
never meet: the unstructured threshold is known when the block starts, and an N:M mask is a row's own.

Runs without a GPU too, in Triton's interpreter (TRITON_INTERPRET=1), which is how the tests compare it with the twin.
Shapes: E experts, R rows (out features), B columns of the block, G groups of columns that share a scale.
"""

import triton
import triton.language as tl
from torch import Tensor

from pipeline.pattern import Pattern
from pipeline.solver.quantizer import Grid

TILE, WARPS = 64, 1  # rows and warps of a program; measured on an H100
STRIP = 16  # columns that are solved in registers: the smallest side of a matrix product in Triton
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest integer, ties to even


@triton.jit
def _block_kernel(weight, upper, threshold, error, scale, zero, rows, start, top,
                  weight_stride_e, weight_stride_c, upper_stride_e, upper_stride_c, error_stride_e, groups, width,
                  BLOCK: tl.constexpr, STRIP: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, GRID: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_row = row < rows
    column = tl.arange(0, PADDED)  # of a strip, up to the next power of two
    weight += expert * weight_stride_e + row[None, :]
    error += expert * error_stride_e + row[None, :]
    upper += expert * upper_stride_e
    limit = tl.zeros((TILE,), tl.float32)
    if M == 0:
        limit = tl.load(threshold + expert * rows + row, mask=is_row, other=0.0)
    for first in range(0, BLOCK, STRIP):
        in_strip = (column < STRIP) & (first + column < BLOCK)
        real = in_strip[:, None] & is_row[None, :]
        at = (first + column).to(tl.int64)[:, None]
        w = tl.load(weight + at * weight_stride_c, mask=real, other=0.0)
        diagonal = tl.load(upper + (first + column) * (upper_stride_c + 1), mask=in_strip, other=1.0)
        pruned = tl.zeros((PADDED, TILE), tl.int32)
        if M == 0:
            score = tl.div_rn(w, diagonal[:, None] + tl.zeros_like(w))
            pruned = (score * score <= limit[None, :]).to(tl.int32)
        for before in range(0, first, STRIP):
            u = tl.load(upper + (before + column)[None, :] * upper_stride_c + (first + column)[:, None],
                        mask=(column < STRIP)[None, :] & in_strip[:, None], other=0.0)
            e = tl.load(error + (before + column).to(tl.int64)[:, None] * rows, mask=(column < STRIP)[:, None] & is_row[None, :], other=0.0)
            w -= tl.dot(u, e, input_precision="ieee")
        errors = tl.zeros((PADDED, TILE), tl.float32)
        for i in tl.static_range(STRIP):
            here = column == i
            if M > 0:  # noqa: SIM102 (M is known when the kernel is compiled)
                if i % M == 0:
                    inside = (column >= i) & (column < i + M)
                    score = tl.div_rn(w, diagonal[:, None] + tl.zeros_like(w))
                    score = score * score
                    smaller = tl.zeros((PADDED, TILE), tl.int32)
                    for k in tl.static_range(i, i + M):
                        other = tl.sum(tl.where((column == k)[:, None], score, 0.0), axis=0)[None, :]
                        smaller += ((other < score) | ((other == score) & (k < column)[:, None])).to(tl.int32)
                    pruned = tl.where(inside[:, None], (smaller < M - N).to(tl.int32), pruned)
            dense = tl.sum(tl.where(here[:, None], w, 0.0), axis=0)
            gone = tl.sum(tl.where(here[:, None], pruned, 0), axis=0)
            solved = tl.where(gone > 0, 0.0, dense)
            if GRID:
                group = (start + first + i) // width
                s = tl.load(scale + row * groups + group, mask=is_row & (first + i < BLOCK), other=1.0)
                z = tl.load(zero + row * groups + group, mask=is_row & (first + i < BLOCK), other=0.0)
                level = tl.minimum(tl.maximum(tl.div_rn(solved, s), -1e6), 1e6)
                level = (level + NEAREST) - NEAREST
                solved = s * (tl.minimum(tl.maximum(level + z, 0.0), top) - z)
            d = tl.load(upper + (first + i) * (upper_stride_c + 1), mask=first + i < BLOCK, other=1.0)
            e = tl.div_rn(dense - solved, d + tl.zeros_like(dense))
            u = tl.load(upper + (first + i) * upper_stride_c + first + column, mask=in_strip & (column > i) & (first + i < BLOCK), other=0.0)
            w = tl.where(here[:, None], solved[None, :], w - u[:, None] * e[None, :])
            errors = tl.where(here[:, None], e[None, :], errors)
        tl.store(weight + at * weight_stride_c, w, mask=real)
        tl.store(error + at * rows, errors, mask=real)
        tl.debug_barrier()  # later strips read these errors, other threads' too


def solve_block(weight_EBR: Tensor, upper_EBB: Tensor, error_EBR: Tensor, threshold_ER: Tensor | None, pattern: Pattern, grid: Grid | None,
                start: int) -> None:
    """Solve the columns of one block in place; their scaled errors go to error_EBR. float32; an expert's errors and the last
    dimensions of the others are contiguous.

    threshold_ER: the score up to which weights go, where the pattern is unstructured; with N:M the kernel decides.
    start: the first column's place in the whole weight, for the grid's groups.
    """
    experts, block, rows = weight_EBR.shape
    assert weight_EBR.stride(2) == upper_EBB.stride(2) == error_EBR.stride(2) == 1 and error_EBR.stride(1) == rows
    strip = -(-STRIP // pattern.m) * pattern.m if pattern.is_n_of_m and STRIP % pattern.m else STRIP
    none = error_EBR  # a pointer that is not followed
    _block_kernel[(triton.cdiv(rows, TILE), experts)](
        weight_EBR, upper_EBB, none if threshold_ER is None else threshold_ER.contiguous(), error_EBR,
        none if grid is None else grid.scale_RG.contiguous(), none if grid is None else grid.zero_RG.contiguous(),
        rows, start, 0.0 if grid is None else float(grid.top),
        weight_EBR.stride(0), weight_EBR.stride(1), upper_EBB.stride(0), upper_EBB.stride(1), error_EBR.stride(0),
        1 if grid is None else grid.scale_RG.shape[1], 1 if grid is None else grid.width,
        num_warps=WARPS, num_stages=1, BLOCK=block, STRIP=strip, PADDED=max(16, triton.next_power_of_2(strip)), TILE=TILE,
        N=pattern.n, M=pattern.m, GRID=grid is not None)
