"""Tuning on conversations: prompts are read, and only the assistant's answers are learned.

    tttjax prepare chats.jsonl --chat --tokenizer=RUN --out=DATA
    tttjax train --config=chat:RUN --workdir=DIR --config.data.sources=DATA

RUN         work directory of a run, or of an imported checkpoint (`tttjax import`): its model and
            inner loop, and its newest weights to start from
quickstart  the model of the recipe quickstart:ttt_e2e, with random weights unless
            --config.train.init_from names others

A tenth of the base's learning rate, and the inner rate without warm-up. A sequence is (a part of)
one conversation, so that what was read in one is forgotten in the next; conversations shorter than
train.seq_len are padded, and at least one must be longer.

Cost: 200 steps of 8 sequences; for the quickstart's model 0.8 million tokens. No loss is expected:
that depends on the conversations.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from tttjax.config import default_config
from tttjax.config.run_info import read_config
from tttjax.errors import UserError
from tttjax.recipes import quickstart

QUICKSTART = "quickstart"


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration for tuning a run; arg: its work directory, or "quickstart" (default)."""
    arg = arg or QUICKSTART
    config = quickstart.get_config() if arg == QUICKSTART else _of_run(arg)
    config.inner.lr_warmup_steps = 0
    config.optim.update(peak_lr=config.optim.peak_lr / 10, warmup_steps=20)
    config.data.layout = "documents"
    config.train.update(steps=200, batch_size=8, log_every=10, checkpoint_every=50)
    return config


def recipes() -> list[str]:
    """The argument that needs no run."""
    return [QUICKSTART]


def _of_run(workdir: str) -> ConfigDict:
    """Model, inner loop, learning rate and sequence length of a run, and its weights to start."""
    base = read_config(Path(workdir))
    if base is None:
        raise UserError(f"{workdir} is not the work directory of a run; tune with chat:RUN.")
    config = default_config()
    for section in ("model", "inner"):
        config[section].update(dataclasses.asdict(getattr(base, section)))
    config.optim.peak_lr = base.optim.peak_lr
    config.train.update(init_from=workdir, seq_len=base.train.seq_len)
    config.eval.context_lengths = base.eval.context_lengths
    return config
