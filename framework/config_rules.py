"""Config rules: what several keys must satisfy together, each rule a generator of complaints.

The first complaint wins. What layout, schedule and model owe each other is asked of `parallel.checks`, which knows.

Rule of this file: pure functions of a config. It reads no file, machine or environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from framework.decoding import unknown
from parallel import checks
from parallel.checks import ZERO_BUBBLE
from parallel.layout import Layout

if TYPE_CHECKING:
    from framework.config import Config

OWN_MODEL = "framework.model.Decoder"
MODEL_KEYS = (
    "vocab_size", "num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "rope_theta", "norm_eps", "tie_embeddings",
)  # fmt: skip
BYTE_IDS = 256

Complaints = Iterator[str]


def check(config: Config) -> None:
    """Raises ValueError with the first complaint of the first rule that has one."""
    for rule in RULES:
        for complaint in rule(config):
            raise ValueError(complaint)


def model_shape(config: Config) -> Complaints:
    """The dimensions of our own decoder fit each other; a user's class checks its own."""
    model = config.model
    if model.target != OWN_MODEL:
        return
    if model.extra:
        raise unknown("model", next(iter(model.extra)), MODEL_KEYS)
    if model.dim % model.num_heads or model.dim // model.num_heads % 2:
        advice = f"for example model.dim={model.num_heads * 64}"
        yield f"model.dim: must be an even multiple of model.num_heads {model.num_heads}, got {model.dim}; {advice}"
    if model.num_heads % model.num_kv_heads:
        advice = f"use model.num_kv_heads={_choices(model.num_heads)}"
        yield f"model.num_heads {model.num_heads} does not divide by model.num_kv_heads {model.num_kv_heads}; {advice}"


def vocabulary(config: Config) -> Complaints:
    """Every id of the byte tokenizer has a row in the embedding."""
    size = config.model.vocab_size
    if config.data.tokenizer == "bytes" and config.data.kind != "synthetic" and size is not None and size < BYTE_IDS:
        yield f"model.vocab_size: must be at least the {BYTE_IDS} ids of data.tokenizer=bytes, got {size}; use null"


def automatic(config: Config) -> Complaints:
    """`layout=auto` and a degree of one's own exclude each other."""
    for axis in ("pp", "dp", "tp"):
        degree = getattr(config.layout, axis)
        if config.layout.auto and degree != 1:
            yield f"layout.{axis}: is for layout=auto to choose, got {degree}; leave it out, or use layout=default"


def enough_workers(config: Config) -> Complaints:
    """The layout's ranks have seats."""
    degrees, cluster = config.layout.degrees, config.cluster
    if degrees is None or degrees.world <= cluster.num_workers:
        return
    nodes = -(-degrees.world // cluster.workers_per_node)
    yield (
        f"layout: pp {degrees.pp} x dp {degrees.dp} x tp {degrees.tp} needs {degrees.world} workers, the cluster has "
        f"{cluster.num_workers}; use cluster.num_nodes={nodes}, more cluster.workers_per_node, or layout=auto"
    )


def parallelism(config: Config) -> Complaints:
    """Layout, schedule, microbatches, model and wrapping go together (`parallel.checks`)."""
    wish, model, own = config.layout, config.model, config.model.target == OWN_MODEL
    degrees = wish.degrees
    if degrees is None and wish.schedule not in ZERO_BUBBLE:
        return  # the plan asks the same of every candidate; zero-bubble schedules are refused their traps right here
    try:
        checks.check(
            checks.ModelNumbers(
                num_layers=model.num_layers if degrees is not None else 4,
                vocab_size=model.vocab_size,
                num_heads=model.num_heads if own else None,
                num_kv_heads=model.num_kv_heads if own else None,
                ffn_dim=model.ffn_dim if own else None,
            ),
            layout=degrees or Layout(pp=2),
            schedule=wish.schedule,
            num_microbatches=wish.num_microbatches if degrees is not None else 4,
            wrapping=checks.Wrapping(
                precision=wish.precision,
                sequence_parallel=wish.sequence_parallel,
                reshard_after_forward=wish.reshard_after_forward,
                activation_checkpointing=wish.activation_checkpointing,
                compile=wish.compile,
            ),
            seq_len=config.data.seq_len,
        )
    except ValueError as error:
        yield str(error)


def deepspeed(config: Config) -> Complaints:
    """What the ZeRO engine can do, and the keys that only it reads."""
    layout = config.layout
    if layout.engine == "fsdp":
        if layout.offload_optimizer:
            yield "layout.offload_optimizer: must be false with engine fsdp, got true; use layout.engine=deepspeed"
        return
    if config.cluster.device == "cuda":
        yield "cluster.device: must be auto or cpu with engine deepspeed, got cuda; use cluster.device=cpu or layout.engine=fsdp"
    for axis, degree in (("pp", layout.pp), ("tp", layout.tp)):
        if degree > 1:
            yield f"layout.engine: deepspeed needs {axis} 1, got {axis} {degree}; use layout.{axis}=1 or layout.engine=fsdp"
    if layout.reshard_after_forward:
        yield "layout.reshard_after_forward: is for engine fsdp, got true; use layout.zero_stage=3"
    if layout.compile:
        yield "layout.compile: must be false with engine deepspeed, got true; use layout.engine=fsdp"
    if layout.precision == "bf16" and layout.zero_stage == 1 and not layout.offload_optimizer:
        yield "layout.zero_stage: must be 2 or 3 with engine deepspeed and precision bf16, got 1; use layout.zero_stage=2"


def nodes(config: Config) -> Complaints:
    """The bounds of the cluster are in order, and every node has a failure domain."""
    cluster = config.cluster
    if cluster.min_nodes > cluster.num_nodes:
        yield f"cluster.min_nodes: must be at most cluster.num_nodes {cluster.num_nodes}, got {cluster.min_nodes}; lower it"
    if cluster.max_nodes < cluster.num_nodes:
        yield f"cluster.max_nodes: must be at least cluster.num_nodes {cluster.num_nodes}, got {cluster.max_nodes}; raise it"
    named = cluster.num_nodes + cluster.spare_nodes
    if isinstance(cluster.domains, tuple) and cluster.address != "local":
        yield (
            f"cluster.domains: must be the name of a node label where cluster.address is {cluster.address}, got a list; "
            "start the nodes with ray start --labels, or use cluster.domains=null"
        )
    elif isinstance(cluster.domains, tuple) and len(cluster.domains) != named:
        yield (
            f"cluster.domains: must name one failure domain for each of {named} nodes, got {len(cluster.domains)}; "
            "or use cluster.domains=null"
        )


def coding_group(config: Config) -> Complaints:
    """A group has data blocks left after its parity. One node alone keeps local copies only, and says so in the plan."""
    keeping, num_nodes = config.fault_tolerance, config.cluster.num_nodes
    size = min(keeping.group_size or num_nodes, num_nodes)
    if keeping.every_steps != 0 and num_nodes > 1 and keeping.tolerate >= size:
        yield (
            f"fault_tolerance.tolerate: must be below the {size} nodes of a coding group, got {keeping.tolerate}; "
            f"use fault_tolerance.tolerate={size - 1} or more nodes"
        )
    most, every = keeping.max_steps_lost, keeping.every_steps
    if most is not None and every != "auto" and not 0 < every <= most:
        yield (
            f"fault_tolerance.max_steps_lost: fault_tolerance.every_steps must be between 1 and it, got {every} and {most}; "
            f"use fault_tolerance.every_steps={most} or less"
        )


def detection(config: Config) -> Complaints:
    """Silence is judged over several pings."""
    detect = config.detect
    if detect.ping_timeout_s < 2 * detect.ping_period_s:
        yield (
            f"detect.ping_timeout_s: must be at least twice detect.ping_period_s {detect.ping_period_s}, "
            f"got {detect.ping_timeout_s}; use detect.ping_timeout_s={4 * detect.ping_period_s}"
        )


def drill(config: Config) -> Complaints:
    """Every fault can happen."""
    world, last = config.layout.degrees, config.optim.num_steps
    for i, fault in enumerate(config.drill.faults):
        if fault.step > last:
            yield f"drill.faults[{i}].step: must be at most optim.num_steps {last}, got {fault.step}; lower it"
        if fault.rank is not None and world is not None and not 0 <= fault.rank < world.world:
            yield f"drill.faults[{i}].rank: must be in [0, {world.world}) for layout {world}, got {fault.rank}; lower it"


def _choices(length: int) -> str:
    """The degrees that divide a length, the small ones, as words."""
    fits = [str(n) for n in range(1, min(length, 64) + 1) if length % n == 0]
    return fits[0] if len(fits) == 1 else f"{', '.join(fits[:-1])} or {fits[-1]}"


RULES: tuple[Callable[[Config], Complaints], ...] = (
    model_shape, vocabulary, automatic, enough_workers, parallelism, deepspeed, nodes,
    coding_group, detection, drill,
)  # fmt: skip
