"""A run's model, ready to read and write: engine, tokenizer, and the marks its sessions carry."""

from dataclasses import dataclass
from pathlib import Path

import jax

from tttjax import sharding
from tttjax.config import Config
from tttjax.data.shards import TOKENIZER_DIR
from tttjax.data.tokenizers import CONFIG_FILE, Tokenizer, load_tokenizer
from tttjax.errors import UserError
from tttjax.evaluate.runs import Learning, Run, RunSpec, choose_modes, open_run, ways_to_read
from tttjax.inference.engine import Engine
from tttjax.inference.reading import make_reader
from tttjax.inference.session_file import fingerprint
from tttjax.precision import as_configured


@dataclass(frozen=True)
class Opened:
    """model, tokenizer_mark: fingerprints, which a session file must share."""

    config: Config
    engine: Engine
    tokenizer: Tokenizer
    model: str
    tokenizer_mark: str


def open_model(
    workdir: Path | str,
    *,
    tokenizer: Path | str | None = None,
    mode: str = "",
    max_length: int = 0,
    learning: Learning | None = None,
) -> Opened:
    """The newest weights of a run, on one device.

    tokenizer: folder of it, or of data prepared with it (default: the run's own data). mode: "on",
    "off" or "dynamic" (default: on if the model has fast weights). max_length: tokens that full
    attention has room for (0: eight training sequences).
    Raises UserError if something is missing or does not fit.
    """
    found = open_run(RunSpec(workdir))
    (modes,) = choose_modes([found], (mode,) if mode else ())
    texts = _tokenizer(found, tokenizer)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with as_configured(found.config):
        way = next(ways_to_read(found, modes[:1], learning or Learning(), mesh))[0]
        reader = make_reader(way.model, way.inner, way.lr, learn=way.learn)
        room = max_length or 8 * found.config.train.seq_len
        engine = Engine(reader, way.params, room)
        mark = fingerprint(found.config, way.params)
    return Opened(found.config, engine, texts, mark, texts.fingerprint())


def _tokenizer(run: Run, given: Path | str | None) -> Tokenizer:
    folders = [Path(given)] if given else [Path(s) for s in run.config.data.sources]
    places = [place for folder in folders for place in (folder / TOKENIZER_DIR, folder)]
    there = [place for place in places if (place / CONFIG_FILE).exists()]
    if not there:
        raise UserError(
            f"there is no tokenizer in {', '.join(map(str, folders)) or 'data.sources (empty)'}; "
            f"give the data that {run.source} was trained on, or a copy, with --tokenizer=DIR"
        )
    found = load_tokenizer(there[0])
    if run.tokenizer and found.fingerprint() != run.tokenizer:
        raise UserError(
            f"the tokenizer in {there[0]} is not that of {run.source} (fingerprint "
            f"{found.fingerprint()[:12]}, not {run.tokenizer[:12]}); give the right one with "
            "--tokenizer=DIR"
        )
    if found.vocab_size > run.config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {there[0]} has {found.vocab_size} tokens, more than the "
            f"{run.config.model.vocab_size} of the model; give the right one with --tokenizer=DIR"
        )
    return found
