"""Inventory: the machines of a run as the controller sees them now: who may be used, is warm, joins, leaves, is barred.

    Ray's list, the machines' own answers, membership --places--> what a plan may seat
    idle machines --growth--> processes started, settled, worth it --> trouble `resize`, at a step boundary
    told to leave --leaving--> a snapshot first --> `release`, when nobody needs what they hold
    dead ways between machines --> one end of each is left out (`fault_tolerance/detection/reachability.py`)

Rule of this file: it looks, asks and tells the journal; who is barred is decided in `membership.py`, what is worth growing
to in `plan.py`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from fault_tolerance.detection.reachability import LeftOut, leave_out
from framework import run_dir
from framework.cluster.cluster import Cluster
from framework.cluster.nodes import ClusterError, Node, joined
from framework.cluster.waiting import await_nodes
from framework.config import Config
from framework.control.broken_ways import BrokenWays
from framework.control.crew import Crew
from framework.control.incident import Trouble
from framework.control.journal import Journal
from framework.control.membership import Membership, News
from framework.control.memory import Memory
from framework.control.pool import Pool
from framework.plan import Place, Plan, Unfit, worth_growing
from framework.planning.planner import Planner

LOOK_S = 0.2
SLOW_START_S = 10.0
MAX_UNREADY = 3  # processes of a joining machine that come to nothing
GROW_LOOK_S = 0.5  # how often it is asked whether growing would pay
CALM_S = 2.0  # how often the machines are listed while nobody is suspected


class Stopped(Exception):  # noqa: N818  (an event, not a mistake)
    """The run was ended before it had begun to train."""


class Inventory:
    """Of one run, over its life. `stopped` says whether the run was asked to end."""

    def __init__(
        self,
        config: Config,
        *,
        cluster: Cluster,
        journal: Journal,
        pool: Pool,
        memory: Memory,
        planner: Planner,
        ways: BrokenWays,
        stopped: Callable[[], bool],
    ) -> None:
        self._wish, self._cluster, self._journal = config.cluster, cluster, journal
        self._pool, self._memory, self._planner, self._stopped = pool, memory, planner, stopped
        self._ways, self._left_out = ways, LeftOut((), "")
        self._members = Membership(bar_s=config.detect.quarantine_s)
        self._members.recall(run_dir.events(config.run_dir), time.time())
        self._asked_to_grow = 0.0
        self._seen: tuple[Node, ...] = ()
        self._seen_at = 0.0
        self._missing: tuple[str, ...] = ()
        self._unready: Counter[str] = Counter()

    @property
    def seated(self) -> tuple[str, ...]:
        """The nodes that the newest plan gave ranks to."""
        return () if self._journal.plan is None else self._journal.plan.nodes

    def see(self) -> tuple[Node, ...]:
        """The machines as they are listed now; who has joined or gone is told."""
        nodes = self._cluster.nodes()
        self._tell(self._members.see(nodes, time.time(), answers=self._cluster.confirm))
        for text in self._ways.news():
            self._journal.event("node", reason=text, cause="way")
        self._seen, self._seen_at = nodes, time.monotonic()
        return nodes

    def glance(self, *, worried: bool) -> tuple[Node, ...]:
        """`see` now and then; at every look while somebody is suspected to be gone."""
        return self.see() if worried or time.monotonic() - self._seen_at >= CALM_S else self._seen

    def places(self) -> tuple[Place, ...]:
        """The nodes that can be used now: alive (asked, not believed), not leaving, not in quarantine, and no dead way between two."""
        seen = self.see()
        nodes = [n for n in seen if n.alive and not n.head and n.name not in self._members.out]
        silent = self._cluster.unanswering(n.name for n in nodes)
        nodes = [n for n in nodes if n.name not in silent]
        self._pool.reap(nodes)
        able = {n.name for n in self._cluster.usable()} & {n.name for n in self._members.usable(seen, time.time())}
        warm = {n.name: self._pool.warm(n.name) for n in nodes}
        at_most = max(self._wish.max_nodes, self._wish.num_nodes + self._wish.spare_nodes)
        usable = joined([n for n in nodes if n.name in able], ours=warm, at_most=at_most)
        places = [Place(n.name, self._wish.workers_per_node, n.domain, warm[n.name]) for n in usable]
        places.sort(key=lambda place: place.node not in self.seated)  # who trains now goes before spares
        out = self._leave_out([place.node for place in places])
        return tuple(place for place in places if place.node not in out)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The machines that are done without, because of dead ways to others."""
        return self._left_out.nodes

    def _leave_out(self, nodes: Sequence[str]) -> tuple[str, ...]:
        found = leave_out(self._ways.dead, nodes, seated=self.seated)
        if found.nodes != self._left_out.nodes:
            for node in set(found.nodes) - set(self._left_out.nodes):
                self._journal.event("node", reason=found.reason, cause="left_out", node=node)
            for node in set(self._left_out.nodes) & set(nodes) - set(found.nodes):
                self._journal.event("node", reason=f"{node} is not left out any more: {found.reason}", cause="expired", node=node)
            self._left_out = found
        return found.nodes

    # waiting

    def await_first(self) -> None:
        """Wait for the nodes that a run begins with. Raises Unfit when they do not come in time, Stopped when the run is
        ended meanwhile.
        """
        try:
            there = await_nodes(
                self._cluster,
                num_nodes=self._wish.num_nodes,
                timeout_s=self._wish.start_timeout_s,
                stopped=self._stopped,
                tell=lambda text: self._journal.event("trouble", reason=text, cause="resources"),
            )
        except ClusterError as error:
            raise Unfit(str(error)) from error
        if not there:
            raise Stopped

    def enough_places(self) -> tuple[Place, ...]:
        """`places`; where they are fewer than the run may go on with, some are waited for: the others hold the state."""
        places, least, wait_s = self.places(), self._wish.min_nodes, self._wish.start_timeout_s
        deadline = time.monotonic() + wait_s
        if 0 < len(places) < least:
            lack = f"cluster.min_nodes: {least} nodes must be usable, got {len(places)}"
            self._journal.event("node", reason=f"{lack}; waiting up to {wait_s:.0f} s for one to come back", cause="waiting")
        while 0 < len(places) < least and time.monotonic() < deadline and not self._stopped():
            time.sleep(LOOK_S)
            places = self.places()
        return places

    # joining

    def warm_spares(self, plan: Plan) -> None:
        """Start agents and workers on nodes that have no rank, without waiting for them."""
        self._pool.start(self._seats_on(place.node for place in self.places() if place.node not in plan.nodes))

    def growth(self, plan: Plan) -> Trouble | None:
        """The wish to grow, when machines have joined and settled, are warm, and would pay; asked twice a second while there
        are machines without a rank.
        """
        idle = {node.name for node in self._seen if node.alive and not node.head} - set(plan.nodes)
        if not idle or time.monotonic() - self._asked_to_grow < GROW_LOOK_S:
            return None
        self._asked_to_grow = time.monotonic()
        places = self.places()
        fresh = self._fresh(plan, places)
        if not fresh:
            return None
        situation = self._planner.situation(places, source=plan.source, generation=plan.generation)
        option = worth_growing(plan, self._planner.wish(), situation)
        if option is None:
            return None
        if not self._pool.is_ready(self._seats_on(fresh)):
            self._explain(fresh)
            return None
        return Trouble("resize", (), tuple(fresh), f"{', '.join(fresh)} joined: {option}", self._journal.reached, time.time())

    def _fresh(self, plan: Plan, places: Sequence[Place]) -> list[str]:
        """Nodes without a rank that have been here for a while, so that a flapping one is not grown onto; made warm."""
        idle = [place.node for place in places if place.node not in plan.nodes]
        self._pool.start(self._seats_on([*idle, *self._left_out.nodes]))
        settled = self._members.settled(self._cluster.nodes(), time.time())
        return [name for name in idle if name in settled]

    def _explain(self, fresh: Sequence[str]) -> None:
        """Say why nodes that are here are not grown onto: a process of theirs failed, or does not come up."""
        self.tell_unready()
        missing = self._pool.not_up(self._seats_on(fresh))
        if self._members.age_s(fresh[0], time.time()) > SLOW_START_S and missing and missing != self._missing:
            self._missing = missing
            reason = f"{fresh[0]} is not grown onto: {', '.join(missing)} must be up, and is not for {SLOW_START_S:.0f} s"
            self._journal.event("node", reason=reason, cause="unready", node=fresh[0])

    def tell_unready(self) -> None:
        """Say which processes came to nothing since the last time. A machine that has no rank is barred when it happens there
        again and again, or would.
        """
        told, self._pool.unready = self._pool.unready, []
        for error in told:
            node = error.nodes[0]
            self._journal.event("node", reason=str(error), cause="unready", node=node)
            self._unready[node] += 1
            if node not in self.seated and (error.misfit or self._unready[node] >= MAX_UNREADY):
                self.evict([node], error.misfit or f"processes on {node} came to nothing {self._unready[node]} times")

    def _seats_on(self, nodes: Iterable[str]) -> list[str]:
        return [f"{node}.{slot}" for node in nodes for slot in range(self._wish.workers_per_node)]

    # leaving

    def leaving(self, crew: Crew, nodes: Sequence[Node]) -> frozenset[str]:
        """The nodes that were given notice: by Ray, or of which everything was asked to leave, be it what stands for them
        or all that trains there.
        """
        told, life = crew.leaving(), {node.name: node.ray_id for node in nodes}
        whole = {n for n in crew.plan.nodes if n in self._memory.leaving or told.issuperset(crew.plan.ranks_on(n))}
        for node in whole - self._members.leaving:
            self._members.leave(node, life.get(node, ""), time.time())
        return frozenset(whole) | {n.name for n in nodes if n.draining}

    def release(self, plan: Plan) -> None:
        """Let go of nodes that were asked to leave, now that nobody needs what their vaults hold."""
        draining = {node.name for node in self._cluster.nodes() if node.draining} | self._members.leaving
        for node in sorted(draining & set(self._pool.agents) - set(plan.nodes)):
            self._pool.end_node(node)
            self._journal.event("node", reason=f"{node} has left: nothing of the run is on it any more", cause="left", node=node)

    def bury(self, nodes: Iterable[str]) -> None:
        """Take machines that are gone off the books, and note how often that has happened to each."""
        for node in nodes:
            self._pool.forget(node=node)
            self._tell(self._members.lost(node, time.time()))

    def evict(self, nodes: Iterable[str], reason: str) -> None:
        """Bar machines for a while."""
        self._tell([self._members.evict(node, reason, time.time()) for node in nodes])

    def _tell(self, news: Sequence[News]) -> None:
        for item in news:
            self._journal.event("node", reason=item.reason, cause=item.what, node=item.node, until=item.until)
            if item.what == "gone" and item.node not in self.seated:
                self._pool.forget(node=item.node)
