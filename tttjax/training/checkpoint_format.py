"""The format of one checkpoint on disk: array names, comparison, reading, incomplete ones."""

import difflib
import errno
import time
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from tttjax.errors import UserError
from tttjax.io.paths import is_bucket, remove_tree
from tttjax.models.stacking import path_filter
from tttjax.types import PyTree

FORMAT = 1
ARRAY_ITEMS = ("params", "train")
META = "meta"
TMP_MARK, COMMIT = ".orbax-checkpoint-tmp", "commit_success.txt"


# Names -------------------------------------------------------------------------------------------


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown kind of pytree key: {key!r}")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """{"params/slow/norm": array, ...} in the tree's order, for any containers."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_part(k) for k in path): leaf for path, leaf in leaves}


def split_items(state: PyTree) -> dict[str, dict[str, Any]]:
    """The items of a checkpoint, `params` and `train`, as nested dicts of arrays."""
    items: dict[str, dict[str, Any]] = {item: {} for item in ARRAY_ITEMS}
    for name, leaf in named_leaves(state).items():
        top, _, path = name.partition("/")
        item, key = ("params", path) if top == "params" else ("train", name)
        items[item][key] = leaf
    return {item: unflatten_dict(leaves, sep="/") for item, leaves in items.items()}


# Comparison --------------------------------------------------------------------------------------


def _describe(leaf: Any) -> str:
    return f"{jax.numpy.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _nearest_hint(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (nearest: {close[0]})" if close else ""


def find_differences(
    saved: Mapping[str, Any],
    expected: Mapping[str, Any],
    allow_missing: tuple[str, ...] = (),
    allow_unexpected: tuple[str, ...] = (),
) -> list[str]:
    """One phrase for every array whose name, shape or dtype differs."""

    def allowed(name: str, patterns: tuple[str, ...]) -> bool:
        return path_filter(patterns)(name)

    missing = [n for n in expected if n not in saved and not allowed(n, allow_missing)]
    unexpected = [n for n in saved if n not in expected and not allowed(n, allow_unexpected)]
    differences = [
        f"missing {n} {_describe(expected[n])}{_nearest_hint(n, unexpected)}" for n in missing
    ]
    differences += [
        f"unexpected {n} {_describe(saved[n])}{_nearest_hint(n, missing)}" for n in unexpected
    ]
    for name in expected:
        if name in saved and _describe(saved[name]) != _describe(expected[name]):
            differences.append(
                f"{name} is {_describe(saved[name])} in the checkpoint and "
                f"{_describe(expected[name])} in the model"
            )
    return differences


def _raise_on_differences(path: epath.Path, differences: list[str], max_shown: int = 20) -> None:
    if not differences:
        return
    shown = "\n  ".join(differences[:max_shown])
    more = f"\n  and {len(differences) - max_shown} more" if len(differences) > max_shown else ""
    raise UserError(
        f"the checkpoint {path} does not fit this model; use the configuration it was trained "
        f"with, or load it partially. {len(differences)} differences:\n  {shown}{more}"
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

    concurrent_bytes: bytes of arrays read at a time (0: Orbax's default).

    Raises:
      UserError: names, shapes or dtypes differ, apart from what is allowed.
    """
    expected = named_leaves(template)
    limits = {"restore_concurrent_gb": _to_gb(concurrent_bytes)} if concurrent_bytes else {}
    reader = ocp.PyTreeCheckpointHandler(**limits)
    saved = named_leaves(reader.metadata(path).tree)
    _raise_on_differences(path, find_differences(saved, expected, allow_missing, allow_unexpected))
    target = unflatten_dict(
        {n: _abstract(leaf) for n, leaf in expected.items() if n in saved}, sep="/"
    )
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
    missing = {n: leaf for n, leaf in expected.items() if n not in saved}
    abstract = [n for n, leaf in missing.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if abstract:
        raise ValueError(f"allow_missing needs arrays in the template, not shapes, for {abstract}")
    leaves = [restored.get(n, leaf) for n, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def array_handler(concurrent_bytes: int) -> ocp.StandardCheckpointHandler:
    """Orbax's array handler, which writes at most `concurrent_bytes` at a time."""
    return ocp.StandardCheckpointHandler(save_concurrent_gb=_to_gb(concurrent_bytes))


def _to_gb(size: int) -> Any:
    """Bytes in Orbax's unit. Orbax multiplies by 10^9, so fractions work."""
    return size / 10**9


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def read_train_state(path: epath.Path, abstract_state: PyTree) -> PyTree:
    """Reads a whole train state. UserError for any difference."""
    targets = {item: target for item, target in split_items(abstract_state).items() if target}
    if any(not (path / item).exists() for item in targets):
        raise UserError(
            f"the checkpoint {path} holds weights alone, so training cannot resume from it: start "
            "from it in another work directory, with --config.train.init_from="
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
    """The JSON item of a checkpoint. UserError if it is damaged or of another format."""
    try:
        meta = ocp.JsonCheckpointHandler().restore(path / META)
        version, _ = meta["format"], (meta["data_state"], meta["extra"], meta["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / META} is damaged ({type(error).__name__}: {error}); restore the checkpoint "
            "from a copy"
        ) from error
    if version != FORMAT:
        raise UserError(
            f"the checkpoint {path} has the format {version!r}, and this version of tttjax reads "
            f"{FORMAT}; use the version that wrote it, or a later one"
        )
    return meta


# Complete and incomplete -------------------------------------------------------------------------


def completed_checkpoints(folder: epath.Path) -> list[epath.Path]:
    """The completed checkpoints of a folder, oldest first."""
    paths = [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return sorted(filter(_is_committed, paths), key=lambda p: int(p.name))


def uncommitted(folder: epath.Path) -> list[epath.Path]:
    """The checkpoints of a folder that are being saved, or whose save did not end.

    Orbax gives them a temporary name until they are complete; in a bucket, where nothing is
    renamed, it writes COMMIT last.
    """
    if not folder.exists():
        return []
    paths = [p for p in folder.iterdir() if TMP_MARK in p.name or p.name.isdigit()]
    return [p for p in paths if TMP_MARK in p.name or not _is_committed(p)]


def _is_committed(path: epath.Path) -> bool:
    return not is_bucket(path) or (path / COMMIT).exists()


def unfinished_steps(folder: epath.Path) -> list[int]:
    """Steps with an incomplete checkpoint."""
    names = [path.name.split(TMP_MARK)[0] for path in uncommitted(folder)]
    return sorted({int(name) for name in names if name.isdigit()})


def remove_unfinished(folder: epath.Path, quiet_s: float = 0.5, timeout_s: float = 10.0) -> None:
    """Deletes incomplete checkpoints.

    After a failed write, Orbax's other threads go on writing and can recreate a directory. So this
    deletes until nothing has appeared for `quiet_s` seconds, at most for `timeout_s`.
    """
    if jax.process_index() != 0:
        return
    start = last_deletion = time.monotonic()
    while True:
        for path in uncommitted(folder):
            remove_tree(path)
            last_deletion = time.monotonic()
        now = time.monotonic()
        if now - last_deletion >= quiet_s or now - start >= timeout_s:
            return
        time.sleep(quiet_s / 10)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is a full disk, quota or file size limit."""
    phrases = ("no space left", "disk quota exceeded", "file too large")
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(phrase in str(error).lower() for phrase in phrases):
            return True
        error = error.__cause__ or error.__context__
    return False
