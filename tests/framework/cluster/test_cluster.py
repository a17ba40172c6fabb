"""The shell over Ray against real raylets and actors on this machine."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from framework.cluster.cluster import (
    Call,
    CallError,
    Cluster,
    ClusterError,
    Machines,
    Node,
    Remote,
    RemoteError,
    WorkerDied,
    tail,
    wait_all,
    wait_any,
)
from framework.cluster.host import BESIDE_NICENESS
from framework.cluster.local_cluster import LocalCluster
from framework.cluster.nodes import Exit, joined, machine_names, natural
from framework.cluster.ray_session import connect

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[3]
HERE = str(Path(__file__).parent)
THING, START_S = "hosted:Thing", 60.0
PRELOAD = ("ray", "ray._private.node", "framework.cluster.cluster")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes with two workers each, node n0 in a domain of its own."""
    cluster = Cluster.open(
        run_id="test",
        num_nodes=3,
        workers_per_node=2,
        domains={"n0": "rack-a"},
        import_paths=[HERE],
        early=LocalCluster.begin(preload=PRELOAD),
    )
    yield cluster
    cluster.close()


@pytest.fixture
def thing(cluster: Cluster, tmp_path: Path) -> Iterator[Remote]:
    """A worker on n0."""
    remote = cluster.start_worker("n0", "n0.0", THING, {"start": 5}, log=str(tmp_path / "log"))
    remote.ready().result(START_S)
    yield remote
    remote.kill()


def test_the_inventory_knows_every_node(cluster: Cluster) -> None:
    nodes = {node.name: node for node in cluster.nodes()}
    assert list(nodes) == ["head", "n0", "n1", "n2"]
    assert nodes["head"].head and not nodes["n0"].head
    assert all(
        node.alive and node.cpus == 2 and node.memory_bytes > 1 << 28 for name, node in nodes.items() if name != "head"
    )
    assert (nodes["n0"].domain, nodes["n1"].domain) == ("rack-a", "n1")
    assert len({node.ip for node in nodes.values()}) == 4
    assert cluster.confirm("n0") and not cluster.confirm("n9")


def test_a_call_returns_a_value_or_raises_what_the_method_raised(thing: Remote) -> None:
    assert thing.call("add", 2).result(10) == 7
    assert thing.call("add", 2, twice=True, lane="train").result(10) == 9
    with pytest.raises(RemoteError, match="worker:n0.0 on n0 raised Odd: odd 3") as caught:
        thing.call("fail").result(10)
    assert caught.value.kind == "Odd" and "in fail" in caught.value.traceback
    with pytest.raises(RemoteError, match="only public methods"):
        thing.call("__init__").result(10)


def test_control_calls_are_answered_while_training_blocks_in_its_one_thread(thing: Remote) -> None:
    threads = {thing.call("thread", lane="train").result(10) for _ in range(3)}
    assert len(threads) == 1
    blocked = thing.call("sleep", 20.0, lane="train")
    began = time.monotonic()
    assert [thing.call("add", n).result(10) for n in range(5)] == [5, 6, 7, 8, 9]
    assert time.monotonic() - began < 5 and not blocked.done()
    with pytest.raises(TimeoutError, match=r"worker:n0.0.sleep: must answer within 0.05 s"):
        blocked.result(0.05)


def test_waiting_for_many_tells_the_ended_from_the_pending(thing: Remote) -> None:
    quick, slow = thing.call("add", 1), thing.call("sleep", 20.0, lane="train")
    assert wait_any([slow, quick], 10) == ((quick,), (slow,))
    assert wait_all([slow, quick], 0.1) == ((quick,), (slow,))
    assert wait_any([], 1) == ((), ())


def test_a_worker_reports_whose_code_it_runs(cluster: Cluster, thing: Remote) -> None:
    identity, own = thing.ready().result(10), cluster.call_context()
    assert identity["node"] == "n0" and identity["pid"] == thing.pid != os.getpid()
    assert {k: identity[k] for k in ("code_path", "version")} == {k: own[k] for k in ("code_path", "version")}


def test_a_rank_goes_before_all_else_on_its_processor(cluster: Cluster, thing: Remote) -> None:
    """Ray starts its workers at niceness 15, ours were no exception: whatever else a machine did, be it another run's tests or the
    command that was typed, took the processor from a rank, and so from all ranks that waited for it.
    """
    beside = cluster.start_vault("n0", THING, {"start": 0})
    beside.ready().result(START_S)
    assert niceness(thing.pid) == {os.getpriority(os.PRIO_PROCESS, 0)}
    assert niceness(beside.pid) == {BESIDE_NICENESS}
    if (weight := Path(f"/proc/{beside.pid}/autogroup")).exists():  # where sessions are weighed against each other
        assert weight.read_text().split()[-1] == str(BESIDE_NICENESS)
    beside.kill()


def niceness(pid: int) -> set[int]:
    """Of all threads of a process."""
    return {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()}


def test_what_a_worker_prints_goes_to_the_log_it_was_given(thing: Remote, tmp_path: Path) -> None:
    thing.call("speak", "one").result(10)
    thing.redirect(str(tmp_path / "g2_r0.log")).result(10)
    thing.call("speak", "two").result(10)
    assert tail(str(tmp_path / "log")).splitlines() == ["made with 5", "one", "child one"]
    assert tail(str(tmp_path / "g2_r0.log"), 1) == "child two" and tail("/nowhere") == ""


@pytest.mark.parametrize(
    ("method", "args", "exit", "cause"),
    [
        ("leave", (3,), Exit.EXITED, "exited with code 3"),
        ("crash", (), Exit.SIGNAL, r"killed by signal 11 \(SIGSEGV\)"),
    ],
)
def test_a_death_is_decoded(thing: Remote, method: str, args: tuple[Any, ...], exit: Exit, cause: str) -> None:
    with pytest.raises(WorkerDied, match=cause) as caught:
        thing.call(method, *args).result(20)
    assert caught.value.exit is exit and caught.value.node == "n0"


def test_a_killed_worker_is_noticed_at_once_and_replaced_in_its_place(cluster: Cluster, thing: Remote) -> None:
    call, pid = thing.call("sleep", 60.0, lane="train"), thing.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=r"killed by signal 9 \(SIGKILL\)") as caught:
        call.result(20)
    assert time.monotonic() - began < 5 and caught.value.signal == 9
    again = cluster.start_worker("n0", "n0.0", THING, {"start": 1})
    assert again.ready().result(START_S)["pid"] != pid
    assert cluster.workers()["n0.0"].pid == again.pid
    again.kill()


def test_a_constructor_that_fails_is_told_as_that(cluster: Cluster) -> None:
    with pytest.raises(WorkerDied, match="its constructor failed: RuntimeError: no such thing") as caught:
        cluster.start_worker("n1", "n1.0", "hosted:Unmakeable", {}).ready().result(START_S)
    assert caught.value.exit is Exit.INIT
    with pytest.raises(WorkerDied, match="must be an importable 'module:name', got 'hosted:Nothing'"):
        cluster.start_worker("n1", "n1.0", "hosted:Nothing", {}).ready().result(START_S)


def test_workers_do_not_share_random_numbers(cluster: Cluster) -> None:
    crew = [cluster.start_worker("n1", f"n1.{i}", THING, {}) for i in range(2)]
    draws = [remote.call("random").result(START_S) for remote in crew]
    assert len({d[0] for d in draws}) == len({d[1] for d in draws}) == 2
    for remote in crew:
        remote.kill()


def test_a_controller_finds_the_crew_again_after_it_was_killed(cluster: Cluster) -> None:
    worker = cluster.start_worker("n1", "n1.0", THING, {"start": 40})
    vault = cluster.start_vault("n1", THING, {})
    controller = cluster.start_controller("hosted:Director", {"run_id": "test"})
    assert controller.call("ask", "n1.0", 2).result(START_S) == 42
    pid = controller.call("pid").result(10)
    assert pid in Machines(str(cluster.control)).pids("head")  # it once lived on some node, and was lost with it
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(CallError):
        for _ in range(500):
            controller.call("pid").result(10)
            time.sleep(0.01)
    found = found_again(cluster)
    crew, vaults = found.call("crew").result(START_S)
    assert found.call("pid").result(10) != pid
    assert "n1.0" in crew and vaults == ["n1"]
    for remote in (worker, vault, found):
        remote.kill()


def test_a_killed_node_fails_its_calls_at_once_and_comes_back_under_its_name(cluster: Cluster) -> None:
    machines = Machines(str(cluster.control))
    worker = cluster.start_worker("n2", "n2.0", THING, {})
    vault = cluster.start_vault("n2", THING, {})
    worker.ready().result(START_S)
    child = worker.call("spawn").result(10)
    life = node_of(cluster, "n2").ray_id
    calls = [remote.call("sleep", 60.0, lane="train") for remote in (worker, vault)]
    killed = machines.kill("n2")
    began = time.monotonic()
    assert worker.pid in killed and child in killed and not cluster.confirm("n2")
    assert [exit_of(call) for call in calls] == [Exit.NODE, Exit.NODE]
    assert exit_of(worker.call("add", 1)) is Exit.NODE
    assert time.monotonic() - began < 4
    wait_until(lambda: not node_of(cluster, "n2").alive)
    assert "n2.0" not in cluster.workers() and "n2" not in cluster.vaults()
    with pytest.raises(ClusterError, match="node: must be alive, got n2; alive are head, n0, n1"):
        cluster.start_worker("n2", "n2.0", THING, {})
    machines.add("n2")
    wait_until(lambda: node_of(cluster, "n2").alive)
    assert node_of(cluster, "n2").ray_id != life
    wait_until(lambda: "n2" in {node.name for node in cluster.usable()})
    wait_until(lambda: life[:12] not in cluster._reserved())  # else Ray would place it again, before any other
    again = cluster.start_worker("n2", "n2.0", THING, {"start": 1})
    assert again.call("add", 1).result(START_S) == 2
    again.kill()


def test_pending_resources_are_explained(cluster: Cluster) -> None:
    assert len(cluster.require(num_nodes=3, timeout_s=20)) == 3
    said = (
        r"cluster.num_nodes: 5 nodes with 2 CPUs each are needed, present 3 \(n0, n1, n2\), missing 2 after 0.2 s "
        r"\(head: the head, which holds no workers\)"
    )
    with pytest.raises(ClusterError, match=said):
        cluster.require(num_nodes=5, timeout_s=0.2)


def test_notice_to_a_node_shows_as_draining(cluster: Cluster) -> None:
    Machines(str(cluster.control)).add("n3")
    wait_until(lambda: any(node.name == "n3" and node.alive for node in cluster.nodes()))
    vault = cluster.start_vault("n3", THING, {})  # a node that holds nothing leaves at once
    vault.ready().result(START_S)
    cluster.drain("n3", deadline_s=60)
    wait_until(lambda: node_of(cluster, "n3").draining)
    time.sleep(1.5)
    assert vault.call("add", 1).result(10) == 1 and node_of(cluster, "n3").draining
    with pytest.raises(ClusterError, match="n3: draining"):
        cluster.require(num_nodes=9, timeout_s=0)


def test_one_process_has_one_cluster(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match="must not be connected to Ray yet"):
        Cluster.open(run_id="other")
    with pytest.raises(ClusterError, match="run_id: must be a run of this cluster, got other"):
        Cluster.inside("other")


def test_signal_handlers_and_working_directory_are_as_they_were(cluster: Cluster) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Path.cwd().exists() and not sys.argv[0].endswith("/driver")
    assert threading.current_thread() is threading.main_thread()


def test_a_hostile_working_directory_reaches_no_worker(tmp_path: Path) -> None:
    """A user's folder holds `launch.py`, `configs/` and worse: Ray would put it first on the path of every worker."""
    for name in (
        "launch.py",
        "configs/__init__.py",
        "parallel/__init__.py",
        "framework/__init__.py",
        "json.py",
        "hosted.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('a stranger was imported')")
    program = f"""
        from framework.cluster.cluster import Cluster
        from framework.cluster.local_cluster import LocalCluster
        early = LocalCluster.begin(preload=())
        cluster = Cluster.open(run_id="hostile", import_paths=[{HERE!r}], early=early)
        seen = cluster.start_worker("n0", "n0.0", "hosted:Thing", {{}}).call("surroundings").result(60)
        cluster.close()
        print(repr(seen))
    """
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "RAY_ADDRESS": "127.0.0.1:1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = eval(done.stdout)
    assert str(tmp_path) not in seen["path"] and seen["path"][-1] == HERE
    assert seen["cwd"] != str(tmp_path)
    assert Path(seen["launch"]).is_relative_to(ROOT) and Path(seen["parallel"]).is_relative_to(ROOT)
    assert seen["env"]["OMP_NUM_THREADS"] == "1" and seen["env"]["HOLDFAST_NODE"] == "n0"
    assert not Path(seen["env"]["HOLDFAST_SHM_DIR"]).exists()


@pytest.mark.slow
def test_it_joins_a_cluster_that_somebody_else_has_started(tmp_path: Path) -> None:
    """Ray's own start, with its agents and runtime environments, and no warden to ask how a process ended."""
    folder = Path("/tmp") / f"hfj{os.getpid()}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    script = str(Path(sys.executable).parent / "ray")
    node_ip = "127.0.0.3"
    start = [
        script,
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--port=0",
        "--include-dashboard=false",
        f"--temp-dir={folder}",
    ]
    start += [f"--node-ip-address={node_ip}", "--object-store-memory=80000000", "--disable-usage-stats"]
    server = subprocess.Popen(
        start, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert server.stdout is not None
        address = next(found.group() for line in server.stdout if (found := re.search(rf"{node_ip}:\d+", line)))
        program = f"""
            from framework.cluster.cluster import Cluster
            cluster = Cluster.open(run_id="joined", address={address!r}, import_paths=[{HERE!r}], workers_per_node=2)
            (node,) = cluster.require(num_nodes=1, timeout_s=30)
            worker = cluster.start_worker(node.name, "w", "hosted:Thing", {{"start": 1}})
            assert worker.call("add", 1).result(60) == 2
            assert worker.call("surroundings").result(10)["env"]["OMP_NUM_THREADS"] == "1"
            assert cluster.confirm(node.name) and cluster.control is None
            try:
                worker.call("leave", 3).result(30)
            except Exception as error:
                print(type(error).__name__, error)
            cluster.close()
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            cwd=tmp_path, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("WorkerDied worker:w on ")
    finally:
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(folder).encode() in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def test_one_process_may_have_one_cluster_after_the_other() -> None:
    program = f"""
        import os
        from framework.cluster.cluster import Cluster
        from framework.cluster.local_cluster import LocalCluster
        before = dict(os.environ)
        for number in range(2):
            early = LocalCluster.begin(preload={PRELOAD!r})
            cluster = Cluster.open(run_id=f"run{{number}}", import_paths=[{HERE!r}], early=early)
            print(cluster.start_worker("n0", "n0.0", "hosted:Thing", {{"start": number}}).call("add", 1).result(60))
            cluster.close()
        print({{k for k in os.environ if os.environ[k] != before.get(k)}})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:3] == ["1", "2", "set()"], done.stderr


def test_names_are_stable_and_told_apart() -> None:
    def row(id: str, ip: str, alive: bool = True, **labels: str) -> dict[str, Any]:
        return {
            "NodeID": id,
            "NodeManagerAddress": ip,
            "NodeName": ip,
            "Alive": alive,
            "Labels": {f"holdfast.io/{k}": v for k, v in labels.items()},
        }

    assert machine_names([row("aaaa1", "10.0.0.1"), row("bbbb2", "10.0.0.2", node="big")]) == ["10.0.0.1", "big"]
    assert machine_names([row("aaaa1", "10.0.0.1"), row("bbbb2", "10.0.0.1")]) == ["10.0.0.1-aaaa", "10.0.0.1-bbbb"]
    assert machine_names([row("aaaa1", "10.0.0.1"), row("bbbb2", "10.0.0.1", alive=False)]) == ["10.0.0.1", "10.0.0.1"]
    assert sorted(["n10", "n2", "head", "n1"], key=natural) == ["head", "n1", "n2", "n10"]


def test_a_run_keeps_to_the_number_of_nodes_it_was_asked_for() -> None:
    """In a large cluster of somebody's, workers were started on every node there was, as spares."""
    nodes = [Node(name=f"n{i}", ray_id=str(i), ip="", alive=True) for i in range(12)]
    assert [n.name for n in joined(nodes, ours={}, at_most=3)] == ["n0", "n1", "n2"]
    assert [n.name for n in joined(nodes, ours={"n11": 2, "n4": 1}, at_most=3)] == ["n4", "n11", "n0"]


def test_an_address_where_no_cluster_is_gets_one_line_soon(tmp_path: Path) -> None:
    """Ray looks for a cluster for more than a minute, and then says so in a traceback."""
    for address, said in (
        ("127.0.0.1:1", "must answer at 127.0.0.1:1, got: [Errno 111] Connection refused; start one with ray start --head"),
        ("ray://127.0.0.1:10001", "must be local, auto or IP:PORT, got ray://127.0.0.1:10001; type the command on a node"),
    ):
        with pytest.raises(ClusterError, match=re.escape(said)):
            connect("nobody", address, timeout_s=0.3)


def found_again(cluster: Cluster) -> Remote:
    """The controller, once it answers."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        found = cluster.find_controller(timeout_s=5)
        if found is not None:
            with contextlib.suppress(CallError):
                found.ready().result(START_S)
                return found
        time.sleep(0.1)
    raise AssertionError("no controller came back")


def exit_of(call: Call) -> Exit:
    with pytest.raises(WorkerDied) as caught:
        call.result(20)
    return caught.value.exit


def node_of(cluster: Cluster, name: str) -> Node:
    return next(node for node in cluster.nodes() if node.name == name)


def wait_until(holds: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"still not so after {timeout_s} s"
        time.sleep(0.02)
