"""Layer shards on their way to disk: written where they were made, beside the next block; by the driver for actors that do not
see the run directory."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import ray
import torch
from ray.exceptions import RayError

from actors.crew import Crew, Lost, Seat
from actors.layer_shard import Made, fitted_routers
from actors.wire import unpack_all
from pipeline.checkpoint import RunDirectory
from pipeline.schedule import Task, in_order
from pipeline.shard import shard_tensors
from pipeline.storage import Storage


@dataclass
class Writing:
    """A block whose shard is being written. experts: of each task, as the actor `solvers` names handed them over (None: they
    are still only there). seconds, reports: for the manifest."""

    run: RunDirectory
    made: Made
    groups: tuple[tuple[str, ...], ...]
    fitted: list[dict]
    tasks: list[Task]
    solvers: list[Seat]
    experts: list[ray.ObjectRef | None]
    reports: list[dict]
    seconds: dict[str, float] = field(default_factory=dict)
    writer: Seat | None = None
    written: ray.ObjectRef | Future | None = None

    @property
    def index(self) -> int:
        return self.made[1]

    def begin(self, writer: Seat, driver: ThreadPoolExecutor) -> None:
        """Write it: by the actor `writer`, or by the driver if that one does not see where to."""
        self.writer = writer
        if writer.sees_run:
            elsewhere = [experts for experts, solver in zip(self.experts, self.solvers) if solver is not writer]
            self.written = writer.actor.write.remote(self.run.storage, self.made, self.fitted, self.tasks, elsewhere)
        else:
            here = [experts or solver.actor.hand_over.remote(self.made, task) for task, solver, experts in zip(self.tasks, self.solvers, self.experts)]
            self.written = driver.submit(_write, self.run.storage, self.made, self.groups, self.fitted, self.tasks, here)

    def is_done(self) -> bool:
        if isinstance(self.written, Future):
            return self.written.done()
        return bool(ray.wait([self.written], timeout=0)[0])

    def digest(self, crew: Crew, where: str) -> str:
        """The shard's hash, once it is there."""
        if isinstance(self.written, Future):
            try:
                return self.written.result()
            except (RayError, OSError) as error:
                raise crew.translated(error, where) from None
        return crew.ask([(self.writer, self.written)], where)[0]

    def again(self, crew: Crew, driver: ThreadPoolExecutor) -> None:
        """Its writer was lost: another actor writes it, if everybody's experts were handed over. Raises Lost if some are gone."""
        for seat in crew.seats:
            if all(experts is not None or solver is seat for experts, solver in zip(self.experts, self.solvers)):
                self.begin(seat, driver)
                return
        raise Lost(set(), "experts that were not written yet are gone")


def _write(storage: Storage, made: Made, groups, fitted: list[dict], tasks: list[Task], experts: list[ray.ObjectRef]) -> str:
    found = [unpack_all(weights) for weights in ray.get(experts)]
    return storage.write(made[1], shard_tensors(groups, in_order(tasks, found, torch.device("cpu")), fitted_routers(fitted)))
