"""Whether a checkpoint is intact: the checksums of its files, and finite arrays.

The work is divided between the processes of a run. Each one hashes the files that it wrote before
the checkpoint is committed, and a share of all files before a restore; all get the same answer.
"""

import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from tttjax.errors import UserError
from tttjax.io.paths import file_sizes
from tttjax.io.sealed import file_checksums
from tttjax.training.checkpoint_format import (
    ARRAY_ITEMS,
    META,
    TMP_MARK,
    completed_checkpoints,
    named_leaves,
    uncommitted,
)
from tttjax.types import Array, PyTree

CHECKSUMS = "checksums.json"
PART = "checksums.process_{}.json"  # of the files of one process, until the checkpoint is sealed
SHARE = (
    "the work directory must be on one disk that all hosts share; mount it on each, and run the "
    "same command again"
)


def print_once(line: str) -> None:
    """Prints a line on stderr, in process 0 alone."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def all_texts(text: str) -> list[str]:
    """The texts of all processes, in their order; every process must call this."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(encoded.size))))
    padded = np.zeros(max(longest, 1), np.uint8)
    padded[: encoded.size] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b"\0").decode() for row in rows]


def check_all_see(folder: epath.Path) -> None:
    """Raises UserError, on all processes, if one does not see a checkpoint that process 0 sees."""
    steps = all_texts(" ".join(path.name for path in completed_checkpoints(folder)))[0].split()
    unseen = all_texts(", ".join(step for step in steps if not (folder / step).exists()))
    if other := next((i for i, text in enumerate(unseen) if text), 0):
        raise UserError(
            f"process {other} does not see checkpoints in {folder} that process 0 sees (of steps "
            f"{unseen[other]}): {SHARE}"
        )


# Arrays ------------------------------------------------------------------------------------------


@jax.jit
def _are_finite(leaves: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in leaves])


def first_nonfinite(tree: PyTree) -> str | None:
    """The name of the first array that is not finite; None if all are.

    One reduction on the devices, with the same answer on every process.
    """
    named = named_leaves(tree)
    finite = np.asarray(_are_finite(list(named.values())))
    return next((name for name, ok in zip(named, finite, strict=True) if not ok), None)


# Files -------------------------------------------------------------------------------------------


def _of_items(sizes: dict[str, int]) -> dict[str, int]:
    """Those of the files of a checkpoint's items, by their path in it."""
    return {n: size for n, size in sizes.items() if n.partition("/")[0] in (*ARRAY_ITEMS, META)}


def _below(item: epath.Path, own: str) -> list[str]:
    """The paths in an item of a file, or of all files in a folder; none if it is missing."""
    if (item / own).is_dir():
        return [f"{own}/{name}" for name in file_sizes(item / own)]
    return [own] if (item / own).exists() else []


def checksums(path: epath.Path) -> dict[str, str]:
    """{path inside the checkpoint: BLAKE2b} of the files of its items."""
    return file_checksums(path, list(_of_items(file_sizes(path))))


def write_own_checksums(folder: epath.Path) -> None:
    """Hashes the files that this process wrote into the checkpoint being saved, for `seal`.

    Each of several processes calls this when its own files are complete. Orbax writes the arrays of
    process N to `ocdbt.process_N`, in folders that may still have temporary names.
    """
    index = jax.process_index()
    for path in uncommitted(folder):
        names = {}
        for item in path.iterdir():
            final = item.name.split(TMP_MARK)[0]
            for own in (f"ocdbt.process_{index}", f"array_metadatas/process_{index}"):
                # No others: their files appear and vanish while they are being written.
                for inside in _below(item, own):
                    names[f"{item.name}/{inside}"] = f"{final}/{inside}"
        hashed = file_checksums(path, list(names))
        part = {names[name]: value for name, value in hashed.items()}
        (path / PART.format(index)).write_text(json.dumps(part))


def seal(folder: epath.Path) -> None:
    """Writes checksums.json into the checkpoint being saved.

    Orbax calls this on process 0 when all files are written, just before it renames the checkpoint.
    It hashes what no process has hashed as its own: the files that process 0 merges, a few hundred
    bytes per array.
    """
    for path in uncommitted(folder):
        known: dict[str, str] = {}
        for part in path.glob(PART.format("*")):
            known |= json.loads(part.read_text())
            part.unlink()
        remaining = _of_items(file_sizes(path)).keys() - known.keys()
        known |= file_checksums(path, sorted(remaining))
        (path / CHECKSUMS).write_text(json.dumps(known, indent=1, sort_keys=True))


def find_damage(path: epath.Path) -> str | None:
    """A phrase on what is wrong with a checkpoint's files; None if they are intact.

    Each process hashes its share of the files; every process must call this.

    Raises:
      UserError: on all processes, if they do not see the same files.
    """
    seen = file_sizes(path)
    sizes = _of_items(seen)
    _check_same_view(path, {n: size for n, size in seen.items() if n in (*sizes, CHECKSUMS)})
    by_size = sorted(sizes, key=lambda name: (-sizes[name], name))
    share = by_size[jax.process_index() :: jax.process_count()]
    return next(filter(None, all_texts(_find_own_damage(path, by_size, share) or "")), None)


def _check_same_view(path: epath.Path, sizes: dict[str, int]) -> None:
    digest = hashlib.blake2b(json.dumps(sorted(sizes.items())).encode(), digest_size=16).hexdigest()
    views = all_texts(f"{len(sizes)} files, {sum(sizes.values()):,} bytes {digest}")
    if other := next((i for i, view in enumerate(views) if view != views[0]), 0):
        first, second = (view.rpartition(" ")[0] for view in (views[0], views[other]))
        raise UserError(
            f"the processes see different files in the checkpoint {path} (process 0: {first}; "
            f"process {other}: {second}): {SHARE}"
        )


def _find_own_damage(path: epath.Path, names: list[str], share: list[str]) -> str | None:
    """As `find_damage`, of the contents of the files in `share` alone."""
    try:
        expected = json.loads((path / CHECKSUMS).read_text())
        actual = file_checksums(path, share)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read: {type(error).__name__}"
    if not isinstance(expected, dict):
        return f"{CHECKSUMS} holds no checksums"
    for item in ("params", META):
        if not any(name.startswith(f"{item}/") for name in (*expected, *names)):
            return f"it has no {item}"
    if unknown := sorted(set(names) - expected.keys()):
        return f"{CHECKSUMS} lacks {len(unknown)} files, the first {unknown[0]}"
    if missing := sorted(expected.keys() - set(names)):
        return f"{len(missing)} files missing, the first {missing[0]}"
    if changed := sorted(n for n in share if expected[n] != actual[n]):
        return f"{len(changed)} files changed or truncated, the first {changed[0]}"
    return None
