"""Killed builds and runs: nothing half-written is read, no process is left, the next call ends with the same bytes."""

import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

from bank_world import contents
from tally import Tally
from test_bank_faults import build, kill_until_finished, one_thread, undisturbed  # noqa: F401
from upclose import cli, paths

BUILDS, RUNS = 200, 50  # kills of each
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MARK = "UPCLOSE_CAMPAIGN"  # in the environment of a call and of all that it starts
PATIENCE = 240  # seconds that a call may take to end on a busy machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes in /proc"),
]


def test_killed_builds(tmp_path, undisturbed):  # noqa: F811
    tally, trial = Tally("killed builds"), 0
    while (left := BUILDS - tally.detected) > 0:
        root = tmp_path / str(trial)
        delays = np.random.default_rng(trial).uniform(0, 0.15, min(5, left))
        numbers = [SIGNALS[(trial + k) % 3] for k in range(len(delays))]
        killed = kill_until_finished(root, undisturbed, delays, numbers)
        same = contents(Path(build(root).folder.path)) == undisturbed
        for _ in range(killed):
            tally.add((trial, delays), "detected" if same else "the next build has other bytes")
        trial += 1
        assert trial < 5 * BUILDS  # on an idle machine most builds end before they are killed
    tally.close(BUILDS)


# -------------------------------------------------------------------------------------------------------------- runs

CELLS = [  # they import nothing large, so that a call is short
    "import os, pathlib, time\nfolder = pathlib.Path(os.environ['UPCLOSE_RUN'])\ntime.sleep(0.3)",
    "(folder / 'metrics.csv').write_text(f'dataset,n,value\\n{dataset},{images},50.0\\n')",
    "time.sleep(0.3)\nprint(images)",
]


@pytest.fixture
def sheet(tmp_path, monkeypatch):
    """The parameter file of a small notebook."""
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    first = nbformat.v4.new_code_cell(
        'dataset: str = "birdlets"  # which\nimages: int = 20  # how many\n', metadata={"tags": ["parameters"]}
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    cells = [first, *map(nbformat.v4.new_code_cell, CELLS)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "small.ipynb")
    file = tmp_path / "small.yaml"
    file.write_text("notebook: small\n")
    return file


def call(file, root):
    """`upclose run` in a process that is forked from this one, where torch has been imported; its number."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setsid()
        os.environ[MARK] = str(os.getpid())
        with root.with_suffix(".log").open("a") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = cli.main(["run", str(file), "--results", str(root)])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """The exit code of a call, None when it has not come to its end in time."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def started_by(pid):
    """The living processes of a call, by what they are: the caller itself, its workers, their kernels."""
    found = {"caller": [], "worker": [], "kernel": []}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.pid == pid or process.environ().get(MARK) == str(pid)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                line = " ".join(process.cmdline())
                kind = "kernel" if "ipykernel" in line else "caller" if process.pid == pid else "worker"
                found[kind].append(process)
    return {kind: processes for kind, processes in found.items() if processes}


def all_gone(pid):
    deadline = time.monotonic() + PATIENCE / 4
    while (left := started_by(pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not left


def complete(root):
    """What does not differ from call to call of the complete runs, and what is wrong with them."""
    found, wrong = {}, ""
    for file in root.glob("*/[!.]*/run.json"):
        wrong = wrong or paths.damage(file.parent)
        found[file.parent.name] = {
            "files": sorted(json.loads(file.read_text())["files"]),
            **{name: (file.parent / name).read_bytes() for name in ("metrics.csv", "params.yaml")},
        }
    return found, wrong


def kill_one(file, root, delay, number, draw):
    """Start a call, send a signal to one of its processes after `delay` seconds; what became of it, "" for too late."""
    pid = call(file, root)
    time.sleep(delay)
    there = started_by(pid)
    kind = draw.choice(sorted(there)) if there else None
    with suppress(psutil.NoSuchProcess):
        if kind:
            draw.choice(there[kind]).send_signal(number)
    code = ended(pid)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        return f"{kind} {number.name} at {delay:.1f} s: the call has not ended"
    if not all_gone(pid):
        return f"{kind} {number.name} at {delay:.1f} s: it has left {started_by(pid)}"
    if wrong := complete(root)[1]:
        return f"{kind} {number.name} at {delay:.1f} s: {wrong}"
    if "Traceback" in (said := root.with_suffix(".log").read_text()):
        return f"{kind} {number.name} at {delay:.1f} s: {said[-1000:]}"
    return "detected" if code != 0 else "harmless" if kind else ""


def test_killed_runs(sheet, tmp_path):
    tally, trial, draw = Tally("killed runs"), 0, random.Random(0)
    code, seconds = timed(sheet, tmp_path / "undisturbed")
    alone, _ = complete(tmp_path / "undisturbed")
    assert (code, len(alone)) == (0, 1)
    left = RUNS
    while left > 0:
        root, outcomes = tmp_path / str(trial), []
        while len(outcomes) < min(5, left) and not complete(root)[0]:
            delay = draw.uniform(0, seconds)
            if outcome := kill_one(sheet, root, delay, SIGNALS[draw.randrange(3)], draw):
                outcomes.append(outcome)
            else:  # it had ended by then
                seconds = delay
        is_new = not complete(root)[0]
        code, took = timed(sheet, root)
        seconds = took if is_new else seconds  # the machine may be busier, or idler, than it was
        same = code == 0 and complete(root) == (alone, "") and not list(root.glob("*/.partial-*"))
        for outcome in outcomes:
            left -= 1
            after = "" if same else f"the next call: {code}, {complete(root)}, {list(root.glob('*/.*'))}"
            tally.add((trial, outcome), f"{outcome}; {after}" if after else outcome)
            print(f"{RUNS - left}: {outcome} {after}", flush=True)
        trial += 1
        assert trial < 5 * RUNS
    tally.close(RUNS)


def timed(file, root):
    """The exit code of a call and its seconds."""
    start = time.monotonic()
    return ended(call(file, root)), time.monotonic() - start
