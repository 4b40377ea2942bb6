"""Converts a pretrained run of one system into a run of another, in a new work directory.

    python experiments/comparison/convert.py SOURCE TARGET --config=experiments/compare_small.py:ARG

On sequences no longer than the window, full, window and hybrid attention are the same computation,
so they share one pretraining; only the layout of the weights differs. TARGET gets the weights, the
training records and the configuration of the other system.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tttjax.config import Config, load_config, read_config, write_run_info
from tttjax.models.relayout import relayout
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.training import checkpoint_format, checkpoints
from tttjax.training.step import make_trainer


def convert_run(source: Path, target: Path, config: Config) -> None:
    """Writes `target`, a finished run of `config` with the weights of the finished run `source`.

    The models must have the same weights in each block. An incomplete target is replaced.
    """
    source_config = read_config(source)
    assert source_config is not None, f"{source} has no configuration"
    old, new = (build_model(c.model, c.inner) for c in (source_config, config))
    checkpoint = checkpoints.find_checkpoint(source)
    trainer = make_trainer(source_config, make_mesh())
    params = checkpoints.restore_params(str(source), trainer.abstract_state.params)
    state = make_trainer(config, make_mesh()).start_from(relayout(params, old, new))
    temporary = target.with_name(f".{target.name}.converting")
    shutil.rmtree(temporary, ignore_errors=True)
    write_run_info(temporary, config, with_devices=True)
    saver = checkpoints.Checkpointer(temporary / checkpoints.CHECKPOINT_DIR)
    saver.save(
        int(checkpoint.name),
        state,
        data_state=None,
        tokenizer=checkpoint_format.read_meta(checkpoint).get("tokenizer", ""),
    )
    saver.wait()
    saver.close()
    for name in ("metrics.jsonl", "summary.json"):
        shutil.copyfile(source / name, temporary / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--config", required=True)
    args, overrides = parser.parse_known_args()
    convert_run(args.source, args.target, load_config(args.config, overrides))


if __name__ == "__main__":
    main()
