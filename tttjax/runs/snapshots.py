"""Snapshots of a session at regular positions of a text, to rewind to; their number is bounded.

They are session files in the folder `FILE.kept/`, named `<tokens read>.session`. The first is from
before the text; the others are evenly spaced. When there would be more than `max_count`, the
interval doubles and every other snapshot is removed. So the set of snapshots depends only on the
number of tokens read.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tttjax.errors import UserError
from tttjax.inference.session_file import SessionHeader, read_header
from tttjax.io.atomic import atomic_write

SUFFIX = ".session"


@dataclass(frozen=True)
class Snapshots:
    """The snapshots of the session file `path`.

    every: initial interval between snapshots, in prefill calls. max_count: of snapshots.
    call_tokens: tokens of a prefill call.
    """

    path: Path
    every: int
    max_count: int
    call_tokens: int

    def interval(self, calls: int) -> int:
        """Prefill calls from one snapshot to the next, after `calls` of them."""
        interval = self.every
        while calls // interval + 1 > self.max_count:
            interval *= 2
        return interval

    def is_due(self, done: int) -> bool:
        """Whether a snapshot is due after `done` tokens of the text."""
        calls, remainder = divmod(done, self.call_tokens)
        return not remainder and calls % self.interval(calls) == 0

    def check(self) -> None:
        """UserError if the folder holds snapshots of another session."""
        current = read_header(self.path) if self.path.exists() else None
        for path, header in list_snapshots(self.path).items():
            if current is None or _identity(header) != _identity(current):
                raise UserError(
                    f"{path.parent} holds sessions of an earlier reading; remove it, or give "
                    "another --save-session"
                )

    def take(self) -> None:
        """Copies the session file into a snapshot, and removes snapshots beyond `max_count`."""
        header = read_header(self.path)
        target = snapshot_dir(self.path) / f"{header.tokens:012}{SUFFIX}"
        if not target.exists():
            copy_atomically(self.path, target)
        interval = self.interval(header.source["tokens"] // self.call_tokens)
        for path, snapshot in list_snapshots(self.path).items():
            if snapshot.source["tokens"] // self.call_tokens % interval:
                path.unlink()


def snapshot_dir(session: str | os.PathLike) -> Path:
    """The folder with the snapshots of a session file."""
    return Path(f"{os.fspath(session)}.kept")


def list_snapshots(session: str | os.PathLike) -> dict[Path, SessionHeader]:
    """The snapshots of a session file, oldest first."""
    return {path: read_header(path) for path in sorted(snapshot_dir(session).glob(f"*{SUFFIX}"))}


def find_snapshot(session: Path, tokens: int) -> Path:
    """The last snapshot at or before `tokens` tokens, or the session file itself.

    Raises UserError if there is none. Only files in float32 are considered.
    """
    snapshots = list_snapshots(session)
    candidates = {
        path: header.tokens
        for path, header in {**snapshots, session: read_header(session)}.items()
        if header.tokens <= tokens and header.precision == "float32"
    }
    if not candidates:
        first = min((header.tokens for header in snapshots.values()), default=None)
        before = "" if first is None else f" before {first:,} tokens"
        raise UserError(
            f"{session} cannot rewind to {tokens:,} tokens: it has no snapshots{before}; make "
            "them with `tttjax read --keep-every=TOKENS`"
        )
    return max(candidates, key=candidates.__getitem__)


def copy_atomically(source: Path, target: Path) -> None:
    """Copies a file; `target` appears only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def _identity(header: SessionHeader) -> tuple[str, str, str]:
    return header.model, header.source.get("text", ""), header.source.get("mark", "")
