"""What a process computes on: its device, its threads, its precision."""

import torch


def prepare_device(use_gpu: bool, threads: int) -> torch.device:
    """The device of this process, set up once before anything is computed: `threads` CPU threads, and float32 products in
    full float32, since the factors need it (TF32 keeps 10 bits)."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For people: the card's name, or the CPU threads in use."""
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} CPU thread{'s' if threads > 1 else ''}"
