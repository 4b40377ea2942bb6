"""List the published recipes, or say what one costs and what to expect of it.

examples:
  tttjax recipes                                the recipe files
  tttjax recipes paper                          what a file is about, and its recipes
  tttjax recipes paper:125m,ttt_e2e,pretrain    command, parameters, tokens, FLOPs, expected loss
"""

import argparse
import importlib
import inspect
from types import ModuleType

from tttjax.config.files import load_config, recipe_names
from tttjax.config.values import nearest
from tttjax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax recipes`."""
    parser.add_argument(
        "recipe",
        nargs="?",
        default="",
        metavar="NAME[:ARG]",
        help="a recipe file (paper), or one of its recipes (paper:125m,ttt_e2e,pretrain)",
    )


def run(args: argparse.Namespace) -> int:
    """`tttjax recipes` from parsed arguments; returns the exit code."""
    name, _, arg = args.recipe.partition(":")
    if not name:
        for file in recipe_names():
            module = _module(file)
            print(f"{file:12}{len(module.recipes()):>4} recipes  {_summary(module)}")
        print("\n`tttjax recipes NAME` lists those of a file.")
        return 0
    if name not in recipe_names():
        raise UserError(
            f"There is no recipe file {name!r}; choose from {', '.join(recipe_names())}."
            f"{nearest(name, recipe_names())}"
        )
    if arg:
        print(_describe(args.recipe, _module(name), arg))
    else:
        print(inspect.getdoc(_module(name)), "\n\nRecipes:\n")
        print("\n".join(f"{name}:{recipe}" for recipe in _module(name).recipes()))
    return 0


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"tttjax.recipes.{name}")


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def _describe(spec: str, module: ModuleType, arg: str) -> str:
    from tttjax.config import parameter_count
    from tttjax.planning.flops import train_flops_per_token

    config = load_config(spec)
    train, count = config.train, parameter_count(config.model)
    tokens = train.steps * train.batch_size * train.seq_len
    flops = tokens * train_flops_per_token(config.model, config.inner, train.seq_len)
    file, _, _ = spec.partition(":")
    expect = getattr(module, "expect", None)
    expected = expect(arg) if expect else f"what `tttjax recipes {file}` says"
    return (
        f"command:    tttjax train --config={spec} --workdir=DIR\n"
        f"parameters: {count['total']:,}, {count['non_embedding']:,} without the embedding, "
        f"{count['fast']:,} fast\n"
        f"tokens:     {tokens:,}: {train.steps:,} steps of {train.batch_size} x {train.seq_len}\n"
        f"FLOPs:      {flops:.3g}\n"
        f"expect:     {expected}"
    )
