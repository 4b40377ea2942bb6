"""What session files hold: tokens read, size, how far the fast weights have moved, last losses.

examples:
  tttjax sessions book.session other.session
  tttjax sessions book.session --json
"""

import argparse
import dataclasses
import json
from pathlib import Path

from tttjax.inference.session_file import About, read_about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax sessions`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="session files")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """`tttjax sessions` from parsed arguments; the exit code."""
    found = {path: read_about(path) for path in args.files}
    if args.json:
        print(json.dumps({path: dataclasses.asdict(about) for path, about in found.items()}))
        return 0
    for path, about in found.items():
        print("\n".join(_describe(path, about)))
    return 0


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
    if about.chunk_losses:
        last = about.chunk_losses
        lines.append(
            f"  loss before learning, last {len(last)} chunks: first {last[0]:.4f}, last "
            f"{last[-1]:.4f}, mean {sum(last) / len(last):.4f} nats per token"
        )
    width = max((len(name) for name in about.drift), default=0)
    lines += [f"  {name:{width}}  moved by {moved:.4f}" for name, moved in about.drift.items()]
    return lines
