"""Layer shards on their way to disk, beside the next block: every actor writes its own experts into the one file. The driver
writes for those that do not see the run directory; to a remote place one actor writes for all."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.exceptions import RayError

from actors.crew import Crew, Lost, Seat
from actors.layer_shard import Made, fitted_routers
from actors.wire import unpack_all
from pipeline.checkpoint import RunDirectory
from pipeline.layout import Entry, Layout, described
from pipeline.schedule import Task
from pipeline.shard import router_tensors


@dataclass
class Finished:
    """A task's experts. solver: the actor that has them. reports: for the manifest. entries: their tensors in the shard. experts:
    where they were handed over, for everybody (None: the solver alone has them)."""

    solver: Seat
    reports: list[dict]
    entries: dict[str, Entry]
    experts: ray.ObjectRef | None = None


@dataclass
class Writing:
    """A block whose shard is being written. seconds: for the manifest."""

    run: RunDirectory
    made: Made
    groups: tuple[tuple[str, ...], ...]
    fitted: list[dict]
    tasks: dict[Task, Finished]
    seconds: dict[str, float] = field(default_factory=dict)
    parts: list[tuple[Seat | None, ray.ObjectRef | Future]] = field(default_factory=list)  # who writes (None: the driver), and hashes by name
    layout: Layout | None = None
    file: Path | None = None  # that is being filled

    @property
    def index(self) -> int:
        return self.made[1]

    @property
    def reports(self) -> list[dict]:
        reports = [report for finished in self.tasks.values() for report in finished.reports]
        return sorted(reports, key=lambda report: (report["router"], report["expert"]))

    def begin(self, crew: Crew, driver: ThreadPoolExecutor, where: str) -> None:
        """Write it, for the first time or once more: of actors that are gone only what they handed over can be written. Raises Lost
        if something else is missing."""
        gone = [finished for finished in self.tasks.values() if finished.solver not in crew.seats]
        if any(finished.experts is None for finished in gone):
            raise Lost(set(), "experts that were not written yet are gone")
        if self.run.storage.is_remote:
            writer = crew.seats[self.index % len(crew.seats)]
            self._hand_over([task for task, finished in self.tasks.items() if finished.solver is not writer])
            told = {task: None if finished.solver is writer else finished.experts for task, finished in self.tasks.items()}
            self.parts = [(writer, writer.actor.write_whole.remote(self.run.storage, self.made, self.fitted, told))]
            return
        here = router_tensors(self.groups, fitted_routers(self.fitted), len(self.fitted[0]["counts"]))
        entries = described(here)
        for finished in self.tasks.values():
            entries |= finished.entries
        self.layout = self.run.storage.layout(entries)
        try:
            self.file = self.run.storage.create(self.index, self.layout)
        except OSError as error:
            raise crew.translated(error, where) from None
        writers = {task: finished.solver if finished.solver in crew.seats and finished.solver.sees_run else None for task, finished in self.tasks.items()}
        self.parts = [(seat, seat.actor.write.remote(self.file, self.layout, self.made, [task for task in self.tasks if writers[task] is seat]))
                      for seat in crew.seats if seat in writers.values()]
        others = [task for task in self.tasks if writers[task] is None]
        self._hand_over(others)
        self.parts.append((None, driver.submit(_write, self.file, self.layout, here, [self.tasks[task].experts for task in others])))

    def _hand_over(self, tasks: list[Task]) -> None:
        for task in tasks:
            finished = self.tasks[task]
            finished.experts = finished.experts or finished.solver.actor.hand_over.remote(self.made, task)

    def is_done(self) -> bool:
        return all(part.done() if isinstance(part, Future) else ray.wait([part], timeout=0)[0] for _, part in self.parts)

    def digest(self, crew: Crew, where: str) -> str:
        """The shard's hash, once it is whole."""
        told = crew.ask([(seat, part) for seat, part in self.parts if seat is not None], where)
        if self.run.storage.is_remote:
            return told[0]
        try:
            hashes = self.parts[-1][1].result()
            for more in told:
                hashes |= more
            self.run.storage.finish(self.index, self.file)
        except (RayError, OSError) as error:
            raise crew.translated(error, where) from None
        return self.layout.digest(hashes)


def _write(file: Path, layout: Layout, tensors: dict, experts: list[ray.ObjectRef]) -> dict[str, bytes]:
    """The driver's part: routers, and what the others cannot write."""
    hashes = layout.fill(file, tensors)
    for handed_over in experts:
        hashes |= layout.fill(file, unpack_all(ray.get(handed_over)))
    return hashes
