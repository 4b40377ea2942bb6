"""The result of a training run, and the line that reports it."""

import dataclasses
from typing import Any

from tttjax.training.metrics_file import json_safe
from tttjax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result and timing of a run. Seconds are of this start, `train_seconds` of all starts.

    step: steps done in total. first_step_seconds: the first step of this start, compilation
    included; step_seconds: median of the others (None if there were none). interrupted: stopped
    before the last step; the same command resumes, after this step unless it was skipped.
    """

    step: int
    loss: float | None
    interrupted: bool
    state: TrainState
    setup_seconds: float
    first_step_seconds: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    mfu: float | None
    mfu_refers_to: str | None
    train_seconds: float
    skipped_steps: int
    peak_memory_bytes: int
    peak_memory_of: str

    def summary(self) -> dict[str, Any]:
        """Everything but the state, for `summary.json`; nonfinite values as "nan", "inf"."""
        return {
            field.name: json_safe(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "state"
        }


def describe_result(result: TrainResult, saved_step: int | None) -> str:
    """The last line of a start. saved_step: that of the newest checkpoint."""
    verb = "stopped" if result.interrupted else "done"
    loss = "" if result.loss is None else f"; loss {result.loss:.4f}"
    speed = (
        "" if result.step_seconds is None else f"; {result.step_seconds:.3f} s per step (median)"
    )
    if saved_step == result.step:
        hint = "; saved, the same command resumes" if result.interrupted else ""
    else:
        origin = "starts over" if saved_step is None else f"resumes after step {saved_step}"
        hint = f"; not saved, because its last steps were skipped: the same command {origin}"
    return f"{verb} at step {result.step}{loss}{speed}{hint}"
