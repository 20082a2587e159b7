"""Runs: a parameter file's grid through papermill into `results/YYYY-MM-DD/<run>/`.

A run is complete when its `run.json` stands in its folder. It is the last file to be written, into a folder that gets
its name only then, and it lists the other files with their checksums. One process at a time works on a run. A run whose
hash (parameters, weights, prompts, data, code) is complete at any date is not run again.
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
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import date
from functools import cache
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import psutil
import torch
import yaml
from filelock import FileLock
from tqdm import tqdm

from upclose import datasets, encode, paths, prompts, report
from upclose.params import Job, ParameterError, notebook_cells

PACKAGES = ("torch", "torchvision", "open_clip_torch", "pot", "numpy", "pandas", "papermill", "upclose")
LEAST_FREE = 64 * 2**20  # bytes
KERNEL_START = 600  # seconds that a kernel may take to answer on a busy machine
GRACE = 10  # seconds that an interrupted run may take to end by itself


class Outcome(NamedTuple):
    """What became of a job: "done", "complete" (an earlier run stands) or "failed"; where it is; seconds; the error."""

    job: Job
    status: str
    folder: Path
    seconds: float = 0.0
    error: str = ""


class Plan(NamedTuple):
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


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for file in sorted(paths.PACKAGE.rglob("*.py")):
        digest.update(file.relative_to(paths.PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


@cache
def _prompts() -> str:
    digest = hashlib.sha256()
    shipped = [*paths.PACKAGE.rglob("prompts/*.json"), *(paths.PUBLISHED / f for f in ("templates.json", "words.txt"))]
    for file in sorted([*shipped, *(paths.cache() / "prompts").rglob("*.json")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _notebook(path: Path) -> str:
    code = ["".join(cell["source"]) for cell in notebook_cells(path) if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


@cache
def _weights(backbone: str, pretrained: str) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*has random weights")
        try:
            return encode.identity(backbone, pretrained or None)
        except UserWarning as warning:
            raise ValueError(str(warning)) from None


@cache
def _data(dataset: str, split: str, protocol: str | None) -> str:
    return datasets.load(dataset, split, protocol=protocol).fingerprint


@cache
def _sentences(file: str) -> str:
    prompts.read(file)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@cache
def _arithmetic(device: str, precision: str) -> None:
    encode.load("birdlets-tiny", None, device, precision)


def ingredients(job: Job, here: bool = True) -> tuple[dict[str, str], list[str]]:
    """The hashes that name a run, and a sentence for each thing that is missing.

    Args:
        job: its values
        here: it would run on this machine, which must have the device then
    """
    values, missing = job.values, []
    hashes = {"code": _code(), "prompts": _prompts(), "notebook": _notebook(job.notebook)}

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            missing.append(str(error))

    weights = {name: values.get("pretrained", "") for name in values.get("backbones") or [values.get("backbone")]}
    weights |= {values.get("second_backbone"): ""}  # no notebook gives it a tag
    for name, pretrained in weights.items():
        if name:
            with noted():
                hashes[f"weights {name}"] = _weights(name, pretrained)
    data = {"data": (values.get("dataset"), values.get("split", "test"), values.get("protocol") or None)}
    data["training data"] = (values.get("train_dataset"), "train", None)
    for what, (dataset, split, protocol) in data.items():
        if dataset:
            with noted():
                hashes[what] = _data(dataset, split, protocol)
    for what in ("description_file", "sentence_file"):
        if values.get(what):
            with noted():
                hashes[what] = _sentences(values[what])
    if here and "device" in values:
        with noted():
            _arithmetic(values["device"], values.get("precision", "fp32"))
    return hashes, missing


def plan(jobs: Iterable[Job], root: Path | None = None, force: bool = False, here: bool = True) -> list[Plan]:
    """What would be run, what is complete, and what is missing; two jobs that are the same run are one.

    Args:
        jobs: of one or several parameter files
        root: of the results
        force: do not look for earlier runs
        here: they would run on this machine, not on a cluster
    """
    root = root or paths.results()
    plans = {}
    for job in jobs:
        hashes, missing = ingredients(job, here)
        facts = json.dumps([job.values, hashes], sort_keys=True, default=str)
        digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
        found = None if force else _complete(root, f"{job.name}-{digest}")
        if found and (why := paths.damage(found)):
            missing, found = [f"the complete run {found} is damaged ({why}): --force runs it again"], None
        item = Plan(job, digest, hashes, found, "; ".join(missing), force)
        plans.setdefault(item.run, item)
    return list(plans.values())


def _complete(root: Path, run: str) -> Path | None:
    """The last complete folder of a run, at any date."""
    found = sorted(file for file in root.glob(f"*/{run}/run.json") if file.is_file())
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


def _partial(item: Plan, day: Path) -> Path:
    return day / f".partial-{item.run}.{uuid.uuid4().hex[:8]}"


def _execute(item: Plan, partial: Path, ticks: Any = None) -> Outcome:
    """Run one notebook in this process; whatever goes wrong is that run's failure alone.

    A process that runs the same run is waited for; what it has completed is not run again.
    """
    start, root = time.time(), partial.parent.parent
    try:
        lock = root / ".locks" / f"{item.run}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            if not item.forced and (found := _complete(root, item.run)) and not paths.damage(found):
                return Outcome(item.job, "complete", found)
            for left in root.glob(f"*/.partial-{item.run}.*"):  # of processes that have ended: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            folder = _run_notebook(item, partial, ticks)
    except Exception as error:
        return Outcome(item.job, "failed", partial, time.time() - start, _why(error, partial))
    return Outcome(item.job, "done", folder, time.time() - start)


def _why(error: Exception, partial: Path) -> str:
    import papermill

    if isinstance(error, papermill.PapermillExecutionError):
        return f"cell {error.exec_count} raised {error.ename}: {error.evalue}; see {partial / 'notebook.ipynb'}"
    return f"{type(error).__name__}: {error}; see {partial}"


def _run_notebook(item: Plan, partial: Path, ticks: Any) -> Path:
    """Run one notebook, whose kernel is this process's only child, and return its complete folder."""
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines

    class Ticking(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, manager, *args, **kwargs):
            done = manager.cell_complete

            def complete(cell, *a, **k):
                peaks.append(_peak_of_children())
                if ticks is not None:
                    ticks.put(1)
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
    start = time.time()
    papermill.execute_notebook(
        str(job.notebook),
        str(partial / "notebook.ipynb"),
        parameters=job.values,
        engine_name="ticking",
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
        start_timeout=KERNEL_START,
        cwd=os.getcwd(),  # a path among the parameters is read from where the caller stands
    )
    seconds = time.time() - start
    facts = partial / "facts.json"
    content = {
        "notebook": os.path.relpath(job.notebook, paths.NOTEBOOKS),
        "hash": item.hash,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": {package: metadata.version(package) for package in PACKAGES},
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "hashes": item.hashes,
        "seeds": {key: value for key, value in job.values.items() if "seed" in key},
        **(json.loads(facts.read_text()) if facts.exists() else {}),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": max(peaks),
    }
    facts.unlink(missing_ok=True)
    log.unlink()
    content["files"] = paths.checksums(partial)
    paths.write(partial / "run.json", paths.seal(content))
    final, before = partial.with_name(item.run), partial.with_name(partial.name.replace("partial", "before", 1))
    if final.exists():  # an earlier run of a forced one goes when the new one stands
        final.rename(before)
    partial.rename(final)
    shutil.rmtree(before, ignore_errors=True)
    return final


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


def _locally(todo: list[Plan], day: Path, workers: int) -> Iterator[tuple[Plan, Outcome]]:
    """Each job in a process of its own, `workers` at a time that share the cores, with one bar over all cells."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    running: list[multiprocessing.process.BaseProcess] = []

    def apart(item: Plan, ticks: Any) -> Outcome:
        receive, send = context.Pipe(duplex=False)
        partial = _partial(item, day)
        process = context.Process(target=_child, args=(item, partial, ticks, threads, send))
        process.start()
        running.append(process)
        send.close()
        try:
            return receive.recv()
        except EOFError:
            why = f"its process was killed, as when memory is short; see {partial}"
            return Outcome(item.job, "failed", partial, error=why)
        finally:
            process.join()
            running.remove(process)

    with (
        context.Manager() as manager,
        tqdm(total=sum(_cells(p.job) for p in todo), unit="cell", disable=not todo) as bar,
    ):
        ticks = manager.Queue()
        pool = ThreadPoolExecutor(workers)
        try:
            waiting = {pool.submit(apart, item, ticks): item for item in todo}
            while waiting:
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                while True:
                    try:
                        bar.update(ticks.get_nowait())
                    except queue.Empty:
                        break
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


def _child(item: Plan, partial: Path, ticks: Any, threads: int, send: Connection) -> None:
    """Run one notebook whose kernel has so many threads, unless the caller has set them; `run.json` states them."""
    signal.signal(signal.SIGTERM, lambda *_: _end())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)  # torch was imported before and has read the variable already
    send.send(_execute(item, partial, ticks))


def _end_with_parent() -> None:
    """However the caller ends, what it has started ends with it."""
    multiprocessing.parent_process().join()
    _end()


def _end() -> None:
    for kernel in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            kernel.kill()
    os._exit(1)


def _on_ray(todo: list[Plan], day: Path, address: str) -> Iterator[tuple[Plan, Outcome]]:
    """Each job as a task of an existing Ray cluster that shares the results folder."""
    try:
        import ray
    except ImportError:
        raise ParameterError("--ray needs the extra: pip install 'upclose[cluster]'") from None
    ray.init(address=None if address == "local" else address, log_to_driver=False)
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


def execute(plans: list[Plan], root: Path | None = None, workers: int = 1, ray: str | None = None) -> list[Outcome]:
    """Run what is not complete, and write the pages of the days, also when interrupted.

    Args:
        plans: see `plan`
        root: of the results
        workers: notebooks at a time on this machine
        ray: the address of a Ray cluster, "auto", or "local"

    Returns:
        An outcome a plan, in their order

    Raises:
        ParameterError: something that a job needs is missing, or the results cannot be written; nothing has been run
    """
    root = (root or paths.results()).absolute()
    if lacking := [item for item in plans if item.missing and item.complete is None]:
        more = f" ({len(lacking)} of {len(plans)} runs lack something)" if len(lacking) > 1 else ""
        raise ParameterError(f"{lacking[0].job.name}: {lacking[0].missing}{more}")
    _check_root(root)
    day = root / date.today().isoformat()
    todo = [item for item in plans if item.complete is None]
    outcomes = {item.run: Outcome(item.job, "complete", item.complete) for item in plans if item.complete}
    try:
        if todo:
            for item, outcome in _on_ray(todo, day, ray) if ray else _locally(todo, day, workers):
                outcomes[item.run] = outcome
    finally:
        report.refresh(root)
    return [outcomes[item.run] for item in plans]


def summary(outcomes: list[Outcome]) -> pd.DataFrame:
    """A line a run: status, seconds, rows of metrics, verdicts of its claims and where it is."""
    rows = []
    for outcome in outcomes:
        metrics = outcome.folder / "metrics.csv"
        rows.append(
            {
                "run": outcome.job.name,
                "status": outcome.status,
                "seconds": f"{outcome.seconds:.0f}" if outcome.seconds else "",
                "metrics": len(pd.read_csv(metrics)) if metrics.exists() else 0,
                **report.verdicts(outcome.folder),
                "folder": os.path.relpath(outcome.folder),
            }
        )
    return pd.DataFrame(rows)
