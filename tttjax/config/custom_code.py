"""Custom inner rules and inner losses, which recipe files define, by the hash of the file.

A recipe file may define

    inner_rule(inner)    an optax transformation from an `InnerConfig`: the update for a learning
                         rate of 1
    inner_loss(chunk)    a scalar, the inner loss of one chunk, from `ttt.chunk.LossInputs`

and choose them by inner.rule = "custom" and inner.loss = "custom". `inner.code` is the file's
sha256. A process knows the functions once it has run that very file (`config.files.use_code`), so
that opening a run executes nothing that its user did not name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tttjax.errors import UserError

if TYPE_CHECKING:
    from tttjax.config.schema import InnerConfig

CODE = "recipe.py"  # in a run: the file that defines its rule or loss


@dataclass(frozen=True)
class CustomCode:
    """The functions of a recipe file; their errors name its line. None: not defined."""

    path: Path
    source: bytes
    inner_rule: Callable[..., Any] | None
    inner_loss: Callable[..., Any] | None


_known: dict[str, CustomCode] = {}


def add_custom_code(sha256: str, code: CustomCode) -> None:
    """Makes the functions of a file that was run known to this process."""
    _known[sha256] = code


def custom_code(sha256: str) -> CustomCode:
    """What `inner.code` names. Raises UserError if this process has not run the file."""
    if sha256 not in _known:
        raise UserError(
            f"inner.code = {sha256[:12]} is a recipe file that this process has not run; give "
            "--code=FILE (from Python: tttjax.recipes.use_code(FILE))"
        )
    return _known[sha256]


def check_custom_code(inner: "InnerConfig") -> None:
    """Raises UserError if a rule or loss is custom and no file, or not this one, defines it."""
    for name, value in (("rule", inner.rule), ("loss", inner.loss)):
        if value != "custom":
            continue
        code = _known.get(inner.code)
        if not inner.code or (code and getattr(code, f"inner_{name}") is None):
            where = f"{code.path} defines none" if code else "there is none"
            raise UserError(
                f'inner.{name} = "custom" needs a recipe file with a function inner_{name}, and '
                f"{where}; define it in the file of --config"
            )


def check_run_code(inner: "InnerConfig", workdir: Path) -> None:
    """Raises UserError if the run in `workdir` needs code that this process has not run."""
    if not inner.code or inner.code in _known:
        return
    file = workdir / CODE
    others = ", ".join(str(code.path) for code in _known.values())
    raise UserError(
        f"{workdir} has a custom inner rule or loss (sha256 {inner.code[:12]}...), which is Python "
        f"code: read {file}, then give --code={file} (from Python: tttjax.recipes.use_code)"
        + (f"; {others} is another file" if others else "")
    )
