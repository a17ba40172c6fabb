"""Planner: a config, read once as the numbers that `plan.py` asks for.

Rule of this file: it translates; it neither looks at the cluster nor decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

from framework.build import make_atlas
from framework.config import Config
from framework.config_rules import OWN_MODEL
from framework.control.incident import Trouble
from framework.data import samples as data_source
from framework.plan import Place, Situation, Source, Wish, microbatches
from framework.planning.cost import Method, ModelCost, predict
from framework.planning.devices import decide
from framework.planning.layout_choice import candidates
from framework.planning.overlap import Overlap
from framework.planning.rates import Rates, calibrated, guess
from parallel.atlas import Atlas
from parallel.layout import Layout

GIB = 1 << 30


class Planner:
    """What a config means for planning. `memory_bytes` is what one worker may use, infinite where unknown."""

    def __init__(self, config: Config, *, memory_bytes: float = math.inf, cores_per_worker: float = 1.0) -> None:
        self._config = config
        self.atlas: Callable[[Layout, str], Atlas] = make_atlas(config)
        self._rates: Rates = guess(
            decide(config).kind,
            workers_per_node=config.cluster.workers_per_node,
            precision=config.layout.precision,
            cores_per_worker=cores_per_worker,
            memory_bytes=memory_bytes,
        )
        self.step_s: Callable[[Layout], float] = lru_cache(maxsize=4096)(self._step_s)

    @cached_property
    def model(self) -> ModelCost:
        """The model in numbers. For a model of the user's own they are those of a decoder with the same keys."""
        model, data = self._config.model, self._config.data
        return ModelCost(
            num_layers=model.num_layers,
            dim=model.dim,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            ffn_dim=model.ffn_dim,
            vocab_size=model.vocab_size or data_source.vocab_size(self._config.data),
            seq_len=data.seq_len,
            tied=model.tie_embeddings,
        )

    @cached_property
    def method(self) -> Method:
        """How layouts are run."""
        layout = self._config.layout
        return Method(
            global_batch=self._config.optim.global_batch,
            schedule=layout.schedule,
            precision=layout.precision,
            sequence_parallel=layout.sequence_parallel,
            reshard_after_forward=layout.reshard_after_forward,
            activation_checkpointing=layout.activation_checkpointing,
        )

    def wish(self) -> Wish:
        """What the config asks for."""
        cluster, layout = self._config.cluster, self._config.layout
        return Wish(
            layout=layout.degrees,
            schedule=layout.schedule,
            num_microbatches=layout.num_microbatches,
            global_batch=self._config.optim.global_batch,
            num_nodes=cluster.num_nodes,
            min_nodes=cluster.min_nodes,
            max_nodes=cluster.max_nodes,
            tolerate=self._config.fault_tolerance.tolerate,
        )

    def candidates(self, num_workers: int) -> Sequence[Layout]:
        """The layouts that fit into memory on so many workers. A model of the user's own keeps to tp 1 and its layers;
        DeepSpeed to dp alone.
        """
        if num_workers < 1:
            return ()
        scored = candidates(self.model, num_workers=num_workers, method=self.method, rates=self._rates)
        foreign = self._config.model.target != OWN_MODEL
        zero = self._config.layout.engine == "deepspeed"
        fitting = (cost.layout for cost in scored if cost.fits)
        return tuple(
            layout
            for layout in fitting
            if not (foreign and layout.tp > 1) and not (zero and layout.pp * layout.tp > 1)
        )

    def measured(self, layout: Layout, step_s: float) -> None:
        """Correct the predictions by a step time that was seen."""
        predicted = self.step_s(layout)
        if step_s > 0 and predicted > 0:
            self._rates = calibrated(self._rates, predicted_s=predicted, measured_s=step_s)
            self.step_s = lru_cache(maxsize=4096)(self._step_s)

    def situation(
        self,
        places: tuple[Place, ...],
        *,
        source: Source,
        generation: int,
        overlap: Overlap | None = None,
        trouble: Trouble | None = None,
        seated: tuple[str, ...] = (),
    ) -> Situation:
        """What is known, in the form that `make_plan` takes."""
        return Situation(
            places=places,
            generation=generation,
            source=source,
            predict=lambda layout: self.step_s(layout),
            candidates=self.candidates,
            overlap=overlap if overlap is not None else (lambda layout, node, ranks: 0),
            needed=None if overlap is None else overlap.needed,
            seated=seated,
            trouble="" if trouble is None else str(trouble),
        )

    def _step_s(self, layout: Layout) -> float:
        count = microbatches(layout, self.wish())
        return predict(self.model, layout, count, method=self.method, rates=self._rates).step_s
