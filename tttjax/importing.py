"""Make a run of weights from elsewhere, for every command that takes a run.

examples:
  tttjax import checkpoints/125m-e2e --workdir=runs/125m --tokenizer=llama3/tokenizer.json
      a checkpoint of the official TTT-E2E code; sizes are told from its arrays
  tttjax import gs://BUCKET/125m-e2e/4800 --workdir=runs/125m \\
      --config=experiments/paper.py:125m,ttt_e2e,pretrain
      the same from Google Cloud Storage, with a configuration of yours

then, for instance
  tttjax generate runs/125m --prompt="It was"
  tttjax train --config=experiments/paper.py:125m,ttt_e2e,extend,32k --workdir=runs/125m-32k \\
      --config.train.init_from=runs/125m

Names and shapes are compared before anything is read; weights are read one array at a time. When
all is written, the run is opened again and its logits are compared with those of the weights that
were read. docs/exchange.md has the rest.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from tttjax import checkpoint
from tttjax.config import Config, from_config_dict, load_config, parameter_count
from tttjax.config.files import apply_override
from tttjax.data.tokenizers import Tokenizer
from tttjax.data.vocabulary import open_tokenizer
from tttjax.errors import UserError
from tttjax.evaluate.runs import RunSpec, make_run_mesh, open_run, weights_template
from tttjax.interop import official
from tttjax.interop.adopt import bytes_at_once, check_vacant, new_workdir, write_run
from tttjax.interop.official_checkpoint import looks_official, open_official_checkpoint
from tttjax.interop.official_config import deduce_config
from tttjax.interop.streaming import Piece, assemble
from tttjax.models import Transformer, build_model, combine
from tttjax.precision import as_configured
from tttjax.types import Params

SAMPLE = 64  # random tokens whose logits are compared
TOLERANCE = 1e-4  # of these logits, read back on the same devices

Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Weights that have been opened, and not read.

    step: the number that the imported checkpoint gets. origin: where the weights are from, for
    `origin.json`. pieces: reads them one by one, in the model's layout.
    """

    config: Config
    step: int
    origin: dict[str, Any]
    pieces: Callable[[Transformer], Iterator[Piece]]
    tokenizer: Tokenizer | None = None


def import_run(source: Source, workdir: str | Path, say: Say = print) -> float:
    """Reads the weights, writes the run, opens it again; the largest deviation of its logits.

    Raises UserError for a work directory that is in use, for weights that cannot be read, and for a
    run that does not compute what the weights in memory did; then nothing is left behind.
    """
    config = source.config
    model, mesh = build_model(config.model, config.inner), make_run_mesh(config)
    with as_configured(config), new_workdir(workdir) as folder:
        template = weights_template(model, mesh)
        params = assemble(template, source.pieces(model), model)
        logit_TV = sample_logits(config, params)
        if not np.isfinite(logit_TV).all():
            raise UserError(
                f"the logits of {source.origin['source']} are not finite: its weights are damaged, "
                "or it needs another configuration."
            )
        write_run(
            folder,
            config,
            params,
            step=source.step,
            origin=source.origin,
            tokenizer=source.tokenizer,
        )
        at_once = bytes_at_once(params)
        del params  # so that the two never lie in memory together
        written = open_run(RunSpec(folder))
        again = checkpoint.restore_params(folder, template, at_once=at_once)
        deviation = float(np.max(np.abs(sample_logits(written.config, again) - logit_TV)))
        if not deviation <= TOLERANCE:
            raise UserError(
                f"the run that was written computes other logits than the weights that were read "
                f"(by up to {deviation:.3g}); it was removed. Check the disk, and import again."
            )
    say(f"opened again: logits of {SAMPLE} random tokens differ by at most {deviation:.3g}")
    return deviation


def sample_tokens(vocab_size: int) -> np.ndarray:
    """The same random tokens [T] in every comparison."""
    return np.random.default_rng(0).integers(vocab_size, size=SAMPLE, dtype=np.int32)


def sample_logits(config: Config, params: Params) -> np.ndarray:
    """Logits [T, V] of random tokens, without learning, through every weight but embeddings."""
    # By XLA alone: its programs may be divided among devices, and agree with others to rounding.
    plain = dataclasses.replace(config.model, attention_kernel="xla", remat="none")
    model = build_model(plain, config.inner)
    token_T = sample_tokens(config.model.vocab_size)

    @jax.jit
    def logits(params: Params) -> jax.Array:
        weights = combine(params.slow, params.fast)
        x_TD = model.embed(params.slow, token_T)
        for part in ("prefix", "suffix"):
            x_TD, _ = model.run_part(part, weights, None, x_TD)
        return model.logits(weights, model.final_norm(weights, x_TD))

    return np.asarray(logits(params))


# Sources -----------------------------------------------------------------------------------------


def open_official(
    path: str,
    *,
    config: str = "",
    overrides: Sequence[str] = (),
    tokenizer: str = "",
    project: str = "",
    say: Say = print,
) -> Source:
    """A checkpoint of the official code, compared with the configuration by names and shapes.

    config: experiment file; "": the configuration is told from the arrays. overrides: of either.
    Raises UserError for anything wrong with one of them.
    """
    found = open_official_checkpoint(path, project)
    size = sum(array.nbytes for array in found.arrays.values())
    say(
        f"{found.source}: official TTT-E2E checkpoint, step {found.step}, {len(found.arrays)} "
        f"arrays, {size / 1e9:.2f} GB"
    )
    if config:
        resolved, assumed = load_config(config, overrides), {}
    else:
        values, assumed = deduce_config(found.arrays)
        resolved, assumed = _overridden(values, overrides, assumed)
    official.check_arrays(found.arrays, build_model(resolved.model, resolved.inner))
    _say_config(resolved, assumed, say)
    return Source(
        config=resolved,
        step=found.step,
        origin={
            "kind": "official TTT-E2E checkpoint",
            "source": found.source,
            "step": found.step,
            "assumed": assumed,
        },
        pieces=lambda model: official.pieces(found.arrays, model),
        tokenizer=_tokenizer(tokenizer, resolved, say),
    )


def open_source(args: argparse.Namespace, say: Say = print) -> Source:
    """What the arguments of the command name. UserError if it is neither kind, or incomplete."""
    path = Path(args.source).expanduser()
    if "://" not in args.source:
        if not path.exists():
            raise UserError(f"There is no folder {path} to import from; check how it is spelt.")
        if not path.is_dir():
            raise UserError(f"{path} is a file; give the folder of a checkpoint.")
        if (path / checkpoint.DIRECTORY).is_dir() or (path / "meta").is_dir():
            raise UserError(f"{path} is a run of tttjax already; use it as it is.")
        if not looks_official(path):
            raise UserError(
                f"{path} is no checkpoint of the official TTT-E2E code, which has model_weights in "
                "the folder of a step."
            )
    return open_official(
        args.source,
        config=args.config or "",
        overrides=args.overrides,
        tokenizer=args.tokenizer or "",
        project=args.gcs_project,
        say=say,
    )


def _overridden(
    values: ConfigDict, overrides: Sequence[str], assumed: dict[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """The configuration with the overrides, and what is still assumed of it."""
    for override in overrides:
        apply_override(values, override)
    named = {override.removeprefix("--config.").partition("=")[0] for override in overrides}
    left = {name: value for name, value in assumed.items() if name not in named}
    return from_config_dict(values), left


def _say_config(config: Config, assumed: dict[str, Any], say: Say) -> None:
    model = config.model
    count = parameter_count(model)
    fast = f", fast MLPs in the last {model.suffix_layers}" if model.fast_mlp else ""
    say(
        f"{model.num_layers} blocks of width {model.embed_dim}, {model.num_heads} heads, MLPs of "
        f"{model.mlp_dim}{fast}, vocabulary {model.vocab_size}; {count['total']:,} parameters, "
        f"{count['fast']:,} of them fast"
    )
    if assumed:
        told = ", ".join(f"{name}={_plain(value)}" for name, value in assumed.items())
        say(f"assumed, since no array tells: {told} (change any with --config.NAME=VALUE)")


def _plain(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value}"


def _tokenizer(path: str, config: Config, say: Say) -> Tokenizer | None:
    if not path:
        say("no tokenizer: give one with --tokenizer, here or to the commands that read text")
        return None
    found = open_tokenizer(Path(path).expanduser())
    if found is None:
        raise UserError(
            f"there is no tokenizer at {path}: give a tokenizer.json, a SentencePiece .model file, "
            "or the folder of prepared data or of a run."
        )
    if found.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {found.vocab_size} tokens, more than the "
            f"{config.model.vocab_size} of the model; give the one that it was trained with."
        )
    return found


# The command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax import`."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of a checkpoint of the official code, its step or the one above; or "
        "gs://BUCKET/FOLDER",
    )
    add("--workdir", required=True, metavar="DIR", help="where the run goes: empty, or not there")
    add(
        "--config",
        metavar="FILE.py[:ARG]",
        help="experiment file of the model (default: told from the arrays); single fields with "
        "--config.SECTION.FIELD=VALUE, also without a file",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model, or folder of prepared data or of a run",
    )
    add(
        "--gcs-project",
        default="",
        metavar="ID",
        help="Google Cloud project that pays for reading a bucket whose owner does not",
    )
    parser.set_defaults(has_own_config=True)


def run(args: argparse.Namespace) -> int:
    """`tttjax import` from parsed arguments; the exit code."""
    logging.set_verbosity(logging.FATAL)  # Orbax tells of its own steps otherwise
    check_vacant(args.workdir)  # before anything is asked of a network
    source = open_source(args)
    import_run(source, args.workdir)
    print(f"imported into {args.workdir}")
    return 0
