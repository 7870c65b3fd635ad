"""Seconds, and the rates of this device that floors are taken from."""

import functools
import gc
import threading
import time
from collections.abc import Callable

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], repeats: int = 3, warm: bool = True) -> float:
    """The best of several runs, after one that does not count."""
    if warm:
        work()
    best = float("inf")
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def product_rate(dtype: torch.dtype = torch.float32) -> float:
    """Operations a second in a large matrix product."""
    torch.backends.cuda.matmul.allow_tf32 = False
    size = 8192 if ON_GPU else 2048
    left, right = torch.randn(2, size, size, device=DEVICE).to(dtype).unbind()
    return 2 * size**3 / seconds(lambda: left @ right, 5)


@functools.cache
def copy_rate() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << (30 if ON_GPU else 26), device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), 5)


def device_name() -> str:
    return torch.cuda.get_device_name() if ON_GPU else f"{torch.get_num_threads()} CPU threads"


class PeakMemory:
    """The most bytes of the card in use, by every library, while this lasts."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()  # what earlier benchmarks left
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while ON_GPU and not self._over.is_set():
            free, total = torch.cuda.mem_get_info()
            self.bytes = max(self.bytes, total - free)
            time.sleep(0.01)

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()
