"""Libraries that a machine compiles for itself: once, by one process, and never half."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from fault_tolerance.digest_kernel import DIGEST
from parallel.native import BuildError, Native, TakenUp, cache_dir, reason


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def writing(text: str, built: list[str], *, seconds: float = 0.0) -> Native:
    def compile(folder: Path) -> None:
        (folder / "it.so").write_text(text[: len(text) // 2])
        time.sleep(seconds)
        (folder / "it.so").write_text(text)
        built.append(text)

    return Native("it", "it.so", "no.module", lambda: text, compile)


def test_many_builders_at_once_compile_once_and_nobody_sees_half_of_it() -> None:
    built: list[str] = []
    native = writing("whole", built, seconds=0.2)
    threads = [threading.Thread(target=native.build) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not native.path().exists():
        time.sleep(0.001)
    assert native.path().read_text() == "whole"
    for thread in threads:
        thread.join()
    assert built == ["whole"]


def test_who_must_not_wait_is_told_that_another_is_at_it() -> None:
    built: list[str] = []
    native = writing("whole", built, seconds=0.5)
    other = threading.Thread(target=native.build)
    other.start()
    while not list(cache_dir().rglob("it.so")):
        time.sleep(0.001)
    assert not native.build(wait=False)
    other.join()
    assert native.build(wait=False) and built == ["whole"]


def test_a_build_that_failed_leaves_nothing_that_could_be_loaded_and_is_tried_again() -> None:
    def fails(folder: Path) -> None:
        (folder / "it.so").write_text("hal")
        raise BuildError("no compiler")

    native = Native("it", "it.so", "no.module", lambda: "source", fails)
    with pytest.raises(BuildError, match="no compiler"):
        native.build()
    assert not list(cache_dir().rglob("it.so"))
    again = Native("it", "it.so", "no.module", lambda: "source", lambda folder: (folder / "it.so").touch())
    assert again.build() and again.path().exists()


def test_another_source_has_another_place() -> None:
    assert writing("a", []).path() != writing("b", []).path()
    assert writing("a", []).path() == writing("a", []).path()


@pytest.mark.slow
def test_a_build_beside_appears_by_itself_and_is_not_begun_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    DIGEST.build_beside()
    deadline = time.monotonic() + 60
    while not DIGEST.path().exists():
        assert time.monotonic() < deadline, (DIGEST.path().parent / "build.log").read_text()
        time.sleep(0.01)
    monkeypatch.setattr("subprocess.Popen", None)  # would raise
    DIGEST.build_beside()


def test_without_a_compiler_it_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BuildError, match="install gcc or set CC"):
        DIGEST.build()
    monkeypatch.setattr("os.nice", lambda by: 0)
    assert DIGEST.main(without="digests are made by numpy") == 1
    assert capsys.readouterr().err.startswith("digests are made by numpy: BuildError: digest: needs a C compiler")


def test_of_pages_of_errors_the_first_is_told() -> None:
    assert reason(RuntimeError("In file\nx.c:3: error: no\nx.c:4: error: more")) == "RuntimeError: x.c:3: error: no"
    assert reason(RuntimeError()) == "RuntimeError"


def test_what_is_not_built_is_looked_for_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no compiler, the disk was asked for the library at every one of thousands of digests."""
    asked: list[int] = []
    native = Native("it", "it.so", "no.module", lambda: asked.append(1) or "source", lambda folder: (folder / "it.so").touch())  # type: ignore[func-returns-value]
    monkeypatch.setattr(Native, "path", lambda self, path=Native.path: asked.append(1) or path(self))  # type: ignore[func-returns-value]
    taken = TakenUp(native, lambda path: path.name, every_s=60)
    assert [taken() for _ in range(50)] == [None] * 50 and asked.count(1) < 5
    now = TakenUp(native, lambda path: path.name, every_s=0)
    assert now() is None and native.build() and now() == "it.so"
    assert TakenUp(native, lambda path: None)() is None, "there, and not believed"
