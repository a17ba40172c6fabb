"""One pool of processes for all tests that need ranks."""

from collections.abc import Iterator

import pytest

from tests.parallel.compare import Reference
from tests.parallel.harness import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight ranks at most."""
    ranks = Pool(8)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def one(pool: Pool) -> Reference:
    """What one worker makes of a job."""
    return Reference(pool)
