"""GPU memory lent to another process, and what happens when it cannot be."""

import multiprocessing

import pytest
import torch

from pipeline.loans import Loan, LoanError, borrow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.uint8)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 100, (3, 5 + place), generator=generator).to(dtype) for place, dtype in enumerate(DTYPES)] + [torch.zeros(0, 7)]


def lend(pipe) -> None:
    """Another process: lends, until it is told to stop."""
    loans = [Loan(tensor.cuda()) for tensor in tensors()]
    pipe.send([loan.handle for loan in loans])
    pipe.recv()
    del loans
    pipe.send("taken back")
    pipe.recv()


@pytest.fixture
def lender():
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    process = context.Process(target=lend, args=(far,))
    process.start()
    yield process, pipe
    process.kill()
    process.join()


def test_what_is_borrowed_is_what_was_lent(lender):
    _, pipe = lender
    for handle, wanted in zip(pipe.recv(), tensors(), strict=True):
        borrowed = borrow(handle)
        assert borrowed.is_cuda and borrowed.dtype == wanted.dtype and torch.equal(borrowed.cpu(), wanted)


def test_what_was_taken_back_cannot_be_borrowed(lender):
    _, pipe = lender
    handles = pipe.recv()
    pipe.send("stop")
    assert pipe.recv() == "taken back"
    with pytest.raises(LoanError, match="cannot be borrowed"):
        borrow(handles[0])
    assert torch.ones(2, device="cuda").sum() == 2  # this process goes on


def test_a_lender_that_was_killed(lender):
    process, pipe = lender
    handles = pipe.recv()
    process.kill()
    process.join()
    with pytest.raises(LoanError, match="cannot be borrowed"):
        borrow(handles[0])
    assert torch.ones(2, device="cuda").sum() == 2


def test_lent_memory_is_given_back():
    tensor = torch.zeros(1 << 28, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    loan = Loan(tensor)
    assert before - torch.cuda.mem_get_info()[0] >= tensor.nbytes
    del loan
    assert torch.cuda.mem_get_info()[0] == before


def test_no_room_to_lend():
    free, _ = torch.cuda.mem_get_info()
    tensor = torch.empty(int(free * 0.6), dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError, match="could not be lent"):
        Loan(tensor)
