"""Sessions kept on the way through a text, to which one can go back: few, however long it is.

They lie in a folder beside the session file, `FILE.kept/<tokens read>.session`, each a session file
of its own. The first is of before the text; the others stand at equal distances. Where there would
be more than `most`, the distance is doubled and every other one removed: what is kept depends on
how far was read and on nothing else.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tttjax.errors import UserError
from tttjax.inference.session_file import About, read_about
from tttjax.io.atomic import atomic_write

SUFFIX = ".session"


@dataclass(frozen=True)
class Snapshots:
    """Of the session file `path`. every: stretches from one to the next, at first. size: tokens of
    a stretch.
    """

    path: Path
    every: int
    most: int
    size: int

    def distance(self, stretches: int) -> int:
        """Stretches from one snapshot to the next, once so many have been read."""
        distance = self.every
        while stretches // distance + 1 > self.most:
            distance *= 2
        return distance

    def is_due(self, done: int) -> bool:
        """Whether one is kept of after `done` tokens of the text."""
        stretches, rest = divmod(done, self.size)
        return not rest and stretches % self.distance(stretches) == 0

    def check(self) -> None:
        """UserError if the folder holds snapshots of something else."""
        mine = read_about(self.path) if self.path.exists() else None
        for path, about in list_snapshots(self.path).items():
            if mine is None or _identity(about) != _identity(mine):
                raise UserError(
                    f"{path.parent} holds sessions of an earlier reading; remove it, or give "
                    "another --save-session"
                )

    def keep(self) -> None:
        """Keeps the session file as it is now, and removes what is too much."""
        about = read_about(self.path)
        target = snapshot_dir(self.path) / f"{about.tokens:012}{SUFFIX}"
        if not target.exists():
            copy(self.path, target)
        distance = self.distance(about.source["tokens"] // self.size)
        for path, found in list_snapshots(self.path).items():
            if found.source["tokens"] // self.size % distance:
                path.unlink()


def snapshot_dir(session: str | os.PathLike) -> Path:
    """Where the snapshots of a session file are."""
    return Path(f"{os.fspath(session)}.kept")


def list_snapshots(session: str | os.PathLike) -> dict[Path, About]:
    """The snapshots of a session file, the earliest first."""
    return {path: read_about(path) for path in sorted(snapshot_dir(session).glob(f"*{SUFFIX}"))}


def copy(source: Path, target: Path) -> None:
    """Copies a file; what stands at `target` is never a part of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def _identity(about: About) -> tuple[str, str, str]:
    return about.model, about.source.get("text", ""), about.source.get("mark", "")
