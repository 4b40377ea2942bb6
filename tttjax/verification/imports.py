"""Verification of importers: official Orbax checkpoints and Zarr token data."""

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
from tttjax.verification.rows import VerifyRow, max_abs_diff, tolerance_of


def check_checkpoints(
    path: Path, description: Mapping[str, Any], name: str, x64: bool, cache: Cache
) -> Iterator[VerifyRow]:
    """Rows of every checkpoint that the JSON at `path` describes.

    Every array must equal the stored one bit for bit; with the case's initial weights, the loss
    must equal the case's.
    """
    for folder, entry in description["checkpoints"].items():
        case = f"{name}/{folder}"
        try:
            yield from _check_checkpoint(path, description, folder, entry, case, x64, cache)
        except (UserError, KeyError) as error:
            yield VerifyRow(case, "checkpoint", None, None, False, str(error))


def _check_checkpoint(path, description, folder, entry, case, x64, cache) -> Iterator[VerifyRow]:
    checkpoint = load_official_checkpoint(path.parent / folder / str(entry["step"]))
    source_note = entry.get("model_weights") or entry["values"]
    match = re.match(r"(\S+/)\* of (\S+\.npz)", source_note)
    if not match:
        raise UserError(
            f"{path.name} does not say where the weights of {folder} are ({source_note!r})"
        )
    arrays = golden.load_arrays(_resolve_file(path, match[2]))
    yield _equal(
        case, "model_weights", checkpoint.model_weights, golden.select_prefix(arrays, match[1])
    )
    if "opt_state" in entry:
        expected = golden.load_arrays(_resolve_file(path, entry["opt_state"].split()[0]))
        yield _equal(case, "opt_state", checkpoint.opt_state or {}, expected)
    if "train_ds_iter" in entry:
        ok = checkpoint.data_iterator == entry["train_ds_iter"]
        note = "" if ok else f"{checkpoint.data_iterator} was read, not {entry['train_ds_iter']}"
        yield VerifyRow(case, "train_ds_iter", 0.0 if ok else float("inf"), 0.0, ok, note)
    if match[1] == "params/" and "config" in description:
        config = json.loads(_resolve_file(path, description["config"]).read_text(encoding="utf-8"))
        yield from _loss(case, config, arrays, checkpoint.model_weights, x64, cache)


def _loss(case, config, arrays, weights, x64: bool, cache: Cache) -> Iterator[VerifyRow]:
    """The losses of the case, recomputed with the imported weights."""
    for prefix, setup in golden.case_setups(config, x64).items():
        is_f64 = setup.dtype == "float64" and f"f64/{prefix}loss" in arrays
        reference = arrays[("f64/" if is_f64 else "") + prefix + "loss"]
        dtype = jnp.dtype(setup.model.config.param_dtype)
        params = from_official(weights, setup.model, dtype)
        step = jnp.asarray(first_step(config))
        compiled = cache.get(cache_key(config, prefix)) or CompiledCase(setup)
        output, *_ = compiled.one_batch(params, golden.load_batch(arrays), step)
        deviation = max_abs_diff(np.asarray(np.mean(output.loss)), reference)
        tolerance = tolerance_of("loss", setup.dtype, is_f64)
        note = "forward pass with the imported weights"
        yield VerifyRow(case, f"{prefix}loss", deviation, tolerance, deviation <= tolerance, note)


def _resolve_file(path: Path, name: str) -> Path:
    """Path of a file that the JSON at `path` names: in its folder or the parent folder."""
    return next((f / name for f in path.parents[:2] if (f / name).exists()), path.parent / name)


def _equal(case: str, quantity: str, actual, expected) -> VerifyRow:
    if set(actual) != set(expected):
        names = ", ".join(sorted(set(actual) ^ set(expected)))
        return VerifyRow(case, quantity, float("inf"), 0.0, False, f"names differ: {names}")
    deviations = {name: max_abs_diff(actual[name], expected[name]) for name in expected}
    worst = max(deviations, key=lambda name: np.nan_to_num(deviations[name], nan=np.inf))
    note = worst if deviations[worst] else f"{len(deviations)} arrays, bit for bit"
    return VerifyRow(case, quantity, deviations[worst], 0.0, deviations[worst] == 0, note)


def check_zarr(path: Path, name: str) -> Iterator[VerifyRow]:
    """Rows of a Zarr case, one per token folder: the batches of our data pipeline."""
    from tttjax.verification.golden_data import check_zarr_case

    try:
        deviations = check_zarr_case(path)
    except UserError as error:
        yield VerifyRow(name, "batches", None, None, False, str(error))
        return
    folders: dict[str, list[tuple[float, str]]] = {}
    for array, deviation in deviations:
        folder, _, array_name = array.partition("/")
        folders.setdefault(folder, []).append((deviation, array_name))
    for folder, results in folders.items():
        worst, array = max(results)
        note = array if worst else f"{len(results)} arrays, exactly"
        yield VerifyRow(f"{name}/{folder}", "batches", worst, 0.0, worst == 0, note)
