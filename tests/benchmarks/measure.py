"""What the benchmarks share: rates measured in turn, and the memory of a call in a process of its own."""

import resource
import subprocess
import sys
import time
from pathlib import Path


def rates(count, *functions, rounds=5):
    """`count` a second of each function, the best of several rounds in which they take turns."""
    best = [float("inf")] * len(functions)
    for function in functions:
        function()
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[i] = min(best[i], time.perf_counter() - start)
    return [count / seconds for seconds in best]


def peak_growth(module, prepare, *arguments):
    """MiB by which one call raises the peak of a fresh process above what its inputs take.

    `module.prepare(*arguments)` makes the inputs in that process and returns the function to call.
    """
    call = f"{module}.{prepare}(*{arguments!r})"
    program = f"import measure, {module}; print(measure.growth({call}))"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=here, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def growth(function):
    """MiB that the peak of this process lies above its present memory after `function()`.

    On Linux the mark is reset first and read from /proc: a child's `ru_maxrss` begins at its parent's peak.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = _rusage()
        function()
        return _rusage() - before
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def _rusage():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
