"""Vault to vault: how fast bytes of one process's shared memory reach another's, and what both processors pay for it.

    sender: a memfd            receiver: a buffer that was made and touched before         loopback, blocks of --block bytes

    wire        as the vaults do it: `Channel.send_bytes` out of the mapped memory, `recv_into` the place
    sendfile    `os.sendfile` from the memfd, `recv_into` the place
    zeromq      PUSH/PULL with copy=False, then a copy into the place
    flight      Arrow Flight `do_get` of a record batch over the memory, then a copy into the place
    ray         an object put by an actor on one raylet, got by a process on another, then a copy into the place

The last copy of three of them is there because the bytes must end in the vault's own memory, and those transports hand
out memory of theirs. Transports take turns, round by round; one that is not installed is left out, with the reason.

    python -m benchmarks.transport [--rounds 5] [--bytes 268435456] [--block 4194304]

It writes `benchmarks/results/transport.json` and `.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from fault_tolerance.snapshots.arena import Segment
from fault_tolerance.snapshots.wire import Channel

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"wire": None, "sendfile": None, "zeromq": "zmq", "flight": "pyarrow.flight", "ray": "ray"}
Receive = Callable[[np.ndarray[Any, np.dtype[np.uint8]]], None]


def main() -> None:
    """Measure, print, and write the results."""
    options = _options()
    rows, reasons = [], dict[str, str]()
    place = np.zeros(options.bytes, np.uint8)
    with ExitStack() as stack:
        ready: dict[str, tuple[Receive, list[psutil.Process]]] = {}
        for name, module in NEEDS.items():
            if module is not None and importlib.util.find_spec(module.partition(".")[0]) is None:
                reasons[name] = f"{module} is not installed"
                continue
            ready[name] = stack.enter_context(_TRANSPORTS[name](options.bytes, options.block))
        for receive, _ in ready.values():
            receive(place)  # connections, first buffers
        for number in range(options.rounds):
            for name in [*ready][number % len(ready) :] + [*ready][: number % len(ready)]:
                rows.append({"transport": name, "round": number, **_timed(*ready[name], place)})
    report = {"bytes": options.bytes, "block": options.block, "load": os.getloadavg()[0], "rows": rows, "left_out": reasons}
    options.out.mkdir(exist_ok=True, parents=True)
    (options.out / "transport.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "transport.md").write_text(_markdown(report))
    print(_markdown(report))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=int, default=256 << 20)
    parser.add_argument("--block", type=int, default=4 << 20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve(options.serve, options.bytes, options.block)
        sys.exit(0)
    return options


def _timed(receive: Receive, others: list[psutil.Process], place: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, float]:
    place[:: 1 << 20] = 0
    processes = [psutil.Process(), *others]
    before = sum(sum(p.cpu_times()[:2]) for p in processes)
    began = time.perf_counter()
    receive(place)
    took = time.perf_counter() - began
    assert bool((place[:: 1 << 20] == 7).all()), "what arrived is not what was sent"
    return {"seconds": took, "cpu_s": sum(sum(p.cpu_times()[:2]) for p in processes) - before}


# ---- the sender, a process of its own


def _serve(name: str, nbytes: int, block: int) -> None:
    segment = Segment(nbytes, name="bench")
    segment.view[:] = 7
    if name == "flight":
        _serve_flight(segment, block)
    elif name == "zeromq":
        _serve_zeromq(segment, nbytes, block)
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            _say(server.getsockname()[1])
            client, _ = server.accept()
            while client.recv(1):
                _send(name, client, segment, nbytes, block)


def _send(name: str, client: socket.socket, segment: Segment, nbytes: int, block: int) -> None:
    channel = Channel(client)
    for start in range(0, nbytes, block):
        if name == "wire":
            channel.send_bytes(segment.view[start : start + block].data)
            continue
        at, end = start, min(start + block, nbytes)
        while at < end:
            at += os.sendfile(client.fileno(), segment.fd, at, end - at)


def _serve_zeromq(segment: Segment, nbytes: int, block: int) -> None:
    import zmq  # type: ignore[import-not-found]

    context = zmq.Context()
    push, asked = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    push.set_hwm(4)
    ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in (push, asked)]
    _say(*ports)
    while asked.recv():
        for start in range(0, nbytes, block):
            push.send(segment.view[start : start + block].data, copy=False)


def _serve_flight(segment: Segment, block: int) -> None:
    import pyarrow as pa
    from pyarrow import flight

    schema = pa.schema([("bytes", pa.uint8())])
    parts = [pa.record_batch([pa.array(segment.view[s : s + block])], schema=schema) for s in range(0, segment.nbytes, block)]

    class Server(flight.FlightServerBase):  # type: ignore[misc]
        def do_get(self, context: Any, ticket: Any) -> Any:
            return flight.GeneratorStream(schema, iter(parts))

    server = Server("grpc://127.0.0.1:0")
    _say(server.port)
    server.serve()


def _say(*ports: int) -> None:
    print(json.dumps(ports), flush=True)


# ---- the receivers


@contextmanager
def _sender(name: str, nbytes: int, block: int) -> Iterator[tuple[list[int], psutil.Process]]:
    command = [sys.executable, "-m", "benchmarks.transport", "--serve", name, "--bytes", str(nbytes), "--block", str(block)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield json.loads(process.stdout.readline()), psutil.Process(process.pid)  # type: ignore[union-attr]
    finally:
        process.kill()
        process.wait()


@contextmanager
def _sockets(name: str, nbytes: int, block: int) -> Iterator[tuple[Receive, list[psutil.Process]]]:
    with _sender(name, nbytes, block) as (ports, process), socket.create_connection(("127.0.0.1", ports[0])) as sock:
        channel = Channel(sock)

        def receive(place: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
            sock.sendall(b"?")
            for start in range(0, nbytes, block):
                channel.recv_into(place[start : start + block].data)

        yield receive, [process]


@contextmanager
def _zeromq(nbytes: int, block: int) -> Iterator[tuple[Receive, list[psutil.Process]]]:
    import zmq

    with _sender("zeromq", nbytes, block) as (ports, process):
        context = zmq.Context()
        pull, ask = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        pull.set_hwm(4)
        pull.connect(f"tcp://127.0.0.1:{ports[0]}")
        ask.connect(f"tcp://127.0.0.1:{ports[1]}")

        def receive(place: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
            ask.send(b"?")
            for start in range(0, nbytes, block):
                np.copyto(place[start : start + block], np.frombuffer(pull.recv(copy=False).buffer, np.uint8))

        yield receive, [process]
        context.destroy(linger=0)


@contextmanager
def _flight(nbytes: int, block: int) -> Iterator[tuple[Receive, list[psutil.Process]]]:
    from pyarrow import flight

    with _sender("flight", nbytes, block) as (ports, process):
        client = flight.connect(f"grpc://127.0.0.1:{ports[0]}")

        def receive(place: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
            at = 0
            for chunk in client.do_get(flight.Ticket(b"all")):
                part = chunk.data.column(0).to_numpy()
                np.copyto(place[at : at + len(part)], part)
                at += len(part)

        yield receive, [process]
        client.close()


@contextmanager
def _ray(nbytes: int, block: int) -> Iterator[tuple[Receive, list[psutil.Process]]]:
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_memory_monitor_refresh_ms="0")
    store = 3 * nbytes
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False})
    cluster.add_node(num_cpus=1, object_store_memory=store)
    ray.init(cluster.address, log_to_driver=False)

    class Sender:
        def __init__(self) -> None:
            self.memory = np.full(nbytes, 7, np.uint8)

        def put(self) -> list[Any]:
            return [ray.put(self.memory[start : start + block]) for start in range(0, nbytes, block)]

    sender = ray.remote(num_cpus=1)(Sender).remote()  # type: ignore[attr-defined]

    def receive(place: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        for number, part in enumerate(ray.get(sender.put.remote())):
            np.copyto(place[number * block : number * block + block], ray.get(part))

    try:
        ray.get(sender.put.remote())
        names = ("raylet", "gcs_server", "ray::Sender")
        everybody = psutil.Process().children(recursive=True)
        yield receive, [p for p in everybody if p.name().startswith(names)]
    finally:
        ray.shutdown()
        cluster.shutdown()


_TRANSPORTS: dict[str, Callable[[int, int], Any]] = {
    "wire": lambda nbytes, block: _sockets("wire", nbytes, block),
    "sendfile": lambda nbytes, block: _sockets("sendfile", nbytes, block),
    "zeromq": _zeromq,
    "flight": _flight,
    "ray": _ray,
}


def _markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Vault to vault: transports",
        "",
        f"{report['bytes'] >> 20} MiB out of one process's memory into another's, in blocks of {report['block'] >> 20} MiB, over",
        f"loopback, medians of interleaved rounds; load {report['load']:.1f}. CPU: seconds of both ends' processors for a GB.",
        "",
        "| | GB/s | to wire | CPU s/GB |",
        "| --- | --- | --- | --- |",
    ]
    speed = {name: _median(report, name, "seconds") for name in NEEDS if any(r["transport"] == name for r in report["rows"])}
    for name, seconds in speed.items():
        cpu = _median(report, name, "cpu_s") / report["bytes"] * 1e9
        lines.append(f"| {name} | {report['bytes'] / seconds / 1e9:.2f} | {speed['wire'] / seconds:.2f} | {cpu:.2f} |")
    lines += [f"| {name} | left out: {reason} | | |" for name, reason in report["left_out"].items()]
    lines += [
        "",
        "The vaults use `wire`. What it has to be is no slower than the others for the same processor time, and without a",
        "dependency, a port, a copy and threads of its own; ZeroMQ overlaps sending and receiving by an I/O thread at each end.",
    ]
    return "\n".join(lines) + "\n"


def _median(report: dict[str, Any], name: str, key: str) -> float:
    return statistics.median(row[key] for row in report["rows"] if row["transport"] == name)


if __name__ == "__main__":
    main()
