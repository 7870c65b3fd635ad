"""Tensors from actor to actor: as GPU memory lent to those on the same machine; to everybody else through Ray's object store, as
numpy arrays, which arrive without a copy (bfloat16 travels as 16-bit integers)."""

import logging
import os
import warnings
from collections.abc import Hashable

import numpy as np
import torch
from torch import Tensor

from actors.metrics import Meter
from pipeline.loans import Handle, Loan, LoanError, borrow

log = logging.getLogger("sparse_expansion")

Wire = tuple[np.ndarray, str] | Handle


def pack(tensor: Tensor) -> Wire:
    tensor = tensor.detach().contiguous()
    if tensor.is_cuda:
        # Pinned memory comes from torch's own pool: a GPU fills it 40 times as fast as host memory that is new.
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy(), "bfloat16"
    return tensor.numpy(), ""


def unpack(wire: Wire, device: torch.device | str | None = None) -> Tensor:
    """device: None: where it comes, the GPU of who borrows it or host memory."""
    if isinstance(wire, Handle):
        return _borrowed(wire).to(device or "cuda")
    array, kind = wire
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the store's arrays are read-only; nothing writes to them
        tensor = torch.from_numpy(array)
    return (tensor.view(torch.bfloat16) if kind else tensor).to(device or "cpu")


def _borrowed(handle: Handle) -> Tensor:
    try:
        return borrow(handle)
    except LoanError as error:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            # The lender died while it was read. A process whose GPU has failed once cannot use it again: another takes its place.
            log.error("%s: this actor ends", error)
            os._exit(1)
        raise


def pack_all(tensors: dict) -> dict:
    return {name: pack(tensor) for name, tensor in tensors.items()}


def unpack_all(wires: dict, device: torch.device | str | None = None) -> dict:
    return {name: unpack(wire, device) for name, wire in wires.items()}


class Outbox:
    """What an actor hands to others, and counts. most: bytes that were lent at one time."""

    def __init__(self, meter: Meter):
        self._meter = meter
        self._lent: dict[Hashable, list[Loan]] = {}
        self.most = 0

    def send(self, tensor: Tensor, until: Hashable = None) -> Wire:
        """until: for actors of this machine alone, that will have read it before `take_back` of the same key."""
        self._meter.add("bytes_sent", tensor.nbytes)
        if until is None:
            return pack(tensor)
        loan = Loan(tensor)
        self._lent.setdefault(until, []).append(loan)
        self.most = max(self.most, sum(loan.nbytes for loans in list(self._lent.values()) for loan in loans))  # another thread may offer
        return loan.handle

    def send_all(self, tensors: dict, until: Hashable = None) -> dict:
        return {name: self.send(tensor, until) for name, tensor in tensors.items()}

    def take_back(self, until: Hashable) -> None:
        self._lent.pop(until, None)
