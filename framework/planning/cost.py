"""Cost: how long a step takes and how much memory a worker needs, under any layout, before anything runs.

    step = compute + bubble + tensor-parallel collectives + pipeline hops + gradient exchange + update

    compute   m microbatches of the slowest pp rank: its FLOPs over the worker's rate, and a fixed cost per unit
    bubble    (pp - 1) / v such microbatches, v stages a rank; zero-bubble schedules fill most of it
    tp        ring all-reduces of the activations, two forward and two backward for each layer
    pp        one activation and one gradient over every stage boundary
    dp        parameters gathered and gradients reduced by rings; part of it hides behind compute
    update    one pass over parameters, gradients and moments

A model of this kind is right about order and ratio, not about seconds: `rates.calibrated` fits it to a measured step.

Rule of this file: numbers in, numbers out, no process, no device. Choosing is `layout_choice.py`'s matter.
Sources: Narayanan et al., "Efficient Large-Scale Language Model Training" (2104.04473), section 3 (bubble, tp volume);
Korthikanti et al. (2205.05198), section 4 (activations); Qi et al. (2401.10241, 2405.15362) (zero bubble, V).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from framework.data.batching import places
from framework.planning.rates import GIB, Rates, calibrated, guess  # noqa: F401
from parallel.layout import Layout
from parallel.stages import BUCKET_BYTES, buckets, num_stages, stages_of_rank, units_of_stage

_BUBBLE_LEFT = {"interleaved_zero_bubble": 1 / 3, "zbv_zero_bubble": 1 / 6}  # of (pp - 1) / v; the others: all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A decoder in numbers. Units: 0 embedding, 1..L layers, L+1 norm and head; FLOPs forward and backward, per token."""

    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    vocab_size: int
    seq_len: int
    tied: bool = False

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together."""
        return self.dim // self.num_heads * self.num_kv_heads

    @property
    def params(self) -> int:
        """Parameters of the whole model, a tied table once."""
        tied = self.vocab_size * self.dim if self.tied else 0
        return sum(self.unit_params(u) for u in range(self.num_layers + 2)) - tied

    def unit_params(self, unit: int) -> int:
        """Parameters that a unit of the chain holds; a tied table counts in both of its units."""
        if unit == 0:
            return self.vocab_size * self.dim
        if unit == self.num_layers + 1:
            return self.vocab_size * self.dim + self.dim
        return 2 * self.dim * (self.dim + self.kv_dim) + 3 * self.dim * self.ffn_dim + 2 * self.dim

    def unit_flops(self, unit: int) -> float:
        """6 for each matrix element, and causal attention scores; looking up an embedding is free."""
        if unit == 0:
            return 0.0
        attention = 0 if unit > self.num_layers else 6 * self.dim * self.seq_len
        return 6.0 * self.unit_params(unit) + attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How a layout is run; the meaning of each is that of the config's `layout` keys."""

    global_batch: int
    schedule: str = "1f1b"
    precision: str = "fp32"
    sequence_parallel: bool = True
    reshard_after_forward: bool = False
    activation_checkpointing: bool = False
    state_bytes: int = 16  # for each parameter: itself, its gradient and two moments, in fp32

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The prediction for one layout: parts of the step in seconds (they add up to `step_s`), and bytes per worker."""

    layout: Layout
    num_microbatches: int
    compute_s: float
    bubble_s: float
    tp_s: float
    pp_s: float
    dp_s: float
    update_s: float
    memory_bytes: float
    memory_limit: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.bubble_s + self.tp_s + self.pp_s + self.dp_s + self.update_s

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.memory_limit

    @property
    def reason(self) -> str:
        """One line for people: the step, its largest parts, and the memory."""
        names = ("compute", "bubble", "tp", "pp", "dp", "update")
        parts = ((name, getattr(self, f"{name}_s") / self.step_s) for name in names)
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in sorted(parts, key=lambda p: -p[1]) if share >= 0.005
        )
        return (
            f"{self.layout} with {self.num_microbatches} microbatches: {self.step_s:.3g} s per step ({shares}), "
            f"{self.memory_bytes / GIB:.3g} of {self.memory_limit / GIB:.3g} GiB per worker"
        )


def predict(model: ModelCost, layout: Layout, num_microbatches: int, *, method: Method, rates: Rates) -> Cost:
    """The cost of a step. Raises ValueError where the model has fewer layers than the layout has stages."""
    places_ = places(global_batch=method.global_batch, dp=layout.dp, num_microbatches=num_microbatches)
    tokens = places_ // num_microbatches * model.seq_len
    parts = _parts(model, method.schedule, layout.pp)
    depth = len(stages_of_rank(method.schedule, layout.pp)[0])
    times = [(_compute(p, tokens, layout, method, rates), _tp(model, p, tokens, layout, method, rates)) for p in parts]
    compute, tp = max(times, key=sum)
    bubble = _BUBBLE_LEFT.get(method.schedule, 1.0) * (layout.pp - 1) / depth * (compute + tp)
    dp = max(_dp(p, layout, num_microbatches, method, rates) for p in parts)
    update = max(p.params for p in parts) / (layout.tp * layout.dp) * 28 / rates.memory_bytes_per_s
    busy = num_microbatches * compute
    return Cost(
        layout=layout,
        num_microbatches=num_microbatches,
        compute_s=rates.pace * busy,
        bubble_s=rates.pace * bubble,
        tp_s=rates.pace * num_microbatches * tp,
        pp_s=rates.pace * _pp(model, tokens, depth, num_microbatches, layout, method, rates),
        dp_s=rates.pace * max((1 - rates.overlap) * dp, dp - busy),
        update_s=rates.pace * update,
        memory_bytes=max(_memory(model, p, tokens, num_microbatches, layout, method, rates) for p in parts),
        memory_limit=rates.memory_bytes,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """What a pp rank holds. Of ranks that hold alike, the first stands for all: it has most microbatches in flight."""

    rank: int
    params: int
    largest: int
    flops: float
    num_units: int
    layer_params: int
    layers_of_stages: tuple[int, ...]
    embeds: bool
    ends: bool

    @property
    def num_layers(self) -> int:
        return sum(self.layers_of_stages)


@lru_cache(maxsize=1024)
def _parts(model: ModelCost, schedule: str, pp: int) -> tuple[_Part, ...]:
    stages = num_stages(schedule, pp)
    found: dict[tuple[int, bool, bool], _Part] = {}
    for rank, held in enumerate(stages_of_rank(schedule, pp)):
        of_stages = [units_of_stage(model.num_layers, stages, stage) for stage in held]
        units = [unit for of_stage in of_stages for unit in of_stage]
        sizes = [model.unit_params(u) for u in units]
        layers_of_stages = tuple(sum(0 < u <= model.num_layers for u in of_stage) for of_stage in of_stages)
        flops = sum(map(model.unit_flops, units))
        embeds, ends = 0 in units, model.num_layers + 1 in units
        params = sum(sizes) - (model.vocab_size * model.dim if model.tied and embeds and ends else 0)
        part = _Part(rank, params, max(sizes), flops, len(units), model.unit_params(1), layers_of_stages, embeds, ends)
        found.setdefault((part.num_layers, embeds, ends), part)
    return tuple(found.values())


def _compute(part: _Part, tokens: int, layout: Layout, method: Method, rates: Rates) -> float:
    again = 4 / 3 if method.activation_checkpointing else 1.0
    return again * (part.flops * tokens / layout.tp / rates.flops_per_s + part.num_units * rates.unit_s)


def _tp(model: ModelCost, part: _Part, tokens: int, layout: Layout, method: Method, rates: Rates) -> float:
    """All-reduces, or gathers and reduce-scatters of the same volume, of one microbatch."""
    if layout.tp == 1:
        return 0.0
    per_layer = 6 if method.activation_checkpointing else 4
    count = per_layer * part.num_layers + part.embeds + part.ends
    inside = rates.workers_per_node % layout.tp == 0
    bandwidth, latency = _link(rates, inside, sharing=max(1, rates.workers_per_node // layout.tp))
    heavier = (1 + rates.scatter) / 2 if method.sequence_parallel else 1.0
    return count * heavier * 2 * _ring(layout.tp, tokens * model.dim * method.width, bandwidth, latency)


def _pp(
    model: ModelCost, tokens: int, depth: int, num_microbatches: int, layout: Layout, method: Method, rates: Rates
) -> float:
    """Fill and drain pass every boundary once; in between, what does not hide behind compute is paid each time."""
    if layout.pp == 1:
        return 0.0
    inside = rates.workers_per_node % layout.world == 0
    sharing = min(rates.workers_per_node, layout.dp * layout.tp)
    bandwidth, latency = _link(rates, inside, sharing=sharing)
    hop = tokens * model.dim * method.width / (layout.tp if method.sequence_parallel else 1) / bandwidth + latency
    return 2 * hop * ((layout.pp * depth - 1) + (1 - rates.overlap) * num_microbatches * depth)


def _dp(part: _Part, layout: Layout, num_microbatches: int, method: Method, rates: Rates) -> float:
    """Gathers of the parameters (for every pass where they are let go in between) and one gradient reduction."""
    if layout.dp == 1:
        return 0.0
    inside = rates.workers_per_node % (layout.dp * layout.tp) == 0
    bandwidth, latency = _link(rates, inside, sharing=min(layout.tp, rates.workers_per_node))
    params = part.params / layout.tp
    gathers = 2 * num_microbatches if method.reshard_after_forward else 1
    volume = params * (gathers * method.width + rates.scatter * 4)
    return (
        _ring(layout.dp, volume, bandwidth, 0.0)
        + (gathers + rates.scatter) * _collectives(part, layout.tp) * (layout.dp - 1) * latency
    )


def _collectives(part: _Part, tp: int) -> int:
    """How many gather all parameters of a rank: its buckets of layers, and what else each stage has."""
    layer_bytes = 4 * part.layer_params // tp
    return sum(len(buckets([layer_bytes] * layers)) + 1 for layers in part.layers_of_stages)


def _ring(size: int, volume: float, bandwidth: float, latency: float) -> float:
    """One trip of a ring: a gather or a reduce-scatter of `volume` bytes over `size` ranks."""
    return (size - 1) / size * volume / bandwidth + (size - 1) * latency


def _link(rates: Rates, inside: bool, *, sharing: int) -> tuple[float, float]:
    if inside:
        return rates.intra_bytes_per_s, rates.intra_latency_s
    return min(rates.inter_bytes_per_s / sharing, rates.intra_bytes_per_s), rates.inter_latency_s


def _memory(
    model: ModelCost, part: _Part, tokens: int, num_microbatches: int, layout: Layout, method: Method, rates: Rates
) -> float:
    mine = part.params / layout.tp
    state = mine * method.state_bytes / layout.dp
    gathered = 0.0
    if layout.dp > 1 or method.precision != "fp32":
        two = min(mine, 2 * max(part.largest / layout.tp, BUCKET_BYTES / 4))  # one bucket computes, the next is on its way
        # Gradients wait whole for the last microbatch; with a single one they are reduced bucket by bucket.
        gathered = (two if method.reshard_after_forward else mine) * method.width
        gathered += (mine if num_microbatches > 1 else two) * 4
    return rates.base_bytes + state + gathered + _activations(model, part, tokens, num_microbatches, layout, method)


def _activations(
    model: ModelCost, part: _Part, tokens: int, num_microbatches: int, layout: Layout, method: Method
) -> float:
    """What forward keeps for backward: norm inputs and outputs, attention with rotated copies, SwiGLU, logits."""
    stream = model.dim / (layout.tp if method.sequence_parallel else 1)
    layer = 4 * stream + (4 * model.dim + 3 * model.kv_dim + 4 * model.ffn_dim) / layout.tp
    kept = stream * part.num_layers + layer if method.activation_checkpointing else layer * part.num_layers
    flying = in_flight(method.schedule, layout.pp, part.rank, num_microbatches)
    logits = 12 * tokens * model.vocab_size / layout.tp if part.ends else 0.0  # fp32: themselves, softmax, gradient
    return flying * (kept + part.embeds * stream) * tokens * method.width + logits


def in_flight(schedule: str, pp: int, rank: int, num_microbatches: int) -> float:
    """How many microbatches a pp rank holds activations of at the worst moment, in units of all of its stages."""
    if pp == 1:
        return 1.0
    if schedule == "gpipe":
        return float(num_microbatches)
    if schedule == "1f1b":
        return float(min(num_microbatches, pp - rank))
    if schedule == "zbv_zero_bubble":
        return float(min(num_microbatches, pp))
    return min(2 * num_microbatches, 2 * (pp - rank - 1) + pp + 1) / 2
