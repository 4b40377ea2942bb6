"""Cases of things read rather than computed: official Orbax checkpoints and Zarr token data."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tttjax.errors import UserError
from tttjax.interop.official.checkpoint import load_official_checkpoint
from tttjax.interop.official.names import from_official
from tttjax.verification import golden
from tttjax.verification.cases import Cache, CompiledCase, cache_key, first_step
from tttjax.verification.rows import VerifyRow, absolute, limit


def check_checkpoints(
    path: Path, description: Mapping[str, Any], name: str, x64: bool, cache: Cache
) -> Iterator[VerifyRow]:
    """Rows of every checkpoint that the JSON at `path` describes.

    Every array must equal the stored one bit for bit; with the weights that the case starts from,
    the case's loss must come out.
    """
    for folder, entry in description["checkpoints"].items():
        case = f"{name}/{folder}"
        try:
            yield from _check_checkpoint(path, description, folder, entry, case, x64, cache)
        except (UserError, KeyError) as error:
            yield VerifyRow(case, "checkpoint", None, None, False, str(error))


def _check_checkpoint(path, description, folder, entry, case, x64, cache) -> Iterator[VerifyRow]:
    found = load_official_checkpoint(path.parent / folder / str(entry["step"]))
    said = entry.get("model_weights") or entry["values"]
    match = re.match(r"(\S+/)\* of (\S+\.npz)", said)
    if not match:
        raise UserError(f"{path.name} does not say where the weights of {folder} are ({said!r})")
    arrays = golden.load_arrays(_beside(path, match[2]))
    yield _equal(case, "model_weights", found.model_weights, golden.under(arrays, match[1]))
    if "opt_state" in entry:
        wanted = golden.load_arrays(_beside(path, entry["opt_state"].split()[0]))
        yield _equal(case, "opt_state", found.opt_state or {}, wanted)
    if "train_ds_iter" in entry:
        ok = found.data_iterator == entry["train_ds_iter"]
        note = "" if ok else f"{found.data_iterator} was read, not {entry['train_ds_iter']}"
        yield VerifyRow(case, "train_ds_iter", 0.0 if ok else float("inf"), 0.0, ok, note)
    if match[1] == "params/" and "config" in description:
        config = json.loads(_beside(path, description["config"]).read_text(encoding="utf-8"))
        yield from _loss(case, config, arrays, found.model_weights, x64, cache)


def _loss(case, config, arrays, weights, x64: bool, cache: Cache) -> Iterator[VerifyRow]:
    """The losses of the case, recomputed with imported weights."""
    for prefix, setting in golden.variants(config, x64).items():
        is_f64 = setting.dtype == "float64" and f"f64/{prefix}loss" in arrays
        reference = arrays[("f64/" if is_f64 else "") + prefix + "loss"]
        dtype = setting.model.shape.param_dtype
        params = from_official(weights, setting.model, dtype)
        step = jnp.asarray(first_step(config))
        compiled = cache.get(cache_key(config, prefix)) or CompiledCase(setting)
        reading, *_ = compiled.one_batch(params, golden.load_batch(arrays), step)
        deviation = absolute(np.asarray(np.mean(reading.loss)), reference)
        tolerance = limit("loss", setting.dtype, is_f64)
        note = "forward pass with the imported weights"
        yield VerifyRow(case, f"{prefix}loss", deviation, tolerance, deviation <= tolerance, note)


def _beside(path: Path, name: str) -> Path:
    """A file named by the JSON at `path`: in its folder or the one above."""
    return next((f / name for f in path.parents[:2] if (f / name).exists()), path.parent / name)


def _equal(case: str, quantity: str, got, wanted) -> VerifyRow:
    if set(got) != set(wanted):
        names = ", ".join(sorted(set(got) ^ set(wanted)))
        return VerifyRow(case, quantity, float("inf"), 0.0, False, f"names differ: {names}")
    each = {name: absolute(got[name], wanted[name]) for name in wanted}
    worst = max(each, key=lambda name: np.nan_to_num(each[name], nan=np.inf))
    note = worst if each[worst] else f"{len(each)} arrays, bit for bit"
    return VerifyRow(case, quantity, each[worst], 0.0, each[worst] == 0, note)


def check_zarr(path: Path, name: str) -> Iterator[VerifyRow]:
    """Rows of a Zarr case, one for each token folder: the batches of our own pipeline."""
    from tttjax.verification.golden_data import check_zarr_case

    try:
        deviations = check_zarr_case(path)
    except UserError as error:
        yield VerifyRow(name, "batches", None, None, False, str(error))
        return
    folders: dict[str, list[tuple[float, str]]] = {}
    for array, deviation in deviations:
        folder, _, rest = array.partition("/")
        folders.setdefault(folder, []).append((deviation, rest))
    for folder, found in folders.items():
        worst, array = max(found)
        note = array if worst else f"{len(found)} arrays, exactly"
        yield VerifyRow(f"{name}/{folder}", "batches", worst, 0.0, worst == 0, note)
