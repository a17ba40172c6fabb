"""Config: the one door between what a person wrote and what the program believes.

    YAML + overrides --Hydra--> plain dicts and lists --decode--> Config (frozen)     behind it, nobody sees a DictConfig

Values, defaults included, live in `configs/*.yaml`; what they mean stands here. A `null` that means "derive it" is
filled in by `config_derived.py`, so that what is behind the door holds numbers; rules that tie several keys together
stand in `config_rules.py`, and what a resumed run may change in `config_identity.py`.

Rule of this file: every field is read by somebody, and a wrong value is refused here, in one line, with what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from framework import decoding
from framework.config_derived import derive
from framework.config_rules import check
from framework.data import sources
from framework.data.sources import Source
from framework.decoding import (
    Below1,
    Count,
    Fraction,
    Keyed,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Rest,
    Rule,
    Via,
)
from framework.drills.faults import Fault
from parallel.layout import Layout

Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv_zero_bubble"]
Betas = tuple[Below1, Below1]
ZeroStage = Annotated[int, Rule("1, 2 or 3", lambda v: v in (1, 2, 3), 1)]
Ratio = Annotated[float, Rule("a number above 1", lambda v: v > 1, 1.5)]
Parity = Annotated[int, Rule("an integer from 0 to 127", lambda v: 0 <= v <= 127, 1)]
GroupSize = Annotated[int, Rule("an integer from 2 to 255", lambda v: 2 <= v <= 255, 8)]
ChunkBytes = Annotated[
    int, Rule("a multiple of 4096 from 64 KiB to 1 GiB", lambda v: v % 4096 == 0 and 2**16 <= v <= 2**30, 2**22)
]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What is trained. `target` names the class; `extra` holds the keys that only a user's own class knows.

    `vocab_size` None: that of the tokenizer. A larger one is padded with ids that never occur.
    """

    target: Annotated[str, Keyed("_target_")]
    vocab_size: PositiveInt | None
    num_layers: PositiveInt
    dim: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    ffn_dim: PositiveInt
    rope_theta: PositiveFloat
    norm_eps: PositiveFloat
    tie_embeddings: bool
    extra: Annotated[Mapping[str, Any], Rest()]


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """AdamW and its schedule, counted in optimizer steps. `grad_clip` 0 means none.

    `num_steps` is where this run ends, `schedule_steps` the length of the learning-rate schedule.
    `final_lr_ratio` is the last rate over the peak; `decay_fraction` the part of a wsd schedule that decays.
    """

    lr: PositiveFloat
    betas: Betas
    eps: PositiveFloat
    weight_decay: NonNegative
    grad_clip: NonNegative
    warmup_steps: Count
    schedule: Literal["cosine", "linear", "wsd", "constant"]
    final_lr_ratio: Fraction
    decay_fraction: Fraction
    num_steps: PositiveInt
    schedule_steps: PositiveInt
    global_batch: PositiveInt


@dataclass(frozen=True, slots=True)
class LayoutConfig:
    """How the work is cut. With `auto` the plan chooses the degrees; the others are as in `parallel.layout`.

    `num_microbatches` per data-parallel replica and step. `zero_stage` and `offload_optimizer` belong to DeepSpeed.
    """

    auto: bool
    pp: PositiveInt
    dp: PositiveInt
    tp: PositiveInt
    schedule: Schedule
    num_microbatches: PositiveInt
    engine: Literal["fsdp", "deepspeed"]
    precision: Literal["fp32", "bf16"]
    sequence_parallel: bool
    reshard_after_forward: bool
    activation_checkpointing: bool
    compile: bool
    zero_stage: ZeroStage
    offload_optimizer: bool

    @property
    def degrees(self) -> Layout | None:
        """The layout asked for, or None when the plan is to choose."""
        return None if self.auto else Layout(pp=self.pp, dp=self.dp, tp=self.tp)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The machines. `address`: "local" starts a private Ray with `num_nodes` emulated nodes; else the one to join.

    Spares come on top of `num_nodes`. `domains`: one failure domain per node, or the name of the Ray node label that
    holds it; None: every node is its own.
    """

    address: str
    num_nodes: PositiveInt
    workers_per_node: PositiveInt
    spare_nodes: Count
    min_nodes: PositiveInt
    max_nodes: PositiveInt
    domains: tuple[str, ...] | str | None
    start_timeout_s: PositiveFloat
    device: Literal["auto", "cpu", "cuda"]
    preflight: bool

    @property
    def num_workers(self) -> int:
        """Seats on the nodes that train, spares not counted."""
        return self.num_nodes * self.workers_per_node


@dataclass(frozen=True, slots=True)
class DurableConfig:
    """Checkpoints on storage. `dir` None: `<run_dir>/checkpoints`; `every_steps` 0: only the other occasions."""

    dir: str | None
    every_steps: Count
    at_end: bool
    on_signal: bool
    keep_last: PositiveInt
    keep_every: Count
    keep_best: Count
    retries: Count


@dataclass(frozen=True, slots=True)
class FaultToleranceConfig:
    """Snapshots in the memory of the nodes. `every_steps` 0: none; "auto": from their cost and the failure rate.

    `max_steps_lost`: so many steps at most are taken beyond the newest protected snapshot; None: the interval, and those that are
    taken while the newest one is on its way. `tolerate` nodes of a coding group may be lost together; `group_size` None: one group. Rates are per node, None
    means as fast as it goes; `scrub_mb_s` 0 turns the background check of held blocks off.
    """

    every_steps: Count | Literal["auto"]
    max_steps_lost: PositiveInt | None
    tolerate: Parity
    group_size: GroupSize | None
    chunk_bytes: ChunkBytes
    max_rate_mb_s: PositiveFloat | None
    scrub_mb_s: NonNegative
    mtbf_hours: PositiveFloat
    durable: DurableConfig


@dataclass(frozen=True, slots=True)
class DetectConfig:
    """When a run is in trouble, and whether somebody slow is acted upon or only named.

    A hang is a collective older than the longer of `hang_timeout_s` and `hang_steps` step times; compiling and first
    steps may take `first_step_timeout_s`. `max_skips`: bad steps left out in a row before the run goes back, and then
    stops; `spike_sigma` None: only a loss that is no number is bad; `digest_every` 0: the state's bits are not checked.
    """

    action: Literal["observe", "act"]
    ping_period_s: PositiveFloat
    ping_timeout_s: PositiveFloat
    hang_timeout_s: PositiveFloat
    hang_steps: PositiveFloat
    first_step_timeout_s: PositiveFloat
    slow_ratio: Ratio
    max_skips: Count
    spike_sigma: PositiveFloat | None
    digest_every: Count
    quarantine_s: NonNegative


@dataclass(frozen=True, slots=True)
class DrillConfig:
    """Faults to inject on purpose (`framework.drills.faults`). `on_call`: also those that are called for while the run goes on."""

    faults: tuple[Fault, ...]
    on_call: bool


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """How a run is watched. `eval_every` 0: only at the end; `sample_bytes` 0: no generated text at the end."""

    wandb: Literal["offline", "online", "disabled"]
    wandb_project: str
    wandb_entity: str | None
    wandb_name: str | None
    tensorboard: bool
    csv: bool
    prometheus: bool
    progress: Literal["auto", "rich", "plain", "off"]
    eval_every: Count
    eval_samples: Count
    sample_bytes: Count


def _decode_source(value: Any, where: str) -> Source:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: must be a group of keys, got {decoding.show(value)}; choose one, as in data=text")
    return sources.decode(value, where=where)


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a run is told. `resume`: a run directory, a checkpoint directory, "auto" or None."""

    run_dir: str
    seed: Count
    resume: str | None
    model: ModelConfig
    data: Annotated[Source, Via(_decode_source, sources.encode)]
    optim: OptimConfig
    layout: LayoutConfig
    cluster: ClusterConfig
    fault_tolerance: FaultToleranceConfig
    detect: DetectConfig
    drill: DrillConfig
    monitor: MonitorConfig


def decode(plain: Mapping[str, Any]) -> Config:
    """The config that these plain values mean. Raises ValueError, one line, for anything that is not one."""
    config = decoding.decode(Config, derive(plain), "")
    check(config)
    return config


def plain(config: Config) -> dict[str, Any]:
    """The inverse of `decode`, for `config.yaml`: derived values included."""
    values: dict[str, Any] = decoding.encode(config)
    return values


def with_steps(config: Config, num_steps: int) -> Config:
    """The same run, ending elsewhere; its learning-rate schedule stays."""
    return replace(config, optim=replace(config.optim, num_steps=num_steps))
