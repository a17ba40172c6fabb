"""Storage on real media: a full disk, a broken disk, an object store, and faults that pass."""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fault_tolerance.checkpoints.checkpoint import Checkpoint
from fault_tolerance.checkpoints.shard import write_shard
from fault_tolerance.checkpoints.shelf import checkpoints, newest, remove, sweep, torn
from fault_tolerance.checkpoints.storage import _S3, LocalStorage, StorageError, _s3_kind, open_storage, paced, retry
from tests.fault_tolerance.checkpoints.saving import atlas_of, decoder_specs, free_port, load, random_state, save


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 3 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        _run("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a tmpfs here: {error}")
    yield place
    _run("umount", str(place))


class Disk:
    """An ext4 file system in a file, on a loop device. `cut_power` drops what was not synced: all that follows is EIO."""

    def __init__(self, image: Path, place: Path) -> None:
        self.place = place
        with image.open("wb") as file:
            file.truncate(64 << 20)
        _run("mkfs.ext4", "-q", str(image))
        self._device = _run("losetup", "--find", "--show", str(image))
        _run("mount", self._device, str(place))

    def cut_power(self) -> None:
        """The kernel's own shutdown of a file system, without flushing its journal."""
        handle = os.open(self.place, os.O_RDONLY)
        fcntl.ioctl(handle, 0x8004587D, struct.pack("I", 2))  # FS_IOC_SHUTDOWN, NOLOGFLUSH
        os.close(handle)

    def restart(self) -> None:
        """Mount again what was on the disk when the power went."""
        _run("umount", str(self.place))
        _run("mount", self._device, str(self.place))

    def close(self) -> None:
        subprocess.run(["umount", str(self.place)], check=False)
        subprocess.run(["losetup", "--detach", self._device], check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk whose power can be cut."""
    (tmp_path / "disk").mkdir()
    try:
        disk = Disk(tmp_path / "image", tmp_path / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a loop device here: {getattr(error, 'stderr', error)}")
    yield disk
    disk.close()


def test_a_full_disk_fails_the_save_and_harms_nothing(small_disk: Path) -> None:
    specs = decoder_specs()
    state, atlas = random_state(specs), atlas_of(specs, "1x1x1")
    kept = save(small_disk, atlas, state, step=1)
    with pytest.raises(StorageError, match="failed at once") as caught:
        for step in range(2, 9):
            save(small_disk, atlas, state, step=step)
    assert caught.value.errno == errno.ENOSPC
    whole = checkpoints(str(small_disk))
    assert 1 in whole and len(whole) < 8
    assert all(Checkpoint.open(path).verify() == [] for path in whole.values())
    load(kept, atlas_of(specs, "1x2x1"), state)
    sweep(str(small_disk))
    assert not torn(str(small_disk)) and not list(small_disk.rglob("*.tmp"))
    remove(str(small_disk), list(whole)[:-1])
    save(small_disk, atlas, state, step=20)
    assert newest(str(small_disk)) == str(small_disk / "step_000020")


def test_looking_into_a_directory_that_is_being_written_is_no_error(tmp_path: Path) -> None:
    """`checkpoint save --wait` and `ls` of a live run met the hidden file that a commit was about to rename."""
    storage, done = open_storage(str(tmp_path)), threading.Event()

    def write() -> None:
        for _ in range(150):
            storage.write("index.json", lambda: [np.zeros(64, np.uint8)])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert storage.sizes().get("index.json", 64) == 64
    writer.join()


@pytest.mark.slow
def test_a_disk_that_answers_eio_in_the_middle_fails_the_save_and_keeps_the_older_one(disk: Disk) -> None:
    specs = decoder_specs(dim=256, ffn_dim=600, vocab=400)
    state, atlas = random_state(specs), atlas_of(specs, "1x1x1")
    save(disk.place, atlas, state, step=1)
    pieces, directory = atlas.owned(0), str(disk.place / "step_000002")

    def last() -> np.ndarray:
        disk.cut_power()
        return state[pieces[-1].tensor]

    buffers = [(piece, state[piece.tensor]) for piece in pieces[:-1]] + [(pieces[-1], last)]
    with pytest.raises(StorageError) as caught:
        write_shard(directory, "rank0", buffers, specs=specs)
    assert caught.value.errno == errno.EIO
    disk.restart()
    assert list(checkpoints(str(disk.place))) == [1]
    assert Checkpoint.open(str(disk.place / "step_000001")).verify() == []


@pytest.mark.slow
def test_what_was_committed_before_the_power_went_is_whole_after_it(disk: Disk) -> None:
    """Without the syncs of file and directory this fails: the names, or zeros in place of data, is all that is left."""
    specs = decoder_specs(layers=1)
    for step in range(1, 6):
        save(disk.place, atlas_of(specs, "1x2x1", layers=1), random_state(specs, seed=step), step=step)
        disk.cut_power()
        disk.restart()
        assert newest(str(disk.place)) == str(disk.place / f"step_{step:06d}")
        assert all(Checkpoint.open(path).verify() == [] for path in checkpoints(str(disk.place)).values())


def test_a_fault_that_passes_is_tried_again_and_one_that_stays_is_told() -> None:
    calls: list[int] = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 3:
            raise OSError(errno.EIO, "unlucky")
        return "done"

    assert retry("x", flaky, attempts=4, first_delay_s=0.001) == "done"
    with pytest.raises(StorageError, match=r"x: failed after 2 tries: .*unlucky") as caught:
        calls.clear()
        retry("x", flaky, attempts=2, first_delay_s=0.001)
    assert caught.value.errno == errno.EIO


def test_an_object_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)

    def parts() -> Iterator[np.ndarray]:
        yield np.ones(1000, np.uint8)
        assert storage.sizes().keys() & {"a"} == set()
        raise LookupError("the source broke")

    with pytest.raises(LookupError, match="the source broke"):  # as it is, and not tried again
        storage.write("a", parts)
    assert list(tmp_path.iterdir()) == []


def test_reads_scatter_over_many_buffers(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    storage = LocalStorage(str(tmp_path), attempts=1, first_delay_s=0)
    outs = [np.zeros(size, np.uint8) for size in [0, 1, 7, *[100] * 1500, 0]]
    storage.read_into("a", 13, outs)
    np.testing.assert_array_equal(np.concatenate(outs), data[13 : 13 + 150_008])
    with pytest.raises(StorageError, match="bytes too early"):
        storage.read_into("a", 199_990, [np.zeros(11, np.uint8)])


def test_writing_is_paced() -> None:
    clock = os.times().elapsed
    assert sum(part.nbytes for part in paced([np.zeros(1 << 20, np.uint8)] * 4, 20.0)) == 4 << 20
    assert os.times().elapsed - clock >= 0.19


def test_several_writers_never_meet(tmp_path: Path) -> None:
    specs = decoder_specs(layers=1)
    state = random_state(specs)
    threads = [
        threading.Thread(target=save, args=(tmp_path, atlas_of(specs, "1x2x1", layers=1), state), kwargs={"step": step})
        for step in (1, 2, 3, 4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [Checkpoint.open(path).verify() for path in checkpoints(str(tmp_path)).values()] == [[]] * 4


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 bucket of moto's server on the loopback interface."""
    moto_server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    import s3fs

    s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir("holdfast-tests")
    yield "s3://holdfast-tests/run/checkpoints"
    os.environ.clear()
    os.environ.update(before)
    server.stop()


@pytest.mark.slow
def test_checkpoints_live_in_s3_as_on_a_disk(bucket: str) -> None:
    specs = decoder_specs(dim=24, ffn_dim=50, vocab=30, layers=2)
    state = random_state(specs)
    assert newest(bucket) is None
    for step in (1, 2):
        save(bucket, atlas_of(specs, "1x2x1", layers=2), state, step=step)
    other = random_state(specs, seed=1)
    save(bucket, atlas_of(specs, "1x1x1", layers=2), other, step=2)  # replaces
    path = newest(bucket)
    assert path == f"{bucket}/step_000002"
    checkpoint = Checkpoint.open(path)
    assert checkpoint.verify() == []
    load(checkpoint, atlas_of(specs, "1x1x2", layers=2), other)
    assert len(open_storage(path).sizes()) == 2
    open_storage(path).remove(["index.json"])
    assert newest(bucket) == f"{bucket}/step_000001"
    assert sweep(bucket) == [2]
    remove(bucket, [1])
    assert newest(bucket) is None


@pytest.mark.slow
def test_a_large_object_goes_up_in_parts_or_not_at_all(bucket: str) -> None:
    storage = open_storage(f"{bucket}/large", attempts=1)
    data = np.random.default_rng(0).integers(0, 256, 20 << 20, np.uint8)
    storage.write("a", lambda: [data[: 9 << 20], data[9 << 20 :]])
    out = [np.empty(5, np.uint8), np.empty(1 << 20, np.uint8)]
    storage.read_into("a", 9 << 20, out)
    np.testing.assert_array_equal(np.concatenate(out), data[9 << 20 : (10 << 20) + 5])

    def torn_parts() -> Iterator[np.ndarray]:
        yield data
        raise LookupError("the source broke")

    with pytest.raises(LookupError, match="the source broke"):
        storage.write("b", torn_parts)
    assert storage.sizes() == {"a": 20 << 20}
    with pytest.raises(StorageError, match="must exist"):
        storage.read("nothing")


@pytest.mark.slow
def test_an_object_store_that_is_gone_is_said_in_seconds(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three libraries tried again inside each other: a run heard after minutes that its store did not answer."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    _s3_kind().clear_instance_cache()
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://gone/run/x: failed after 2 tries: Could not connect.*127\.0\.0\.1"):
        open_storage("s3://gone/run", attempts=2, first_delay_s=0.01).write("x", lambda: [np.zeros(9, np.uint8)])
    assert time.monotonic() - began < 20
    _s3_kind().clear_instance_cache()


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An object store that begins uploads and then is silent: it takes connections, as a stopped process does, and reads nothing."""
    begun = (
        b"<?xml version='1.0'?><InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId></InitiateMultipartUploadResult>"
    )

    def serve(connection: socket.socket) -> None:
        while b"?uploads" in connection.recv(1 << 16):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n\r\n%s" % (len(begun), begun))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                held.append(server.accept()[0])
                threading.Thread(target=serve, args=(held[-1],), daemon=True).start()

    held: list[socket.socket] = []
    pytest.importorskip("s3fs")
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "t")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "t")
        monkeypatch.setattr("fault_tolerance.checkpoints.storage._REQUEST_S", 1.5)
        monkeypatch.setitem(_S3["config_kwargs"], "read_timeout", 0.5)
        _s3_kind().clear_instance_cache()
        yield
        _s3_kind().clear_instance_cache()
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


@pytest.mark.slow
def test_an_object_store_that_falls_silent_is_asked_twice(stopped: None) -> None:
    """Each of four tries waited for half a minute. And of a part that such a store did not take the end was waited for without end:
    nothing limits how long a request may take to be sent.
    """
    storage = open_storage("s3://silent/run", first_delay_s=0.01)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://silent/run: failed after 2 tries: Read timeout.*127\.0\.0\.1"):
        storage.sizes()
    with pytest.raises(StorageError, match=r"s3://silent/run/x: failed after 2 tries: upload_part: .*within 1\.5 s"):
        storage.write("x", lambda: [np.zeros(32 << 20, np.uint8)])
    assert time.monotonic() - began < 20
