"""The inventory as values."""

from __future__ import annotations

from typing import Any

from framework.cluster.nodes import machine_names, one_life


def row(id: str, port: int, *, name: str = "n1", alive: bool = True) -> dict[str, Any]:
    return {"NodeID": id, "NodeManagerAddress": "10.0.0.1", "NodeManagerPort": port, "NodeName": name, "Alive": alive, "Labels": {}}


def test_a_machine_that_was_rebooted_has_one_life() -> None:
    """n1 came back before Ray had given up its former life: both were listed as alive, so that for half a second there
    were an n1-4ee7 and an n1-d956, and n1 was gone a second time, which counted towards its quarantine.
    """
    rows = one_life([row("4ee7", 1000), row("d956", 2000), row("aaaa", 3000, name="n2")], lambda r: r["NodeManagerPort"] != 1000)
    assert [r["Alive"] for r in rows] == [False, True, True]
    living = [r for r in rows if r["Alive"]]
    assert machine_names(living) == ["n1", "n2"]


def test_several_raylets_of_one_machine_stay_several() -> None:
    rows = one_life([row("4ee7", 1000), row("d956", 2000)], lambda r: True)
    assert machine_names(rows) == ["n1-4ee7", "n1-d956"]


def test_nobody_is_asked_where_names_differ() -> None:
    asked: list[str] = []
    rows = [row("4ee7", 1000), row("d956", 2000, name="n2"), row("0000", 1, alive=False)]
    assert one_life(rows, lambda r: bool(asked.append(r["NodeID"]))) == rows and asked == []
