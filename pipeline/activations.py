"""Where activations are kept between the stages: on the device while its budget lasts, then in host memory, then in a
memory-mapped file.

What is kept has the same shape for every block, so each tensor is made once, by name, and written over.
"""

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pipeline.devices import free_memory

DEVICE, HOST, DISK = "device", "host", "disk"


def room(place: str, device: torch.device, working: int, host_bytes: float) -> tuple[float, float]:
    """How many bytes of activations may lie on the device and in host memory, by --activations. working: what the stages
    need of the device beside them."""
    if place == "auto":
        return max(0, free_memory(device) - working), host_bytes
    return math.inf if place == DEVICE else 0, 0 if place == DISK else math.inf


class Kept:
    """A tensor that `Shelf.spill` may move. tensor: where it lies now. at: of hidden states, the block that they are to enter, so
    that a call which is made again, since another actor failed, does not send them through twice."""

    def __init__(self, tensor: Tensor, place: str = DEVICE, at: int = 0):
        self.tensor, self.place, self.at = tensor, place, at


class Shelf:
    """device_bytes, host_bytes: how much may be kept there. folder: for the files, which have no name there (a process
    that is killed leaves nothing)."""

    def __init__(self, device: torch.device, device_bytes: float = math.inf, host_bytes: float = math.inf, folder: Path | None = None):
        self.device, self._folder = device, folder or Path(tempfile.gettempdir())
        self._room = {DEVICE: device_bytes if device.type != "cpu" else 0, HOST: host_bytes, DISK: math.inf}
        self._kept: dict[str, Kept] = {}

    def keep(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Kept:
        """The tensor of that name, to be filled: the same one as before, if it is as large."""
        kept = self._kept.get(name)
        if kept is None or kept.tensor.shape != shape or kept.tensor.dtype != dtype:
            if kept is not None:
                self._room[kept.place] += kept.tensor.nbytes
            kept = self._kept[name] = self._made(shape, dtype, (DEVICE, HOST, DISK))
        return kept

    def put(self, name: str, tensor: Tensor) -> Kept:
        """A copy of `tensor`, kept by that name."""
        kept = self.keep(name, tuple(tensor.shape), tensor.dtype)
        kept.tensor.copy_(tensor)
        return kept

    def _made(self, shape: tuple[int, ...], dtype: torch.dtype, places: tuple[str, ...]) -> Kept:
        size = math.prod(shape) * dtype.itemsize
        place = next(place for place in places if size <= self._room[place])
        self._room[place] -= size
        if place == DEVICE:
            return Kept(torch.empty(shape, dtype=dtype, device=self.device), place)
        if place == HOST:  # pinned memory is copied to a GPU at its full rate
            return Kept(torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda"), place)
        return Kept(_mapped(self._folder, shape, dtype), place)

    def spill(self) -> bool:
        """Make room on the device: what is kept there moves on. False if nothing was."""
        moved = [kept for kept in self._kept.values() if kept.place == DEVICE]
        for kept in moved:
            self._room[DEVICE] += kept.tensor.nbytes
            there = self._made(tuple(kept.tensor.shape), kept.tensor.dtype, (HOST, DISK))
            there.tensor.copy_(kept.tensor)
            kept.tensor, kept.place = there.tensor, there.place
        if moved:
            self._room[DEVICE] = 0  # nothing comes back to where there was too little room
            torch.cuda.empty_cache()
        return bool(moved)

    def bytes_by_place(self) -> dict[str, int]:
        kept = list(self._kept.values())  # another thread may ask
        return {place: sum(one.tensor.nbytes for one in kept if one.place == place) for place in (DEVICE, HOST, DISK)}


def _mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    handle, path = tempfile.mkstemp(prefix="activations-", dir=folder)
    try:
        size = math.prod(shape)
        os.posix_fallocate(handle, 0, max(1, size * dtype.itemsize))  # a full disk is an error now, not a crash on the first write
        return torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    finally:
        os.close(handle)
        os.unlink(path)
