"""Way probe: has the agents of machines ask each other, all pairs in both directions, over the addresses that training uses.

    ends ---> where each agent listens          reach  every one asks every other one over TCP
                                                send   and sends datagrams one way, meanwhile
    heard --> how many came                     the agents answer over the controller's own ways to them

Rule of this file: it asks; `fault_tolerance/detection/reachability.py` judges. A machine that does not answer is left out of it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

from fault_tolerance.detection.reachability import Stage, Way
from framework.cluster.cluster import Remote, answers

ENDS_S, ASK_S = 3.0, 15.0
SETTLE_S = 0.2  # for the last datagrams


def probe_ways(agents: Mapping[str, Remote]) -> dict[tuple[str, str], Way]:
    """What every one of these machines saw of every other one. Takes 1 s, some more where ways are dead."""
    token = secrets.token_hex(8)
    ends = answers({node: agent.call("probe", "ends", token) for node, agent in agents.items()}, ENDS_S)
    if len(ends) < 2:
        return {}
    sending, asking = {}, {}
    for number, node in enumerate(ends):
        peers = [*list(ends)[number + 1 :], *list(ends)[:number]]  # each begins with another one
        letters = {peer: ends[peer][1] for peer in peers}
        sending[node] = agents[node].call("probe", "send", letters, token=token, name=node)
        asking[node] = agents[node].call("probe", "reach", {peer: ends[peer][0] for peer in peers})
    told, sent = answers(asking, ASK_S), answers(sending, ENDS_S)
    time.sleep(SETTLE_S)
    heard = answers({node: agents[node].call("probe", "heard", token) for node in told}, ENDS_S)
    return {
        (a, b): Way(Stage(stage), seconds, failure, sent.get(a, 0), heard[b].get(a, 0))
        for a, found in told.items()
        for b, (stage, seconds, failure) in found.items()
        if a in heard and b in heard and a in sent
    }
