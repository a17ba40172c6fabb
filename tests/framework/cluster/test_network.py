"""Which interface collectives use."""

from framework.cluster.network import interface_of, interfaces, socket_environment, used_address

FOUND = {"lo": ("127.0.0.1", "::1"), "eth0": ("192.168.1.7",), "ib0": ("10.0.0.7", "fe80::1"), "down0": ()}


def test_the_interface_is_the_one_that_bears_the_node_s_address():
    assert interface_of("10.0.0.7", FOUND) == "ib0"
    assert interface_of("fe80::1", FOUND) == "ib0"
    assert interface_of("127.0.0.4", FOUND) == "lo"
    assert interface_of("10.9.9.9", FOUND) == ""


def test_what_the_user_has_set_stays():
    assert socket_environment("10.0.0.7", {"GLOO_SOCKET_IFNAME": "eth0"}, FOUND) == {
        "NCCL_SOCKET_IFNAME": "ib0",
        "TP_SOCKET_IFNAME": "ib0",
    }
    assert socket_environment("10.9.9.9", {}, FOUND) == {}


def test_ways_are_asked_over_the_interface_that_collectives_use():
    assert used_address("192.168.1.7", {}, FOUND) == "192.168.1.7"
    assert used_address("192.168.1.7", {"GLOO_SOCKET_IFNAME": "ib0"}, FOUND) == "10.0.0.7"
    assert used_address("192.168.1.7", {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth0"}, FOUND) == "192.168.1.7"
    assert used_address("192.168.1.7", {"NCCL_SOCKET_IFNAME": "^docker0"}, FOUND) == "192.168.1.7"
    assert used_address("192.168.1.7", {"GLOO_SOCKET_IFNAME": "down0"}, FOUND) == "192.168.1.7"


def test_this_machine_has_a_loopback_interface():
    assert interface_of("127.0.0.1", interfaces()) == "lo"
