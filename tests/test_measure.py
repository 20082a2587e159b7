import time

import pytest
import torch

from upclose import measure


def test_seconds_are_the_median_of_calls_after_one_that_is_not_timed():
    calls = []
    assert measure.seconds(lambda: calls.append(0), repeats=3) >= 0
    assert len(calls) == 4


def test_a_cpus_clock_does_not_count_what_others_do_and_a_gpus_does():
    def rest():
        time.sleep(0.2)

    assert measure.seconds(rest, repeats=1, clock=measure.clock(torch.device("cpu"))) < 0.1
    assert measure.seconds(rest, repeats=1, clock=measure.clock(torch.device("cuda"))) >= 0.2


def test_peak_memory_is_what_is_held_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.ones(2**21)

    def together():
        return [torch.ones(2**21) for _ in range(3)]

    cpu = torch.device("cpu")
    assert measure.peak_memory(one_after_the_other, cpu) == pytest.approx(8, abs=0.5)
    assert measure.peak_memory(together, cpu) == pytest.approx(24, abs=0.5)
