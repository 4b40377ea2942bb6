"""The TTT-E2E paper's recipes: every size, system, stage and context length.

    tttjax train --config=paper:SIZE,SYSTEM,pretrain[,MULTIPLE] --workdir=DIR
    tttjax train --config=paper:SIZE,SYSTEM,extend,CONTEXT[,MULTIPLE] --workdir=DIR

SIZE 125m, 350m, 760m, 1b, 3b; CONTEXT 8k, 16k, 32k, 64k, 128k; MULTIPLE 1x to 5x the
Chinchilla-optimal tokens (default 1x; the paper's large 3B run is 3x). SYSTEM:

full, window, hybrid     full attention; window attention of 8K tokens; one full layer in six
ttt_e2e                  window attention, the MLPs of the last quarter of the blocks are fast
mamba2, gated_deltanet   each with window attention in every block
kda                      the same with Kimi Delta Attention, which the papers do not have
ttt_kvb                  window attention and TTT-MLP in every block
ttt_linear, ttt_mlp      the second paper's layers, without attention

The last six are described in baselines.py, with patterns for any other hybrid. Every system is as
large as full attention, the embedding left out, to within 2%.

Cost, in tokens of pretraining at 1x: 2.5B (125m), 7.1B (350m), 15.2B (760m), 26.2B (1b), 54.5B
(3b, 163.6B at 3x); each extension adds 5%. What to expect of one recipe, its cost and its command:

    tttjax recipes paper:3b,ttt_e2e,extend,128k,3x

and the sizes of all systems: python -m tttjax.recipes.paper

The data are the user's own: DCLM-Baseline without documents under 8K tokens in data/dclm and
books in data/books, both prepared with the Llama 3 tokenizer, or set
`--config.data.sources`. An extension starts from `train.init_from`, by default the work directory
of its pretraining run as named by the command that is printed. The mesh is the machine's: 1b and
3b need `--config.mesh.fsdp=8` or the like, and `--config.train.accum_steps` where memory is short.

One choice differs from the published runs: their warm-up starts at a learning rate of 0, so that
the first step does nothing; here it starts above zero (`--config.optim.init_lr=0` is theirs).
"""

import re
import sys
from dataclasses import astuple, dataclass
from itertools import product

from ml_collections import ConfigDict

from tttjax.config import from_config_dict, parameter_count
from tttjax.errors import UserError
from tttjax.recipes.results import expected
from tttjax.recipes.sizes import (
    CONTEXTS,
    MIXERS,
    SIZES,
    choose,
    extension,
    full_attention_size,
    pretraining,
)


@dataclass(frozen=True)
class Recipe:
    """One of the paper's runs; `str` gives the argument that names it."""

    size: str
    system: str
    stage: str
    context: str = ""
    multiple: int = 1

    def __str__(self) -> str:
        words = [self.size, self.system, self.stage, self.context]
        words += [f"{self.multiple}x"] if self.multiple > 1 else []
        return ",".join(word for word in words if word)

    def config(self) -> ConfigDict:
        """Its configuration."""
        if self.stage == "pretrain":
            return pretraining(self.size, self.system, self.multiple)
        return extension(self.size, self.system, self.context, self.multiple)


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of the recipe named `arg`, as `125m,ttt_e2e,pretrain`."""
    return parse(arg).config()


def parse(arg: str | None) -> Recipe:
    """The recipe of an argument; UserError that says what is wrong with it."""
    words = (arg or "").split(",")
    if len(words) < 3:
        raise UserError(
            f"paper needs SIZE,SYSTEM,pretrain or SIZE,SYSTEM,extend,CONTEXT, such "
            f"as 125m,ttt_e2e,pretrain, not {arg!r}."
        )
    size, system, stage, *remaining = words
    choose(size, SIZES, "The size")
    choose(system, MIXERS, "The system")
    choose(stage, ("pretrain", "extend"), "The stage")
    context = ""
    if stage == "extend":
        context, *remaining = remaining or [""]
        choose(context, CONTEXTS, "The context length")
    multiple = remaining.pop(0) if remaining else "1x"
    if remaining or not re.fullmatch("[1-5]x", multiple):
        raise UserError(
            f"{arg!r} ends with {','.join([multiple, *remaining])!r}; only 1x to 5x may."
        )
    return Recipe(size, system, stage, context, int(multiple[0]))


def expect(arg: str) -> str:
    """The published numbers to expect of a recipe."""
    return expected(*astuple(parse(arg)))


def size_table() -> str:
    """Parameters without embedding of every system and size, and the ratio to full attention."""
    rows = [["system", *SIZES]]
    for system in MIXERS:
        rows.append([system])
        for size in SIZES:
            model = from_config_dict(pretraining(size, system)).model
            count = parameter_count(model)["non_embedding"]
            rows[-1].append(f"{count / 1e6:.1f}M ({count / full_attention_size(size):.3f})")
    return "\n".join(f"{name:15}" + "".join(f"{x:>17}" for x in row) for name, *row in rows)


def recipes() -> list[Recipe]:
    """All of the paper's runs: 1x everywhere, 3x at 3b, and 2x to 5x at 760m."""
    result = []
    for size, system in product(SIZES, MIXERS):
        multiples = {"760m": (1, 2, 3, 4, 5), "3b": (1, 3)}.get(size, (1,))
        if system not in ("full", "gated_deltanet", "ttt_e2e") and size == "760m":
            multiples = (1,)
        for multiple in multiples:
            result.append(Recipe(size, system, "pretrain", multiple=multiple))
            lengths = ["32k"] if size == "760m" and multiple > 1 else list(CONTEXTS)
            result += [Recipe(size, system, "extend", length, multiple) for length in lengths]
    return result


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("usage: tttjax recipes paper:RECIPE, or without a recipe for the table of sizes")
    print(size_table())
