"""What a process computes on: its device, its share of it, its threads, its precision."""

import os

import torch

CPU_BATCHES = 4 << 30  # bytes that count as free on a CPU: fixed, so that batches are the same on every machine


def prepare_device(gpu_share: float, threads: int) -> torch.device:
    """The device of this process, set up once before anything is computed: `threads` CPU threads, and float32 products in
    full float32, since the factors need it (TF32 keeps 10 bits). gpu_share: of a GPU that other processes use too; 0: a CPU."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    # Before the card is first used. What is held and not used then shrinks from a tenth of the memory to a hundredth.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not gpu_share or not torch.cuda.is_available():
        return torch.device("cpu")
    if gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share)
    return torch.device("cuda")


def device_name(device: torch.device) -> str:
    """For people: the card's name, or the CPU threads in use."""
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} CPU thread{'s' if threads > 1 else ''}"


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take of its device; what torch holds without using it is free, too."""
    if device.type == "cpu":
        return CPU_BATCHES
    free, total = torch.cuda.mem_get_info()
    share = torch.cuda.get_per_process_memory_fraction() * total if hasattr(torch.cuda, "get_per_process_memory_fraction") else total
    held = torch.cuda.memory_reserved()
    return int(min(free, share - held)) + held - torch.cuda.memory_allocated()
