"""List the weights of a configuration's model: path, shape, and which of them are fast.

examples:
  tttjax paths --config=quickstart:ttt_e2e
  tttjax paths --config=paper:125m,full,pretrain --config.model.suffix_layers=3 \\
      --config.inner.fast_paths='suffix/**/mlp/**'
                                                what a choice of fast weights would match
"""

import argparse

from tttjax.cli.config_argument import add_config_argument
from tttjax.config.files import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax paths`."""
    add_config_argument(parser)


def run(args: argparse.Namespace) -> int:
    """`tttjax paths` from parsed arguments; returns the exit code."""
    config = load_config(args.config, args.overrides)

    from flax.traverse_util import flatten_dict

    from tttjax.models.stacking import combine
    from tttjax.models.transformer import build_model

    model = build_model(config.model, config.inner)
    params = model.abstract_params()
    weights = flatten_dict(combine(params.slow, params.fast), sep="/")
    shapes = {path: " x ".join(map(str, weight.shape)) for path, weight in weights.items()}
    width = max(map(len, shapes.values()))
    for path in sorted(weights):
        mark = "fast" if path in model.fast_paths else "    "
        print(f"{mark}  {shapes[path]:>{width}}  {path}")
    total, fast = (sum(weights[path].size for path in p) for p in (weights, model.fast_paths))
    print(f"{total:,} parameters, {fast:,} of them fast; a stack of blocks has its height in front")
    return 0
