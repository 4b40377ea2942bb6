"""What session files hold: tokens read, size, how far the fast weights have moved, last losses.

examples:
  tttjax sessions book.session other.session
  tttjax sessions book.session --json
  tttjax sessions book.session --rewind=100000 --to=early.session
      the session as it was when 100,000 tokens had been read, or at the last one kept before that
      (`tttjax read --keep-every` keeps them); book.session stays as it is
  tttjax sessions book.session --rewind=100000 --to=early.session --run=runs/first --text=book.txt
      reads on from that one to exactly 100,000 tokens

To fork a session is to open its file several times: each `tttjax generate --session=FILE
--save-session=NEW` goes on from the same state, and leaves FILE as it is.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tttjax.cli.flag_types import int32
from tttjax.cli.model_arguments import add_model_arguments, load_from_args
from tttjax.errors import UserError
from tttjax.inference.session_file import About, check_file, read_about
from tttjax.io.locks import hold
from tttjax.parallel.precision import as_configured
from tttjax.runs.long_text import (
    find_text,
    is_session_of,
    resume_prefill,
    run_prefill,
    save_prefill,
)
from tttjax.runs.snapshots import copy_atomically, list_snapshots, snapshot_dir

SHOWN = 8  # last updates whose losses are shown one by one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax sessions`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="session files")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    rewind = parser.add_argument_group("going back")
    add = rewind.add_argument
    add("--rewind", type=int32, metavar="TOKENS", help="to when so many tokens had been read")
    add("--to", metavar="NEW", help="file for the session as it was then")
    add("--run", metavar="WORKDIR", help="of the model, to read on to exactly there")
    add("--text", metavar="FILE", help="the text that was read")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """`tttjax sessions` from parsed arguments; the exit code."""
    if args.rewind is not None or args.to:
        path, new = _check_rewind(args)
        with hold(new, beside=True):
            _rewind(args, path, new)
        return 0
    if args.run or args.text:
        raise UserError("--run and --text are for --rewind=TOKENS: give that too")
    for path in args.files:
        check_file(path)
    found = {path: read_about(path) for path in args.files}
    if args.json:
        print(json.dumps({path: _as_json(path, about) for path, about in found.items()}))
        return 0
    for path, about in found.items():
        print("\n".join(_describe(path, about)))
    return 0


# --- what there is -------------------------------------------------------------------------------


def _as_json(path: str, about: About) -> dict:
    snapshots = {
        str(file): dataclasses.asdict(found) for file, found in list_snapshots(path).items()
    }
    return {**dataclasses.asdict(about), "kept": snapshots}


def _describe(path: str, about: About) -> list[str]:
    stored = about.precision + (f", rank {about.rank}" if about.rank else "")
    lost = f", {about.lost:.2%} of the changes lost" if about.lost else ""
    lines = [
        f"{path}: {about.tokens:,} tokens read, {about.pending} of them not yet learned from; "
        f"{Path(path).stat().st_size:,} bytes ({stored}{lost})",
        f"  model {about.model[:12]}, tokenizer {about.tokenizer[:12] or 'not known'}",
    ]
    if about.source:
        source = about.source
        lines.append(f"  text {source['text']}: {source['tokens']:,} of {source['of']:,} tokens")
    lines += _losses(about)
    lines += [f"  {line}" for line in _drifts(about)]
    snapshots = list_snapshots(path)
    if snapshots:
        lines.append(f"  to go back to, in {snapshot_dir(path)}:")
    for found in snapshots.values():
        moved = sum(size**2 for size in found.drift.values()) ** 0.5
        line = f"    {found.tokens:12,} tokens  moved by {moved:.4f}"
        if last := found.chunk_losses:
            line += f"  loss {sum(last) / len(last):.4f} over the last {len(last)} chunks"
        lines.append(line)
    return lines


def _losses(about: About) -> list[str]:
    before, after = about.chunk_losses, about.chunk_losses_after
    if not before:
        return []
    lines = [
        f"  loss before learning, last {len(before)} chunks: first {before[0]:.4f}, last "
        f"{before[-1]:.4f}, mean {sum(before) / len(before):.4f} nats per token"
    ]
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if b is not None]
    if pairs:
        gain = sum(a - b for a, b in pairs) / len(pairs)
        shown = ", ".join(f"{a:.4f} -> {b:.4f}" for a, b in pairs[-SHOWN:])
        lines.append(f"  before -> after each update, the last: {shown} (mean gain {gain:.4f})")
    return lines


def _drifts(about: About) -> list[str]:
    width = max(map(len, about.layers), default=0)
    return [
        f"{name:{width}}  moved by {moved:.4f}" + (f", {moved / start:.2%}" if start else "")
        for name, (moved, start) in about.layers.items()
    ]


# --- going back ----------------------------------------------------------------------------------


def _rewind(args: argparse.Namespace, path: Path, new: Path) -> None:
    about = read_about(path)
    if args.rewind > about.tokens:
        raise UserError(f"{path} has read {about.tokens:,} tokens, not {args.rewind:,}")
    candidates = {**list_snapshots(path), path: about}
    earlier = {
        file: found
        for file, found in candidates.items()
        if found.tokens <= args.rewind and found.precision == "float32"
    }
    if not earlier:
        first = min((found.tokens for found in list_snapshots(path).values()), default=None)
        have = "keeps none" if first is None else f"keeps none before {first:,} tokens"
        raise UserError(
            f"{path} cannot go back to {args.rewind:,} tokens: it {have}; sessions on the way are "
            "kept by `tttjax read --keep-every=TOKENS`"
        )
    nearest = max(earlier, key=lambda file: earlier[file].tokens)
    tokens = earlier[nearest].tokens
    if tokens < args.rewind and args.text:
        _read_to(args, nearest, new)
        tokens = args.rewind
    else:
        check_file(nearest)
        copy_atomically(nearest, new)
    print(f"{new}: as it was after {tokens:,} tokens", file=sys.stderr)
    if tokens < args.rewind:
        print(
            f"the last one kept before {args.rewind:,}; --run=WORKDIR and --text=FILE read on to "
            "exactly there",
            file=sys.stderr,
        )


def _check_rewind(args: argparse.Namespace) -> tuple[Path, Path]:
    if args.rewind is None or not args.to:
        raise UserError("--rewind=TOKENS and --to=NEW go together")
    if len(args.files) != 1:
        raise UserError(f"--rewind goes back in one session, and {len(args.files)} are named")
    if args.rewind < 0:
        raise UserError(f"--rewind={args.rewind} must be at least 0.")
    if bool(args.run) != bool(args.text):
        raise UserError("to read on, both --run=WORKDIR and --text=FILE are needed")
    path, new = Path(args.files[0]), Path(args.to)
    if new.exists():
        raise UserError(f"--to={new} exists already; name another file")
    return path, new


def _read_to(args: argparse.Namespace, nearest: Path, new: Path) -> None:
    """Reads the text on from a session file, up to `args.rewind` tokens of it all."""
    file = find_text(args.text)
    about = read_about(nearest)
    if not is_session_of(about, file):
        raise UserError(
            f"{args.text} is not the text that {args.files[0]} was read from "
            f"({about.source['text']}), or has changed since; give that one, as it was"
        )
    args.workdir = args.run
    loaded = load_from_args(args, trace_updates=about.source.get("telescope", False))
    with as_configured(loaded.config):
        prefill = resume_prefill(loaded, file, nearest)
        until = prefill.done + args.rewind - prefill.session.tokens
        if until > prefill.total:
            raise UserError(
                f"{args.text} ends before {args.rewind:,} tokens, after "
                f"{args.rewind - until + prefill.total:,}: what came then was no part of it"
            )
        for _ in run_prefill(loaded, prefill, until):
            pass
        save_prefill(new, loaded, prefill)
