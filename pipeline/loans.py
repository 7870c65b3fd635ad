"""GPU memory lent to other processes of the same machine: they copy out of it, over NVLink where there is one, without a detour
through host memory.

A process owns what it lends until it drops the `Loan`; who borrows must be done by then. Uses CUDA's interprocess handles, which
torch's own memory does not always have (expandable segments do not), so what is lent is memory of the CUDA driver's own. A process
may borrow from a GPU that it does not see otherwise (CUDA_VISIBLE_DEVICES).
"""

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class LoanError(RuntimeError):
    """Nothing can be lent or borrowed here, or who lent it is gone."""


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * 64)]


@dataclass(frozen=True)
class Handle:
    """A lent tensor, for another process. memory: as CUDA names it there."""

    memory: bytes
    shape: torch.Size
    dtype: torch.dtype


class Loan:
    """A copy of a tensor on the GPU, in memory that lives as long as this object. handle: by which others find it. nbytes: of
    the GPU.

    Raises torch.OutOfMemoryError where there is no room, LoanError where memory cannot be lent at all.
    """

    def __init__(self, tensor: Tensor):
        tensor, self._address = tensor.detach().contiguous(), ctypes.c_uint64()
        self.nbytes = size = max(tensor.nbytes, 1)
        torch.cuda.synchronize()  # also makes the GPU the calling thread's own
        failed = _driver().cuMemAlloc_v2(ctypes.byref(self._address), size)
        if failed == OUT_OF_MEMORY:  # torch may hold what it does not use
            torch.cuda.empty_cache()
            failed = _driver().cuMemAlloc_v2(ctypes.byref(self._address), size)
        if failed:
            raise torch.OutOfMemoryError(f"{size} bytes of GPU memory could not be lent (CUDA error {failed})")
        _copy(self._address.value, tensor.data_ptr(), tensor)
        torch.cuda.synchronize()
        memory = _IpcHandle()
        _check(_driver().cuIpcGetMemHandle(ctypes.byref(memory), self._address), "lent")
        self.handle = Handle(bytes(memory), tensor.shape, tensor.dtype)

    def __del__(self):
        if self._address.value:
            _driver().cuMemFree_v2(self._address)


def borrow(handle: Handle) -> Tensor:
    """A copy of a lent tensor on this process's GPU. Raises LoanError if it is not there any more."""
    copied = torch.empty(handle.shape, dtype=handle.dtype, device="cuda")
    address = ctypes.c_uint64()
    _check(_driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), _IpcHandle.from_buffer_copy(handle.memory), LAZY_PEER_ACCESS), "borrowed")
    try:
        _copy(copied.data_ptr(), address.value, copied)
        torch.cuda.synchronize()
    finally:
        _driver().cuIpcCloseMemHandle(address)
    return copied


def _copy(to: int, source: int, like: Tensor) -> None:
    if like.numel():
        stream = torch.cuda.current_stream().cuda_stream
        _check(_driver().cuMemcpyDtoDAsync_v2(to, source, like.nbytes, stream), "copied")


def _check(code: int, what: str) -> None:
    if code:
        raise LoanError(f"GPU memory cannot be {what} (CUDA error {code})")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LoanError(f"there is no CUDA driver: {error}") from None
    pointer, size, address = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    for name, arguments in (("cuMemAlloc_v2", (pointer, size)), ("cuMemFree_v2", (address,)), ("cuIpcGetMemHandle", (pointer, address)),
                            ("cuIpcOpenMemHandle_v2", (pointer, _IpcHandle, ctypes.c_uint)), ("cuIpcCloseMemHandle", (address,)),
                            ("cuMemcpyDtoDAsync_v2", (address, address, size, pointer))):
        getattr(driver, name).argtypes = arguments
    return driver
