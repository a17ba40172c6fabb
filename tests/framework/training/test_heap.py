"""Heap: counted in page faults, in a process of its own."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import numpy as np
from framework.training.heap import keep_freed_memory

def step():
    kept = [np.ones(1 << 17) for _ in range(24)]  # 1 MiB each

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

taken = sys.argv[1] == "kept" and keep_freed_memory()
step(), step()
before = faults()
for _ in range(10):
    step()
print(taken, (faults() - before) // 10)
"""


def faults_a_step(how: str) -> tuple[bool, int]:
    taken, faults = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout.split()
    return taken == "True", int(faults)


def test_a_step_uses_the_memory_of_the_one_before():
    """Each step of a rank had two thousand pages made and zeroed that the step before had given back."""
    taken, kept = faults_a_step("kept")
    if not taken:
        pytest.skip("the C library is not glibc")
    assert kept < 100 < 1000 < faults_a_step("as ever")[1]
