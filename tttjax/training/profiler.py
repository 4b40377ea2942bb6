"""Profiler traces of chosen training steps."""

from pathlib import Path

import jax

from tttjax.io.spool import Spool
from tttjax.types import PyTree


class Profiler:
    """Traces steps `first` to `last` into `profile/` in the work directory.

    The traces are readable by TensorBoard and Perfetto.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path):
        self._first, self._last = steps or (0, 0)
        self._workdir = workdir
        self._running = False

    def before(self, step: int) -> None:
        if step == self._first and self._first:
            self._spool = Spool(self._workdir)
            jax.profiler.start_trace(str(self._spool.folder / "profile"))
            self._running = True

    def after(self, step: int, result: PyTree) -> None:
        """Ends the trace after the last step, once its arrays `result` are computed."""
        if self._running and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            self._spool.upload()
            self._spool.close()
