"""Every recipe as text, so that a change to any of them is seen as a diff.

    python -m tests.helpers.recipe_dump tests/recipes/golden

writes one file per experiment file (paper.py: one per size) with, for each recipe, the fields
that differ from the defaults, `defaults.txt` with all defaults, and `sizes.txt` with the sizes of
paper.py's systems.
"""

import dataclasses
import sys
from pathlib import Path

from ml_collections import ConfigDict

from tttjax.config import Config, default_config, from_config_dict, parameter_count, to_flat_dict
from tttjax.recipes import ablations, books, chat, mid_size, paper, quickstart, small, toy
from tttjax.recipes.results import expected
from tttjax.recipes.sizes import full_attention_size


def all_recipes() -> dict[str, ConfigDict]:
    """Every recipe by the word that `--config` takes."""
    found = {f"paper:{recipe}": recipe.config() for recipe in paper.recipes()}
    for module in (ablations, books, toy, quickstart, mid_size, small, chat):
        name = module.__name__.rpartition(".")[2]
        found |= {f"{name}:{arg}": module.get_config(arg) for arg in module.recipes()}
    return found


def dumps() -> dict[str, str]:
    """The contents of the dumped files by name."""
    defaults = to_flat_dict(from_config_dict(default_config()))
    files = {"defaults.txt": "".join(f"{name} = {v!r}\n" for name, v in defaults.items())}
    files["sizes.txt"] = paper.size_table() + "\n"
    for word, config in all_recipes().items():
        file, _, arg = word.partition(":")
        name = f"paper_{arg.split(',')[0]}.txt" if file == "paper" else f"{file}.txt"
        text = _dump(word, from_config_dict(config), defaults)
        files[name] = f"{files[name]}\n{text}" if name in files else text
    return files


def _dump(word: str, config: Config, defaults: dict) -> str:
    count = parameter_count(config.model)
    train = config.train
    lines = [
        f"[{word}]",
        f"parameters: {count['total']:,}; fast MLPs {count['fast']:,}",
        f"tokens: {train.steps * train.batch_size * train.seq_len:,}",
    ]
    if word.startswith("paper:"):
        recipe = paper.parse(word.partition(":")[2])
        ratio = count["non_embedding"] / full_attention_size(recipe.size)
        lines[1] += f"; without embedding {ratio:.3f} of full attention's"
        lines.append(f"expect: {expected(*dataclasses.astuple(recipe))}")
    values = to_flat_dict(config)
    lines += [f"{name} = {v!r}" for name, v in values.items() if v != defaults[name]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in dumps().items():
        (folder / name).write_text(text)
