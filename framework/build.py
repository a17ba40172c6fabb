"""Build: from a config to the parts that train: model, state, engine, feed, schedule.

Rule of this file: assembly only, each part a function of the config and the few numbers of the plan it depends on.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from framework.config import Config, ModelConfig
from framework.config_rules import MODEL_KEYS
from framework.data import samples as data_source
from framework.data.batching import Loader
from framework.data.windows import Data
from framework.model import flops_per_token
from framework.planning.devices import decide
from framework.training.peak import peak_flops, shared
from framework.training.schedule import Schedule
from parallel.assemble import meta
from parallel.atlas import Atlas
from parallel.checks import Wrapping, check
from parallel.contract import check_model
from parallel.deepspeed_engine import DeepSpeedEngine, Zero
from parallel.engine import Engine, EngineOptions, FsdpEngine, numbers
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.specs import state_specs


def open_data(config: Config) -> Data:
    """The samples of the run. Raises ValueError for what the user can mend."""
    return data_source.build(config.data, seed=config.seed)


def model_builder(config: Config) -> Callable[[], nn.Module]:
    """A function that builds the whole model on torch's current default device."""
    model = config.model
    module, _, name = model.target.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"model._target_: must name an importable class, got {model.target!r} ({error}); write module.Class"
        ) from error
    vocab_size = model.vocab_size or data_source.vocab_size(config.data)
    arguments = _arguments(target, model, vocab_size)
    return lambda: target(**arguments)  # type: ignore[no-any-return]


def _arguments(target: Callable[..., Any], model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What a constructor is called with: of the keys that every model has those it takes, and all further ones.

    Raises ValueError for a further key that it does not take, and for an argument that no key gives.
    """
    taken = inspect.signature(target).parameters
    every = {name: getattr(model, name) for name in MODEL_KEYS} | {"vocab_size": vocab_size}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return every | dict(model.extra)
    for name in model.extra:
        if name not in taken:
            raise ValueError(f"model.{name}: must be an argument of {model.target}, got none of that name; it takes {', '.join(taken)}")
    given = {name: value for name, value in every.items() if name in taken} | dict(model.extra)
    for name, parameter in taken.items():
        if name not in given and parameter.default is parameter.empty:
            raise ValueError(f"model.{name}: must be given, for {model.target} takes it, got nothing; use +model.{name}=...")
    return given


def make_atlas(config: Config) -> Callable[[Layout, str], Atlas]:
    """Atlases of this config's model: a function of layout and schedule. The model is looked at once.

    Raises ValueError for a model that breaks its contract, or does not go together with the layout that is asked for.
    """
    whole = meta(model_builder(config))
    _check_model(config, whole)
    specs, num_layers = state_specs(whole), len(whole.layers)  # type: ignore[arg-type]
    zero = _zero(config)
    sharding = "rows" if zero is None else zero.sharding
    return lambda layout, schedule: Atlas(specs, layout, schedule, num_layers, sharding)


def _check_model(config: Config, whole: nn.Module) -> None:
    """What the engine would refuse, before any worker is started: of a user's own model the config cannot know it."""
    layout, degrees = config.layout, config.layout.degrees
    check_model(whole, tp=degrees.tp if degrees is not None else 1)
    if degrees is not None:
        check(numbers(whole), layout=degrees, schedule=layout.schedule, num_microbatches=layout.num_microbatches, wrapping=_wrapping(config))


def _wrapping(config: Config) -> Wrapping:
    layout = config.layout
    return Wrapping(
        precision=layout.precision,
        sequence_parallel=layout.sequence_parallel,
        reshard_after_forward=layout.reshard_after_forward,
        activation_checkpointing=layout.activation_checkpointing,
        compile=layout.compile,
    )


def make_engine(config: Config, mesh: Mesh, *, schedule: str, num_microbatches: int) -> Engine:
    """This rank's engine on a mesh; its parameters are zero until they are loaded or initialised."""
    optim = config.optim
    options = EngineOptions(
        schedule=schedule,
        num_microbatches=num_microbatches,
        wrapping=_wrapping(config),
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    zero = _zero(config)
    if zero is not None:
        return DeepSpeedEngine(model_builder(config), mesh=mesh, options=options, zero=zero)
    return FsdpEngine(model_builder(config), mesh=mesh, options=options)


def make_mfu(config: Config, layout: Layout, *, workers_here: int) -> Callable[[float], float]:
    """Model FLOPs utilisation as a function of a step's seconds. Measures the device's peak where no data sheet has it.

    `workers_here`: how many of the layout's workers share this machine's processor.
    """
    optim, seq_len, device = config.optim, config.data.seq_len, decide(config).kind
    flops = flops_per_token(meta(model_builder(config)), seq_len=seq_len) * optim.global_batch * seq_len
    peak = peak_flops(device, precision=config.layout.precision)
    if device == "cpu":
        peak = shared(peak, workers_here=workers_here, threads=torch.get_num_threads())
    return lambda step_s: flops / (step_s * peak * layout.world)


def _zero(config: Config) -> Zero | None:
    """What the DeepSpeed engine is to cut; None for FSDP2."""
    layout = config.layout
    return Zero(stage=layout.zero_stage, offload_optimizer=layout.offload_optimizer) if layout.engine == "deepspeed" else None


def make_schedule(config: Config) -> Schedule:
    """The learning rate as a function of the step."""
    optim = config.optim
    return Schedule(
        kind=optim.schedule,
        peak=optim.lr,
        warmup_steps=optim.warmup_steps,
        schedule_steps=optim.schedule_steps,
        final_lr_ratio=optim.final_lr_ratio,
        decay_fraction=optim.decay_fraction,
    )


def make_feed(config: Config, data: Data, *, dp: int, dp_index: int, num_microbatches: int) -> Loader:
    """One replica's samples of every step, and of evaluations; `Feed` of `framework/trainer.py`."""
    return Loader(
        data,
        seq_len=config.data.seq_len,
        global_batch=config.optim.global_batch,
        dp=dp,
        dp_index=dp_index,
        num_microbatches=num_microbatches,
        eval_samples=config.monitor.eval_samples,
    )
