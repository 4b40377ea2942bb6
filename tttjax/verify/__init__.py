"""Checks this build against reference numbers: recomputes every case in a folder and compares.

Works from each case's JSON alone, so any folder in the format will do. Cases (`X.json` beside
`X.npz`): losses, per-token NLL, outer gradient, inner loop, optimizer steps. Recurrent layers,
their operators and small language models of them: outputs and states in every form (in chunks,
token by token), gradients. Official Orbax checkpoints: every array, and the loss with the imported
weights. Zarr data: every batch.

  tttjax verify tests/golden/cases
  tttjax verify tests/golden/cases --x64 --json verify.json

Exit code 0: everything within tolerance; 1: something is not; 2: nothing here can be checked.
"""

from tttjax.verify.command import add_arguments, run, verify
from tttjax.verify.rows import Row

__all__ = ["Row", "add_arguments", "run", "verify"]
