"""Check this build against reference values.

examples:
  tttjax verify DIR --x64
      compares losses, gradients and weights with the reference cases in DIR, in float64
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tttjax
from tttjax.errors import UserError
from tttjax.io.atomic import atomic_write

if TYPE_CHECKING:
    from tttjax.verification.rows import VerifyRow


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax verify`."""
    parser.add_argument("directory", metavar="DIR", help="folder of reference cases")
    parser.add_argument(
        "--x64", action="store_true", help="compute in float64, with tighter tolerances"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to FILE as JSON")


def run(args: argparse.Namespace) -> int:
    """`tttjax verify` from parsed arguments; returns 1 if a check failed."""
    import jax

    from tttjax.verification.verify import check_cases, find_cases, format_table

    entries = find_cases(args.directory)
    head = {
        "version": tttjax.__version__,
        "precision": "float64" if args.x64 else "float32",
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
    }
    print(
        "tttjax {version}, computed in {precision} on {platform} ({device}), jax {jax}".format(
            **head
        )
    )
    rows = check_cases(entries, args.x64, lambda name: print(f"... {name}", file=sys.stderr))
    print("\n".join(format_table(rows)))
    ignored = [entry.name for entry in entries if entry.kind is None]
    if ignored:
        print(f"not recognised: {', '.join(ignored)}")
    failures = [row for row in rows if not row.ok]
    checked = sum(row.deviation is not None for row in rows)
    print(
        f"{len(failures)} of {len(rows)} checks failed"
        if failures
        else f"all {checked} quantities are within tolerance"
    )
    if args.json:
        _write_json(Path(args.json), {**head, "rows": rows, "not_recognised": ignored})
    return 1 if failures else 0


def _write_json(path: Path, content: dict[str, Any]) -> None:
    def to_json(row: "VerifyRow") -> dict[str, Any]:
        fields = dataclasses.asdict(row)
        finite = row.deviation is None or math.isfinite(row.deviation)
        return fields if finite else {**fields, "deviation": str(row.deviation)}

    content = {**content, "rows": [to_json(row) for row in content["rows"]]}
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
