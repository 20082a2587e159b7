"""What a call costs: seconds, and the most memory that it holds at once."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time

import torch


def clock(device: torch.device) -> Callable[[], float]:
    """On a CPU the processor's time, which other work on the machine does not lengthen; on a GPU the wall's."""
    return process_time if device.type == "cpu" else perf_counter


def seconds(function: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = perf_counter) -> float:
    """The median time of `repeats` calls after one that is not timed.

    Args:
        function: what is timed
        repeats: calls that count
        clock: the wall's, or what `measure.clock` gives for a device

    Example:
        >>> seconds(lambda: sum(range(1000)), repeats=3) < 1
        True
    """
    function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return median(times)


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """The most memory that a call holds at once beyond what was held before, in MiB.

    On a GPU torch's allocator tells; on a CPU torch's profiler counts what torch allocates in this thread.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, size in moves:
        held += size
        most = max(most, held)
    return most / 2**20
