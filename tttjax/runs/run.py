"""Finished runs, and the ways in which their models can read: learning on, off, dynamic."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tttjax.config import (
    Config,
    InnerConfig,
    check_weights_config,
    from_config_dict,
    has_fast_weights,
    read_config,
)
from tttjax.config.run_info import possible_places
from tttjax.config.values import check_value
from tttjax.data.shards import content_id, read_manifest
from tttjax.data.splits import TRAIN
from tttjax.errors import UserError
from tttjax.io.paths import local_path
from tttjax.models import Transformer, build_model, relayout
from tttjax.parallel.mesh import make_mesh, param_shardings
from tttjax.training import checkpoint_format, checkpoints
from tttjax.ttt.outer_loss import InnerLoop, make_inner_loop
from tttjax.types import Params, PyTree


@dataclass(frozen=True)
class EvalSetup:
    """One way of reading: with these weights on this mesh, learning at rate `lr` or not at all."""

    mode: str
    label: str
    model: Transformer
    params: Params
    mesh: Mesh
    inner: InnerLoop
    lr: float
    learn: bool
    rule: str = ""


MODES = ("on", "off", "dynamic")
DYNAMIC_PATHS = ("suffix/**/mlp/**",)


@dataclass(frozen=True)
class RunSpec:
    """A run to evaluate: its work directory (or one checkpoint), and what to call it.

    name: default the directory's name. modes: default those asked of all runs.
    """

    workdir: Path | str
    name: str = ""
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LearningOptions:
    """How models learn while they are evaluated, where that differs from their configuration.

    inner: fields of `InnerConfig` with other values, for every learning mode.
    dynamic_paths, dynamic_layers: which weights of a model without fast weights learn in dynamic
        evaluation: patterns over paths, and the last blocks that form the suffix (0: a quarter).
    dynamic_lrs: inner learning rates of dynamic evaluation, one curve each (empty: inner.lr).
    """

    inner: Mapping[str, Any] = field(default_factory=dict)
    dynamic_paths: tuple[str, ...] = DYNAMIC_PATHS
    dynamic_layers: int = 0
    dynamic_lrs: tuple[float, ...] = ()

    def __post_init__(self):
        if self.dynamic_layers < 0:
            raise UserError(f"dynamic_layers={self.dynamic_layers} must be at least 0.")


@dataclass(frozen=True)
class Run:
    """A run that has been found; its weights are read when it is its turn.

    weights: template with shapes, dtypes and shardings -> the arrays. tokenizer: fingerprint of
    the one whose tokens they were trained on; "" if not known. folder: the checkpoint that holds
    them, home: the work directory; None for weights in memory.
    """

    name: str
    config: Config
    weights: Callable[[Params], Params]
    step: int | None = None
    source: str = ""
    modes: tuple[str, ...] = ()
    tokenizer: str = ""
    folder: Path | None = None
    home: Path | None = None

    @property
    def has_fast_weights(self) -> bool:
        return has_fast_weights(self.config.model, self.config.inner)

    @property
    def window(self) -> int:
        """Tokens that its window attention sees; 0 if it has none."""
        model = self.config.model
        return model.window_size if "window" in model.mixer_kinds else 0


def open_run(spec: RunSpec) -> Run:
    """The newest undamaged checkpoint of a run.

    Raises UserError if there is none, or `config.json` is not of its weights; and, once these are
    read, if they are not finite.
    """
    workdir = local_path(spec.workdir)
    found = checkpoints.find_checkpoint(workdir)
    meta = checkpoint_format.read_meta(found)
    config = read_config(workdir)
    if config is not None:
        check_weights_config(meta["config"], config, str(found))
    else:
        values = meta["config"]
        if values is None:
            raise UserError(
                f"{spec.workdir} has no configuration: give the work directory of a run, with its "
                "config.json"
            )
        config = from_config_dict(values)
    home = found.parent.parent if found.parent.name == checkpoints.CHECKPOINT_DIR else found.parent
    config = _resolve_data_paths(config, Path(home), meta["data_state"])
    return Run(
        name=spec.name or workdir.resolve().name,
        config=config,
        weights=lambda template: _finite(
            checkpoint_format.read_item(found / "params", template), str(found)
        ),
        step=int(found.name) if found.name.isdigit() else None,
        source=str(workdir),
        modes=spec.modes,
        tokenizer=meta.get("tokenizer", ""),
        folder=Path(found),
        home=Path(home),
    )


def _resolve_data_paths(config: Config, home: Path, data_state: Any) -> Config:
    """The configuration with the paths of data sets as they are found now, if they are."""
    sources = config.data.sources
    contents = data_state.get("data", ()) if isinstance(data_state, dict) else ()
    if len(contents) != len(sources):  # batches from elsewhere, or weights alone
        contents = (None,) * len(sources)
    found = tuple(
        str(_find_data(source, home, content))
        for source, content in zip(sources, contents, strict=True)
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=found))


def _find_data(source: str, home: Path, content: int | None) -> str | Path:
    """Where a data set of the run in the work directory `home` is; `source` if it is not found.

    content: of its training split, if known; what lies in another place has to have the same.
    """
    if Path(source).exists():
        return source
    for place in possible_places(source, home):
        with contextlib.suppress(UserError, KeyError):
            if content in (None, content_id(read_manifest(place), TRAIN)):
                return place.absolute()
    return source


@jax.jit
def _are_finite(params: Params) -> PyTree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _finite(params: Params, where: str) -> Params:
    """The weights themselves. UserError if one is not finite."""
    for name, is_finite in checkpoint_format.named_leaves(_are_finite(params)).items():
        if not is_finite:
            raise UserError(
                f"the weights in {where} are not finite ({name}), so nothing can be computed from "
                "them: give an earlier checkpoint, or train again with a lower learning rate"
            )
    return params


def run_of_params(config: Config, params: Params, name: str = "model") -> Run:
    """A run from weights in memory."""

    def weights(template: Params) -> Params:
        return jax.device_put(params, jax.tree.map(lambda x: x.sharding, template))

    return Run(name=name, config=config, weights=weights)


def choose_modes(runs: Sequence[Run], wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """The modes of each run: what it asks for itself, or those of `wanted` that fit its model.

    `on` needs fast weights, `dynamic` a model without; by default on and off, or off.
    Raises UserError for a mode that is unknown or fits no run.
    """
    for mode in {*wanted, *(mode for run in runs for mode in run.modes)} - set(MODES):
        raise UserError(f"the mode {mode!r} is unknown; choose from {', '.join(MODES)}")
    chosen = []
    for run in runs:
        possible = ("on", "off") if run.has_fast_weights else ("off", "dynamic")
        asked = run.modes or wanted or (("on", "off") if run.has_fast_weights else ("off",))
        fits = tuple(mode for mode in MODES if mode in asked and mode in possible)
        if not fits or set(run.modes) - set(fits):
            raise _misfit(run, [mode for mode in asked if mode not in fits])
        chosen.append(fits)
    for mode in wanted:
        if not any(mode in modes for modes in chosen):
            raise _misfit(runs[0], [mode])
    return chosen


def _misfit(run: Run, modes: Sequence[str]) -> UserError:
    if run.has_fast_weights:
        why = "has fast weights, whose learning is the mode on (dynamic is for models without)"
    else:
        why = "has no fast weights: choose off, or dynamic to let some of its weights learn anyway"
    return UserError(f"the mode {', '.join(modes)} does not fit the run {run.name}, which {why}")


def make_run_mesh(config: Config) -> Mesh:
    """All devices, arranged like the run's if that is possible here."""
    mesh = config.mesh
    if jax.device_count() % (mesh.fsdp * mesh.tensor) == 0:
        return make_mesh(-1, mesh.fsdp, mesh.tensor)
    return make_mesh()


def inner_config(run: Run, learning: LearningOptions) -> InnerConfig:
    """The run's inner loop with the values that were asked for. UserError for an impossible one."""
    values = {key: check_value(f"inner.{key}", value) for key, value in learning.inner.items()}
    inner = dataclasses.replace(run.config.inner, **values)
    if run.window and run.window < inner.chunk_size:
        raise UserError(
            f"the run {run.name} has a window of {run.window} tokens, smaller than the chunk size "
            f"of {inner.chunk_size}, so tokens of one chunk would not see each other; choose a "
            f"chunk size of at most {run.window}"
        )
    return inner


def learning_rates(run: Run, mode: str, learning: LearningOptions) -> tuple[float, ...]:
    """The inner learning rates with which a mode is evaluated; one, and unused, if it is off."""
    if mode == "dynamic" and learning.dynamic_lrs:
        return tuple(check_value("inner.lr", lr) for lr in learning.dynamic_lrs)
    return (inner_config(run, learning).lr if mode != "off" else 0.0,)


def iter_eval_setups(
    run: Run, modes: Sequence[str], learning: LearningOptions, mesh: Mesh
) -> Iterator[tuple[EvalSetup, ...]]:
    """Reads the run's weights and gives, for each mode, its ways of reading (one per rate)."""
    model = build_model(run.config.model, run.config.inner)
    params = run.weights(weights_template(model, mesh))
    for mode in modes:
        its_model, inner = build_eval_model(run, mode, learning)
        its_params = params
        if mode == "dynamic":
            its_params = _relayout(params, model, its_model, mesh)
        rates = learning_rates(run, mode, learning)
        yield tuple(
            EvalSetup(
                mode=mode,
                label=_label(run, mode, lr if len(rates) > 1 else None),
                model=its_model,
                params=its_params,
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
    """The model that reads in a mode, and its inner loop."""
    # What is off does not learn, so what was asked of learning does not concern it.
    inner = run.config.inner if mode == "off" else inner_config(run, learning)
    if mode == "dynamic":
        return _dynamic_model(run, inner, learning), inner
    return build_model(run.config.model, run.config.inner), inner


# The same values give the same functions, so that what is compiled for one run serves another.
_inner_loop = lru_cache(maxsize=16)(make_inner_loop)


def weights_template(model: Transformer, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of a model's weights."""
    abstract = model.abstract_params()
    shardings = param_shardings(mesh, model.axes(), abstract)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


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
