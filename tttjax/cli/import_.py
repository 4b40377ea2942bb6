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

from tttjax.io.atomic import require_empty_dir


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
        help="recipe (paper:125m,...) or experiment file (default: inferred from the source); "
        "--config.SECTION.FIELD=VALUE "
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
    from absl import logging

    from tttjax.interop.open_source import open_source
    from tttjax.interop.transfer import import_run

    logging.set_verbosity(logging.FATAL)  # silences Orbax
    require_empty_dir(args.workdir, "--workdir")  # before any network access
    source = open_source(
        args.source,
        config=args.config or "",
        overrides=args.overrides,
        tokenizer=args.tokenizer or "",
        project=args.gcs_project,
    )
    import_run(source, args.workdir)
    print(f"licence of the weights: {source.origin['license']}. {source.origin['terms']}")
    print(f"imported into {args.workdir}")
    return 0
