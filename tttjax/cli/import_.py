"""Make a run of weights from elsewhere, for every command that takes a run.

examples:
  tttjax import checkpoints/125m-e2e --workdir=runs/125m --tokenizer=llama3/tokenizer.json
      a checkpoint of the official TTT-E2E code; sizes are told from its arrays
  tttjax import gs://BUCKET/125m-e2e/4800 --workdir=runs/125m \\
      --config=paper:125m,ttt_e2e,pretrain
      the same from Google Cloud Storage, with a configuration of yours
  tttjax import hf/Llama-3.2-1B --workdir=runs/llama
      a Transformer of Hugging Face: config.json, safetensors, tokenizer.json
  tttjax import hf/Llama-3.2-1B --workdir=runs/llama-ttt --config.model.fast_mlp=true \\
      --config.model.suffix_layers=4 --config.inner.chunk_size=1024
      the same as a start for TTT-E2E: fast MLPs that change nothing until they have learned

then, for instance
  tttjax generate runs/125m --prompt="It was"
  tttjax train --config=paper:125m,ttt_e2e,extend,32k --workdir=runs/125m-32k \\
      --config.train.init_from=runs/125m

Names and shapes are compared before anything is read; weights are read one tensor at a time. When
all is written, the run is opened again and its logits are compared with those of the weights that
were read, and those with transformers where it is installed (pip install -e '.[interop]').
docs/exchange.md has the rest.
"""

import argparse
from pathlib import Path

from absl import logging

from tttjax.config.files import split_spec
from tttjax.errors import UserError
from tttjax.interop.huggingface import supported
from tttjax.interop.huggingface.import_ import looks_like_huggingface, open_huggingface
from tttjax.interop.official.checkpoint import looks_official
from tttjax.interop.official.import_ import open_official
from tttjax.interop.source import ImportSource, Reference, Say
from tttjax.interop.transfer import import_run
from tttjax.io.atomic import require_empty_dir
from tttjax.io.paths import local_path
from tttjax.training import checkpoints

__all__ = [
    "ImportSource",
    "Reference",
    "add_arguments",
    "import_run",
    "open_huggingface",
    "open_official",
    "open_source",
    "run",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax import`."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of a Hugging Face model; or of a checkpoint of the official code, its step or "
        "the one above, or gs://BUCKET/FOLDER",
    )
    add("--workdir", required=True, metavar="DIR", help="where the run goes: empty, or not there")
    add(
        "--config",
        metavar="FILE.py[:ARG]",
        help="experiment file (default: told from the source); single fields with "
        "--config.SECTION.FIELD=VALUE, also without a file",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model, or folder of prepared data or of a run "
        "(default: the source's own, if it has one)",
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
    require_empty_dir(args.workdir, "--workdir")  # before anything is asked of a network
    source = open_source(args)
    import_run(source, args.workdir)
    print(f"licence of the weights: {source.origin['license']}. {source.origin['terms']}")
    print(f"imported into {args.workdir}")
    return 0


def open_source(args: argparse.Namespace, say: Say = print) -> ImportSource:
    """What the arguments of the command name. UserError for what cannot be imported."""
    if args.config:
        split_spec(args.config)  # refused before a network is asked
    is_bucket = "://" in args.source
    folder = Path() if is_bucket else local_path(args.source)
    settings = {
        "config": args.config or "",
        "overrides": args.overrides,
        "tokenizer": args.tokenizer or "",
        "say": say,
    }
    if not is_bucket:
        if not folder.exists():
            raise UserError(f"There is no folder {folder} to import; check how it is spelt.")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file; give the folder of a model or checkpoint.")
        if (folder / checkpoints.CHECKPOINT_DIR).is_dir() or (folder / "meta").is_dir():
            raise UserError(f"{folder} is a run of tttjax already; use it as it is.")
        if looks_like_huggingface(folder):
            return open_huggingface(folder, **settings)
        if not looks_official(folder):
            raise UserError(
                f"{folder} is neither a checkpoint of the official TTT-E2E code (model_weights in "
                "the folder of a step) nor a Hugging Face model (config.json and safetensors); "
                f"of these, {supported()} can be imported."
            )
    return open_official(
        args.source if is_bucket else str(folder), project=args.gcs_project, **settings
    )
