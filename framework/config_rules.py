"""Config rules: what several keys must satisfy together, each rule a generator of complaints.

The first complaint wins. Rules that other files own (how stages are dealt out) are asked of those files. The
combinations in `silently_wrong` run without an error in PyTorch 2.13 and give wrong numbers (measured: losses off by
0.02 to 0.42), which is why they are refused here.

Rule of this file: pure functions of a config. It reads no file, machine or environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from framework.decoding import unknown
from parallel.stages import num_stages, units_of_stage

if TYPE_CHECKING:
    from framework.config import Config

OWN_MODEL = "framework.model.Decoder"
MODEL_KEYS = (
    "vocab_size", "num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "rope_theta", "norm_eps", "tie_embeddings",
)  # fmt: skip
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv_zero_bubble")
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


def tensor_parallel(config: Config) -> Complaints:
    """tp cuts heads, the inner dimension, and with sequence parallelism the sequence."""
    tp = config.layout.tp
    lengths = {"model.num_heads": config.model.num_heads, "model.ffn_dim": config.model.ffn_dim}
    if config.layout.sequence_parallel:
        lengths["data.seq_len"] = config.data.seq_len
    for key, length in lengths.items():
        if length % tp:
            yield f"{key} {length} does not divide by tp {tp}; use layout.tp={_choices(length)}"


def pipeline(config: Config) -> Complaints:
    """There is a layer for every stage, and the schedule gets the microbatches it needs."""
    layout, layers = config.layout, config.model.num_layers
    if layout.pp == 1:
        return
    stages = num_stages(layout.schedule, layout.pp)
    try:
        units_of_stage(layers, stages, 0)
    except ValueError:
        advice = f"use layout.pp={layout.pp * layers // stages or 1} or layout.schedule=1f1b"
        yield f"layout: schedule {layout.schedule} has {stages} stages at pp {layout.pp}, the model {layers} layers; {advice}"
    if layout.num_microbatches < layout.pp or (stages > layout.pp and layout.num_microbatches % layout.pp):
        must = "a multiple of" if stages > layout.pp else "at least"
        yield (
            f"layout.num_microbatches: must be {must} pp {layout.pp} for schedule {layout.schedule}, "
            f"got {layout.num_microbatches}; use layout.num_microbatches={2 * layout.pp}"
        )


def silently_wrong(config: Config) -> Complaints:
    """No combination that PyTorch accepts and computes wrongly."""
    layout = config.layout
    if layout.pp == 1 and not layout.auto or layout.schedule not in ZERO_BUBBLE:
        return
    if layout.reshard_after_forward:
        yield (
            f"layout.reshard_after_forward: must be false with schedule {layout.schedule}, got true; "
            "gradients would be wrong without an error; use layout.reshard_after_forward=false or layout.schedule=1f1b"
        )
    if layout.compile:
        yield (
            f"layout.compile: must be false with schedule {layout.schedule}, got true; "
            "gradients would be wrong without an error; use layout.compile=false or layout.schedule=1f1b"
        )


def deepspeed(config: Config) -> Complaints:
    """What the ZeRO engine can do, and the keys that only it reads."""
    layout = config.layout
    if layout.engine == "deepspeed" and (layout.pp > 1 or layout.auto):
        got = "layout=auto" if layout.auto else f"pp {layout.pp}"
        yield f"layout.engine: deepspeed needs pp 1, got {got}; use layout.pp=1 or layout.engine=fsdp"
    if layout.engine == "fsdp" and layout.offload_optimizer:
        yield "layout.offload_optimizer: must be false with engine fsdp, got true; use layout.engine=deepspeed"


def nodes(config: Config) -> Complaints:
    """The bounds of the cluster are in order, and every node has a failure domain."""
    cluster = config.cluster
    if cluster.min_nodes > cluster.num_nodes:
        yield f"cluster.min_nodes: must be at most cluster.num_nodes {cluster.num_nodes}, got {cluster.min_nodes}; lower it"
    if cluster.max_nodes < cluster.num_nodes:
        yield f"cluster.max_nodes: must be at least cluster.num_nodes {cluster.num_nodes}, got {cluster.max_nodes}; raise it"
    named = cluster.num_nodes + cluster.spare_nodes
    if isinstance(cluster.domains, tuple) and len(cluster.domains) != named:
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
    model_shape, vocabulary, automatic, enough_workers, tensor_parallel, pipeline, silently_wrong, deepspeed, nodes,
    coding_group, detection, drill,
)  # fmt: skip
