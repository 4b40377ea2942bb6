"""Describe session files: tokens, size, drift of the fast weights, recent losses; rewind them.

examples:
  tttjax sessions book.session other.session
  tttjax sessions book.session --json
  tttjax sessions book.session --rewind=100000 --to=early.session
      writes the last snapshot (of `tttjax read --keep-every`) at or before 100,000 tokens;
      book.session is not changed
  tttjax sessions book.session --rewind=100000 --to=early.session --run=runs/first --text=book.txt
      continues from that snapshot to exactly 100,000 tokens

To fork a session, continue it several times: `tttjax generate --session=FILE --save-session=NEW`
does not change FILE.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tttjax.cli.flag_types import int32
from tttjax.cli.model_arguments import add_model_arguments, load_from_args
from tttjax.errors import UserError
from tttjax.io.locks import hold
from tttjax.io.paths import storage_text, text_path

if TYPE_CHECKING:
    from tttjax.inference.session_header import SessionHeader

MAX_LOSSES = 8  # last updates whose losses are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax sessions`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="session files")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add = parser.add_argument_group("rewinding").add_argument
    add("--rewind", type=int32, metavar="TOKENS", help="number of tokens to rewind to")
    add("--to", metavar="NEW", help="session file to write")
    add(
        "--run",
        type=storage_text,
        metavar="WORKDIR",
        help="run of the model, to continue to exactly TOKENS",
    )
    add("--text", type=text_path, metavar="FILE", help="text of the session, for --run")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`tttjax sessions` from parsed arguments; returns the exit code."""
    if args.rewind is not None or args.to:
        path, new = _check_rewind(args)
        with hold(new, beside=True):
            _rewind(args, path, new)
        return 0
    if args.run or args.text:
        raise UserError("--run and --text need --rewind=TOKENS")

    from tttjax.inference.session_file import check_file, read_header

    for path in args.files:
        check_file(path)
    sessions = {path: read_header(path) for path in args.files}
    if args.json:
        print(json.dumps({path: _as_json(path, header) for path, header in sessions.items()}))
        return 0
    for path, header in sessions.items():
        print("\n".join(_describe(path, header)))
    return 0


# --- descriptions -------------------------------------------------------------------------------


def _as_json(path: str, header: "SessionHeader") -> dict:
    from tttjax.runs.snapshots import list_snapshots

    snapshots = {
        str(file): dataclasses.asdict(snapshot) for file, snapshot in list_snapshots(path).items()
    }
    return {**dataclasses.asdict(header), "kept": snapshots}


def _describe(path: str, header: "SessionHeader") -> list[str]:
    from tttjax.runs.snapshots import list_snapshots, snapshot_dir

    error = f", {header.lost:.2%} of the weight changes lost" if header.lost else ""
    lines = [
        f"{path}: {header.tokens:,} tokens, {header.pending} since the last inner update; "
        f"{Path(path).stat().st_size:,} bytes ({header.precision}{error})",
        f"  model {header.model[:12]}, tokenizer {header.tokenizer[:12] or 'unknown'}",
    ]
    if header.source:
        source = header.source
        lines.append(f"  text {source['text']}: {source['tokens']:,} of {source['of']:,} tokens")
    lines += _losses(header)
    lines += [f"  {line}" for line in _drifts(header)]
    snapshots = list_snapshots(path)
    if snapshots:
        lines.append(f"  snapshots in {snapshot_dir(path)}:")
    for snapshot in snapshots.values():
        drift = sum(size**2 for size in snapshot.drift.values()) ** 0.5
        line = f"    {snapshot.tokens:12,} tokens  drift {drift:.4f}"
        if last := snapshot.chunk_losses:
            line += f"  loss {sum(last) / len(last):.4f} over the last {len(last)} chunks"
        lines.append(line)
    return lines


def _losses(header: "SessionHeader") -> list[str]:
    before, after = header.chunk_losses, header.chunk_losses_after
    if not before:
        return []
    lines = [
        f"  loss before the update, last {len(before)} chunks: first {before[0]:.4f}, last "
        f"{before[-1]:.4f}, mean {sum(before) / len(before):.4f} nats per token"
    ]
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if b is not None]
    if pairs:
        gain = sum(a - b for a, b in pairs) / len(pairs)
        losses = ", ".join(f"{a:.4f} -> {b:.4f}" for a, b in pairs[-MAX_LOSSES:])
        lines.append(f"  before -> after the update, last: {losses} (mean gain {gain:.4f})")
    return lines


def _drifts(header: "SessionHeader") -> list[str]:
    width = max(map(len, header.layers), default=0)
    return [
        f"{name:{width}}  drift {drift:.4f}" + (f", {drift / initial:.2%}" if initial else "")
        for name, (drift, initial) in header.layers.items()
    ]


# --- rewinding ----------------------------------------------------------------------------------


def _rewind(args: argparse.Namespace, path: Path, new: Path) -> None:
    from tttjax.inference.session_file import check_file, read_header
    from tttjax.runs.snapshots import copy_atomically, find_snapshot

    total = read_header(path).tokens
    if args.rewind > total:
        raise UserError(
            f"{path} has {total:,} tokens; give a smaller --rewind than {args.rewind:,}"
        )
    snapshot = find_snapshot(path, args.rewind)
    tokens = read_header(snapshot).tokens
    if tokens < args.rewind and args.text:
        _prefill_to(args, snapshot, new)
        tokens = args.rewind
    else:
        check_file(snapshot)
        copy_atomically(snapshot, new)
    print(f"{new}: the session at {tokens:,} tokens", file=sys.stderr)
    if tokens < args.rewind:
        print(
            f"the last snapshot before {args.rewind:,}; give --run=WORKDIR and --text=FILE to "
            "continue to exactly there",
            file=sys.stderr,
        )


def _check_rewind(args: argparse.Namespace) -> tuple[Path, Path]:
    if args.rewind is None or not args.to:
        raise UserError("give both --rewind=TOKENS and --to=NEW")
    if len(args.files) != 1:
        raise UserError(f"--rewind needs one session file, not {len(args.files)}")
    if args.rewind < 0:
        raise UserError(f"--rewind={args.rewind} must be at least 0.")
    if bool(args.run) != bool(args.text):
        raise UserError("give both --run=WORKDIR and --text=FILE")
    path, new = Path(args.files[0]), Path(args.to)
    if new.exists():
        raise UserError(f"--to={new} exists already; choose another file")
    return path, new


def _prefill_to(args: argparse.Namespace, snapshot: Path, new: Path) -> None:
    """Continues a snapshot with its text to `args.rewind` tokens."""
    from tttjax.inference.session_file import read_header
    from tttjax.parallel.precision import x64_if_configured
    from tttjax.runs.long_text import (
        find_text,
        is_session_of,
        resume_prefill,
        run_prefill,
        save_prefill,
    )

    file = find_text(args.text)
    header = read_header(snapshot)
    if not is_session_of(header, file):
        raise UserError(
            f"{args.text} is not the text of {args.files[0]} ({header.source['text']}), or has "
            "changed since; give the original text"
        )
    args.workdir = args.run
    loaded = load_from_args(args, trace_updates=header.source.get("telescope", False))
    with x64_if_configured(loaded.config):
        prefill = resume_prefill(loaded, file, snapshot)
        until = prefill.done + args.rewind - prefill.session.tokens
        if until > prefill.total:
            raise UserError(
                f"{args.text} ends at {args.rewind - until + prefill.total:,} tokens; give a "
                f"smaller --rewind than {args.rewind:,}"
            )
        for _ in run_prefill(loaded, prefill, until):
            pass
        save_prefill(new, loaded, prefill)
