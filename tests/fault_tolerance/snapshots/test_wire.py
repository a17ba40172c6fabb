import os
import socket
import struct
import threading
import time

import pytest

from fault_tolerance.snapshots.server import Server, reply
from fault_tolerance.snapshots.wire import MAGIC, Channel, Refused, Traffic, WireError, connect, local_address, split

SECRET = b"s" * 16


class Echo:
    """A server that answers with what it got, or refuses."""

    def __init__(self, run="r", secret=SECRET):
        self.gone = []
        self.server = Server(
            ["127.0.0.1:0", local_address(run, f"echo{os.getpid()}")],
            run=run,
            secret=secret,
            handle=self.handle,
            gone=self.gone.append,
        )
        self.server.start()
        self.address = f"127.0.0.1:{self.server.port}"

    def handle(self, connection, header):
        if header["op"] == "refuse":
            raise Refused("never", "echo: no")
        if header["op"] == "sleep":
            time.sleep(header["s"])
        data = connection.take()
        reply(connection, {"got": header, "pid": connection.pid}, [memoryview(data)] if data else ())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.close()


def call(channel, header, payload=b""):
    return channel.call(header, [memoryview(payload)] if payload else ())


def test_headers_and_payloads_arrive_as_they_were_sent():
    with Echo() as echo:
        channel = connect(echo.address, run="r", secret=SECRET)
        for size in (0, 1, 17, 1 << 20, (5 << 20) + 3):
            payload = os.urandom(size)
            header, data = call(channel, {"op": "echo", "size": size}, payload)
            assert header["got"]["size"] == size
            assert header["pid"] is None
            assert bytes(data) == payload


def test_the_unix_socket_tells_who_calls_and_leaves_no_file():
    with Echo() as echo:
        channel = connect(local_address("r", f"echo{os.getpid()}"), run="r", secret=SECRET)
        assert call(channel, {"op": "echo"})[0]["pid"] == os.getpid()
        assert echo.server.traffic["unix"].received > 0 == echo.server.traffic["tcp"].received


def test_bytes_are_counted_alike_on_both_sides():
    with Echo() as echo:
        mine = Traffic()
        channel = connect(echo.address, run="r", secret=SECRET, traffic=mine)
        call(channel, {"op": "echo"}, b"x" * 100_000)
        theirs = echo.server.traffic["tcp"]
        for _ in range(100):  # the server counts what it sent just after we have it
            if theirs.sent == mine.received:
                break
            time.sleep(0.01)
        assert (mine.sent, mine.received) == (theirs.received, theirs.sent)
        assert 200_000 < mine.sent + mine.received < 202_000


@pytest.mark.parametrize(("run", "secret"), [("other", SECRET), ("r", b"wrong"), ("other", b"wrong")])
def test_a_stranger_is_not_served(run, secret):
    with Echo() as echo, pytest.raises((Refused, WireError)):
        connect(echo.address, run=run, secret=secret)


def test_a_server_without_the_secret_is_not_believed():
    """A process that took over the port of a dead vault must not be given state, whatever it answers."""
    with Echo(secret=b"another") as echo, pytest.raises(WireError, match="secret"):
        connect(echo.address, run="r", secret=SECRET)


def test_a_recorded_introduction_is_of_no_use_a_second_time():
    with Echo() as echo:
        sent = []
        original = Channel.send_bytes

        def record(self, view, **options):
            sent.append(bytes(view))
            original(self, view, **options)

        Channel.send_bytes = record
        try:
            mine = connect(echo.address, run="r", secret=SECRET)
        finally:
            Channel.send_bytes = original
        hello, proof = sent[0], next(part for part in sent if b'{"proof"' in part and b"nonce" not in part)
        replay = socket.create_connection(split(echo.address))
        channel = Channel(replay, timeout_s=5)
        channel.send_bytes(memoryview(hello))
        channel.recv()
        channel.send_bytes(memoryview(proof))
        with pytest.raises(Refused, match="secret"):
            channel.reply()
        mine.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n" * 4,
        struct.pack("!4sIQ", b"XXXX", 2, 0) + b"{}",
        struct.pack("!4sIQ", MAGIC, 1 << 30, 0),
        struct.pack("!4sIQ", MAGIC, 2, 1 << 60) + b"{}",
        struct.pack("!4sIQ", MAGIC, 4, 0) + b"[1] ",
        struct.pack("!4sIQ", MAGIC, 5, 0) + b"{nope",
    ],
)
def test_garbage_ends_its_connection_and_nothing_else(garbage):
    with Echo() as echo:
        healthy = connect(echo.address, run="r", secret=SECRET)
        sock = socket.create_connection(split(echo.address))
        sock.sendall(garbage)
        sock.settimeout(5)
        while sock.recv(4096):
            pass
        assert call(healthy, {"op": "echo"})[0]["got"] == {"op": "echo"}


def test_a_refusal_leaves_the_connection_usable_even_with_a_payload_unread():
    with Echo() as echo:
        channel = connect(echo.address, run="r", secret=SECRET)
        for _ in range(3):
            with pytest.raises(Refused, match="no") as refused:
                call(channel, {"op": "refuse"}, b"x" * 300_000)
            assert refused.value.kind == "never"
            assert call(channel, {"op": "echo"}, b"abc")[1] == b"abc"
        with pytest.raises(Refused, match="KeyError"):
            call(channel, {"no": "op"})
        assert call(channel, {"op": "echo"}, b"abc")[1] == b"abc"


def test_silence_beyond_the_deadline_is_an_error():
    with Echo() as echo:
        channel = connect(echo.address, run="r", secret=SECRET, timeout_s=0.2)
        began = time.monotonic()
        with pytest.raises(WireError, match="time"):
            channel.call({"op": "sleep", "s": 3})
        assert time.monotonic() - began < 2


def test_nobody_there_is_an_error_that_names_the_address():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(WireError, match=address):
        connect(address, run="r", secret=SECRET, timeout_s=1)
    with pytest.raises(WireError, match="@nobody"):
        connect("@nobody", run="r", secret=SECRET, timeout_s=1)


@pytest.mark.slow
def test_closing_wakes_up_whoever_waits():
    with Echo() as echo:
        channel = connect(echo.address, run="r", secret=SECRET)
        threading.Timer(0.2, channel.close).start()
        with pytest.raises(WireError):
            channel.call({"op": "sleep", "s": 1})
        for _ in range(100):
            if echo.gone:
                break
            time.sleep(0.1)
        assert echo.gone


def test_a_taken_address_is_refused_while_its_owner_lives_and_free_afterwards():
    with Echo(), pytest.raises(OSError, match="in use"):
        Echo()
    Echo().server.close()


def test_addresses_are_read_strictly():
    assert split("[::1]:80") == ("::1", 80)
    for bad in ("host", "host:", ":80", "host:x"):
        with pytest.raises(ValueError, match="host:port"):
            split(bad)
    assert len(local_address("r" * 90, "n" * 90)) < 107
