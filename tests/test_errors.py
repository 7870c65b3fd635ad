"""What the machine lacks is a sentence that names the stage; anything else keeps its traceback. Real errors, as the libraries raise them."""

import json

import numpy as np
import pytest
import torch

from actors.cluster import CrewSize
from actors.crew import Crew, Lost
from actors.progress import Bar
from pipeline.errors import UserError, for_the_user
from pipeline.loans import LoanError


def raised(work) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: B017 (which it is, is what the tests look at)
        work()
    return caught.value


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 60, np.uint8)])
def test_out_of_memory(ask):
    sentence = str(for_the_user(raised(ask), "solve layer 3 of 32"))
    assert sentence.startswith("Solve layer 3 of 32: out of memory (") and "--activations host or disk, the same command goes on." in sentence


def test_out_of_memory_on_a_gpu():
    """As torch raises it there."""
    assert "Cluster layer 1 of 2: out of memory (CUDA out of memory." in str(for_the_user(torch.OutOfMemoryError("CUDA out of memory. Tried to ..."), "cluster layer 1 of 2"))


def test_bugs_are_not_for_the_user():
    assert for_the_user(raised(lambda: torch.zeros(2) @ torch.zeros(3)), "solve") is None
    assert for_the_user(FileNotFoundError(2, "No such file", "x"), "solve") is None
    told = UserError("--model is wrong.")
    assert for_the_user(told, "solve") is told


def test_what_was_lent_and_is_gone_is_a_loss():
    """Its lender was killed: the actor that could not borrow is not to blame, and the job goes on."""
    crew = Crew(CrewSize(2, 1, 1.0, 1), "float32", None)
    assert isinstance(crew.translated(LoanError("GPU memory cannot be borrowed (CUDA error 201)"), "solve"), Lost)


def test_progress_that_cannot_be_written_does_not_stop_a_job(tmp_path):
    bar = Bar(1, verbose=False)
    bar.path = tmp_path / "no such folder" / "progress.json"
    bar.stage("solve", "layer 1 of 2")
    bar.path, bar._written = tmp_path / "progress.json", 0.0
    bar.stage("write", "layer 1 of 2")
    assert json.loads(bar.path.read_text())["stage"].startswith("write") and list(tmp_path.iterdir()) == [bar.path]
