"""Server: accepts connections, proves who is there, and gives each a thread that answers its requests one by one.

Rule of this file: it does not know what the requests mean. A request that fails is answered with the reason; one that
leaves the connection in an unknown state ends it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fault_tolerance.snapshots.wire import Channel, Header, Refused, Traffic, WireError, listen, welcome

MAX_CONNECTIONS = 1024
MAX_PAYLOAD = 256 << 20
HELLO_S = 10.0


class Connection:
    """One client. `pid` is its process if it is on this machine, as the kernel says, else None."""

    def __init__(self, channel: Channel, *, pid: int | None) -> None:
        self.channel = channel
        self.pid = pid
        self.left = 0

    @property
    def local(self) -> bool:
        """Whether it came over the Unix socket."""
        return self.pid is not None

    def take(self) -> bytearray:
        """The payload of the request. Raises Refused if it is too long."""
        if self.left > MAX_PAYLOAD:
            raise Refused("too_long", f"server: a payload must be under {MAX_PAYLOAD} bytes, got {self.left}")
        return self.channel.recv_bytes(self._taken())

    def take_into(self, view: memoryview) -> None:
        """The payload, into memory of its length. Raises Refused if the length differs."""
        if self.left != view.nbytes:
            raise Refused("length", f"server: the payload must have {view.nbytes} bytes, got {self.left}")
        self._taken()
        self.channel.recv_into(view)

    def _taken(self) -> int:
        left, self.left = self.left, 0
        return left


Handler = Callable[[Connection, Header], None]


class Server:
    """Threads around listening sockets. `handle` answers one request; `gone` hears of every connection that ends."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        run: str,
        secret: bytes,
        handle: Handler,
        gone: Callable[[Connection], None],
        timeout_s: float = 30.0,
    ) -> None:
        """Raises OSError if an address is taken."""
        self._run, self._secret, self._handle, self._gone = run, secret, handle, gone
        self._timeout_s = timeout_s
        self.traffic = {"tcp": Traffic(), "unix": Traffic()}
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._closed = False
        self._listeners: list[socket.socket] = []
        self._acceptors: list[threading.Thread] = []
        with contextlib.ExitStack() as stack:
            for address in addresses:
                self._listeners.append(listen(address))
                stack.callback(self._listeners[-1].close)
            stack.pop_all()

    @property
    def port(self) -> int:
        """The TCP port."""
        return next(int(s.getsockname()[1]) for s in self._listeners if s.family != socket.AF_UNIX)

    def start(self) -> None:
        """Begin to accept."""
        for sock in self._listeners:
            self._acceptors.append(threading.Thread(target=self._accept, args=(sock,), daemon=True, name="vault-accept"))
            self._acceptors[-1].start()

    def close(self) -> None:
        """Stop accepting and end all connections."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for sock in self._listeners:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._acceptors:
            thread.join(1.0)  # an address is free only when nobody is in `accept` any more
        for connection in connections:
            connection.channel.close()

    def _accept(self, sock: socket.socket) -> None:
        while True:
            try:
                client, _ = sock.accept()
            except OSError:
                return  # closed
            with self._lock:
                refuse = self._closed or len(self._open) >= MAX_CONNECTIONS
            if refuse:
                client.close()
            else:
                threading.Thread(target=self._serve, args=(client,), daemon=True, name="vault-serve").start()

    def _serve(self, client: socket.socket) -> None:
        local = client.family == socket.AF_UNIX
        channel = Channel(client, timeout_s=HELLO_S, traffic=self.traffic["unix" if local else "tcp"])
        connection = Connection(channel, pid=_peer_pid(client) if local else None)
        with self._lock:
            self._open.add(connection)
        try:
            welcome(channel, run=self._run, secret=self._secret)
            channel.timeout_s = self._timeout_s
            while True:
                header, connection.left = channel.recv(wait_s=-1)
                self._answer(connection, header)
        except WireError:
            pass  # the client left, or was none of ours
        finally:
            channel.close()
            with self._lock:
                self._open.discard(connection)
            self._gone(connection)

    def _answer(self, connection: Connection, header: Header) -> None:
        try:
            self._handle(connection, header)
        except Refused as refused:
            self._say_no(connection, refused.kind, str(refused))
        except OSError as error:
            self._say_no(connection, "failed", f"server: {header.get('op')!r} failed: {error}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            self._say_no(connection, "malformed", f"server: {header.get('op')!r} failed: {error!r}")

    def _say_no(self, connection: Connection, kind: str, message: str) -> None:
        scratch = memoryview(bytearray(1 << 16))
        while connection.left:
            part = scratch[: min(connection.left, scratch.nbytes)]
            connection.left -= part.nbytes
            connection.channel.recv_into(part)
        connection.channel.send({"error": kind, "message": message})


def _peer_pid(client: socket.socket) -> int:
    pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(pid)


def reply(connection: Connection, header: dict[str, Any] | None = None, payload: Sequence[memoryview] = ()) -> None:
    """Answer a request."""
    connection.channel.send(header or {}, payload)
