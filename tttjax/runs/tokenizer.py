"""The tokenizer of a run: kept in its work directory, or with the data that it was trained on."""

from collections.abc import Iterator
from pathlib import Path

from tttjax.data.shards import TOKENIZER_DIR
from tttjax.data.tokenizers.base import CONFIG_FILE, Tokenizer, load_tokenizer
from tttjax.errors import UserError
from tttjax.io.paths import local_path
from tttjax.runs.run import Run
from tttjax.training.checkpoints import CHECKPOINT_DIR


def run_tokenizer(run: Run, given: Path | str | None = None) -> Tokenizer:
    """That of `given`, else the one that the run keeps, else that of its data.

    given: folder of a tokenizer, or of a run or data set that has one.
    Raises UserError if there is none, or it is not the one that the run was trained with.
    """
    folders = [local_path(given)] if given else list(_own_folders(run))
    places = [place for folder in folders for place in (folder / TOKENIZER_DIR, folder)]
    there = [place for place in places if (place / CONFIG_FILE).exists()]
    if not there:
        raise UserError(
            f"there is no tokenizer in {' or '.join(map(str, folders)) or 'data.sources (empty)'}; "
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


def _own_folders(run: Run) -> Iterator[Path]:
    """Where a run's tokenizer may be, the likeliest first: its work directory, its data."""
    if run.folder:
        above = run.folder.parent
        yield above.parent if above.name == CHECKPOINT_DIR else above
    yield from map(Path, run.config.data.sources)
