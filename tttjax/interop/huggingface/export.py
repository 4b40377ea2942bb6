"""A run as a folder that Hugging Face transformers opens: weights, config, tokenizer, card."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.interop.huggingface import architectures, compare
from tttjax.interop.huggingface.files import TensorFiles, write_tensors
from tttjax.interop.huggingface.names import TensorSlot, check_names, pieces, tensor_places
from tttjax.interop.huggingface.seal import seal_export
from tttjax.interop.huggingface.tokenizer_files import SAMPLE, special_tokens, write_tokenizer
from tttjax.interop.official.checkpoint import StoredArray, open_item
from tttjax.interop.streaming import assemble
from tttjax.io.atomic import atomic_folder
from tttjax.models import Transformer, build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import as_configured
from tttjax.runs.origin import card_metadata, card_section, find_origin
from tttjax.runs.run import (
    LearningOptions,
    Run,
    RunSpec,
    build_eval_model,
    choose_modes,
    iter_eval_setups,
    open_run,
)
from tttjax.runs.tokenizer import load_run_tokenizer
from tttjax.types import Params

DTYPES = ("float32", "bfloat16", "float16")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CODE = ("configuration_tttjax.py", "modeling_tttjax.py")
CODE_TERMS = f"`{CODE[0]}` and `{CODE[1]}` are part of tttjax, under the Apache License 2.0."

Say = Callable[[str], None]


class Deviation(Exception):
    """The export does not compute what the run does."""


@dataclass(frozen=True)
class Export:
    """A run, and what it is to become. learns: whether the export has fast parameters."""

    run: Run
    mode: str
    model: Transformer
    family: str
    places: list[TensorSlot]
    dtype: str
    learns: bool
    tokenizer: Tokenizer | None


def parse_size(text: str) -> int:
    """Bytes of "500MB" or "2GiB". UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size={text} is no size; write it like 500MB or 5GB.")
    return size


def plan(
    workdir: Path | str,
    *,
    dtype: str = "",
    mode: str = "",
    own_code: bool = False,
    tokenizer: Path | str | None = None,
    say: Say = lambda line: None,
) -> Export:
    """Opens a run, and settles how it is exported. UserError if it cannot be."""
    found = open_run(RunSpec(workdir))
    (modes,) = choose_modes([found], (mode,) if mode else ())
    config, learns = found.config, found.has_fast_weights or modes[0] == "dynamic"
    with as_configured(config):
        model = build_model(config.model, config.inner)
        family = architectures.choose_family(
            config.model, config.inner, learns=learns, own_code=own_code
        )
        return Export(
            run=found,
            mode=modes[0],
            model=model,
            family=family,
            places=tensor_places(model, family),
            dtype=dtype or config.model.param_dtype.replace("float64", "float32"),
            learns=learns,
            tokenizer=_tokenizer(found, tokenizer, say),
        )


def _tokenizer(found: Run, given: Path | str | None, say: Say) -> Tokenizer | None:
    try:
        return load_run_tokenizer(found, given)
    except UserError as error:
        if given:
            raise
        say(f"without a tokenizer: {error}")
        return None


def write(export: Export, target: Path, *, limit: int, say: Say = lambda line: None) -> None:
    """Writes, reads back, compares, and only then gives the folder its name.

    limit: bytes of a file. Raises Deviation if logits differ, and leaves nothing then.
    """
    with atomic_folder(target, "--to") as folder, as_configured(export.run.config):
        total = write_tensors(
            folder, _by_stack(export.places), _reader(export), dtype=export.dtype, limit=limit
        )
        _write_texts(export, folder, say)
        name = architectures.CLASSES[export.family]
        say(f"{total:,} bytes of {export.dtype} as {name}; reading them back")
        _compare(export, folder, say)
        seal_export(folder)
    say(f"{target} is complete")


# --- writing --------------------------------------------------------------------------------------


def _by_stack(places: list[TensorSlot]) -> list[TensorSlot]:
    """The rows of a stack of blocks one after the other, as they are stored."""
    order = {path: i for i, path in enumerate(dict.fromkeys(place.path for place in places))}
    return sorted(places, key=lambda place: order[place.path])


def _reader(export: Export) -> Callable[[TensorSlot], np.ndarray]:
    """Reads our weight at a place out of the checkpoint; of a stack, one row."""
    assert export.run.checkpoint is not None
    arrays: dict[str, StoredArray] = open_item(export.run.checkpoint / "params")
    fast = export.model.fast_paths
    opened: dict[str, Callable[[int], np.ndarray]] = {}

    def read(place: TensorSlot) -> np.ndarray:
        part = "fast" if place.path in fast else "slow"
        array = arrays[".".join((part, *place.path.split("/")))]
        if place.row is None:
            return array.read()
        if place.path not in opened:
            opened.clear()  # and with it what was kept of the stack before
            opened[place.path] = array.rows()
        return opened[place.path](place.row)

    return read


def _write_texts(export: Export, folder: Path, say: Say) -> None:
    """Configuration, tokenizer, code and model card."""
    config, tokenizer = export.run.config, export.tokenizer
    tokens = special_tokens(tokenizer) if tokenizer else {}
    scaling = config.model.rope_scaling
    trained = max(config.train.seq_len, int(scaling[0] * scaling[3]) if len(scaling) == 4 else 0)
    values = architectures.config_json(
        config.model, export.family, dtype=export.dtype, max_length=trained, tokens=tokens
    )
    if export.learns:
        model, inner = build_eval_model(export.run, export.mode, LearningOptions())
        values |= architectures.learning_json(model, inner, inner.lr, learn=export.mode != "off")
    _write_json(folder / "config.json", values)
    known = {name: token for name, token in tokens.items() if token is not None}
    _write_json(folder / "generation_config.json", known)
    note = write_tokenizer(tokenizer, folder) if tokenizer else ""
    if note:
        say(note)
    if export.family == architectures.OWN:
        code = resources.files("tttjax.interop.huggingface") / "exported_code"
        for name in CODE:
            (folder / name).write_text((code / name).read_text())
    (folder / "README.md").write_text(_card(export))


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _card(export: Export) -> str:
    config = export.run.config
    trust = ", trust_remote_code=True" if export.family == architectures.OWN else ""
    learning = f"""
The model learns while it reads and writes: after every {config.inner.chunk_size} tokens it takes a
gradient step on {len(export.model.fast_paths) or "some"} of its weights, separately for each
sequence. What it learned lies in the cache that `forward` returns (`past_key_values`).
`generate(..., learn=False)` switches that off.
"""
    origin, lost = find_origin(Path(export.run.source))
    code = f"\n{CODE_TERMS}\n" if export.family == architectures.OWN else ""
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [tttjax]
{card_metadata(origin)}---
# {export.run.name}

Exported by tttjax {metadata.version("tttjax")} from step {export.run.step} of the run
{export.run.name}, in {export.dtype}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained("."{trust})
text = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=50)[0]))
```
{learning if export.learns else ""}
## Licence

{card_section(origin, lost)}{code}"""


# --- comparing ------------------------------------------------------------------------------------


def _compare(export: Export, folder: Path, say: Say) -> None:
    """Raises Deviation if the export is not the run; UserError if it cannot be read."""
    files = TensorFiles(folder)
    check_names(files.names, export.places, f"the export {folder.name}")
    model = dataclasses.replace(export.run.config.model, compute_dtype="float32")
    config = dataclasses.replace(export.run.config, model=model)
    found = dataclasses.replace(export.run, config=config)

    def reload(template: Params) -> Params:
        return assemble(template, pieces(export.places, files.read), export.model)

    def rounded(template: Params) -> Params:
        dtype = jnp.dtype(export.dtype)
        return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), found.weights(template))

    token_T = _sample(export)
    before = _logits(export, found, token_T)
    limit = compare.TOLERANCE * max(1.0, float(np.max(np.abs(before))))
    lost, note = 0.0, ""
    if jnp.dtype(export.dtype).itemsize < jnp.dtype(model.param_dtype).itemsize:
        coarse = dataclasses.replace(found, weights=rounded)
        lost = compare.largest_difference(_logits(export, coarse, token_T), before)
        note = f"; rounding to {export.dtype} alone gives {lost:.2g}"
    after = _logits(export, dataclasses.replace(found, weights=reload), token_T)
    _judge("read back by tttjax", after, before, limit + 3 * lost, note, say)

    learn = export.mode != "off" and export.learns
    size = compare.sample_chunk(config.inner.chunk_size)
    at_P = compare.places(len(token_T) - 1, size, learn=learn)
    theirs = compare.their_logits(folder, token_T, at_P, chunk_size=size if learn else 0)
    if theirs is None:
        say("transformers or torch is not installed, so they have not read the export")
        return
    # Where embedding and head are one weight but two tensors, they are rounded apart.
    is_doubled = len({(place.path, place.row) for place in export.places}) < len(export.places)
    limit += 3 * lost if is_doubled else 0
    _judge("read by transformers, in float32", theirs, after, limit, "", say)
    if export.tokenizer and not compare.same_tokens(folder, export.tokenizer, SAMPLE):
        say("transformers cuts the sample text into other tokens than tttjax does")


def _sample(export: Export) -> np.ndarray:
    """Tokens of a text, as many as are compared and one more."""
    size = export.run.config.inner.chunk_size
    count = 1 + compare.sample_length(size, learns=export.learns)
    if export.tokenizer is None or export.tokenizer.kind == "ids":
        vocab = export.run.config.model.vocab_size
        return np.random.default_rng(0).integers(vocab, size=count).astype(np.int32)
    return np.resize(export.tokenizer.encode(SAMPLE), count).astype(np.int32)


def _logits(export: Export, found: Run, token_T: np.ndarray) -> np.ndarray:
    size = compare.sample_chunk(found.config.inner.chunk_size)
    mesh = make_mesh(devices=jax.devices()[:1])
    way = next(
        iter_eval_setups(found, (export.mode,), LearningOptions(inner={"chunk_size": size}), mesh)
    )[0]
    return compare.our_logits(way.model, way.inner, way.lr, way.params, token_T, learn=way.learn)


def _judge(
    what: str, found: np.ndarray, expected: np.ndarray, limit: float, note: str, say: Say
) -> None:
    deviation = compare.largest_difference(found, expected)
    said = f"{what}, logits deviate by at most {deviation:.2g}{note}"
    if not deviation <= limit:  # NaN is no agreement
        raise Deviation(f"{said}, which is more than {limit:.2g}")
    say(said)
