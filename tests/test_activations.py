"""Where activations lie: on the device, in host memory or in files without a name."""

import errno
import math
import os

import pytest
import torch

from pipeline.activations import DEVICE, DISK, HOST, Shelf, room

CPU = torch.device("cpu")


def test_host_memory_up_to_its_budget_then_the_disk(tmp_path):
    shelf = Shelf(CPU, host_bytes=1000, folder=tmp_path)
    kept = [shelf.keep(str(number), (10, 10), torch.float32) for number in range(4)]  # 400 bytes each
    assert [one.place for one in kept] == [HOST, HOST, DISK, DISK] and shelf.bytes_by_place() == {DEVICE: 0, HOST: 800, DISK: 800}
    for number, one in enumerate(kept):
        one.tensor.fill_(number)
    assert [one.tensor.unique().tolist() for one in kept] == [[0], [1], [2], [3]]
    assert shelf.keep("2", (10, 10), torch.float32) is kept[2]  # written over by the next block
    assert shelf.keep("0", (5, 10), torch.float32).place == HOST  # of another size: its room is given back first
    assert os.listdir(tmp_path) == []  # nothing that a killed process could leave


def test_no_tokens_need_no_room(tmp_path):
    assert Shelf(CPU, host_bytes=0, folder=tmp_path).keep("none", (0, 8), torch.float32).tensor.shape == (0, 8)


def test_a_full_disk_is_an_error_when_room_is_asked_for(tmp_path):
    with pytest.raises(OSError) as raised:
        Shelf(CPU, host_bytes=0, folder=tmp_path).keep("large", (1 << 50,), torch.uint8)
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG) and os.listdir(tmp_path) == []


def test_room_by_option():
    assert room("auto", CPU, 1 << 60, 5) == (0, 5)  # whatever the stages need, nothing is left on the device
    assert room("device", CPU, 0, 5) == (math.inf, math.inf) and room("host", CPU, 0, 5) == (0, math.inf) and room("disk", CPU, 0, 5) == (0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_on_the_gpu_moves_to_the_host_when_room_is_wanted(tmp_path):
    shelf = Shelf(torch.device("cuda"), host_bytes=500, folder=tmp_path)
    kept = [shelf.keep(str(number), (10, 10), torch.float32) for number in range(2)]
    for number, one in enumerate(kept):
        one.tensor.fill_(number)
    assert [one.place for one in kept] == [DEVICE, DEVICE] and shelf.spill() and not shelf.spill()
    assert [one.place for one in kept] == [HOST, DISK] and [one.tensor.unique().tolist() for one in kept] == [[0], [1]]
    assert kept[0].tensor.is_pinned() and shelf.keep("new", (2,), torch.float32).place != DEVICE
