"""The kernel's hashes are those of the library, whatever the sizes, and none is believed that differs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fault_tolerance import hashing
from fault_tolerance.hashing import HASHING, Kernel, believed, reference
from parallel.native import C_FLAGS

SOURCE = Path(hashing.__file__).with_name("hashing.c")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    HASHING.build()
    found = believed(HASHING.path())
    assert found is not None
    return found


@given(sizes=st.lists(st.one_of(st.integers(0, 300), st.integers(900, 1100), st.integers(2000, 9000)), min_size=1, max_size=12), at=st.integers(0, 9))
def test_units_of_any_size_anywhere_hash_as_the_library_does(kernel: Kernel, sizes: list[int], at: int) -> None:
    offsets = np.cumsum([at, *sizes], dtype=np.int64)
    data = np.random.default_rng(at).integers(0, 256, at + sum(sizes), np.uint8)[at:]
    assert np.array_equal(kernel(data, offsets), reference(data, offsets))


def test_data_that_does_not_end_where_its_units_do_is_refused(kernel: Kernel) -> None:
    """The kernel trusts its caller: a unit too much would be read out of foreign memory."""
    with pytest.raises(ValueError, match="must be dense and end where the offsets do"):
        kernel(np.zeros(500, np.uint8), np.array([0, 300, 600]))
    with pytest.raises(ValueError, match="must be dense"):
        kernel(np.zeros(600, np.uint8)[::2], np.array([0, 300]))


@pytest.mark.slow
def test_the_plain_loop_is_believed_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    for number, (change, flags, good) in enumerate([(("x", "x"), ["-DPLAIN"], True), (("0x7e,", "0x7f,"), [], False)]):
        source, library = tmp_path / f"{number}.c", tmp_path / f"{number}.so"
        source.write_text(SOURCE.read_text().replace(*change))
        subprocess.run(["cc", *C_FLAGS, *flags, str(source), "-o", str(library)], check=True)
        assert (believed(library) is not None) == good
    assert believed(tmp_path / "absent.so") is None
