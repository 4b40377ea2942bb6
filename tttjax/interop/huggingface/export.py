"""Export of a run to a Hugging Face folder: weights, config.json, tokenizer, model card."""

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
from tttjax.interop.huggingface.names import TensorSlot, check_names, iter_weights, tensor_slots
from tttjax.interop.huggingface.seal import seal_export
from tttjax.interop.huggingface.tokenizer_files import SAMPLE, special_tokens, write_tokenizer
from tttjax.interop.official.checkpoint import StoredArray, open_item
from tttjax.interop.source import Log
from tttjax.interop.streaming import assemble
from tttjax.io.atomic import atomic_folder, local_copy
from tttjax.io.paths import storage_path
from tttjax.models.transformer import Transformer, build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import x64_if_configured
from tttjax.runs.eval_setup import LearningOptions, build_eval_model, choose_modes, load_eval_setup
from tttjax.runs.origin import card_metadata, card_section, find_origin
from tttjax.runs.run import Run, RunSpec, open_run
from tttjax.runs.tokenizer import load_run_tokenizer
from tttjax.types import Params

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CODE = ("configuration_tttjax.py", "modeling_tttjax.py")
CODE_TERMS = f"`{CODE[0]}` and `{CODE[1]}` are part of tttjax, under the Apache License 2.0."


class ExportMismatch(Exception):
    """The export computes other logits than the run."""


@dataclass(frozen=True)
class ExportPlan:
    """A run and the form of its export. learns: whether the export has fast parameters."""

    run: Run
    mode: str
    model: Transformer
    family: str
    slots: list[TensorSlot]
    dtype: str
    learns: bool
    tokenizer: Tokenizer | None


def parse_size(text: str) -> int:
    """Bytes of a size such as "500MB" or "2GiB". Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    size = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size={text} is no size; write, for example, 500MB or 5GB.")
    return size


def plan_export(
    workdir: Path | str,
    *,
    dtype: str = "",
    mode: str = "",
    own_code: bool = False,
    tokenizer: Path | str | None = None,
    log: Log = lambda line: None,
) -> ExportPlan:
    """Opens a run and plans its export. Raises UserError if the model cannot be exported."""
    run = open_run(RunSpec(workdir))
    (modes,) = choose_modes([run], (mode,) if mode else ())
    config, learns = run.config, run.has_fast_weights or modes[0] == "dynamic"
    with x64_if_configured(config):
        model = build_model(config.model, config.inner)
        family = architectures.choose_family(
            config.model, config.inner, learns=learns, own_code=own_code
        )
        return ExportPlan(
            run=run,
            mode=modes[0],
            model=model,
            family=family,
            slots=tensor_slots(model, family),
            dtype=dtype or config.model.param_dtype.replace("float64", "float32"),
            learns=learns,
            tokenizer=_tokenizer(run, tokenizer, log),
        )


def _tokenizer(run: Run, path: Path | str | None, log: Log) -> Tokenizer | None:
    try:
        return load_run_tokenizer(run, path)
    except UserError as error:
        if path:
            raise
        log(f"without a tokenizer: {error}")
        return None


def write_export(
    export: ExportPlan, target: Path, *, limit: int, log: Log = lambda line: None
) -> None:
    """Writes the export under a temporary name, verifies its logits, then renames it to `target`.

    limit: bytes per file. Raises ExportMismatch if logits differ; nothing is left then.
    """
    assert export.run.checkpoint is not None
    with atomic_folder(target, "--to") as folder, x64_if_configured(export.run.config):
        with local_copy(export.run.checkpoint / "params", folder.parent) as params:
            read = _weight_reader(export, params)
            slots = _by_stack(export.slots)
            total = write_tensors(folder, slots, read, dtype=export.dtype, limit=limit)
        _write_metadata(export, folder, log)
        name = architectures.CLASSES[export.family]
        log(f"{total:,} bytes of {export.dtype} as {name}; verifying the export")
        _compare(export, folder, log)
        seal_export(folder)
    log(f"{target} is complete")


# --- writing --------------------------------------------------------------------------------------


def _by_stack(slots: list[TensorSlot]) -> list[TensorSlot]:
    """Slots sorted so that the rows of a stack of blocks follow each other, as in storage."""
    order = {path: i for i, path in enumerate(dict.fromkeys(slot.path for slot in slots))}
    return sorted(slots, key=lambda slot: order[slot.path])


def _weight_reader(export: ExportPlan, params: Path) -> Callable[[TensorSlot], np.ndarray]:
    """Returns a function that reads the weight of a slot; of a stack, one row."""
    arrays: dict[str, StoredArray] = open_item(params)
    fast = export.model.fast_paths
    row_readers: dict[str, Callable[[int], np.ndarray]] = {}

    def read(slot: TensorSlot) -> np.ndarray:
        part = "fast" if slot.path in fast else "slow"
        array = arrays[".".join((part, *slot.path.split("/")))]
        if slot.row is None:
            return array.read()
        if slot.path not in row_readers:
            row_readers.clear()  # frees the rows buffered for the previous stack
            row_readers[slot.path] = array.rows()
        return row_readers[slot.path](slot.row)

    return read


def _write_metadata(export: ExportPlan, folder: Path, log: Log) -> None:
    """Writes configuration, tokenizer, modeling code and model card."""
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
    present = {name: token for name, token in tokens.items() if token is not None}
    _write_json(folder / "generation_config.json", present)
    note = write_tokenizer(tokenizer, folder) if tokenizer else ""
    if note:
        log(note)
    if export.family == architectures.OWN:
        code = resources.files("tttjax.interop.huggingface") / "exported_code"
        for name in CODE:
            (folder / name).write_text((code / name).read_text())
    (folder / "README.md").write_text(_card(export))


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _card(export: ExportPlan) -> str:
    config = export.run.config
    trust = ", trust_remote_code=True" if export.family == architectures.OWN else ""
    learning = f"""
The model is trained at test time: after every {config.inner.chunk_size} tokens of prompt or
generated text, it takes a gradient step on {len(export.model.fast_paths) or "some"} of its weights,
separately for each sequence. The updated weights are part of the cache that `forward` returns
(`past_key_values`). `generate(..., learn=False)` switches test-time training off.
"""
    origin, missing_run = find_origin(storage_path(export.run.source))
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

{card_section(origin, missing_run)}{code}"""


# --- comparison -----------------------------------------------------------------------------------


def _compare(export: ExportPlan, folder: Path, log: Log) -> None:
    """Raises ExportMismatch if the export differs from the run, UserError if it cannot be read."""
    files = TensorFiles(folder)
    check_names(files.names, export.slots, f"the export {folder.name}")
    model = dataclasses.replace(
        export.run.config.model, compute_dtype="float32", attention_kernel="xla"
    )
    config = dataclasses.replace(export.run.config, model=model)
    run = dataclasses.replace(export.run, config=config)

    def reload_weights(template: Params) -> Params:
        return assemble(template, iter_weights(export.slots, files.read), export.model)

    def round_weights(template: Params) -> Params:
        dtype = jnp.dtype(export.dtype)
        return jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), run.weights(template))

    token_T = _sample(export)
    run_logit_PV = _logits(export, run, token_T)
    limit = compare.TOLERANCE * max(1.0, float(np.max(np.abs(run_logit_PV))))
    rounding, note = 0.0, ""
    if jnp.dtype(export.dtype).itemsize < jnp.dtype(model.param_dtype).itemsize:
        rounded_run = dataclasses.replace(run, weights=round_weights)
        rounding = compare.largest_difference(_logits(export, rounded_run, token_T), run_logit_PV)
        note = f"; rounding to {export.dtype} alone gives {rounding:.2g}"
    export_logit_PV = _logits(export, dataclasses.replace(run, weights=reload_weights), token_T)
    _check_deviation(
        "read back by tttjax", export_logit_PV, run_logit_PV, limit + 3 * rounding, note, log
    )

    learn = export.mode != "off" and export.learns
    size = compare.sample_chunk(config.inner.chunk_size)
    position_P = compare.sample_positions(len(token_T) - 1, size, learn=learn)
    transformers_logit_PV = compare.transformers_logits(
        folder, token_T, position_P, chunk_size=size if learn else 0
    )
    if transformers_logit_PV is None:
        log("transformers or torch is not installed, so the export was not compared with them")
        return
    # A tied weight that is stored as two tensors is rounded twice.
    is_tied_twice = len({(slot.path, slot.row) for slot in export.slots}) < len(export.slots)
    limit += 3 * rounding if is_tied_twice else 0
    _check_deviation(
        "read by transformers, in float32", transformers_logit_PV, export_logit_PV, limit, "", log
    )
    if export.tokenizer and not compare.same_tokens(folder, export.tokenizer, SAMPLE):
        log("transformers tokenizes the sample text differently from tttjax")


def _sample(export: ExportPlan) -> np.ndarray:
    """Tokens of the sample text: inputs, and one more as the last target."""
    size = export.run.config.inner.chunk_size
    count = 1 + compare.sample_length(size, learns=export.learns)
    if export.tokenizer is None or export.tokenizer.kind == "ids":
        vocab = export.run.config.model.vocab_size
        return np.random.default_rng(0).integers(vocab, size=count).astype(np.int32)
    return np.resize(export.tokenizer.encode(SAMPLE), count).astype(np.int32)


def _logits(export: ExportPlan, run: Run, token_T: np.ndarray) -> np.ndarray:
    size = compare.sample_chunk(run.config.inner.chunk_size)
    mesh = make_mesh(devices=jax.devices()[:1])
    setup = load_eval_setup(run, export.mode, LearningOptions(inner={"chunk_size": size}), mesh)
    return compare.tttjax_logits(
        setup.model, setup.inner, setup.lr, setup.params, token_T, learn=setup.learn
    )


def _check_deviation(
    reader: str, actual: np.ndarray, expected: np.ndarray, limit: float, note: str, log: Log
) -> None:
    deviation = compare.largest_difference(actual, expected)
    summary = f"{reader}, logits deviate by at most {deviation:.2g}{note}"
    if not deviation <= limit:  # also for NaN
        raise ExportMismatch(f"{summary}, which is more than {limit:.2g}")
    log(summary)
