"""Recording: a worker's end of the record of its collectives.

    order -> open(ring of this generation) -> groups are made -> mark(step, phase) ... -> close

The extension may still be compiling when a generation begins, on the machine or on another one of the crew (the first run
on a machine, or one that has just joined). Then all make their groups without it, and it is attached later, by all ranks between the same two operations: each says in the step's report whether
it could begin, and when all can, all do.

Rule of this file: no failure to record is a failure to train. Without a record there is one line that says why.
"""

from __future__ import annotations

from collections.abc import Callable

from parallel.record import Phase
from parallel.recorder import Recorder, install
from parallel.recorder_build import library, why_not

PHASES = {
    "forward": Phase.TRAIN, "staging": Phase.SNAPSHOT, "protection": Phase.SNAPSHOT, "evaluate": Phase.EVALUATE,
    "test": Phase.EVALUATE,
}  # fmt: skip


class Recording:
    """The record of one generation in this process: from the start, or else when all ranks can. `tell` is called when it
    becomes known how it stands.
    """

    def __init__(
        self, ring: str | None, *, rank: int, generation: int, tell: Callable[[str], None], at_once: bool = True
    ) -> None:
        self._ring, self._rank, self._generation, self._tell = ring, rank, generation, tell
        self._step = 0
        self._recorder: Recorder | None = None
        self._failed = ring is None
        self.reason = "no ring was lent" if ring is None else ""
        if at_once and self._built():
            self._install()
        tell(standing(self))

    @property
    def on(self) -> bool:
        """Whether operations are recorded."""
        return self._recorder is not None

    def ready(self) -> bool:
        """Whether it is off and could begin now: the extension has been built meanwhile."""
        return self._recorder is None and self._built()

    def begin(self) -> bool:
        """Record the groups that exist from here on. Returns whether it is on now."""
        self._install()
        try:
            if self._recorder is not None:
                self._recorder.attach_all()
        except Exception as error:  # whatever torch's groups are made of: training goes on without
            self._recorder, self._failed, self.reason = None, True, f"{type(error).__name__}: {error}"
        self._tell(standing(self))
        return self.on

    def mark(self, step: int, phase: str) -> None:
        """Note what the trainer does; phases inside a training step are part of it."""
        self._step = step
        if self._recorder is not None and phase in PHASES:
            self._recorder.mark(step, PHASES[phase])

    def over(self) -> None:
        """Training has ended for this rank: from here on it keeps nobody waiting."""
        if self._recorder is not None:
            self._recorder.mark(self._step, Phase.IDLE)

    def abort(self) -> None:
        """Free whoever waits in an operation of this process. From any thread."""
        if self._recorder is not None:
            self._recorder.abort()

    def close(self) -> None:
        """New groups are not recorded any more."""
        if self._recorder is not None:
            self._recorder.close()

    def _built(self) -> bool:
        return not self._failed and library().exists()

    def _install(self) -> None:
        try:
            made = install(self._ring, rank=self._rank, generation=self._generation, compile=False)
        except (OSError, ValueError, RuntimeError) as error:
            self._failed, self.reason = True, f"{type(error).__name__}: {error}"
            return
        self.reason = made.reason
        if made.on:
            self._recorder = made
        else:
            self._failed = True


def standing(recording: Recording) -> str:
    """One line on the record for the run's events."""
    if recording.on:
        return f"every collective is recorded: {recording.reason}"
    if recording.reason:
        return f"collectives are not recorded, watched by liveness only: {recording.reason}"
    reason = why_not()
    if reason is not None:
        return f"collectives are not recorded, watched by liveness only: {reason}"
    return "the recorder is being built beside the run; collectives are recorded as soon as every machine of it has it"
