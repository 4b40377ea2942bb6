"""Show the state of a run from its files: progress, hosts, starts, and where its time went.

examples:
  tttjax status runs/first            also of a run that has ended, was killed, or runs elsewhere
  tttjax status runs/first --json     one object, for scripts
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tttjax.io.paths import storage_text

if TYPE_CHECKING:  # slow to import
    from tttjax.evaluation.tables import Block
    from tttjax.runs.status import RunStatus

MOST_HOSTS = 32  # in the table
_USES = {  # of a run's time, and what they are called in the table
    "start": "imports, joining, data",
    "compile": "compiling, first step",
    "restore": "restoring or initialising",
    "input": "waiting for input",
    "steps": "steps",
    "lost": "steps lost or computed again",
    "save": "saving",
    "evaluate": "evaluating",
    "other": "ending",
    "down": "down, between starts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax status`."""
    parser.add_argument(
        "workdir", type=storage_text, metavar="WORKDIR", help="work directory of the run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """`tttjax status` from parsed arguments; returns the exit code."""
    from tttjax.evaluation.tables import show
    from tttjax.runs.status import run_status

    status = run_status(args.workdir)
    if args.json:
        print(json.dumps(status.to_dict(), indent=1))
        return 0
    print("\n".join(_lines(status)), end="\n\n")
    show(list(_tables(status)), sys.stdout)
    return 0


def _lines(status: "RunStatus") -> Iterator[str]:
    from tttjax.evaluation.tables import format_seconds
    from tttjax.runs.status import describe_end

    state = f"{status.workdir}: {status.state}"
    if status.holder:
        state += f" ({status.phase or 'start'}), {status.holder}"
    elif status.starts and status.state not in ("finished", "killed"):
        state += f": {describe_end(status.starts[-1], False)}"
    if status.quiet_seconds is not None:
        state += f"; last sign of life {format_seconds(status.quiet_seconds)} ago"
    yield state
    step = [f"step {status.step}" + (f" of {status.steps}" if status.steps else "")]
    if status.loss is not None:
        step.append(
            f"loss {status.loss:.4f}" if isinstance(status.loss, float) else f"loss {status.loss}"
        )
    if status.tokens_per_second is not None:
        step.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.mfu is not None:
        step.append(f"MFU {status.mfu:.1%}")
    if status.eta_seconds is not None:
        step.append(f"ETA {format_seconds(status.eta_seconds)}")
    yield ", ".join(step)
    if status.checkpoint_seconds is None:
        yield "no checkpoint"
    else:
        age = format_seconds(status.checkpoint_seconds)
        yield f"newest checkpoint: step {status.checkpoint_step}, {age} old"
    yield (
        f"steps computed again: {status.lost_steps}; failed starts in a row: "
        f"{status.failed_starts}; hangs: {len(status.hangs)}"
    )


def _tables(status: "RunStatus") -> "Iterator[Block]":
    import pandas as pd

    from tttjax.evaluation.tables import CaptionedTable, format_seconds
    from tttjax.runs.status import describe_end

    if status.hosts:
        rows = [_host_row(process, host) for process, host in _shown_hosts(status.hosts)]
        of = f" ({len(rows)} of {len(status.hosts)})" if len(rows) < len(status.hosts) else ""
        yield CaptionedTable(f"Hosts{of}, as they last said", pd.DataFrame(rows))
    if status.starts:
        rows = [
            {
                "start": str(start.number),
                "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.began)),
                "lasted": format_seconds(start.seconds),
                "steps": "-"
                if start.steps_before is None
                else f"{start.steps_before}-{start.step}",
                "again": str(start.lost_steps),
                "end": describe_end(start, bool(status.holder) and start is status.starts[-1]),
            }
            for start in status.starts
        ]
        yield CaptionedTable("Starts", pd.DataFrame(rows))
        total = sum(status.goodput.values())
        shares = [
            {"time": _USES[use], "seconds": f"{seconds:,.1f}", "share": f"{seconds / total:.1%}"}
            for use, seconds in status.goodput.items()
        ]
        shares.append({"time": "all", "seconds": f"{total:,.1f}", "share": "100.0%"})
        yield CaptionedTable("Time since the first start", pd.DataFrame(shares))


def _shown_hosts(hosts: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """All, or of many those that spend the most time outside of steps; with their processes."""
    numbered = list(enumerate(hosts))
    if len(hosts) > MOST_HOSTS:
        numbered.sort(key=lambda item: -item[1].get("input", 0.0) - item[1].get("other", 0.0))
    return numbered[:MOST_HOSTS]


def _host_row(process: int, host: dict[str, Any]) -> dict[str, str]:
    from tttjax.evaluation.tables import MISSING, format_bytes

    row = {"host": str(process), "name": host["name"], "devices": host["devices"]}
    if "step" not in host:
        names = ("step", "s/step", "input", "other", "memory", "peak", "age")
        return row | dict.fromkeys(names, MISSING)
    seconds = host["step_seconds"]
    return row | {
        "step": str(host["step"]),
        "s/step": MISSING if seconds is None else f"{seconds:.3f}",
        "input": f"{host['input']:.0%}",
        "other": f"{host['other']:.0%}",
        "memory": format_bytes(host["memory_bytes"]),
        "peak": format_bytes(host["peak_bytes"]),
        "age": f"{host['age']:.0f} s",
    }
