"""Runs: a parameter file's grid through papermill into `results/YYYY-MM-DD/<run>/`.

A run is complete when its `run.json` stands in its folder; it is the last file to be written, into a folder that gets
its name only then. A run whose hash (parameters, weights, prompts, data, code) is complete at any date is not run
again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import queue
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from datetime import date
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from tqdm import tqdm

from upclose import datasets, encode, paths, report
from upclose.params import Job, ParameterError

PACKAGES = ("torch", "torchvision", "open_clip_torch", "pot", "numpy", "pandas", "papermill", "upclose")
LEAST_FREE = 64 * 2**20  # bytes
KERNEL_START = 600  # seconds that a kernel may take to answer on a busy machine


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


# ---------------------------------------------------------------------------------------------- inside a notebook


def record(**facts: Any) -> dict[str, Any]:
    """Facts for `run.json`, from within a notebook; outside a run they are only returned.

    Args:
        facts: `dataset=` and `encoder=` are reduced to names and hashes; everything else must be plain data
    """
    plain = {}
    for name, value in facts.items():
        if isinstance(value, encode.Encoder):
            plain |= {"weights": value.fingerprint, "device": str(value.device), "precision": value.precision}
        elif hasattr(value, "class_names"):
            order = hashlib.sha256("\n".join(value.class_names).encode()).hexdigest()[:16]
            plain |= {f"{name}_fingerprint": value.fingerprint, "class_order": order, "split": value.split}
        else:
            plain[name] = value
    if (folder := paths.run_folder()) is not None:
        file = folder / "facts.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | plain))
    return plain


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
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


@cache
def _weights(backbone: str, pretrained: str) -> str:
    return encode.identity(backbone, pretrained or None)


@cache
def _data(dataset: str, split: str, protocol: str | None) -> str:
    return datasets.load(dataset, split, protocol=protocol).fingerprint


def ingredients(job: Job) -> tuple[dict[str, str], list[str]]:
    """The hashes that name a run, and a sentence for each thing that this machine lacks."""
    values, missing = job.values, []
    hashes = {"code": _code(), "prompts": _prompts(), "notebook": _notebook(job.notebook)}
    backbones = values.get("backbones") or [values[k] for k in ("backbone", "second_backbone") if values.get(k)]
    for name in backbones:
        try:
            hashes[f"weights {name}"] = _weights(name, values.get("pretrained", ""))
        except (ValueError, OSError, RuntimeError) as error:
            missing.append(str(error))
    wanted = {"data": (values.get("dataset"), values.get("split", "test"), values.get("protocol") or None)}
    wanted["training data"] = (values.get("train_dataset"), "train", None)
    for what, (dataset, split, protocol) in wanted.items():
        if dataset:
            try:
                hashes[what] = _data(dataset, split, protocol)
            except (ValueError, OSError, RuntimeError) as error:
                missing.append(str(error))
    return hashes, missing


def plan(jobs: Iterable[Job], root: Path | None = None, force: bool = False) -> list[Plan]:
    """What would be run, what is complete, and what is missing.

    Args:
        jobs: of one or several parameter files
        root: of the results
        force: do not look for earlier runs
    """
    root = root or paths.results()
    plans = []
    for job in jobs:
        hashes, missing = ingredients(job)
        facts = json.dumps([job.values, hashes], sort_keys=True, default=str)
        digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
        found = [] if force else sorted(root.glob(f"*/{job.name}-{digest}/run.json"))
        plans.append(Plan(job, digest, hashes, found[-1].parent if found else None, "; ".join(missing)))
    return plans


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


def _execute(item: Plan, day: Path, ticks: Any = None) -> Outcome:
    """Run one notebook in this process; its kernel is this process's only child."""
    import papermill
    from papermill.engines import NBClientEngine, papermill_engines

    class Ticking(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, manager, *args, **kwargs):
            done = manager.cell_complete

            def complete(cell, *a, **k):
                if ticks is not None:
                    ticks.put(1)
                return done(cell, *a, **k)

            manager.cell_complete = complete
            return super().execute_managed_notebook(manager, *args, **kwargs)

    papermill_engines.register("ticking", Ticking)
    job, name = item.job, f"{item.job.name}-{item.hash}"
    partial = day / f".partial-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "params.yaml").write_text(yaml.safe_dump(job.values, sort_keys=False))
    os.environ["UPCLOSE_RUN"] = str(partial)
    log = partial / "kernel.log"
    with log.open("w") as file:  # what the kernel says beside the notebook
        os.dup2(file.fileno(), 2)
    start = time.time()
    try:
        papermill.execute_notebook(
            str(job.notebook),
            str(partial / "notebook.ipynb"),
            parameters=job.values,
            engine_name="ticking",
            kernel_name="python3",
            progress_bar=False,
            log_output=False,
            start_timeout=KERNEL_START,
            cwd=str(job.notebook.parent),
        )
    except papermill.PapermillExecutionError as error:
        why = f"cell {error.exec_count} raised {error.ename}: {error.evalue}; see {partial / 'notebook.ipynb'}"
        return Outcome(job, "failed", partial, time.time() - start, why)
    except RuntimeError as error:  # of nbclient: the kernel died, as when memory is short, or never answered
        return Outcome(job, "failed", partial, time.time() - start, f"{error}; see {log}")
    seconds = time.time() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
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
        "peak_memory_bytes": peak,
    }
    facts.unlink(missing_ok=True)
    log.unlink()
    with (partial / "run.json").open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    final = day / name
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return Outcome(job, "done", final, seconds)


def _cells(job: Job) -> int:
    return len(json.loads(job.notebook.read_text())["cells"])


def _locally(todo: list[Plan], day: Path, workers: int) -> Iterator[Outcome]:
    """Each job in a fresh process, `workers` at a time that share the cores, with one bar over all cells."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Manager() as manager,
        tqdm(total=sum(_cells(p.job) for p in todo), unit="cell", disable=not todo) as bar,
    ):
        ticks = manager.Queue()
        threads = max(1, (os.cpu_count() or 1) // workers)
        pool = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_limit_threads, initargs=(threads,), max_tasks_per_child=1
        )
        try:
            waiting = {pool.submit(_execute, item, day, ticks): item for item in todo}
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
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _limit_threads(threads: int) -> None:
    """What the kernels of this process inherit and `run.json` states, unless the caller has set it."""
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)  # torch was imported before and has read the variable already


def _on_ray(todo: list[Plan], day: Path, address: str) -> Iterator[Outcome]:
    """Each job as a task of an existing Ray cluster that shares the results folder."""
    try:
        import ray
    except ImportError:
        raise ParameterError("--ray needs the extra: pip install 'upclose[cluster]'") from None
    ray.init(address=None if address == "local" else address, log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_gpus=gpus, max_calls=1)(_execute)
    waiting = [task.remote(item, day) for item in todo]
    with tqdm(total=len(waiting), unit="run") as bar:
        while waiting:
            done, waiting = ray.wait(waiting)
            bar.update()
            yield ray.get(done[0])
    ray.shutdown()


def execute(plans: list[Plan], root: Path | None = None, workers: int = 1, ray: str | None = None) -> list[Outcome]:
    """Run what is not complete, and write the page of the day.

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
    root = root or paths.results()
    if lacking := [item for item in plans if item.missing and item.complete is None]:
        more = f" ({len(lacking)} of {len(plans)} runs lack something)" if len(lacking) > 1 else ""
        raise ParameterError(f"{lacking[0].job.name}: {lacking[0].missing}{more}")
    _check_root(root)
    day = root / date.today().isoformat()
    todo = [item for item in plans if item.complete is None]
    outcomes = {item.job.name: Outcome(item.job, "complete", item.complete) for item in plans if item.complete}
    if todo:
        day.mkdir(exist_ok=True)
        for outcome in _on_ray(todo, day, ray) if ray else _locally(todo, day, workers):
            outcomes[outcome.job.name] = outcome
        report.write(day)
    return [outcomes[item.job.name] for item in plans]


def summary(outcomes: list[Outcome]) -> pd.DataFrame:
    """A line a run: status, seconds, rows of metrics and where it is."""
    rows = []
    for outcome in outcomes:
        metrics = outcome.folder / "metrics.csv"
        rows.append(
            {
                "run": outcome.job.name,
                "status": outcome.status,
                "seconds": f"{outcome.seconds:.0f}" if outcome.seconds else "",
                "metrics": len(pd.read_csv(metrics)) if metrics.exists() else 0,
                "folder": os.path.relpath(outcome.folder),
            }
        )
    return pd.DataFrame(rows)
