"""A saved model's feed-forward layers beside the dense ones of the same shape, in one run: a few tokens, many tokens, memory.

    python -m tests.benchmarks.inference --shape 4096 11008 --experts 16        on a GPU, in bfloat16
    python -m tests.benchmarks.inference --shape 512 2048 --dtype float32 --prefill 2048

Experts are random; tokens are routed by random centroids, which spreads them evenly: the worst case for a batch. The floor of a
few tokens is the bytes of the experts that they use, read once; of many the operations.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.modeling_sparse_expansion import RoutedLinear, Router
from pipeline.packing import choose_form
from pipeline.pattern import Pattern
from tests.benchmarks.measure import DEVICE, device_name

CASES = {"2:4, 4 bits": ("2:4", 4), "2:4": ("2:4", 0), "0.5": ("0.5", 0), "0.8": ("0.8", 0)}


def random_linear(router: Router, experts: int, rows: int, columns: int, sparsity: str, bits: int, dtype: torch.dtype) -> RoutedLinear:
    """Packed experts of random numbers, without packing them."""
    form = choose_form(Pattern.parse(sparsity), bits, None, experts, rows, columns, dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)
    fraction = Pattern.parse(sparsity).fraction
    mask, counts = [], torch.zeros(experts, dtype=torch.int64)
    if form.index == "mask":
        for expert in range(experts):
            kept = torch.rand(rows * columns, generator=generator, device=DEVICE) >= fraction
            counts[expert] = kept.sum()
            mask.append((kept.view(-1, 8) * torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], device=DEVICE)).sum(1).to(torch.uint8))
    linear = RoutedLinear(router, experts, columns, rows, False, form, int(counts.sum())).to(DEVICE, dtype).requires_grad_(False)
    for part, tensor in linear.parts.items():
        if part == "mask":
            tensor.data = torch.stack(mask)
        elif part == "starts":
            tensor.data = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(DEVICE)
        elif part == "words":
            tensor.data = torch.randint(form.choices ** (form.groups % form.digits or form.digits), tensor.shape, generator=generator, device=DEVICE).to(torch.int32)
        elif part == "zero":
            tensor.data = torch.full_like(tensor, 1 << bits - 1)
        elif part == "scale":
            tensor.data = torch.full(tensor.shape, 0.01, device=DEVICE)
        elif part == "codes":
            tensor.data = torch.randint(256, tensor.shape, generator=generator, device=DEVICE, dtype=torch.uint8)
        else:
            tensor.data = torch.randn(tensor.shape, generator=generator, device=DEVICE, dtype=dtype) / columns**0.5
    return linear


class FeedForward(nn.Module):
    def __init__(self, hidden: int, wide: int, make: Callable[[int, int, int], nn.Module]):
        super().__init__()
        self.gate, self.up, self.down = make(0, wide, hidden), make(0, wide, hidden), make(1, hidden, wide)

    def forward(self, tokens_NC: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(tokens_NC)) * self.up(tokens_NC))


def seconds(call: Callable[[], object], graph: bool) -> float:
    """The best of several; as a CUDA graph where a few tokens leave the CPU no time."""
    if DEVICE.type == "cpu":
        call()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if graph:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            for _ in range(10):
                call()
        run, each = recorded.replay, 10
    else:
        run, each = call, 1
    best = float("inf")
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1000 / each)
    return best


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 11008])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefill", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    (hidden, wide), dtype, rows = options.shape, getattr(torch, options.dtype), []
    dense = FeedForward(hidden, wide, lambda _, out, into: nn.Linear(into, out, bias=False).to(DEVICE, dtype))
    sizes = {"decode, 1 token": 1, "decode, 16 tokens": 16, "prefill": options.prefill}
    tokens = {what: torch.randn(count, hidden, device=DEVICE, dtype=dtype) for what, count in sizes.items()}
    base = {what: seconds(lambda what=what: dense(tokens[what]), graph=what != "prefill") for what in sizes}
    dense_bytes = sum(part.nbytes for part in dense.parameters())
    for name, (sparsity, bits) in CASES.items():
        routers = [Router(options.experts, columns).to(DEVICE) for columns in (hidden, wide)]
        for router in routers:
            router.weight.data.normal_()
            router.bias.data.zero_()

        def make(which: int, out: int, into: int, routers=routers, sparsity=sparsity, bits=bits) -> RoutedLinear:
            return random_linear(routers[which], options.experts, out, into, sparsity, bits, dtype)

        packed = FeedForward(hidden, wide, make)
        bytes_of_one = sum(part.nbytes for part in packed.parameters()) / options.experts
        for what in sizes:
            here = seconds(lambda what=what, packed=packed: packed(tokens[what]), graph=what != "prefill")
            rows.append({"experts": name, "what": what, "dense": base[what], "here": here, "ratio": here / base[what], "bytes of one expert": bytes_of_one, "dense bytes": dense_bytes})
            print(json.dumps(rows[-1]), flush=True)
        if DEVICE.type == "cuda" or name == "0.5":
            for linear in (packed.gate, packed.up, packed.down):
                linear.unpack_(dtype)
            here = seconds(lambda packed=packed: packed(tokens["prefill"]), graph=False)
            rows.append({"experts": f"{name}, unpacked", "what": "prefill", "dense": base["prefill"], "here": here, "ratio": here / base["prefill"]})
            print(json.dumps(rows[-1]), flush=True)
        del packed
    if options.out:
        options.out.write_text(json.dumps({"device": device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
