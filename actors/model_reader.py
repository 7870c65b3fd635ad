"""A model's weights for all actors: each block is read once, ahead of its turn, by the actor that owns it; by the driver where
that one does not see the model's files."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import ray
import torch

from actors.crew import Crew, Seat
from actors.layer_shard import ModelFiles
from actors.wire import pack_all
from pipeline.blocks import BlockwiseModel
from pipeline.schedule import deal


class ModelReader:
    """`take(index)` gives a block's weights as a reference that every actor can be handed."""

    def __init__(self, crew: Crew, directory: Path, num_blocks: int, driver: ThreadPoolExecutor):
        self._crew, self._directory, self._num_blocks, self._driver = crew, directory, num_blocks, driver
        self._ahead: dict[int, ray.ObjectRef | Future] = {}
        self._shell: ray.ObjectRef | None = None

    @cached_property
    def _model(self) -> BlockwiseModel:
        return BlockwiseModel(self._directory, torch.float32, torch.device("cpu"))  # weights are handed on as they are stored

    def files_for(self, seat: Seat) -> ModelFiles | ray.ObjectRef:
        if seat.sees_model:
            return ModelFiles(self._directory)
        if self._shell is None:
            self._shell = ray.put(ModelFiles(None, self._model.config, pack_all(self._model.shell_weights())))
        return self._shell

    def ahead(self, index: int) -> None:
        """Begin to read a block."""
        if index in self._ahead or index >= self._num_blocks:
            return
        owner = self.owner(index)
        able = owner.sees_model and owner.block >= 0  # it has opened the model
        self._ahead[index] = owner.actor.publish.remote(index) if able else self._driver.submit(lambda: ray.put(pack_all(self._model.block_weights(index))))

    def take(self, index: int) -> ray.ObjectRef:
        """A block's weights; nobody keeps them but those who are handed them."""
        self.ahead(index)
        found = self._ahead.pop(index)
        return found.result() if isinstance(found, Future) else found

    def owner(self, index: int) -> Seat:
        """Consecutive blocks belong to one actor."""
        shares = deal(range(self._num_blocks), len(self._crew.seats))
        return next(seat for seat, blocks in zip(self._crew.seats, shares) if index in blocks)

    def forget(self) -> None:
        """Actors were lost, and with them perhaps what they had read."""
        self._ahead.clear()
