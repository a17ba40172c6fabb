"""The suite's own rules: quick tests first, and what starts a Ray cluster or takes long is marked.

pytest -m "not slow and not cluster"     what `make test-fast` runs: a minute and a half on two cores
"""

import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # who starts the tests in the background must not decide what they see
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order by cost, stable otherwise, so that a mistake shows in seconds."""

    def cost(item: pytest.Item) -> int:
        return 2 * (item.get_closest_marker("cluster") is not None) + (item.get_closest_marker("slow") is not None)

    items.sort(key=cost)
