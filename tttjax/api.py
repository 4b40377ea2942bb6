"""The public API, what `import tttjax` offers: the library behind the command line.

docs/api.md has an example of everything, and says what is stable.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from tttjax import recipes
from tttjax.config import Config
from tttjax.config.build import replace_values
from tttjax.data.preparation import prepare as prepare_data
from tttjax.data.shards import PreparedData
from tttjax.errors import UserError
from tttjax.evaluation.compare import compare
from tttjax.evaluation.report.entries import ReportEntry
from tttjax.evaluation.report.make import make_report
from tttjax.evaluation.report.results import Report
from tttjax.evaluation.results import Comparison
from tttjax.io.paths import storage_path
from tttjax.models.transformer import Transformer
from tttjax.models.transformer import build_model as build_transformer
from tttjax.parallel.precision import x64_if_configured
from tttjax.planning.make import Plan, make_plan
from tttjax.planning.topologies import parse_topology
from tttjax.runs.load import load_model
from tttjax.runs.loaded_run import LoadedRun, StrPath
from tttjax.runs.run import RunSpec
from tttjax.training.loop import train as train_config
from tttjax.ttt.chunk import InnerLoss
from tttjax.ttt.outer_loss import (
    ForwardOutput,
    InnerLoop,
    learns,
    make_inner_loop,
    make_outer_loss,
    normalise_weights,
)
from tttjax.types import Array, Batch, Params

MetaGrad = Callable[..., tuple[Array, Params]]


def prepare(
    inputs: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    tokenizer: StrPath = "bytes",
    **settings: Any,
) -> PreparedData:
    """Tokenizes text files or folders into the data set `out`, and opens it.

    tokenizer: "bytes", "sentencepiece" (trained on the text), a tokenizer file, or the folder of
    another data set. settings: the other options of `tttjax prepare`, such as vocab_size=4096.
    Called again, it resumes. Raises UserError for bad input.
    """
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    return prepare_data(paths, out, tokenizer=str(tokenizer), **settings)


def train(
    config: Config | str,
    workdir: StrPath,
    *,
    data: StrPath | Sequence[StrPath] | None = None,
    stop_after: int | None = None,
) -> LoadedRun:
    """Trains in `workdir`, from its newest checkpoint if there is one, and loads the result.

    config: a configuration, or a recipe as `recipes.get` takes it. data: prepared data sets, in
    place of `config.data.sources`. stop_after: save and return after this step; the same call
    goes on. Raises UserError as `tttjax train` does, and KeyboardInterrupt after Ctrl-C or SIGTERM,
    once the last step is saved.
    """
    config = _resolved(config)
    if data is not None:
        folders = [data] if isinstance(data, str | os.PathLike) else data
        config = replace_values(config, {"data.sources": tuple(map(os.fspath, folders))})
    result = train_config(config, workdir, stop_after=stop_after)
    if result.interrupted and result.step != stop_after:
        raise KeyboardInterrupt(f"stopped after step {result.step}; the same call resumes")
    return load(workdir)


def load(
    workdir: StrPath, *, mode: str = "", tokenizer: StrPath | None = None, max_length: int = 0
) -> LoadedRun:
    """The newest weights of a run, on one device, ready for inference.

    mode: "on" (default for a model with fast weights), "off", or "dynamic". tokenizer: its folder
    (default: the run's own). max_length: capacity of full attention, in tokens (0: eight training
    sequences). Raises UserError if something is missing or does not fit.
    """
    folder = None if tokenizer is None else Path(tokenizer)
    return LoadedRun(
        load_model(os.fspath(workdir), tokenizer=folder, mode=mode, max_length=max_length)
    )


def build_model(config: Config | str) -> Transformer:
    """The model of a configuration: pure functions. Its weights are `model.init(seed)`."""
    config = _resolved(config)
    return build_transformer(config.model, config.inner)


def value_and_meta_grad(
    model: Transformer,
    config: Config,
    *,
    rule: optax.GradientTransformation | None = None,
    loss: InnerLoss | None = None,
) -> MetaGrad:
    """The outer loss (eq. 6 of the paper) and its gradient.

    The gradient goes through the inner updates that `config.inner.meta_gradient` selects. Returns
    f(params, batch, inner_lr=config.inner.lr) -> (loss, gradient), compiled: the mean over
    sequences and chunks of each chunk's masked mean, in nats; and `Params(slow, fast)`. batch:
    `Batch(inputs, targets, mask)`, each [B, T] with T a multiple of config.inner.chunk_size. With a
    fourth array, `weight`, the loss is the weighted mean over the batch's targets; the inner loss
    has no weights.

    rule, loss: a custom inner rule and inner loss, in place of the configuration's. Raises
    UserError if there are no inner updates.
    """
    learn = learns(model, config.inner.meta_gradient)
    outer = make_outer_loss(model, _inner_loop(config, rule, loss, learn), learn=learn)
    return _checked(
        jax.value_and_grad(lambda params, batch, lr: outer(params, batch, lr)[0]), model, config
    )


def forward(
    model: Transformer,
    config: Config,
    *,
    learn: bool = True,
    rule: optax.GradientTransformation | None = None,
    loss: InnerLoss | None = None,
) -> Callable[..., ForwardOutput]:
    """The outer loss and what it consists of, such as the losses by chunk.

    Returns f(params, batch, inner_lr=config.inner.lr) -> `ForwardOutput`, compiled: of every
    sequence, loss [B], chunk_loss_N, token_nll_T, grad_norm_N, fast, drift, layer_drift_L. Losses
    are in nats per token; the mean of `loss` is the outer loss. Arguments are those of
    `value_and_meta_grad`; learn: whether to update.
    """
    learn = learn and bool(model.fast_paths)
    outer = make_outer_loss(model, _inner_loop(config, rule, loss, learn), learn=learn)
    return _checked(lambda params, batch, lr: outer(params, batch, lr)[1], model, config)


def _inner_loop(
    config: Config,
    rule: optax.GradientTransformation | None,
    loss: InnerLoss | None,
    learn: bool,
) -> InnerLoop:
    if (rule or loss) and not learn:
        raise UserError(
            "rule and loss need inner updates: fast weights, and an inner.meta_gradient other than "
            '"none"'
        )
    inner = make_inner_loop(config.inner)
    return inner._replace(rule=rule or inner.rule, loss=loss or inner.loss)


def _checked(
    function: Callable[..., Any], model: Transformer, config: Config
) -> Callable[..., Any]:
    """A function of (params, batch, inner_lr), compiled, with checks of its arguments."""
    compiled = jax.jit(lambda params, batch, lr: function(params, normalise_weights(batch), lr))
    with x64_if_configured(config):
        expected = model.abstract_params()

    def run(params: Params, batch: Batch, inner_lr: float = config.inner.lr) -> Any:
        _check_batch(batch, config)
        with x64_if_configured(config):
            _check_params(params, expected)
            return compiled(params, batch, inner_lr)

    return run


def _check_batch(batch: Batch, config: Config) -> None:
    """UserError for a batch that the model cannot read, or would read wrongly."""
    inputs, targets = np.asarray(batch.inputs), np.asarray(batch.targets)
    chunk, vocab = config.inner.chunk_size, config.model.vocab_size
    if inputs.ndim != 2 or not inputs.shape == targets.shape == np.shape(batch.mask):
        raise UserError(
            f"inputs {inputs.shape}, targets {targets.shape} and mask {np.shape(batch.mask)} must "
            "have one shape, [B, T]"
        )
    if batch.weight is not None:
        weight = np.asarray(batch.weight)
        if (
            weight.shape != inputs.shape
            or (weight < 0).any()
            or weight[~np.asarray(batch.mask)].any()
        ):
            raise UserError(
                f"weight must have the inputs' shape, {inputs.shape}, be at least 0, and be 0 "
                "where mask is False"
            )
        if not weight.any():
            raise UserError("weight is 0 everywhere: no target is left to learn from")
    if not inputs.size or inputs.shape[1] % chunk:
        raise UserError(
            f"sequences of {inputs.shape[1]} tokens are no multiple of inner.chunk_size = {chunk}"
        )
    for name, tokens in (("inputs", inputs), ("targets", targets)):
        if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() >= vocab:
            raise UserError(f"{name} must be integers from 0 to {vocab - 1}, the vocabulary")


def _check_params(params: Params, expected: Params) -> None:
    """UserError for weights of another model, or in another dtype."""
    structure: Any = jax.tree.structure(expected)
    if structure != jax.tree.structure(params):
        raise UserError("the weights have other names than the model's; make them by model.init")
    for actual, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        if (np.shape(actual), actual.dtype) != (leaf.shape, leaf.dtype):
            raise UserError(
                f"a weight is {actual.dtype}{list(np.shape(actual))}, and the model has "
                f"{leaf.dtype}{list(leaf.shape)}; make the weights by model.init"
            )


def evaluate(
    *workdirs: StrPath,
    data: StrPath | None = None,
    modes: str | Sequence[str] = (),
    names: Sequence[str] = (),
) -> Comparison:
    """Loss by position and context length of runs on the same held-out tokens, TTT on and off.

    data: a prepared data set (default: the first run's). modes: "on", "off", "dynamic". names: of
    the runs in tables (default: their folders'). `.table` is the result as text, `.series` the
    sums. Raises UserError for runs that do not compare.
    """
    folder = None if data is None else os.fspath(data)
    if names and len(names) != len(workdirs):
        raise UserError(f"there are {len(names)} names for {len(workdirs)} runs; give one for each")
    labels = names or [""] * len(workdirs)
    runs = [RunSpec(os.fspath(path), name) for path, name in zip(workdirs, labels, strict=True)]
    return compare(runs, data=folder, modes=(modes,) if isinstance(modes, str) else modes)


def _resolved(config: Config | str) -> Config:
    return config if isinstance(config, Config) else recipes.get(config)


def report(systems: Mapping[str, StrPath], out: StrPath, *, data: StrPath | None = None) -> Report:
    """Compares runs by name, {"ttt_e2e": "runs/first"}, and writes a page with tables to `out`."""
    entries = [ReportEntry(name, storage_path(workdir)) for name, workdir in systems.items()]
    return make_report(entries, Path(out), data=None if data is None else storage_path(data))


def plan(config: Config | str, topology: str) -> Plan:
    """Memory, FLOPs and time of a train step on a pod such as "v5p:2x2x1", compiled for it.

    Needs the extra `plan` for TPUs, `plan-gpu` for GPUs. Raises UserError if the mesh does not fit
    the topology.
    """
    return make_plan(_resolved(config), parse_topology(topology))
