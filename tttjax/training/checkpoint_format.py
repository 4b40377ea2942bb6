"""One checkpoint on disk: names of arrays, comparison, checksums, reading.

`checkpoint.py` says what is kept when; this module knows how one checkpoint looks.
"""

import difflib
import errno
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tttjax.errors import UserError
from tttjax.io.sealed import file_checksums
from tttjax.models import path_filter
from tttjax.types import PyTree

FORMAT = 1
ARRAY_ITEMS = ("params", "train")
META = "meta"
CHECKSUMS = "checksums.json"
TMP_MARK = ".orbax-checkpoint-tmp"


# Names -------------------------------------------------------------------------------------------


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"a pytree key of unknown kind: {key!r}")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{"params/slow/norm": array, ...} in the tree's order, whatever its containers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_part(k) for k in path): leaf for path, leaf in leaves}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}: the form in which Orbax stores the names."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root


def split_items(state: PyTree) -> dict[str, dict[str, Any]]:
    """The weights, and all the rest, each as nested dicts of arrays."""
    items: dict[str, dict[str, Any]] = {item: {} for item in ARRAY_ITEMS}
    for name, leaf in named_leaves(state).items():
        top, _, rest = name.partition("/")
        item, key = ("params", rest) if top == "params" else ("train", name)
        items[item][key] = leaf
    return {item: _nested(leaves) for item, leaves in items.items()}


# Comparison --------------------------------------------------------------------------------------


def _describe(leaf: Any) -> str:
    return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _near(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (nearest: {close[0]})" if close else ""


def differences(
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
) -> list[str]:
    """Every array that the two do not share in name, shape and dtype, one phrase each."""

    def allowed(name: str, patterns: tuple[str, ...]) -> bool:
        return path_filter(patterns)(name)

    missing = [n for n in wanted if n not in saved and not allowed(n, allow_missing)]
    unexpected = [n for n in saved if n not in wanted and not allowed(n, allow_unexpected)]
    found = [f"missing {n} {_describe(wanted[n])}{_near(n, unexpected)}" for n in missing]
    found += [f"unexpected {n} {_describe(saved[n])}{_near(n, missing)}" for n in unexpected]
    for name in wanted:
        if name in saved and _describe(saved[name]) != _describe(wanted[name]):
            found.append(
                f"{name} is {_describe(saved[name])} in the checkpoint and "
                f"{_describe(wanted[name])} in the model"
            )
    return found


def _refuse_differences(path: epath.Path, found: list[str], at_most: int = 20) -> None:
    if not found:
        return
    shown = "\n  ".join(found[:at_most])
    more = f"\n  and {len(found) - at_most} more" if len(found) > at_most else ""
    raise UserError(
        f"the checkpoint {path} does not fit this model; use the configuration it was trained "
        f"with, or ask for partial loading. {len(found)} differences:\n  {shown}{more}"
    )


# Reading -----------------------------------------------------------------------------------------


def read_item(
    path: epath.Path,
    template: PyTree,
    *,
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
    concurrent_bytes: int = 0,
) -> PyTree:
    """Reads one item (`<step>/params`, ...) into the template's structure, dtypes and shardings.

    at_once: bytes of arrays that are being read at a time (0: as Orbax likes).

    Raises:
      UserError: names, shapes or dtypes differ, apart from what is allowed.
    """
    wanted = named_leaves(template)
    limits = {"restore_concurrent_gb": _in_gb(concurrent_bytes)} if concurrent_bytes else {}
    reader = ocp.PyTreeCheckpointHandler(**limits)
    saved = named_leaves(reader.metadata(path).tree)
    _refuse_differences(path, differences(saved, wanted, allow_missing, allow_unexpected))
    target = _nested({n: _abstract(leaf) for n, leaf in wanted.items() if n in saved})
    restored = named_leaves(
        reader.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=target,
                restore_args=ocp.checkpoint_utils.construct_restore_args(target),
                partial_restore=True,
            ),
        )
    )
    kept = [n for n in wanted if n not in saved and isinstance(wanted[n], jax.ShapeDtypeStruct)]
    if kept:
        raise ValueError(f"allow_missing needs arrays in the template, not shapes, for {kept}")
    leaves = [restored.get(n, leaf) for n, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def array_handler(concurrent_bytes: int) -> ocp.StandardCheckpointHandler:
    """Orbax's writer of arrays, with at most `concurrent_bytes` bytes of them in flight."""
    return ocp.StandardCheckpointHandler(save_concurrent_gb=_in_gb(concurrent_bytes))


def _in_gb(size: int) -> Any:
    """Bytes in Orbax's unit; it multiplies by 10^9, so that fractions serve as well."""
    return size / 10**9


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def read_items(path: epath.Path, abstract_state: PyTree) -> PyTree:
    """Reads a whole train state; every difference in any item is a UserError."""
    targets = {item: target for item, target in split_items(abstract_state).items() if target}
    if any(not (path / item).exists() for item in targets):
        raise UserError(
            f"the checkpoint {path} holds weights alone, so that no training can be resumed from "
            "it: start from it in another work directory, with --config.train.init_from="
            f"{path.parent.parent}"
        )
    leaves: dict[str, Any] = {}
    for item, target in targets.items():
        prefix = "params/" if item == "params" else ""
        for name, leaf in named_leaves(read_item(path / item, target)).items():
            leaves[prefix + name] = leaf
    ordered = [leaves[name] for name in named_leaves(abstract_state)]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), ordered)


def read_meta(path: epath.Path) -> dict[str, Any]:
    """The JSON item of a checkpoint. UserError if a later or unknown format wrote it, or none."""
    try:
        meta = ocp.JsonCheckpointHandler().restore(path / META)
        found, _ = meta["format"], (meta["data_state"], meta["extra"], meta["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / META} is no description of a checkpoint ({type(error).__name__}: {error}); "
            "restore the checkpoint from a copy"
        ) from error
    if found != FORMAT:
        raise UserError(
            f"the checkpoint {path} has the format {found!r}, and this version of tttjax reads "
            f"{FORMAT}; use the version that wrote it, or a later one"
        )
    return meta


# Integrity ---------------------------------------------------------------------------------------


def completed_checkpoints(folder: epath.Path) -> list[epath.Path]:
    """The checkpoints of a folder, oldest first."""
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return sorted(found, key=lambda p: int(p.name))


def unfinished_steps(folder: epath.Path) -> list[int]:
    """Steps whose saving was broken off, by Orbax's name for checkpoints being written."""
    if not folder.exists():
        return []
    names = [p.name for p in folder.iterdir() if TMP_MARK in p.name]
    return sorted({int(n.split(TMP_MARK)[0]) for n in names if n.split(TMP_MARK)[0].isdigit()})


def remove_unfinished(folder: epath.Path, quiet_s: float = 0.5, patience_s: float = 10.0) -> None:
    """Deletes checkpoints that were being written; the completed ones are not touched.

    One failed write ends a save, but its other writes go on in Orbax's threads and can bring a
    directory back: deletes until nothing has appeared for `quiet_s` seconds, or `patience_s` are
    over.
    """
    if jax.process_index() != 0:
        return
    start = last_seen = time.monotonic()
    while True:
        for path in folder.iterdir():
            if TMP_MARK in path.name:
                shutil.rmtree(path, ignore_errors=True)
                last_seen = time.monotonic()
        now = time.monotonic()
        if now - last_seen >= quiet_s or now - start >= patience_s:
            return
        time.sleep(quiet_s / 10)


def _walk_files(path: epath.Path) -> Iterator[epath.Path]:
    for child in path.iterdir():
        if child.is_dir():
            yield from _walk_files(child)
        else:
            yield child


def checksums(path: epath.Path) -> dict[str, str]:
    """{file's path inside the checkpoint: BLAKE2b} over the files of its items."""
    items = [path / item for item in (*ARRAY_ITEMS, META) if (path / item).exists()]
    files = [file for item in items for file in _walk_files(item)]
    return file_checksums(path, [file.relative_to(path).as_posix() for file in files])


def seal_unfinished(folder: epath.Path) -> None:
    """Writes checksums.json into the checkpoint being written: all its files are there by now.

    Orbax calls this on the first process, just before it gives the checkpoint its name.
    """
    for path in folder.iterdir():
        if TMP_MARK in path.name:
            (path / CHECKSUMS).write_text(json.dumps(checksums(path), indent=1, sort_keys=True))


def damage(path: epath.Path) -> str | None:
    """What is wrong with a checkpoint's files, in a phrase, or None."""
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
        actual = checksums(path)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read: {type(error).__name__}"
    if not isinstance(expected, dict):
        return f"{CHECKSUMS} holds no checksums"
    for item in ("params", META):
        if not any(name.startswith(f"{item}/") for name in (expected.keys() | actual.keys())):
            return f"it has no {item}"
    if unknown := sorted(actual.keys() - expected.keys()):
        return f"{CHECKSUMS} lacks {len(unknown)} files, the first {unknown[0]}"
    if missing := sorted(expected.keys() - actual.keys()):
        return f"{len(missing)} files missing, the first {missing[0]}"
    if changed := sorted(n for n in expected if expected[n] != actual[n]):
        return f"{len(changed)} files changed or cut short, the first {changed[0]}"
    return None


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, says that the disk, quota or file is full."""
    words = ("no space left", "disk quota exceeded", "file too large")
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(word in str(error).lower() for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False
