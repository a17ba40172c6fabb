"""Wire: authenticated connections that carry a JSON header and raw bytes.

    | "HFv1" | header length u32 | payload length u64 | header: JSON | payload: raw bytes ... |

    client                        server           `proof(x) = HMAC-SHA256(run secret, role | run | nonces)`
      |  hello: run, nonce_c        |
      |---------------------------->|              both sides prove that they know the secret of the run, so neither
      |  nonce_s, proof(server)     |              a stranger nor a vault of another run is ever talked to; what
      |<----------------------------|              follows is checked by hashes, not encrypted
      |  proof(client)              |
      |---------------------------->|
      |  {}                         |
      |<----------------------------|

Every wait has a deadline, every length a limit, and nothing is unpickled. A payload is received into memory that the
caller gives, so a block goes from the socket to its place without a copy, and the GIL is free meanwhile.

Addresses are `host:port`, or `@name` for a Unix socket in Linux's abstract namespace, which leaves no file behind.

Rule of this file: bytes in, bytes out. It knows no vault and no snapshot.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MAGIC = b"HFv1"
_FRAME = struct.Struct("!4sIQ")
MAX_HEADER = 64 << 20
MAX_HELLO = 4096
SEND_SLICE = 1 << 20
WAKE_BYTES = 256 << 10  # who waits for more than this is woken when so much is there: a quarter less processor time

Header = dict[str, Any]


class WireError(RuntimeError):
    """The connection is of no more use: closed, silent beyond its deadline, or not speaking our language."""


class Refused(RuntimeError):
    """The other side answered, and said no. `kind` is a word for programs (`fenced`, `busy`, `unknown`, ...)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Traffic:
    """Bytes that went through sockets, counted where they are sent and received; shared by many connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent = 0
        self.received = 0

    def add(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes."""
        with self._lock:
            self.sent += sent
            self.received += received


class Channel:
    """One connection. Not for several threads at once: a caller that shares it holds a lock of its own."""

    def __init__(self, sock: socket.socket, *, timeout_s: float = 30.0, traffic: Traffic | None = None) -> None:
        self.sock = sock
        self.timeout_s = timeout_s
        self.traffic = traffic if traffic is not None else Traffic()
        self._wakes = 1
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))

    def send(self, header: Mapping[str, Any], payload: Sequence[memoryview] = (), *, length: int | None = None) -> None:
        """Send a frame. With `length`, only the frame's head goes out, and the caller sends that many bytes after it."""
        text = json.dumps(header, separators=(",", ":")).encode()
        total = length if length is not None else sum(part.nbytes for part in payload)
        self.send_bytes(memoryview(_FRAME.pack(MAGIC, len(text), total) + text))
        for part in payload:
            self.send_bytes(part)

    def send_bytes(self, view: memoryview, *, pace: Callable[[int], None] | None = None) -> None:
        """Send raw bytes; `pace(n)` is called before each slice of n bytes and may sleep."""
        view = view.cast("B") if view.nbytes else view
        for start in range(0, view.nbytes, SEND_SLICE):
            part = view[start : start + SEND_SLICE]
            if pace is not None:
                pace(part.nbytes)
            self._guard(self.sock.sendall, part)
            self.traffic.add(sent=part.nbytes)

    def recv(self, *, wait_s: float | None = None, limit: int = MAX_HEADER) -> tuple[Header, int]:
        """The next header, and how many bytes of payload must be received after it.

        `wait_s` is how long the other side may stay silent before the frame begins (default: the channel's
        deadline; negative: for ever).
        """
        first = self._first_byte(self.timeout_s if wait_s is None else wait_s)
        magic, header_bytes, payload_bytes = _FRAME.unpack(first + bytes(self.recv_bytes(_FRAME.size - 1)))
        if magic != MAGIC or header_bytes > limit:
            raise WireError(f"wire: a frame must begin with {MAGIC!r} and a header under {limit} bytes, got {magic!r}")
        try:
            header = json.loads(bytes(self.recv_bytes(header_bytes)))
        except ValueError as error:
            raise WireError("wire: a header must be JSON") from error
        if not isinstance(header, dict):
            raise WireError("wire: a header must be a JSON object")
        return header, payload_bytes

    def recv_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes. Raises WireError if they do not come in time."""
        view = view.cast("B") if view.nbytes else view
        done = 0
        self._guard(self.sock.settimeout, self.timeout_s)
        while done < view.nbytes:
            self._wake_at(view.nbytes - done)
            got = self._guard(self.sock.recv_into, view[done:])
            if not got:
                raise WireError("wire: the other side closed the connection in the middle of a frame")
            done += got
        self._wake_at(1)
        self.traffic.add(received=done)

    def recv_bytes(self, length: int) -> bytearray:
        """The next `length` bytes."""
        data = bytearray(length)
        self.recv_into(memoryview(data))
        return data

    def reply(self, *, wait_s: float | None = None) -> tuple[Header, int]:
        """As `recv`, but raises Refused where the other side answered with an error."""
        header, payload = self.recv(wait_s=wait_s)
        if "error" in header:
            raise Refused(str(header["error"]), str(header.get("message", header["error"])))
        return header, payload

    def call(
        self, header: Mapping[str, Any], payload: Sequence[memoryview] = (), *, wait_s: float | None = None
    ) -> tuple[Header, bytearray]:
        """Send a request, wait `wait_s` for the answer, and give its header and payload."""
        self.send(header, payload)
        answer, length = self.reply(wait_s=wait_s)
        return answer, self.recv_bytes(length)

    def send_fds(self, fds: Sequence[int]) -> None:
        """Pass file descriptors over a Unix socket; the receiver owns its copies."""
        self._guard(socket.send_fds, self.sock, [b"F"], list(fds))

    def recv_fds(self, count: int) -> list[int]:
        """`count` file descriptors that the other side passed."""
        self._guard(self.sock.settimeout, self.timeout_s)
        _, fds, _, _ = self._guard(socket.recv_fds, self.sock, 1, count)
        if len(fds) != count:
            for fd in fds:
                os.close(fd)
            raise WireError(f"wire: {count} file descriptors must come, got {len(fds)}")
        return list(fds)

    def close(self) -> None:
        """End the connection; whoever waits on it, on either side, wakes up."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it was already down
        self.sock.close()

    def _first_byte(self, wait_s: float) -> bytes:
        self._guard(self.sock.settimeout, None if wait_s < 0 else max(wait_s, 0.001))
        first: bytes = self._guard(self.sock.recv, 1)
        if not first:
            raise WireError("wire: the other side closed the connection")
        self.traffic.add(received=1)
        self._guard(self.sock.settimeout, self.timeout_s)
        return first

    def _wake_at(self, left: int) -> None:
        """While at least WAKE_BYTES are to come, sleep until so many are there; else until anything is."""
        wakes = WAKE_BYTES if left >= WAKE_BYTES else 1
        if wakes != self._wakes and self.sock.family != socket.AF_UNIX:
            self._guard(self.sock.setsockopt, socket.SOL_SOCKET, socket.SO_RCVLOWAT, wakes)
            self._wakes = wakes

    def _guard(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except TimeoutError as error:
            raise WireError(f"wire: the other side must answer in time, got nothing for {self.timeout_s} s") from error
        except (OSError, ValueError) as error:
            raise WireError(f"wire: the connection broke: {error}") from error


def listen(address: str) -> socket.socket:
    """A listening socket. Raises OSError if the address is taken, which for `@name` means: by a live process."""
    if address.startswith("@"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("\0" + address[1:])
    else:
        host, port = split(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    sock.listen(512)
    return sock


def connect(
    address: str, *, run: str, secret: bytes, timeout_s: float = 10.0, traffic: Traffic | None = None
) -> Channel:
    """An authenticated connection. Raises WireError if nobody answers in time or the other side lacks the secret."""
    try:
        if address.startswith("@"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            sock.connect("\0" + address[1:])
        else:
            sock = socket.create_connection(split(address), timeout=timeout_s)
    except OSError as error:
        raise WireError(f"wire: {address} must accept a connection within {timeout_s} s, got: {error}") from error
    channel = Channel(sock, timeout_s=timeout_s, traffic=traffic)
    try:
        _introduce(channel, run=run, secret=secret)
    except (WireError, Refused):
        channel.close()
        raise
    return channel


def _introduce(channel: Channel, *, run: str, secret: bytes) -> None:
    mine = os.urandom(16).hex()
    channel.send({"op": "hello", "run": run, "nonce": mine})
    answer, _ = channel.reply()
    theirs = str(answer.get("nonce"))
    if not hmac.compare_digest(str(answer.get("proof")), _proof(secret, "server", run, mine, theirs)):
        raise WireError("wire: the other side must prove that it knows the secret of the run; it is not ours")
    channel.send({"proof": _proof(secret, "client", run, mine, theirs)})
    channel.reply()


def welcome(channel: Channel, *, run: str, secret: bytes) -> None:
    """The server's half of the introduction. Raises WireError, after a word to the other side, if it fails."""
    hello, payload = channel.recv(limit=MAX_HELLO)
    theirs = str(hello.get("nonce"))
    if hello.get("op") != "hello" or hello.get("run") != run or payload:
        channel.send({"error": "stranger", "message": f"wire: this is run {run}, got {str(hello.get('run'))[:64]}"})
        raise WireError("wire: a connection must begin with a hello of this run")
    mine = os.urandom(16).hex()
    channel.send({"nonce": mine, "proof": _proof(secret, "server", run, theirs, mine)})
    answer, payload = channel.recv(limit=MAX_HELLO)
    if payload or not hmac.compare_digest(str(answer.get("proof")), _proof(secret, "client", run, theirs, mine)):
        channel.send({"error": "stranger", "message": "wire: the secret of the run must be proven"})
        raise WireError("wire: a client did not know the secret of the run")
    channel.send({})


def _proof(secret: bytes, role: str, run: str, client: str, server: str) -> str:
    return hmac.new(secret, "|".join((role, run, client, server)).encode(), "sha256").hexdigest()


def split(address: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `[v6]:port`. Raises ValueError if it is neither."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"wire: an address must read host:port, got {address!r}")
    return host.strip("[]"), int(port)


def local_address(run: str, node: str) -> str:
    """Where the vault of a node is found by the processes of its machine."""
    name = f"holdfast/{run}/{node}"
    return "@" + (name if len(name) <= 100 else "holdfast/" + hashlib.sha256(name.encode()).hexdigest())
