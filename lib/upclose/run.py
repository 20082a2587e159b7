"""Runs: a parameter file's grid through papermill into `results/YYYY-MM-DD/<run>/`.

A run is complete when its `run.json` stands in its folder. It is the last file to be written, into a folder that gets
its name only then, and it lists the other files with their checksums. One process at a time works on a run. A run whose
hash (parameters, notebook, imported code, sentences, weights, data) is complete at any date is not run again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import psutil
import torch
import yaml
from filelock import FileLock
from tqdm import tqdm

from upclose import identity, paths, report
from upclose.bank import cluster
from upclose.params import Job, ParameterError, notebook_cells

PACKAGES = ("torch", "torchvision", "open_clip_torch", "pot", "numpy", "pandas", "papermill", "upclose")
LEAST_FREE = 64 * 2**20  # bytes
KERNEL_START = 600  # seconds that a kernel may take to answer on a busy machine
LONGEST_TEMPORARY = 60  # characters of the temporary folder's path: a socket in it may have 107
TICK = "a cell is done"
GRACE = 10  # seconds that an interrupted run may take to end by itself


class Outcome(NamedTuple):
    """What became of a job: "done", "complete" (an earlier run stands) or "failed"; where it is; seconds; the error."""

    job: Job
    status: str
    folder: Path
    seconds: float = 0.0
    error: str = ""


class Item(NamedTuple):
    """A job and what is known before it starts: its hash and what went in, an earlier complete run, what is missing."""

    job: Job
    hash: str
    hashes: dict[str, str]
    complete: Path | None
    missing: str
    forced: bool = False

    @property
    def run(self) -> str:
        """The name of its folder."""
        return f"{self.job.name}-{self.hash}"


# ------------------------------------------------------------------------------------------------ before a run


def prepare(jobs: Iterable[Job], root: Path | None = None, force: bool = False, here: bool = True) -> list[Item]:
    """What would be run, what is complete, and what is missing; two jobs that are the same run are one.

    Args:
        jobs: of one or several parameter files
        root: of the results
        force: do not look for earlier runs
        here: they would run on this machine, not on a cluster
    """
    root = root or paths.results()
    items = {}
    for job in jobs:
        hashes, missing = identity.ingredients(job, here)
        facts = json.dumps([job.values, hashes], sort_keys=True, default=str)
        digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
        found = None if force else _complete(root, digest)
        if found and (why := paths.damage(found)):
            missing, found = [f"the complete run {found} is damaged ({why}): --force runs it again"], None
        item = Item(job, digest, hashes, found, "; ".join(missing), force)
        items.setdefault(item.run, item)
    return list(items.values())


def _complete(root: Path, digest: str) -> Path | None:
    """The last complete folder of a run, at any date and by any name: a sweep names its runs by what it sweeps."""
    found = sorted(file for file in root.glob(f"*/*-{digest}/run.json") if file.is_file())
    return found[-1].parent if found else None


def _check_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ParameterError(
            f"cannot write results to {root}: {error.strerror}; set UPCLOSE_RESULTS to another folder"
        ) from None
    if (free := shutil.disk_usage(root).free) < LEAST_FREE:
        raise ParameterError(f"only {free / 2**20:.0f} MiB are free at {root}; a run needs {LEAST_FREE >> 20}")


# --------------------------------------------------------------------------------------------------------- a run


def _git(*command: str) -> str:
    done = subprocess.run(["git", "-C", str(paths.ROOT), *command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _partial(item: Item, day: Path) -> Path:
    return day / f".partial-{item.run}.{uuid.uuid4().hex[:8]}"


def _execute(item: Item, partial: Path, tick: Callable[[], object] = lambda: None) -> Outcome:
    """Run one notebook in this process; whatever goes wrong is that run's failure alone.

    A process that runs the same run is waited for; what it has completed is not run again.
    """
    start, root = time.monotonic(), partial.parent.parent
    try:
        lock = root / ".locks" / f"{item.hash}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, mode=paths.mode()):
            if not item.forced and (found := _complete(root, item.hash)) and not paths.damage(found):
                return Outcome(item.job, "complete", found)
            for left in root.glob(f"*/.partial-*-{item.hash}.*"):  # of processes that have ended: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            folder = _seal(item, partial, *_run_notebook(item, partial, tick))
    except Exception as error:
        return Outcome(item.job, "failed", partial, time.monotonic() - start, _why(error, partial))
    return Outcome(item.job, "done", folder, time.monotonic() - start)


def _why(error: Exception, partial: Path) -> str:
    import papermill

    if isinstance(error, papermill.PapermillExecutionError):
        return f"cell {error.exec_count} raised {error.ename}: {error.evalue}; see {partial / 'notebook.ipynb'}"
    if not partial.is_dir():
        return f"its folder {partial} is gone, somebody removed it while it ran ({type(error).__name__})"
    return f"{type(error).__name__}: {error}; see {partial}"


def _run_notebook(item: Item, partial: Path, tick: Callable[[], object]) -> tuple[float, int]:
    """Run one notebook, whose kernel is this process's only child; seconds, and bytes that it held at most."""
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines

    class Ticking(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, manager, *args, **kwargs):
            done = manager.cell_complete

            def complete(cell, *a, **k):
                peaks.append(_peak_of_children())
                tick()
                return done(cell, *a, **k)

            manager.cell_complete = complete
            return super().execute_managed_notebook(manager, *args, **kwargs)

    peaks: list[int] = []
    papermill_engines.register("ticking", Ticking)
    job = item.job
    partial.mkdir(parents=True)
    (partial / "params.yaml").write_text(yaml.safe_dump(job.values, sort_keys=False))
    os.environ["UPCLOSE_RUN"] = str(partial)
    log = partial / "kernel.log"
    with log.open("w") as file:  # what the kernel says beside the notebook
        os.dup2(file.fileno(), 2)
    start = time.monotonic()
    papermill.execute_notebook(
        _literal(job.notebook),
        _literal(partial / "notebook.ipynb"),
        parameters=job.values,
        engine_name="ticking",
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
        start_timeout=KERNEL_START,
        cwd=os.getcwd(),  # a path among the parameters is read from where the caller stands
    )
    log.unlink()
    return time.monotonic() - start, max(peaks)


def _seal(item: Item, partial: Path, seconds: float, peak: int) -> Path:
    """Write `run.json` and give the folder its name: the run is complete."""
    job, facts = item.job, partial / "facts.json"
    content = {
        "notebook": os.path.relpath(job.notebook, paths.NOTEBOOKS),
        "hash": item.hash,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")),
        "python": platform.python_version(),
        "packages": {package: metadata.version(package) for package in PACKAGES},
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "hashes": item.hashes,
        "seeds": {key: value for key, value in job.values.items() if "seed" in key},
        **(json.loads(facts.read_text()) if facts.exists() else {}),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak,
    }
    facts.unlink(missing_ok=True)
    content["files"] = paths.checksums(partial)
    paths.write(partial / "run.json", paths.seal(content))
    final, before = partial.with_name(item.run), partial.with_name(partial.name.replace("partial", "before", 1))
    if os.path.lexists(final):  # an earlier run of a forced one goes when the new one stands
        final.rename(before)
    partial.rename(final)
    if before.is_symlink():
        before.unlink()
    shutil.rmtree(before, ignore_errors=True)
    return final


def _literal(path: Path) -> str:
    """A path that papermill does not take for a format."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _peak_of_children() -> int:
    """Bytes that a child of this process has held at most.

    `ru_maxrss` cannot tell on Linux: it begins at what the process held that started the child.
    """
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peaks = [0]
    for child in psutil.Process().children():
        with suppress(OSError):  # it has just ended
            said = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
            peaks.append(1024 * int(said[1]) if said else 0)
    return max(peaks)


def _cells(job: Job) -> int:
    return len(notebook_cells(job.notebook))


def _locally(todo: list[Item], day: Path, places: Sequence[str]) -> Iterator[tuple[Item, Outcome]]:
    """Each job in a process of its own, one at a time on each place; they share the cores, and one bar over all cells.

    A place is the GPU that its process sees, "" for all that there are.
    """
    multiprocessing.set_forkserver_preload(["upclose.run", "papermill"])  # once, not in each process: seconds
    long = len(tempfile.gettempdir()) > LONGEST_TEMPORARY
    context = multiprocessing.get_context("spawn" if long else "forkserver")
    threads = max(1, (os.cpu_count() or 1) // len(places))
    running: list[multiprocessing.process.BaseProcess] = []

    def apart(item: Item) -> Outcome:
        place = free.get()
        try:
            return begun(item, place)
        finally:
            free.put(place)

    def begun(item: Item, place: str) -> Outcome:
        receive, send = context.Pipe(duplex=False)
        partial = _partial(item, day)
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": place} if place else {})}
        process = context.Process(target=_child, args=(item, partial, threads, environment, send))
        process.start()
        running.append(process)
        send.close()
        try:
            while (said := receive.recv()) == TICK:
                ticks.put(said)
            return said
        except EOFError:
            why = f"its process was killed, as when memory is short; see {partial}"
            return Outcome(item.job, "failed", partial, error=why)
        finally:
            process.join()
            running.remove(process)

    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for place in places:
        free.put(place)
    ticks: queue.SimpleQueue[str] = queue.SimpleQueue()
    with tqdm(total=sum(_cells(p.job) for p in todo), unit="cell", disable=not todo) as bar:
        hold = (signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C waits for a child that still imports: see `_child`
        pool = ThreadPoolExecutor(len(places), initializer=signal.pthread_sigmask, initargs=hold)
        try:
            waiting = {pool.submit(apart, item): item for item in todo}
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for _ in range(ticks.qsize()):
                    ticks.get()
                    bar.update()
                for future in done:
                    item = waiting.pop(future)
                    bar.set_postfix_str(item.job.name)
                    yield item, future.result()
        finally:  # when interrupted, those that do not end by themselves are ended, and their kernels with them
            pool.shutdown(wait=False, cancel_futures=True)
            stop = time.monotonic() + GRACE
            while not all(future.done() for future in waiting):
                for process in list(running) if time.monotonic() > stop else ():
                    process.terminate()
                time.sleep(0.1)


def _child(item: Item, partial: Path, threads: int, environment: dict[str, str], send: Connection) -> None:
    """Run one notebook whose kernel has so many threads, unless the caller has set them; `run.json` states them."""
    os.environ.clear()  # it is that of the first run of the caller's process
    os.environ.update(environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)  # torch was imported before and has read the variable already
    send.send(_execute(item, partial, lambda: send.send(TICK)))


def _end_with_parent() -> None:
    """However the caller ends, what it has started ends with it."""
    multiprocessing.parent_process().join()
    _end()


def _end() -> None:
    for kernel in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            kernel.kill()
    os._exit(1)


def _on_ray(todo: list[Item], day: Path, address: str) -> Iterator[tuple[Item, Outcome]]:
    """Each job as a task of an existing Ray cluster that shares the results folder."""
    ray = cluster.connect(address)
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        task = ray.remote(num_gpus=gpus, max_calls=1)(_execute)
        partial = {item.run: _partial(item, day) for item in todo}
        waiting = {task.remote(item, partial[item.run]): item for item in todo}
        with tqdm(total=len(waiting), unit="run") as bar:
            while waiting:
                (done,), _ = ray.wait(list(waiting))
                item = waiting.pop(done)
                bar.update()
                try:
                    yield item, ray.get(done)
                except ray.exceptions.RayError as error:  # its node or its process is gone
                    yield item, Outcome(item.job, "failed", partial[item.run], error=str(error))
    finally:
        ray.shutdown()


def execute(
    items: list[Item],
    root: Path | None = None,
    workers: int = 1,
    ray: str | None = None,
    gpus: Sequence[str] = (),
) -> list[Outcome]:
    """Run what is not complete, and write the pages of the days, also when interrupted.

    Args:
        items: see `prepare`
        root: of the results
        workers: notebooks at a time on this machine
        ray: the address of a Ray cluster, "auto", or "local"
        gpus: of this machine, as `devices.gpus` names them; a notebook at a time on each, instead of `workers`

    Returns:
        An outcome an item, in their order

    Raises:
        ParameterError: something that a job needs is missing, papermill is, or the results cannot be written; nothing
            has been run
    """
    if find_spec("papermill") is None:
        raise ParameterError("running notebooks needs the extra: pip install 'upclose[notebooks]'")
    root = (root or paths.results()).absolute()
    if lacking := [item for item in items if item.missing and item.complete is None]:
        more = f" ({len(lacking)} of {len(items)} runs lack something)" if len(lacking) > 1 else ""
        raise ParameterError(f"{lacking[0].job.name}: {lacking[0].missing}{more}")
    _check_root(root)
    day = root / date.today().isoformat()
    todo = [item for item in items if item.complete is None]
    outcomes = {item.run: Outcome(item.job, "complete", item.complete) for item in items if item.complete}
    try:
        if todo:
            for item, outcome in _on_ray(todo, day, ray) if ray else _locally(todo, day, gpus or [""] * workers):
                outcomes[item.run] = outcome
    finally:
        report.refresh(root)
    return [outcomes[item.run] for item in items]


def summary(outcomes: list[Outcome]) -> pd.DataFrame:
    """A line a run: status, seconds, rows of metrics, verdicts of its claims and where it is."""
    rows = []
    for outcome in outcomes:
        metrics, status = outcome.folder / "metrics.csv", outcome.status
        try:
            measured = {"metrics": len(pd.read_csv(metrics)) if metrics.exists() else 0}
            measured |= report.verdicts(outcome.folder)
        except (OSError, ValueError, KeyError) as error:  # of an old run that lists no checksums
            status, measured = f"{status}, damaged: {error}", {}
        seconds = f"{outcome.seconds:.0f}" if outcome.seconds else ""
        where = os.path.relpath(outcome.folder)
        rows.append({"run": outcome.job.name, "status": status, "seconds": seconds, **measured, "folder": where})
    return pd.DataFrame(rows)
