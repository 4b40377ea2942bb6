"""Recording finished training steps: timing, logging, and the stop after nonfinite steps."""

import hashlib
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write
from tttjax.training.metrics import MetricLogger
from tttjax.training.metrics_file import json_safe
from tttjax.training.start_account import StartAccount
from tttjax.types import Batch


@dataclass
class Totals:
    """Totals over all starts of a run, saved in its checkpoints."""

    seconds: float = 0.0


class StepRecorder:
    """Times and logs the steps that the device has finished; stops after nonfinite ones."""

    def __init__(
        self,
        workdir: Path,
        max_skipped_steps: int,
        logger: MetricLogger,
        totals: Totals,
        account: StartAccount,
    ):
        self._workdir, self._limit, self._logger = workdir, max_skipped_steps, logger
        self._totals, self._account = totals, account
        self._seconds: list[float] = []
        self._last = time.perf_counter()
        self.loss: float | None = None
        self.first_seconds: float | None = None
        self.skipped_in_row = 0

    def start_clock(self) -> None:
        """Starts timing the next step, so that time spent saving is not counted."""
        self._last = time.perf_counter()

    def add(self, result: tuple[int, dict[str, Any], Any] | None) -> None:
        """Records a step from `AsyncMetrics`; does nothing for None.

        Raises:
          UserError: loss or gradient was not finite in too many steps in a row.
        """
        if result is None:
            return
        step, values, (waited, batch, data_state) = result
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._totals.seconds += seconds
        steady = self.first_seconds is not None
        self._logger.log(step, values, seconds, waited, steady=steady)
        self._account.finish(step)
        self.loss, self.skipped_in_row = values["loss"], int(values["skipped_in_row"])
        if steady:
            self._seconds.append(seconds)
        else:
            self.first_seconds = seconds
            self._logger.print_line(f"first step after {seconds:.1f} s, compilation included")
        if values["nonfinite"]:
            self._logger.print_line(f"step {step}: loss or gradient not finite, skipped")
            if values["skipped_in_row"] >= self._limit:
                raise_nonfinite(self._workdir, step, values, batch, data_state)

    def steady_rates(self) -> dict[str, float | None]:
        """step_seconds, tokens_per_second and mfu of the median step after the first."""
        if not self._seconds:
            return {"step_seconds": None, "tokens_per_second": None, "mfu": None}
        median = statistics.median(self._seconds)
        rates = self._logger.throughput.rates(median, 0.0)
        return {
            "step_seconds": median,
            "tokens_per_second": rates["tokens_per_second"],
            "mfu": rates.get("mfu"),
        }


def batch_fingerprint(batch: Batch) -> str:
    """A hash that identifies this process's part of a batch."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (batch.inputs, batch.targets, batch.mask, batch.weight):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def raise_nonfinite(
    workdir: Path, step: int, values: dict[str, Any], batch: Batch, data_state: Any
) -> None:
    """Ends a run whose last steps were all skipped.

    Raises:
      UserError: always; `nonfinite.json` in the work directory holds the details.
    """
    norms = {name: value for name, value in values.items() if "norm" in name or name == "loss"}
    fingerprint = batch_fingerprint(batch)
    report = {
        "step": step,
        "batch": {"fingerprint": fingerprint, "data_state": data_state},
        "values": {name: json_safe(value) for name, value in values.items()},
    }
    path = workdir / "nonfinite.json"
    if jax.process_index() == 0:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    shown = ", ".join(f"{name}={value:.4g}" for name, value in norms.items())
    raise UserError(
        f"loss or gradient was not finite in {values['skipped_in_row']} steps in a row; the last "
        f"was step {step}, batch {fingerprint}, with {shown}. Lower optim.peak_lr or inner.lr, or "
        f"set optim.clip or inner.clip; {path} has the details, and the checkpoints hold the "
        "weights from before"
    )
