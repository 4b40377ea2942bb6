"""How far cheaper meta-gradients are from the exact one, at a run's weights (E4).

    python experiments/meta_gradient_bias.py RUN --data=DATA --out=DIR

For every batch the gradient of the outer loss by each `inner.meta_gradient`, compared with the
exact one: the cosine of the angle between them and the ratio of their norms, for all weights, for
the slow ones and for the initial fast ones. Writes meta_gradient_bias.csv with means and standard
errors over batches. Cost and memory of a step: `tttjax bench train`.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd

import tttjax
from tttjax.cli.flag_types import int32
from tttjax.data.held_out import eval_sequences
from tttjax.data.shards import open_prepared
from tttjax.evaluation.files import check_writable, write_results
from tttjax.evaluation.text import check_tokenizer
from tttjax.recipes.ablations import META_CHANGES
from tttjax.runs.run import RunSpec, open_run
from tttjax.types import Params


def parts(gradient: Params) -> dict[str, np.ndarray]:
    """Flat float64 gradients by part of the weights."""
    flat = {
        name: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
        for name, tree in (("slow", gradient.slow), ("fast", gradient.fast))
    }
    return {"all": np.concatenate([*flat.values()]), **flat}


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row for each batch, meta-gradient and part of the weights."""
    run = tttjax.load(options.run)
    if not run.model.fast_paths:
        raise tttjax.UserError(f"{options.run} has no fast weights, so no meta-gradient")
    train = run.config.train

    def derive(changes: Mapping[str, Any]) -> Any:
        inner = replace(run.config.inner, **changes)
        return tttjax.value_and_meta_grad(run.model, replace(run.config, inner=inner))

    functions = {name: derive(changes) for name, changes in META_CHANGES.items()}
    data = open_prepared(options.data)
    check_tokenizer(open_run(RunSpec(options.run)), data)
    sequences = eval_sequences(
        data,
        length=train.seq_len,
        num=options.batches * train.batch_size,
        split=options.split,
    )
    for i, batch in enumerate(sequences.batches(train.batch_size)):
        gradients = {name: parts(f(run.params, batch)[1]) for name, f in functions.items()}
        for name, gradient in gradients.items():
            for part, g in gradient.items():
                exact = gradients["exact"][part]
                norm, expected = np.linalg.norm(g), np.linalg.norm(exact)
                cosine = float(g @ exact / (norm * expected)) if norm and expected else np.nan
                ratio = float(norm / expected) if expected else np.nan
                yield {
                    **{"batch": i, "meta_gradient": name, "weights": part},
                    **{"cosine": cosine, "norm_ratio": ratio},
                }


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Means and standard errors over batches."""
    groups = rows.groupby(["meta_gradient", "weights"], sort=False)[["cosine", "norm_ratio"]]
    table = groups.agg(["mean", "sem"])
    table.columns = [f"{name}{'' if what == 'mean' else '_stderr'}" for name, what in table]
    return table.reset_index()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; 2 for a user error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="work directory of a run with fast weights")
    add("--data", required=True, help="prepared text")
    add("--out", required=True, help="folder of meta_gradient_bias.csv")
    add("--split", default="train", help="split of the data (default: train)")
    add("--batches", type=int32, default=8, help="of the run's batch size (default: 8)")
    options = parser.parse_args(arguments)
    try:
        if options.batches < 1:
            raise tttjax.UserError("--batches must be positive")
        check_writable(options.out)
        rows = []
        for row in measure(options):
            rows.append(row)
            if row["weights"] == "all":
                values = (
                    "batch {batch}, {meta_gradient}: cosine {cosine:.4f}, ratio {norm_ratio:.3f}"
                )
                print(values.format_map(row), flush=True)
        table = summarize(pd.DataFrame(rows))
        write_results(options.out, {"meta_gradient_bias.csv": table})
    except tttjax.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
