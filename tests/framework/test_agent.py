"""What stands for a node is light: a vault, and no framework for training."""

import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from framework.agent import Agent

START = """
import sys
from framework.agent import Agent
agent = Agent(run_id="light", secret="00" * 16, node="n0", host="127.0.0.1")
agent.close()
print("torch" in sys.modules, "ray" in sys.modules)
"""


def test_an_agent_starts_without_torch() -> None:
    """On a cluster without a zygote every agent imported torch, beside the workers that need it: twice the start of a small run."""
    told = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.split() == ["False", "False"]


class Stuck(Agent):
    """Its storage does not answer."""

    answers = threading.Event()

    def _save(self, directory: str, generation: int, step: int) -> dict[str, Any]:
        self.answers.wait(30)
        return {}


def test_a_save_that_is_stuck_takes_one_thread_and_not_all() -> None:
    """Each try to save to a file server that had stopped kept a thread for good; after four of them the node answered nothing any more."""
    before = signal.getsignal(signal.SIGTERM)
    agent = Stuck(run_id="stuck", secret="00" * 16, node="n0", host="127.0.0.1")
    try:
        first = threading.Thread(target=agent.save, args=("nowhere", 1, 4))
        first.start()
        with pytest.raises(ValueError, match="it has not answered yet"):
            agent.save("nowhere", 1, 4)
        agent.answers.set()
        first.join()
        assert agent.save("nowhere", 1, 4) == {}
    finally:
        agent.close()
        signal.signal(signal.SIGTERM, before)
