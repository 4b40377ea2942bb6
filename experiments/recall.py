"""What a model remembers of a passage that it read some windows ago (E4).

    python experiments/recall.py RUN... --data=DATA --out=DIR

Every passage, as long as a window, is read twice, with other text of the book in between. Recall is
how much lower the loss of the second reading is than it would be had another passage of the book
stood in place of the first. Only what carries the first reading over the distance can lower it:
attention, a recurrent state, or the fast weights. Blocks of window attention reach over as many
windows as there are blocks.

Writes recall.csv and recall.png: nats per token by run, mode and distance. Standard errors are over
books. 40 passages of 128 tokens up to 16 windows apart are 0.4 million tokens for a run and mode.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from tttjax.cli.flag_types import float32, int32, list_of
from tttjax.data.held_out import HeldOut
from tttjax.data.shards import TokenSplit, open_prepared
from tttjax.errors import UserError
from tttjax.evaluation.files import check_writable, write_results
from tttjax.evaluation.plots import add_legend, decorate, line_styles, new_figure, set_ticks
from tttjax.evaluation.statistics import Sums, difference, loss, sum_by_document
from tttjax.evaluation.text import check_tokenizer
from tttjax.inference.prefill import make_inference_model
from tttjax.inference.sequence_nll import make_scorer, token_losses
from tttjax.parallel.mesh import make_mesh
from tttjax.parallel.precision import x64_if_configured
from tttjax.runs.eval_setup import EvalSetup, LearningOptions, choose_modes, iter_eval_setups
from tttjax.runs.run import RunSpec, open_run


def passages(split: TokenSplit, length: int, distance: int, count: int) -> tuple[HeldOut, HeldOut]:
    """Sequences of (distance + 1) * length targets that end with the second reading of a passage.

    In the second result, another passage of the book stands in place of the first reading. count:
    passages of every book, evenly spaced; books too short for them are left out.
    """
    read: list[np.ndarray] = []
    unread: list[np.ndarray] = []
    document: list[int] = []
    for i, (start, stop) in enumerate(zip(*split.document_bounds(), strict=True)):
        stride = (stop - start - 1) // count
        if stride < (distance + 1) * length:
            continue
        token_CT = split.read(start, start + count * stride + 1)
        region_CT = np.stack([token_CT[n * stride : (n + 1) * stride + 1] for n in range(count)])
        first_CT, again_CT = region_CT[:, : length + 1], region_CT[:, 1 : length + 1]
        # Half a book away from both passages, text neither goes on from them nor leads to them.
        filler_CT = np.roll(region_CT[:, length + 1 : distance * length + 1], -(count // 2), axis=0)
        other_CT = np.roll(first_CT, -(count // 4 or 1), axis=0)
        read.append(np.concatenate([first_CT, filler_CT, again_CT], axis=1))
        unread.append(np.concatenate([other_CT, filler_CT, again_CT], axis=1))
        document += [i] * count
    if not read:
        raise UserError(
            f"no document of the split {split.name} has {count} regions of "
            f"{(distance + 1) * length} tokens; give fewer --passages or shorter --distances"
        )
    owner, offset = np.asarray(document), np.zeros(len(document), np.int64)
    return (
        HeldOut(np.concatenate(read), owner, offset, 0),
        HeldOut(np.concatenate(unread), owner, offset, 0),
    )


def second_reading(setup: EvalSetup, sequences: HeldOut, length: int, batch_size: int) -> Sums:
    """Losses of the last `length` targets, by book and position."""
    model = make_inference_model(setup.model, setup.inner, setup.lr, learn=setup.learn)
    scorer, context = make_scorer(model, setup.mesh), sequences.tokens.shape[1] - 1
    nll_NT = token_losses(
        scorer, setup.mesh, setup.params, setup.lr, sequences, context, batch_size
    )[:, -length:]
    loss_DL = sum_by_document(nll_NT, sequences.document, length)
    return Sums(loss_DL, sum_by_document(np.ones_like(nll_NT), sequences.document, length))


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """The rows of recall.csv."""
    runs = [open_run(RunSpec(path)) for path in options.runs]
    if len({run.name for run in runs}) < len(runs):
        raise UserError("two runs have the same name; give each once, or rename a folder")
    data = open_prepared(options.data)
    for run in runs:
        check_tokenizer(run, data)
    split = data.split(options.split)
    mesh = make_mesh(devices=jax.devices()[:1])
    learning = LearningOptions(dynamic_lrs=options.dynamic_lr)
    chosen = choose_modes(runs, options.modes, options.dynamic_lr)
    for run, modes in zip(runs, chosen, strict=True):
        length = options.length or run.window
        if not length:
            raise UserError(f"{run.name} has no window; give --length")
        with x64_if_configured(run.config):
            setups = itertools.chain(*iter_eval_setups(run, modes, learning, mesh))
            for setup, distance in itertools.product(setups, options.distances):
                pair = passages(split, length, distance, options.passages)
                read, unread = (
                    second_reading(setup, sequences, length, options.batch_size)
                    for sequences in pair
                )
                gain = difference([unread], [read])
                yield {
                    **{"run": setup.label, "step": run.step, "windows": distance},
                    **{"recall": float(gain.mean), "stderr": float(gain.stderr)},
                    "unread": float(loss([unread]).mean),
                }


def plot(rows: pd.DataFrame) -> Figure:
    """Recall by distance, one curve for every run and mode."""
    figure, (axes,) = new_figure(1)
    styles = line_styles(rows["run"])
    axes.set_xscale("log", base=2)
    for name, curve in rows.groupby("run", sort=False):
        axes.errorbar(
            curve["windows"], curve["recall"], curve["stderr"], label=name, **styles[name]
        )
    axes.axhline(0, color="0.7", linewidth=0.8)
    set_ticks(axes, sorted(set(rows["windows"])), log=True)
    axes.set_xlabel("distance between the readings (windows)")
    decorate(axes, ylabel="recall (nats per token)")
    add_legend(figure, [axes])
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the experiment; 2 for a user error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="work directory of a run")
    add("--data", required=True, help="prepared books")
    add("--out", required=True, help="folder of recall.csv and recall.png")
    add("--split", default="test", help="split of the data (default: test)")
    add(
        "--modes",
        type=list_of(str),
        default=(),
        help="on, off, dynamic (default: on, off)",
    )
    add(
        "--distances",
        type=list_of(int32),
        default=(1, 2, 4, 8, 16),
        help="windows from reading to reading",
    )
    add("--passages", type=int32, default=8, help="of every book (default: 8)")
    add("--length", type=int32, default=0, help="tokens of a passage (default: the window)")
    add("--dynamic-lr", type=list_of(float32), default=(), help="inner rates of dynamic evaluation")
    add("--batch-size", type=int32, default=8, help="sequences at once (default: 8)")
    options = parser.parse_args(arguments)
    try:
        distances = options.distances
        if options.passages < 4 or min(distances, default=0) < 1:
            raise UserError("give at least 4 --passages, and --distances of at least 1")
        if len({*distances}) < len(distances):
            raise UserError("--distances must differ")
        if options.length < 0 or options.batch_size < 1:
            raise UserError("--length and --batch-size must be positive")
        check_writable(options.out)
        rows = []
        for row in measure(options):
            rows.append(row)
            print(
                "{run}, {windows} windows: {recall:.4f} ± {stderr:.4f}".format_map(row), flush=True
            )
        table = pd.DataFrame(rows)
        write_results(options.out, {"recall.csv": table, "recall.png": plot(table)})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
