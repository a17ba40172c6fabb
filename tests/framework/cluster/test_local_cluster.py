"""The emulated cluster against the machine it runs on: what it starts, and that nothing of it is left."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.cluster.local_cluster import PREFIX, LocalCluster, reap_dead
from framework.cluster.machines import Machines
from framework.cluster.nodes import ClusterError

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[3]
seen: set[str] = set()  # names of the folders that our clusters have had


@pytest.fixture(scope="module", autouse=True)
def place() -> Iterator[Path]:
    """A temporary directory of our own, so that other clusters on this machine do not count."""
    folder = Path(tempfile.mkdtemp(prefix="hf", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster.start(num_nodes=2, preload=())
    yield cluster
    cluster.close()


def test_it_starts_one_raylet_per_node_and_a_head(cluster: LocalCluster) -> None:
    assert cluster.machines.names() == {"head": "up", "n0": "up", "n1": "up"}
    commands = {name: command_of(cluster.machines.pids(name)[0]) for name in ("head", "n0", "n1")}
    assert all("raylet" in command[0] for command in commands.values())
    assert len({word for c in commands.values() for word in c if word.startswith("--node_ip_address=")}) == 3
    assert set(cluster.timings) == {"warden_s", "import_ray_s", "gcs_s", "raylets_s"}


def test_it_is_private(cluster: LocalCluster) -> None:
    assert cluster.folder.stat().st_mode & 0o077 == 0
    assert (cluster.folder / "token").stat().st_mode & 0o077 == 0
    assert len(f"{cluster.folder}/n1234/raylet") < 107
    assert (
        not Path("/tmp/ray/ray_current_cluster").exists()
        or cluster.address not in Path("/tmp/ray/ray_current_cluster").read_text()
    )


def test_a_killed_machine_is_dead_on_return_and_comes_back_empty(cluster: LocalCluster) -> None:
    machines = Machines(cluster.control)
    kept = Path(machines.shm_dir("n1"), "snapshot")
    kept.write_bytes(b"x" * 1000)
    before = machines.pids("n1")
    killed = machines.kill("n1")
    assert set(before) <= set(killed) and not any(is_alive(pid) for pid in killed)
    assert machines.names()["n1"] == "dead" and not machines.answers("n1") and not kept.exists()
    machines.add("n1")
    assert machines.answers("n1") and machines.pids("n1")[0] not in killed


def test_a_stopped_machine_does_not_answer_until_it_is_continued(cluster: LocalCluster) -> None:
    machines = cluster.machines
    pids = machines.stop("n0")
    assert all(state_of(pid) == "T" for pid in pids) and not machines.answers("n0")
    machines.cont("n0")
    wait_until(lambda: machines.answers("n0") and not any(state_of(pid) == "T" for pid in pids))


def test_a_frozen_machine_goes_on_later_by_itself_and_one_whose_raylet_has_ended_is_started_again(cluster: LocalCluster) -> None:
    """A partition of a few seconds: nobody on the machine itself could end it."""
    machines = cluster.machines
    machines.later(0.3, "cont", "n0")
    raylet = machines.stop("n0")[0]
    wait_until(lambda: machines.answers("n0"))
    assert machines.pids("n0")[0] == raylet
    machines.later(0.0, "revive", "n0")
    machines.later(0.1, "kill", "n0")
    machines.later(1.0, "kill", "n0")  # of a machine that is dead by then
    wait_until(lambda: machines.names()["n0"] == "dead")
    assert not machines.answers("n0")
    machines.later(0.0, "revive", "n0")
    wait_until(lambda: machines.answers("n0"))
    assert machines.pids("n0")[0] != raylet, "the first revival found it alive and did nothing"
    time.sleep(1.0)
    assert machines.answers("n0"), "what was planned for a former life is not done to the next one"
    with pytest.raises(ClusterError, match="later: must be add, kill, stop, cont or revive, got explode"):
        machines.later(0.0, "explode", "n0")


def test_a_raylet_that_dies_by_itself_is_a_dead_machine(cluster: LocalCluster) -> None:
    cluster.machines.add("n7")
    raylet = cluster.machines.pids("n7")[0]
    os.kill(raylet, signal.SIGKILL)
    wait_until(lambda: cluster.machines.names()["n7"] == "dead")
    wait_until(lambda: not cluster.machines.pids("n7"))


def test_mistakes_are_explained(cluster: LocalCluster) -> None:
    with pytest.raises(ClusterError, match="kill: ValueError: node must be one of head, n0, n1"):
        cluster.machines.kill("n99")
    with pytest.raises(ClusterError, match="add: node must be new or dead, got n0 which is up"):
        cluster.machines.add("n0")
    with pytest.raises(ClusterError, match="warden must answer"):
        Machines("/nowhere/control").names()


def test_closing_twice_leaves_nothing() -> None:
    before = traces()
    cluster = LocalCluster.start(num_nodes=1, preload=())
    assert len(traces()) > len(before)
    cluster.close()
    cluster.close()
    assert traces() == before


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_driver_is_ended(ending: signal.Signals) -> None:
    before = traces()
    driver = start_driver(
        "c = LocalCluster.start(num_nodes=2, preload=())", "Path(c.machines.shm_dir('n0'), 'x').write_text('x')"
    )
    assert len(traces()) > len(before)
    driver.send_signal(ending)
    driver.wait(20)
    wait_until(lambda: traces() == before, 15)


def test_nothing_is_left_when_the_driver_is_killed_while_it_starts() -> None:
    before = traces()
    driver = start_driver("c = LocalCluster.begin(preload=('torch',))")
    driver.kill()
    driver.wait(20)
    wait_until(lambda: traces() == before, 15)


def test_the_next_start_reaps_what_a_killed_warden_left_and_never_a_living_cluster(cluster: LocalCluster) -> None:
    before = traces()
    driver = start_driver(
        "c = LocalCluster.start(num_nodes=1, preload=())", "print(c._warden.pid, c.folder, flush=True)"
    )
    assert driver.stdout is not None
    warden, folder = driver.stdout.readline().split()
    os.kill(int(warden), signal.SIGKILL)
    driver.kill()
    driver.wait()
    wait_until(lambda: not [pid for pid in processes() if f"process {pid}" not in before])
    assert Path(folder).exists()
    assert folder in reap_dead()
    assert cluster.folder.exists() and cluster.machines.answers("n0")
    wait_until(lambda: traces() == before)


def start_driver(*lines: str) -> "subprocess.Popen[str]":
    """A process that opens a cluster, says so, and waits."""
    program = ["import time", "from pathlib import Path", "from framework.cluster.local_cluster import LocalCluster", *lines]
    program += ["print('up', flush=True)", "time.sleep(600)"]
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent("\n".join(program))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        stderr=2,
    )
    assert driver.stdout is not None
    if "print" not in lines[-1]:
        assert driver.stdout.readline() == "up\n"
    return driver


def processes() -> list[str]:
    """Processes of the clusters in our temporary directory, wardens included."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z" and f"{tempfile.gettempdir()}/{PREFIX}".encode() in words:
                found.append(folder.name)
    return found


def traces() -> set[str]:
    """Everything that a cluster could leave behind."""
    folders = [path.name for path in Path(tempfile.gettempdir()).glob(PREFIX + "*")]
    seen.update(folders)
    shm = [path.name for path in Path("/dev/shm").glob(PREFIX + "*") if path.name in seen]
    return {f"process {pid}" for pid in processes()} | {f"folder {n}" for n in folders} | {f"shm {n}" for n in shm}


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_alive(pid: int) -> bool:
    try:
        return state_of(pid) not in "ZX"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Fails if it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.02)
