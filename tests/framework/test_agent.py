"""What stands for a node is light: a vault, and no framework for training."""

import subprocess
import sys

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
