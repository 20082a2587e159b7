"""Shards spread over a Ray cluster: an actor holds the encoder, a shard is one task, a lost one is done again.

Where pictures lie in tars an actor goes through one tar after the other; with none left it helps with the longest.
"""

from __future__ import annotations

import os
import re
import socket
from collections import Counter, deque
from collections.abc import Callable
from types import ModuleType

import torch

from upclose.bank import shards
from upclose.bank import store as stores
from upclose.bank.store import BankError, Store

SECONDS = 5  # that a cluster may take to answer
ATTEMPTS = 4  # at one shard, or to start actors before any of them works


def spread(
    work: shards.Work,
    address: str,
    workers: int | None,
    gpus: float,
    todo: list[tuple[int, int]],
    advance: Callable[[int], object],
) -> list[dict]:
    """Encode and write shards on a cluster.

    Every actor computes with as many threads as the driver does, so that the bytes are those of a local build. The
    encoder travels in main memory; an actor that has a GPU moves it there.

    Args:
        work: what to encode; every machine of the cluster must see its folder
        address: of the cluster ("auto", "ray://host:10001", "host:6379"); unused when Ray is connected already
        workers: actors, None for as many as the cluster holds
        gpus: share of a GPU an actor asks for
        todo: (start, stop) of each shard
        advance: called with the number of images that each shard adds

    Returns:
        an entry a shard, in the order in which they were finished

    Raises:
        ImportError: Ray is not installed
        ValueError: no machine of the cluster has what an actor asks for, or the encoder is on a GPU and gpus is 0
        ConnectionError: there is no cluster at the address
        BankError: workers are lost again and again, do not write to the same root as this process reads, or Ray fails
    """
    if work.encoder.device.type != "cpu":
        if not gpus:
            raise ValueError(
                f"the encoder is on {work.encoder.device} but gpus is 0, so that no worker would have a GPU: ask for "
                "gpus=1, or load the encoder with device='cpu'"
            )
        work = work._replace(encoder=work.encoder.to("cpu"))
    ray = connect(address)
    try:
        return _spread(ray, work, workers, gpus, todo, advance)
    except ray.exceptions.RayError as error:
        raise BankError(f"Ray failed, the next build goes on from the finished shards ({error})") from error


def _spread(ray: ModuleType, work: shards.Work, workers, gpus, todo, advance) -> list[dict]:
    threads = torch.get_num_threads()
    workers = min(len(todo), workers or _room(ray, threads, gpus))
    shared = ray.put(work)
    actor = ray.remote(num_cpus=threads, num_gpus=gpus)(Worker)
    waiting = {}  # what we wait for -> (actor, its shard; None while it starts)

    def hire() -> None:
        new = actor.remote(shared, threads, gpus)
        waiting[new.ready.remote()] = (new, None)

    queue, idle, entries, lost = Queue(shards.runs(work.dataset, todo)), [], [], Counter()
    try:
        for _ in range(workers):
            hire()
        while queue or any(shard for _, shard in waiting.values()):
            while queue and idle:
                worker = idle.pop()
                shard = queue.take(worker)
                waiting[worker.make.remote(shard)] = (worker, shard)
            task = ray.wait(list(waiting))[0][0]
            worker, shard = waiting.pop(task)
            try:
                result = ray.get(task)
            except ray.exceptions.RayActorError as error:
                lost[shard] += 1
                if lost[shard] == ATTEMPTS:
                    raise BankError(
                        f"Ray lost the worker {ATTEMPTS} times at {f'images {shard}' if shard else 'its start'} "
                        f"(out of memory?): {error}"
                    ) from error
                if shard:
                    queue.put_back(worker, shard)
                hire()
                continue
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            idle.append(worker)
            if shard:
                _check_shared(work.folder, result)
                entries.append(result)
                advance(shard[1] - shard[0])
    finally:
        for worker in [*idle, *(worker for worker, _ in waiting.values())]:
            ray.kill(worker)
    return entries


class Queue:
    """What is to be made: runs of shards, of which each worker goes through one after the other."""

    def __init__(self, runs: list[list[tuple[int, int]]]):
        self._left = deque(map(deque, runs))
        self._held: dict[object, deque] = {}

    def __bool__(self) -> bool:
        return any(self._left) or any(self._held.values())

    def take(self, worker: object) -> tuple[int, int]:
        """A worker's next shard: of its own run, else of a new one, else of the longest that another holds."""
        if not self._held.get(worker):
            self._held[worker] = self._left.popleft() if self._left else max(self._held.values(), key=len)
        return self._held[worker].popleft()

    def put_back(self, worker: object, shard: tuple[int, int]) -> None:
        """A worker is lost, and so is its shard: the next that is idle goes on with its run."""
        run = self._held.pop(worker)
        run.appendleft(shard)
        if not any(run is other for other in self._held.values()):
            self._left.appendleft(run)


class Worker:
    """An actor: the encoder on this machine's device, and what decodes for it, for as many shards as come."""

    def __init__(self, work: shards.Work, threads: int, gpus: float):
        torch.set_num_threads(threads)
        self._work = work._replace(encoder=work.encoder.to("cuda")) if gpus else work

    def ready(self) -> None:
        """Answer once the actor has started."""

    def make(self, shard: tuple[int, int]) -> dict:
        """Encode and write one shard."""
        return shards.make(self._work, [shard])[0]


def connect(address: str) -> ModuleType:
    """Ray, connected to a cluster, which has to answer within seconds.

    Args:
        address: "auto", "local" to start one here, "host:6379" or "ray://host:10001"; unused when Ray is connected

    Raises:
        ImportError: Ray is not installed
        ValueError: no address
        ConnectionError: there is no cluster
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError('a Ray cluster needs Ray: pip install "upclose[cluster]"') from error
    if not ray.is_initialized():
        try:
            _knock(os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address)
            ray.init(address=None if address == "local" else address, log_to_driver=False)
        except OSError as error:
            raise ConnectionError(
                f"there is no Ray cluster at {address!r} ({error}): start one with `ray start --head` (and `ray start "
                "--address=HOST:6379` on every other machine), or do without"
            ) from error
    return ray


def _knock(address: str) -> None:
    """Ray itself waits for minutes for a machine that is not there."""
    if address in ("auto", "local"):
        return
    if not (where := re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d+)", address)):
        raise ValueError(f"{address!r} is no address of a Ray cluster: auto, local, HOST:6379 or ray://HOST:10001")
    socket.create_connection((where[1], int(where[2])), SECONDS).close()


def _room(ray: ModuleType, threads: int, gpus: float) -> int:
    """How many actors the cluster holds."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        int(min(machine.get("CPU", 0) / threads, machine.get("GPU", 0) / gpus if gpus else float("inf")))
        for machine in machines
    )
    if not room:
        raise ValueError(
            f"no machine of the Ray cluster has {threads} processors and {gpus} GPUs for one worker: lower "
            f"torch.set_num_threads({threads}) or gpus={gpus}; there are {machines}"
        )
    return room


def _check_shared(folder: Store, entry: dict) -> None:
    if stores.size(folder, entry["name"]) != entry["bytes"]:
        raise BankError(
            f"a worker wrote shard {entry['name']} to {folder}, but this process does not find it there: choose a root "
            "that every machine of the cluster shares (a network file system, s3://, gs://)"
        )
