"""Write a run's model as Hugging Face safetensors, for transformers and compatible tools.

examples:
  tttjax export runs/first --to=hf/first
      then, in Python: AutoModelForCausalLM.from_pretrained("hf/first", trust_remote_code=True)
  tttjax export runs/full --to=hf/full --dtype=bfloat16 --max-shard-size=2GB
  tttjax export runs/full --to=hf/dynamic --mode=dynamic
      dynamic evaluation of a model without fast weights

A model that matches an architecture of transformers (Llama, Mistral, Ministral, Qwen 3, Gemma 3) is
exported as that architecture. Other models, and all with test-time training, come with a modeling
file that trust_remote_code loads; its generate() applies inner updates as `tttjax generate` does.

Weights are streamed tensor by tensor. The export is then loaded by tttjax, and by transformers if
it is installed (pip install -e '.[interop]'), and logits are compared; an export that deviates is
removed. See docs/exchange.md.
"""

import argparse
import sys

from tttjax.cli.config_argument import add_code_argument
from tttjax.io.atomic import require_empty_dir
from tttjax.io.paths import storage_text
from tttjax.runs.modes import MODES
from tttjax.runtime import progress

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax export`."""
    add_code_argument(parser)
    add = parser.add_argument
    add(
        "workdir",
        type=storage_text,
        metavar="WORKDIR",
        help="work directory or checkpoint of a run",
    )
    add("--to", required=True, metavar="DIR", help="output folder; must be new or empty")
    add("--dtype", choices=DTYPES, default="", help="dtype of the weights (default: the run's own)")
    add(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest size of a file (default: %(default)s)",
    )
    add(
        "--mode",
        choices=MODES,
        default="",
        help="on: test-time training by default (default with fast weights); off: only with "
        "generate(learn=True); dynamic: dynamic evaluation of a static model",
    )
    add(
        "--own-code",
        action="store_true",
        help="use our modeling file even if transformers has the architecture",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        help="folder of the tokenizer, or of data prepared with it (default: the run's own)",
    )


def run(args: argparse.Namespace) -> int:
    """`tttjax export` from parsed arguments; returns 1 if the export deviates."""
    from tttjax.interop.huggingface.export import (
        ExportMismatch,
        parse_size,
        plan_export,
        write_export,
    )
    from tttjax.interop.streaming import return_freed_memory

    return_freed_memory()
    target, limit = require_empty_dir(args.to, "--to"), parse_size(args.max_shard_size)
    export = plan_export(
        args.workdir,
        dtype=args.dtype,
        mode=args.mode,
        own_code=args.own_code,
        tokenizer=args.tokenizer,
        log=_say,
    )
    try:
        write_export(export, target, limit=limit, log=_say)
    except ExportMismatch as deviation:
        print(f"error: {deviation}; the export was removed.", file=sys.stderr)
        return 1
    return 0


def _say(line: str) -> None:
    print(f"export: {line}", flush=True)
    progress.rename_activity(f"export, after: {line}")
