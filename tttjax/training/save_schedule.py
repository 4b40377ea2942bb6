"""When a checkpoint is due: by steps and by time."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from tttjax.config.schema import TrainConfig

MAX_STEPS_UNCHECKED = 100  # bounds the delay if steps become slower


class SaveSchedule:
    """Decides after which steps a checkpoint is due; every process decides alike.

    For the time it is process 0's clock that counts. The processes ask it only half way to the
    deadline, as estimated from the time per step so far, then half way again, and so on: a few
    times between two checkpoints, and not in every step.
    """

    def __init__(
        self, settings: TrainConfig, step: int, clock: Callable[[], float] = time.monotonic
    ):
        """step: steps done before this start. clock: seconds."""
        self._intervals = [n for n in (settings.checkpoint_every, settings.keep_every) if n]
        self._seconds, self._clock = 60 * settings.checkpoint_minutes, clock
        self.saved(step)

    def saved(self, step: int) -> None:
        """Starts the intervals again, after a checkpoint."""
        self._is_due, self._saved_step, self._saved_at = False, step, self._clock()
        self._next_check = step + 1

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, or was after an earlier one without a save.

        Every process must call this after every step.
        """
        if any(step % interval == 0 for interval in self._intervals):
            self._is_due = True
        if self._seconds and not self._is_due and step >= self._next_check:
            wait = self._steps_to_wait(step)
            self._next_check, self._is_due = step + wait, wait == 0
        return self._is_due

    def _steps_to_wait(self, step: int) -> int:
        """Steps until the next look at process 0's clock; 0 if a checkpoint is due."""
        elapsed = self._clock() - self._saved_at
        wait = 0
        if elapsed < self._seconds:
            steps_left = (self._seconds - elapsed) * (step - self._saved_step) / max(elapsed, 1e-9)
            wait = int(min(max(steps_left / 2, 1), MAX_STEPS_UNCHECKED))
        if jax.process_count() > 1:
            wait = int(multihost_utils.broadcast_one_to_all(np.int32(wait)))
        return wait
