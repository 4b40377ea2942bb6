"""Writes docs/configuration.md from the schema: `python -m tttjax.config.reference FILE`."""

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import cast, get_args, get_origin

from tttjax.config.fields import FieldInfo, field_info
from tttjax.config.schema import SECTIONS

_HEAD = """\
# Configuration

<!-- Generated from tttjax/config by `python -m tttjax.config.reference \
docs/configuration.md`; do not edit. -->

A run is described by a Python file with a function `get_config(arg)` that starts from
`tttjax.config.default_config()`, changes what it needs and returns it:

```python
from tttjax.config import default_config


def get_config(arg: str | None = None):
    config = default_config()
    config.model.num_layers = 12
    config.train.seq_len = 8192
    return config
```

Choose the file, its argument, and any field on the command line; the last one wins:

```bash
tttjax train --config=paper:125m,ttt_e2e,pretrain --workdir=runs/125m \\
    --config.data.sources=data/dclm,data/books --config.train.steps=4800 --config.model.remat=none
```

Lists are written `a,b`; booleans `true` and `false`; numbers in decimal notation (`100`,
`1_000`, `1e-3`). Integers are at most 2147483647 (int32), except seeds; numbers are finite in
float32, and 0 or at least 1.2e-38 in size. Everything is checked once, before anything else
happens: an unknown name, a wrong type, a value out of its limits or fields that contradict each
other end the program with a sentence that says so.

Every run writes two files into its work directory: `config.json`, the resolved configuration, and
`environment.json`, for each start the versions of the packages, the git revision and what the
configuration was then. When a run is resumed, the fields marked *may change* below may have other
values (and `train.steps`, if `optim.decay_steps` fixes the schedule); any other difference is
refused, except for the paths of the data, which are recognized by their content. Every checkpoint
has the configuration of its weights: a `config.json` that differs from it in any other field, or
has a later format, is refused by every command that opens the run.

`~` in a path is the home folder. A run records its paths in full.
"""

_BETWEEN_FIELDS = """\
## What must hold between fields

- `train.seq_len` and every one of `eval.context_lengths` are multiples of `inner.chunk_size`.
- With fast weights and window attention, `model.window_size` is at least `inner.chunk_size`.
- `model.suffix_layers` is at most `model.num_layers`; `model.fast_mlp` needs a suffix. A model has
  fast weights if it has fast MLPs or `inner.fast_paths` chooses others.
- `model.mixers` is no longer than `model.num_layers`.
- `model.embed_dim` is a multiple of `model.num_heads` unless `model.head_dim` is set; a head has an
  even number of entries. `model.num_kv_heads` divides `model.num_heads`.
- `model.rope_scaling` is empty, one number, or four; its factor is at least 1, and the second of
  four is less than the third.
- The width of mamba2's heads, `model.mamba2.expand` x `model.embed_dim`, is a multiple of
  `model.mamba2.head_dim`, their number one of `model.mamba2.groups`; `model.mamba2.dt_limits` is
  empty or two numbers, the lower one first.
- `model.gated_deltanet.value_heads` is a multiple of `model.gated_deltanet.key_heads`;
  `model.embed_dim` is a multiple of `model.ttt_layer.heads`, which have an even number of entries.
- `model.fast_mlp` needs `model.mlp_dim` above 0 or `model.fast_mlp_heads`; the latter is only for
  `model.fast_mlp` and divides `model.embed_dim`. `model.fast_mlp_init` = `zero` is only for
  `model.fast_mlp`.
- `inner.truncate_chunks` is set if, and only if, `inner.meta_gradient` is `truncated`.
- `train.batch_size` is a multiple of `train.accum_steps`, and each micro-batch of
  `mesh.data` x `mesh.fsdp`.
- `mesh.data` x `mesh.fsdp` x `mesh.tensor` is the number of devices; `model.mlp_dim`,
  `model.vocab_size`, `model.fast_mlp_heads` and the heads of every mixer that occurs (those of
  keys and values too) are multiples of `mesh.tensor`, `model.embed_dim` of `mesh.fsdp`;
  `mesh.data` x `mesh.fsdp` is a multiple of the number of processes.
- `optim.warmup_steps` is less than `optim.decay_steps` (or `train.steps`).
- `data.weights` is empty or has one entry for each of `data.sources`.
"""


def reference() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD]
    for name, section in SECTIONS.items():
        parts += _tables(name, section)
    return "\n".join([*parts, _BETWEEN_FIELDS])


def _tables(name: str, section: type) -> list[str]:
    """The table of a section, then those of the sections nested in it."""
    fields = [f for f in dataclasses.fields(section) if not dataclasses.is_dataclass(f.type)]
    nested = [f for f in dataclasses.fields(section) if dataclasses.is_dataclass(f.type)]
    rows = "\n".join(map(_row, fields))
    table = f"| field | type | default | meaning |\n|---|---|---|---|\n{rows}"
    heading = "#" * (2 + name.count("."))
    first = f"{heading} {name}\n\n{inspect.getdoc(section)}\n\n{table}\n"
    return [first, *(t for f in nested for t in _tables(f"{name}.{f.name}", cast(type, f.type)))]


def _row(field: dataclasses.Field) -> str:
    info = field_info(field)
    default = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
    notes = [info.doc, *_limits(info)]
    if info.mutable_on_resume:
        notes.append("*May change.*")
    return f"| `{field.name}` | {_type_name(field)} | `{default}` | {' '.join(notes)} |"


def _limits(info: FieldInfo) -> list[str]:
    limits = []
    if info.choices:
        several = ", or several joined by `+`" if info.joined else ""
        limits.append(f"One of {', '.join(f'`{choice}`' for choice in info.choices)}{several}.")
    if info.minimum is not None:
        limits.append(f"At least {info.minimum}.")
    if info.maximum is not None:
        limits.append(f"At most {info.maximum}.")
    if info.above is not None:
        limits.append(f"Above {info.above}.")
    if info.below is not None:
        limits.append(f"Below {info.below}.")
    return limits


def _type_name(field: dataclasses.Field) -> str:
    kind = get_args(field.type)[0] if get_origin(field.type) is tuple else field.type
    name = getattr(kind, "__name__", str(kind))
    return f"list of {name}" if kind is not field.type else name


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference())
