"""One pool of processes for all tests that need ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch is for those who use the fixtures
    from tests.parallel.compare import Reference
    from tests.parallel.harness import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight ranks at most."""
    from tests.parallel.harness import Pool

    ranks = Pool(8)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def one(pool: Pool) -> Reference:
    """What one worker makes of a job."""
    from tests.parallel.compare import Reference

    return Reference(pool)
