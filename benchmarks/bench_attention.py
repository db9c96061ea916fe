"""Every attention provider on a grid of verify windows: microseconds a layer, percent of the read bandwidth, error.

    bench_attention.py --out results --gpus 4 --seconds 540     # the whole grid; again with the same --out: what is missing
    bench_attention.py --out results --merge                    # JSON, plots and table from what was measured so far
    bench_attention.py --out results --specs 128,4,8 --batch 1  # a part: head dim 128, 4 query heads a key/value head, 8 tokens
    bench_attention.py --out results --device cpu --grid tiny   # the same way through, without a GPU

First many processes compile what the grid needs (each kernel once, on all CPU cores), then one process a GPU measures, a spec
(head dim, group, tokens) at a time, the important ones first. Results are appended to rows.jsonl as they come; when the time is
up, cells that were not run are listed as such. How a cell is measured: attention_measure.py; what the figures mean: README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import attention_report
from attention_grid import GRIDS, Cell, Grid, by_spec, cell_of
from attention_measure import AUTO, Bench
from report import environment
from rich.console import Console
from rich.progress import Progress
from shapes import sync

from spec_compile.ops.providers import PROVIDERS

ROWS = "rows.jsonl"
COMPILE_SHARE = 0.4  # of the time budget, at most
MERGE_SECONDS = 15
HANG_SECONDS = 120  # one provider in one cell, whatever it still has to compile included
MAX_CRASHES = 8


@dataclass
class Task:
    """Work for one process: compile one provider's kernels for ``cells``, or measure ``cells``."""

    cells: list[Cell]
    compile: str | None = None
    skip: dict[Cell, set[str]] = field(default_factory=dict)  # providers not to measure (again)


# ----------------------------------------------------------------------------------------------------------------------
# A worker: one process on one GPU


def work(pipe: Connection, device: str, visible: str | None, names: list[str]) -> None:
    """Do the tasks that come through ``pipe`` until None comes; say what is begun, so that a crash has a name."""
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    bench = Bench(device, names)
    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        if task.compile is not None:
            try:
                bench.compile(task.compile, task.cells)
            except Exception as error:  # it will fail again when measured, and be a row then
                pipe.send(("note", f"{task.compile} could not be compiled: {type(error).__name__}: {error}"[:300]))
                sync(device)  # raises where the CUDA context is broken: this process ends, another takes its place
        else:
            if bench.memory is None:
                pipe.send(("row", {"meta": {**environment(device), **bench.prepare()}}))
            for cell in task.cells:
                skip = task.skip.get(cell, set())
                for row in bench.measure(cell, skip, lambda name, cell=cell: pipe.send(("try", (cell, name)))):
                    pipe.send(("row", row))
        pipe.send(("ready", None))


class Worker:
    """The parent's view of a process."""

    def __init__(self, number: int, gpu: int | None, names: list[str]) -> None:
        self.number, self.gpu, self.names = number, gpu, names
        self.task: Task | None = None
        self.trying: tuple[Cell, str] | None = None
        self.idle, self.since = False, time.monotonic()
        context = multiprocessing.get_context("spawn")
        self.pipe, child = context.Pipe()
        device, visible = ("cpu", None) if gpu is None else ("cuda", visible_device(gpu))
        self.process = context.Process(target=work, args=(child, device, visible, names), daemon=True)
        self.process.start()
        child.close()

    def give(self, task: Task) -> None:
        self.task, self.trying, self.idle, self.since = task, None, False, time.monotonic()
        self.pipe.send(task)

    def stop(self, patience: float) -> None:
        """Ask the process to end; end it if it does not."""
        try:
            self.pipe.send(None)
            self.process.join(patience)
        except OSError:  # it is gone already
            pass
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)


def visible_device(gpu: int) -> str:
    """The name of GPU ``gpu`` of those that this process may see."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed.split(",")[gpu] if allowed else str(gpu)


# ----------------------------------------------------------------------------------------------------------------------
# The parent


class Run:
    """Gives tasks to workers, writes rows, survives workers that crash or hang."""

    def __init__(self, args: argparse.Namespace, grid: Grid, cells: list[Cell]) -> None:
        self.args, self.grid, self.cells = args, grid, cells
        self.console = Console(highlight=False, soft_wrap=True)
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.done = finished(attention_report.load(self.out / ROWS))
        self.begin = time.monotonic()
        self.crashes = 0
        self.gpus = args.gpus if args.device == "cuda" else 1
        self.workers: list[Worker] = []  # the first ones, one a GPU, measure; all compile

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def left(self, share: float = 1.0) -> float:
        """Seconds until ``share`` of the budget is used, merging aside."""
        if self.args.seconds is None:
            return float("inf")
        return share * (self.args.seconds - MERGE_SECONDS) - self.seconds()

    def missing(self) -> list[Cell]:
        wanted = {AUTO, *self.args.providers}
        return [cell for cell in self.cells if wanted - self.done.get(cell, set())]

    def run(self) -> None:
        todo = by_spec(self.missing())
        gpus, cuda = self.gpus, self.args.device == "cuda"
        count = min(max(gpus, self.args.compile_workers), max(gpus, len(todo) * len(self.args.providers))) if cuda else 1
        self.workers = [self._start(number, number % gpus) for number in range(count)]
        if cuda:
            compiling = deque(
                Task(cells, compile=name) for cells in todo.values() for name in self.args.providers if name != "torch"
            )
            self._drive(compiling, "compiling", COMPILE_SHARE)
            self.console.print(
                f"compiled after {self.seconds():.0f} s; {len(compiling)} tasks left for the measuring processes"
            )
        for worker in self.workers[gpus:]:
            worker.stop(0.2)
        self.workers = self.workers[:gpus]
        measuring = deque(Task(cells, skip={c: set(self.done.get(c, ())) for c in cells}) for cells in todo.values())
        self._drive(measuring, "measuring", 1.0)
        for worker in self.workers:
            worker.stop(0.5)
        self.console.print(
            f"measured after {self.seconds():.0f} s; {len(self.missing())} of {len(self.cells)} cells not complete"
        )

    def _start(self, number: int, gpu: int) -> Worker:
        return Worker(number, gpu if self.args.device == "cuda" else None, self.args.providers)

    def _drive(self, tasks: deque[Task], what: str, share: float) -> None:
        """Until no task is left or ``share`` of the time is used."""
        spoken = 0.0
        with Progress(console=self.console, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task(what, total=len(self.cells) if what == "measuring" else len(tasks))
            total = len(tasks)
            while self.workers:
                for worker in self.workers:
                    if worker.idle and tasks and self.left(share) > 0:
                        worker.give(tasks.popleft())
                if all(worker.idle for worker in self.workers) and (not tasks or self.left(share) <= 0):
                    return
                if self.left(share) <= 0 and self._out_of_time(what):
                    return
                self._listen(tasks)
                complete = len(self.cells) - len(self.missing()) if what == "measuring" else total - len(tasks)
                progress.update(bar, completed=complete)
                if not self.console.is_terminal and self.seconds() - spoken > 15:
                    spoken = self.seconds()
                    of = len(self.cells) if what == "measuring" else total
                    self.console.print(f"{spoken:.0f} s: {what} {complete}/{of}")

    def _out_of_time(self, what: str) -> bool:
        """Whether to go on: measuring ends at once; of those that compile, the ones that will measure finish their task."""
        if what == "compiling":
            return all(worker.idle for worker in self.workers[: self.gpus])
        for worker in self.workers:
            worker.process.kill()
        return True

    def _listen(self, tasks: deque[Task]) -> None:
        """Take what workers have to say; replace those that died or hang."""
        spoken = wait([worker.pipe for worker in self.workers], timeout=0.5)
        for worker in list(self.workers):
            reason = None
            try:
                while worker.pipe in spoken and worker.pipe.poll():
                    self._hear(worker, *worker.pipe.recv())
            except (EOFError, OSError):
                reason = f"the process ended with exit code {worker.process.exitcode}"
            if reason is None and worker.trying is not None and time.monotonic() - worker.since > HANG_SECONDS:
                reason = f"no result after {HANG_SECONDS} s"
            if reason is not None:
                self._replace(worker, reason, tasks)

    def _hear(self, worker: Worker, kind: str, value: Any) -> None:
        if kind == "ready":
            worker.idle, worker.task, worker.trying = True, None, None
        elif kind == "try":
            worker.trying, worker.since = value, time.monotonic()
        elif kind == "note":
            self.console.print(value)
        else:
            self._write(value)

    def _write(self, row: dict[str, Any]) -> None:
        with open(self.out / ROWS, "a") as file:
            file.write(json.dumps(row) + "\n")
        if "meta" not in row:
            self.done.setdefault(cell_of(row), set()).add(row["provider"])

    def _replace(self, worker: Worker, reason: str, tasks: deque[Task]) -> None:
        """A row for what crashed, for its provider's other cells of this spec too; the rest goes to a new process."""
        worker.process.kill()
        worker.process.join(10)
        self.workers.remove(worker)
        self.crashes += 1
        self.console.print(
            f"worker {worker.number}: {reason}; was at {worker.trying and (str(worker.trying[0]), worker.trying[1])}"
        )
        task = worker.task
        if task is not None and task.compile is None:
            if worker.trying is not None:
                at, name = worker.trying
                for cell in task.cells:
                    if name not in self.done.get(cell, set()):
                        why = reason if cell == at else f"not run: {reason} at {at}"
                        self._write({**vars(cell), "provider": name, "status": "error", "reason": why})
            tasks.appendleft(Task(task.cells, skip={c: set(self.done.get(c, ())) for c in task.cells}))
        if self.crashes <= MAX_CRASHES:
            self.workers.append(self._start(worker.number, worker.gpu or 0))


def finished(rows: Iterable[dict[str, Any]]) -> dict[Cell, set[str]]:
    """Providers that need not be measured again, by cell; errors are tried again."""
    done: dict[Cell, set[str]] = {}
    for row in rows:
        if "meta" not in row and row["status"] != "error":
            done.setdefault(cell_of(row), set()).add(row["provider"])
    return done


def chosen_cells(args: argparse.Namespace, grid: Grid) -> list[Cell]:
    """The grid's cells that ``--specs`` and ``--batch`` leave."""
    specs = [tuple(int(x) for x in spec.split(",")) for spec in args.specs]
    return [
        cell for cell in grid.all_cells() if (not specs or cell.spec in specs) and (not args.batch or cell.batch in args.batch)
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="DIR", help="rows.jsonl is there; also the merged results")
    parser.add_argument("--name", default="attention", help="of the merged files")
    parser.add_argument("--grid", choices=GRIDS, default="full")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="time budget, merging included")
    parser.add_argument("--specs", nargs="+", default=[], metavar="D,G,N", help="only these head dims, groups, window tokens")
    parser.add_argument("--batch", nargs="+", type=int, default=[], help="only these batches")
    parser.add_argument("--compile-workers", type=int, default=max(1, (os.cpu_count() or 1) * 3 // 4), help="processes in all")
    parser.add_argument("--merge", action="store_true", help="measure nothing, only merge")
    args = parser.parse_args(arguments)
    if any(len(spec.split(",")) != 3 or not spec.replace(",", "").isdigit() for spec in args.specs):
        parser.error("--specs takes head_dim,group,tokens, as in 128,4,8")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    grid = GRIDS[args.grid]
    if not args.merge:
        Run(args, grid, chosen_cells(args, grid)).run()
    result = attention_report.merge(attention_report.load(Path(args.out) / ROWS), grid)
    attention_report.write(result, Path(args.out), args.name)
    print(attention_report.summary_text(result))


if __name__ == "__main__":
    main()
