"""Perplexity of a model that is larger than any one actor: block by block, every actor its own windows."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from actors.crew import Crew, Lost
from actors.model_reader import ModelReader
from actors.progress import EVALUATION_COST, Reporter
from actors.stages import look
from pipeline.checkpoint import RunDirectory
from pipeline.schedule import deal
from pipeline.weights import Checkpoint
from pipeline.windows import Windows


@dataclass
class Evaluation:
    """`what`: dense or expanded, for people. run: of the job that it belongs to, if any."""

    what: str
    directory: Path
    num_blocks: int
    windows: Windows
    run: RunDirectory | None
    crew: Crew
    reporter: Reporter
    driver: ThreadPoolExecutor

    def losses(self) -> list[float]:
        """Of every window, in nats. An actor that is lost is replaced, and its windows begin anew."""
        self.where = f"evaluate {self.what}"
        for seat in self.crew.seats:
            seat.block = -1
        self.reader = ModelReader(self.crew, self.directory, self.num_blocks, self.driver)
        while True:
            try:
                return self._losses()
            except Lost as lost:
                self.crew.recover(lost, self.where)
                self.reader.forget()

    def _losses(self) -> list[float]:
        seats = self.crew.seats
        self._begin()
        while behind := [seat for seat in seats if seat.block < self.num_blocks]:
            index = min(seat.block for seat in behind)
            layer = f"layer {index + 1} of {self.num_blocks}"
            self.where = f"evaluate {self.what} {layer}"
            self.reporter.stage(f"evaluate {self.what}", layer)
            weights = self.reader.take(index)
            self.reader.ahead(index + 1)
            here = [seat for seat in behind if seat.block == index]
            self.crew.ask([(seat, seat.actor.evaluate_block.remote(index, weights)) for seat in here], self.where)
            for seat in here:
                seat.block += 1
            self.reporter.advance(EVALUATION_COST)
        by_group = {number: losses for part in self.crew.ask(self.crew.everyone("losses"), self.where) for number, losses in part.items()}
        return [loss for number in sorted(by_group) for loss in by_group[number]]

    def _begin(self) -> None:
        seats = self.crew.seats
        if new := [seat for seat in seats if seat.block < 0]:
            look(self.crew, new, self.run, self.directory, Checkpoint(self.directory).fingerprint())
            groups = self.windows.groups(self.crew.size.device_type)
            shares = deal(list(enumerate(groups)), len(seats))
            self.crew.ask([(seat, seat.actor.begin_evaluation.remote(self.reader.files_for(seat), dict(shares[seat.rank]))) for seat in new], self.where)
            for seat in new:
                seat.block = 0
