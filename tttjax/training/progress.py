"""Training speed and the progress line: tokens/s, MFU, input wait, ETA.

The line is written by hand for the reasons that `evaluation/progress.py` gives.
"""

import sys
from dataclasses import dataclass
from typing import Any, TextIO

from tttjax.planning.flops import Peak
from tttjax.runtime import progress
from tttjax.training.hosts import Hosts


@dataclass
class Throughput:
    """Converts step durations into the rates of a record's "time".

    flops_per_token: model FLOPs (`planning.flops`). peak: peak FLOP/s for MFU, or None.
    """

    tokens_per_step: int
    flops_per_token: float
    peak: Peak | None

    def rates(self, seconds: float, input_seconds: float, steps: int = 1) -> dict[str, Any]:
        """Rates of `steps` steps that took `seconds`, `input_seconds` of them waiting for input."""
        tokens_per_second = steps * self.tokens_per_step / seconds
        rates: dict[str, Any] = {
            "seconds": seconds / steps,
            "tokens_per_second": tokens_per_second,
            "input_share": input_seconds / seconds,
        }
        if self.peak is not None:
            achieved = self.flops_per_token * tokens_per_second
            rates["mfu"] = achieved / self.peak.flops_per_second
        return rates


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _format_count(value: float) -> str:
    for limit, divisor, unit in ((1e4, 1, ""), (1e7, 1e3, "k"), (1e10, 1e6, "M")):
        if value < limit:
            return f"{value / divisor:.{0 if divisor == 1 else 1}f}{unit}"
    return f"{value / 1e9:.1f}G"


class TrainProgress:
    """A progress line, updated in place on a terminal; a line every `log_every` steps elsewhere.

    Its `input` is that of the host that waits longest.
    """

    def __init__(
        self, total_steps: int, log_every: int, hosts: Hosts, stream: TextIO | None = None
    ):
        self.total_steps, self.log_every, self._hosts = total_steps, log_every, hosts
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._open_line = False

    def show(
        self, step: int, loss: float, rates: dict[str, Any], skipped: int = 0, steady: bool = True
    ) -> None:
        """Shows a finished step. rates: of `Throughput.rates`. skipped: steps of the whole run.

        steady: False for a step that includes compilation; it is shown without rates and ETA.
        """
        last = step == self.total_steps
        if not (self._terminal or last or step % self.log_every == 0):
            return
        width = len(str(self.total_steps))
        mfu = f"  mfu {rates['mfu']:.1%}" if "mfu" in rates else ""
        skips = f"skipped {skipped}  " if skipped else ""
        waiting, of_host = self._hosts.worst_input(rates["input_share"])
        text = f"step {step:{width}}/{self.total_steps}  loss {loss:.4f}  {skips}" + (
            f"{_format_count(rates['tokens_per_second'])} tok/s{mfu}  "
            f"input {waiting:.0%}{of_host}  "
            f"eta {_format_duration((self.total_steps - step) * rates['seconds'])}"
            if steady
            else f"compiled and done in {rates['seconds']:.1f} s"
        )
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text}")
            self._open_line = True
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
        # A terminal also shows that a step is slow; a file gets only the lines of `log_every`.
        progress.rename_activity(text if self._terminal else "")

    def print_line(self, text: str) -> None:
        """Prints a separate line."""
        self.end()
        self._stream.write(text + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Ends the progress line on a terminal."""
        if self._open_line:
            self._stream.write("\n")
            self._open_line = False
