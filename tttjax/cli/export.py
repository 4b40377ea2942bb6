"""Write a run's model as Hugging Face safetensors, for transformers and all that reads them.

examples:
  tttjax export runs/first --to=hf/first
      then, in Python: AutoModelForCausalLM.from_pretrained("hf/first", trust_remote_code=True)
  tttjax export runs/full --to=hf/full --dtype=bfloat16 --max-shard-size=2GB
  tttjax export runs/full --to=hf/dynamic --mode=dynamic
      a model without fast weights that learns while it reads all the same

A model that one of transformers' own architectures is exactly becomes that one (Llama, Mistral,
Ministral, Qwen 3, Gemma 3). Others, and all that learn while they read, carry a modeling file,
which trust_remote_code loads; generate() then learns as `tttjax generate` does.

The weights go from the checkpoint to the files tensor by tensor. Then the export is read back, by
this program and by transformers where it is installed (pip install -e '.[interop]'), and logits are
compared: an export that deviates is removed. docs/exchange.md has the rest.
"""

import argparse
import sys

from tttjax.interop.huggingface.export import DTYPES, Deviation, parse_size, plan, write
from tttjax.interop.streaming import return_freed_memory
from tttjax.io.atomic import require_empty_dir
from tttjax.runs.run import (
    MODES,
)
from tttjax.runtime import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax export`."""
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="work directory, or checkpoint, of a run")
    add("--to", required=True, metavar="DIR", help="new folder to write")
    add("--dtype", choices=DTYPES, default="", help="of the files (default: the run's own)")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of a file (default 5GB)")
    add(
        "--mode",
        choices=MODES,
        default="",
        help="on: fast weights learn (default if there are any); off: they can, but only with "
        "generate(learn=True); dynamic: weights learn that never did",
    )
    add("--own-code", action="store_true", help="the modeling file even where there is a stock one")
    add("--tokenizer", metavar="DIR", help="its folder, or data prepared with it")


def run(args: argparse.Namespace) -> int:
    """`tttjax export` from parsed arguments; the exit code, 1 for an export that deviates."""
    return_freed_memory()
    target, limit = require_empty_dir(args.to, "--to"), parse_size(args.max_shard_size)
    export = plan(
        args.workdir,
        dtype=args.dtype,
        mode=args.mode,
        own_code=args.own_code,
        tokenizer=args.tokenizer,
        say=_say,
    )
    try:
        write(export, target, limit=limit, say=_say)
    except Deviation as deviation:
        print(f"error: {deviation}; nothing is left of the export.", file=sys.stderr)
        return 1
    return 0


def _say(line: str) -> None:
    print(f"export: {line}", flush=True)
    progress.now(f"export, after: {line}")
