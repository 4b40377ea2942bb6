"""How a run is evaluated or used: its modes, models, inner loops and learning rates."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
from jax.sharding import Mesh

from tttjax.config import InnerConfig
from tttjax.config.values import check_value
from tttjax.errors import UserError
from tttjax.models.relayout import relayout
from tttjax.models.transformer import Transformer, build_model
from tttjax.parallel.mesh import param_shardings
from tttjax.runs.modes import DYNAMIC_PATHS, MODES
from tttjax.runs.run import Run
from tttjax.training.step import weights_template
from tttjax.ttt.outer_loss import InnerLoop, make_inner_loop
from tttjax.types import Params


@dataclass(frozen=True)
class EvalSetup:
    """A model, its weights on a mesh, and the inner loop to evaluate them with.

    lr: inner learning rate; unused if `learn` is false.
    """

    mode: str
    label: str
    model: Transformer
    params: Params
    mesh: Mesh
    inner: InnerLoop
    lr: float
    learn: bool
    rule: str = ""

    def describe_inner(self) -> dict[str, Any] | None:
        """The inner loop's settings, for results; None without updates."""
        if not self.learn:
            return None
        inner = self.inner
        return {
            "rule": self.rule,
            "lr": self.lr,
            "clip": inner.clip,
            "chunk_size": inner.chunk_size,
        }


@dataclass(frozen=True)
class LearningOptions:
    """Changes to the inner loop for an evaluation.

    inner: overrides of `InnerConfig` fields, for the modes on and dynamic.
    dynamic_paths, dynamic_layers: the weights that dynamic evaluation updates in a model without
        fast weights: patterns over paths, and the number of last blocks that form the suffix (0: a
        quarter).
    dynamic_lrs: inner learning rates of dynamic evaluation, one curve each (empty: inner.lr).
    """

    inner: Mapping[str, Any] = field(default_factory=dict)
    dynamic_paths: tuple[str, ...] = DYNAMIC_PATHS
    dynamic_layers: int = 0
    dynamic_lrs: tuple[float, ...] = ()

    def __post_init__(self):
        if self.dynamic_layers < 0:
            raise UserError(f"dynamic_layers={self.dynamic_layers} must be at least 0.")


def choose_modes(
    runs: Sequence[Run], requested: Sequence[str], dynamic_lrs: Sequence[float] = ()
) -> list[tuple[str, ...]]:
    """The modes of each run: its own `modes`, or those of `requested` that its model supports.

    `on` needs fast weights, `dynamic` a model without. Default: on and off, or off.
    Raises UserError for a mode that is unknown or that no run supports, and for `dynamic_lrs` if no
    run has the mode dynamic.
    """
    for mode in {*requested, *(mode for run in runs for mode in run.modes)} - set(MODES):
        raise UserError(f"the mode {mode!r} is unknown; choose from {', '.join(MODES)}")
    chosen = []
    for run in runs:
        supported = ("on", "off") if run.has_fast_weights else ("off", "dynamic")
        run_modes = run.modes or requested or (("on", "off") if run.has_fast_weights else ("off",))
        usable = tuple(mode for mode in MODES if mode in run_modes and mode in supported)
        if not usable or set(run.modes) - set(usable):
            raise _unsupported(run, [mode for mode in run_modes if mode not in usable])
        chosen.append(usable)
    for mode in requested:
        if not any(mode in modes for modes in chosen):
            raise _unsupported(runs[0], [mode])
    if dynamic_lrs and not any("dynamic" in modes for modes in chosen):
        raise UserError(
            "--dynamic-lr is for the mode dynamic; add it to --modes, or remove the flag"
        )
    return chosen


def _unsupported(run: Run, modes: Sequence[str]) -> UserError:
    if run.has_fast_weights:
        reason = "has fast weights: choose on or off (dynamic is for models without)"
    else:
        reason = "has no fast weights: choose off, or dynamic to update some of its weights anyway"
    return UserError(f"the mode {', '.join(modes)} does not fit the run {run.name}, which {reason}")


def inner_config(run: Run, learning: LearningOptions) -> InnerConfig:
    """The run's inner loop with the overrides of `learning`. UserError if they are invalid."""
    values = {key: check_value(f"inner.{key}", value) for key, value in learning.inner.items()}
    inner = dataclasses.replace(run.config.inner, **values)
    if run.window and run.window < inner.chunk_size:
        raise UserError(
            f"the run {run.name} has a window of {run.window} tokens, smaller than the chunk size "
            f"of {inner.chunk_size}, so it does not cover a chunk; choose a chunk size of at most "
            f"{run.window}"
        )
    return inner


def inner_learning_rates(run: Run, mode: str, learning: LearningOptions) -> tuple[float, ...]:
    """The inner learning rates to evaluate a mode with; (0.0,) for off."""
    if mode == "dynamic" and learning.dynamic_lrs:
        return tuple(check_value("inner.lr", lr) for lr in learning.dynamic_lrs)
    return (inner_config(run, learning).lr if mode != "off" else 0.0,)


def iter_eval_setups(
    run: Run, modes: Sequence[str], learning: LearningOptions, mesh: Mesh
) -> Iterator[tuple[EvalSetup, ...]]:
    """Loads the run's weights and yields the setups of each mode, one per inner learning rate."""
    params = _load_weights(run, mesh)
    for mode in modes:
        yield _eval_setups(run, mode, params, learning, mesh)


def load_eval_setup(run: Run, mode: str, learning: LearningOptions, mesh: Mesh) -> EvalSetup:
    """Loads the run's weights, to read in one mode and with the first of its learning rates."""
    return _eval_setups(run, mode, _load_weights(run, mesh), learning, mesh)[0]


def _load_weights(run: Run, mesh: Mesh) -> Params:
    return run.weights(weights_template(build_model(run.config.model, run.config.inner), mesh))


def _eval_setups(
    run: Run, mode: str, params: Params, learning: LearningOptions, mesh: Mesh
) -> tuple[EvalSetup, ...]:
    model, inner = build_eval_model(run, mode, learning)
    if mode == "dynamic":
        params = _relayout(params, build_model(run.config.model, run.config.inner), model, mesh)
    rates = inner_learning_rates(run, mode, learning)
    return tuple(
        EvalSetup(
            mode=mode,
            label=_label(run, mode, lr if len(rates) > 1 else None),
            model=model,
            params=params,
            mesh=mesh,
            inner=_inner_loop(inner),
            lr=lr,
            learn=mode != "off",
            rule=inner.rule,
        )
        for lr in rates
    )


def build_eval_model(
    run: Run, mode: str, learning: LearningOptions
) -> tuple[Transformer, InnerConfig]:
    """The model and inner loop of a mode."""
    # The mode off ignores `learning`, even if it is invalid for this run.
    inner = run.config.inner if mode == "off" else inner_config(run, learning)
    if mode == "dynamic":
        return _dynamic_model(run, inner, learning), inner
    return build_model(run.config.model, run.config.inner), inner


# Equal configurations share functions, and so compiled programs.
_inner_loop = lru_cache(maxsize=16)(make_inner_loop)


def _dynamic_model(run: Run, inner: InnerConfig, learning: LearningOptions) -> Transformer:
    config = run.config.model
    layers = learning.dynamic_layers or max(1, config.num_layers // 4)
    if not 1 <= layers <= config.num_layers:
        raise UserError(
            f"dynamic evaluation of the last {layers} blocks does not fit the run {run.name}, "
            f"which has {config.num_layers}"
        )
    model = dataclasses.replace(config, suffix_layers=max(layers, config.suffix_layers))
    return build_model(model, dataclasses.replace(inner, fast_paths=learning.dynamic_paths))


def _relayout(params: Params, source: Transformer, target: Transformer, mesh: Mesh) -> Params:
    shardings = param_shardings(mesh, target.axes(), target.abstract_params())
    move = jax.jit(lambda params: relayout(params, source, target), out_shardings=shardings)
    return move(params)


def _label(run: Run, mode: str, lr: float | None) -> str:
    if mode == "dynamic":
        return f"{run.name}, dynamic" + ("" if lr is None else f" {lr:g}")
    return f"{run.name}, TTT {mode}" if run.has_fast_weights else run.name
