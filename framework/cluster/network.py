"""Network: through which interface a process talks to the other nodes: the one that bears its node's own address.

Collectives would otherwise ask the host's name for an address, which on many clusters is 127.0.1.1, a management network,
or nothing at all. Nodes reach each other by the addresses under which they joined, so that is the way to use. What the
user has set in the environment stays.

Rule of this file: it reads the interfaces of this machine, and decides.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence

import psutil

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def interfaces() -> dict[str, tuple[str, ...]]:
    """The addresses of this machine by interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: tuple(a.address.partition("%")[0] for a in addresses if a.family in families)
        for name, addresses in psutil.net_if_addrs().items()
    }


def interface_of(address: str, found: Mapping[str, Sequence[str]]) -> str:
    """The interface that bears an address, or nothing. All of 127.0.0.0/8 is borne by the loopback interface."""
    wanted = ipaddress.ip_address(address)
    for name, addresses in found.items():
        for text in addresses:
            own = ipaddress.ip_address(text)
            if own == wanted or (own.is_loopback and wanted.is_loopback):
                return name
    return ""


def socket_environment(address: str, environment: Mapping[str, str], found: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What a process of the node at `address` has to set so that its collectives use that interface."""
    name = interface_of(address, found)
    return {variable: name for variable in VARIABLES if name and variable not in environment}


def used_address(address: str, environment: Mapping[str, str], found: Mapping[str, Sequence[str]]) -> str:
    """The address over which collectives of the node at `address` go: another one where the user's variables name an interface."""
    names = [environment[variable] for variable in VARIABLES if environment.get(variable) in found]
    if not names or address in found[names[0]]:
        return address
    return next((other for other in found[names[0]] if (":" in other) == (":" in address)), address)


def chosen(address: str, environment: Mapping[str, str], found: Mapping[str, Sequence[str]]) -> str:
    """The interface that collectives of the node at `address` use, and the reason, in words."""
    own = interface_of(address, found)
    named = environment.get(VARIABLES[0])
    if named is None or named == own:
        return f"{own} (bears {address})" if own else f"none bears {address}"
    return f"{named} ({VARIABLES[0]} says so; {address} is on {own or 'none'})"
