"""Convert the weights of a Hugging Face model or an official TTT-E2E checkpoint into a run.

examples:
  tttjax import checkpoints/125m-e2e --workdir=runs/125m --tokenizer=llama3/tokenizer.json
      a checkpoint of the official TTT-E2E code; sizes are inferred from its arrays
  tttjax import gs://BUCKET/125m-e2e/4800 --workdir=runs/125m \\
      --config=paper:125m,ttt_e2e,pretrain
      the same from Google Cloud Storage, with an explicit configuration
  tttjax import hf/Llama-3.2-1B --workdir=runs/llama
      a Hugging Face Transformer: config.json, safetensors, tokenizer.json
  tttjax import hf/Llama-3.2-1B --workdir=runs/llama-ttt --config.model.fast_mlp=true \\
      --config.model.suffix_layers=4 --config.inner.chunk_size=1024
      the same with new fast MLPs for TTT-E2E training, which have no effect initially

then, for example
  tttjax generate runs/125m --prompt="It was"
  tttjax train --config=paper:125m,ttt_e2e,extend,32k --workdir=runs/125m-32k \\
      --config.train.init_from=runs/125m

Names and shapes are compared first; weights are then streamed one tensor at a time. Finally the run
is loaded and its logits are compared with those of the source weights, and with transformers if it
is installed (pip install -e '.[interop]'). See docs/exchange.md.
"""

import argparse
from pathlib import Path

from absl import logging

from tttjax.config.files import split_spec
from tttjax.errors import UserError
from tttjax.interop.huggingface import supported
from tttjax.interop.huggingface.import_ import is_huggingface_model, open_huggingface
from tttjax.interop.official.checkpoint import is_official_checkpoint
from tttjax.interop.official.import_ import open_official
from tttjax.interop.source import ImportSource, Log
from tttjax.interop.transfer import import_run
from tttjax.io.atomic import require_empty_dir
from tttjax.io.paths import local_path
from tttjax.training import checkpoints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax import`."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of a Hugging Face model, or of an official checkpoint (a step or its parent "
        "folder; also gs://BUCKET/FOLDER)",
    )
    add(
        "--workdir",
        required=True,
        metavar="DIR",
        help="work directory of the new run; must be new or empty",
    )
    add(
        "--config",
        metavar="FILE.py[:ARG]",
        help="experiment file (default: inferred from the source); --config.SECTION.FIELD=VALUE "
        "sets single fields, also without a file",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer.json, SentencePiece .model, or folder of prepared data or of a run "
        "(default: the source's own, if any)",
    )
    add(
        "--gcs-project",
        default="",
        metavar="ID",
        help="Google Cloud project to bill for requester-pays buckets",
    )
    parser.set_defaults(has_own_config=True)


def run(args: argparse.Namespace) -> int:
    """`tttjax import` from parsed arguments; returns the exit code."""
    logging.set_verbosity(logging.FATAL)  # silences Orbax
    require_empty_dir(args.workdir, "--workdir")  # before any network access
    source = open_source(args)
    import_run(source, args.workdir)
    print(f"licence of the weights: {source.origin['license']}. {source.origin['terms']}")
    print(f"imported into {args.workdir}")
    return 0


def open_source(args: argparse.Namespace, log: Log = print) -> ImportSource:
    """Opens the source of the weights. Raises UserError if it cannot be imported."""
    if args.config:
        split_spec(args.config)  # checks it before any network access
    is_bucket = "://" in args.source
    folder = Path() if is_bucket else local_path(args.source)
    settings = {
        "config": args.config or "",
        "overrides": args.overrides,
        "tokenizer": args.tokenizer or "",
        "log": log,
    }
    if not is_bucket:
        if not folder.exists():
            raise UserError(f"There is no folder {folder} to import; check the spelling.")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file; give the folder of a model or checkpoint.")
        if (folder / checkpoints.CHECKPOINT_DIR).is_dir() or (folder / "meta").is_dir():
            raise UserError(f"{folder} is a tttjax run already; use it directly.")
        if is_huggingface_model(folder):
            return open_huggingface(folder, **settings)
        if not is_official_checkpoint(folder):
            raise UserError(
                f"{folder} is neither a checkpoint of the official TTT-E2E code (model_weights in "
                "the folder of a step) nor a Hugging Face model (config.json and safetensors); "
                f"supported Hugging Face models: {supported()}."
            )
    return open_official(
        args.source if is_bucket else str(folder), project=args.gcs_project, **settings
    )
