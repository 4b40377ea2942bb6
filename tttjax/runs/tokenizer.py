"""The tokenizer of a run: in its work directory, or with its training data."""

from collections.abc import Iterator
from pathlib import Path

from tttjax.data.shards import TOKENIZER_DIR
from tttjax.data.tokenizers.base import CONFIG_FILE, Tokenizer, load_tokenizer
from tttjax.errors import UserError
from tttjax.io.paths import storage_path
from tttjax.runs.run import Run


def load_run_tokenizer(run: Run, path: Path | str | None = None) -> Tokenizer:
    """The tokenizer in `path`, else the one in the work directory, else that of the data.

    path: folder of a tokenizer, or of a run or data set that has one.
    Raises UserError if there is none, or it is not the one that the run was trained with.
    """
    folders = [storage_path(path)] if path else list(_default_folders(run))
    candidates = [option for folder in folders for option in (folder / TOKENIZER_DIR, folder)]
    existing = [folder for folder in candidates if (folder / CONFIG_FILE).exists()]
    if not existing:
        raise UserError(
            f"there is no tokenizer in {' or '.join(map(str, folders)) or 'data.sources (empty)'}; "
            f"give the training data of {run.source}, or a copy, with --tokenizer=DIR"
        )
    tokenizer = load_tokenizer(existing[0])
    if run.tokenizer and tokenizer.fingerprint() != run.tokenizer:
        raise UserError(
            f"the tokenizer in {existing[0]} is not that of {run.source} (fingerprint "
            f"{tokenizer.fingerprint()[:12]}, not {run.tokenizer[:12]}); give the right one with "
            "--tokenizer=DIR"
        )
    if tokenizer.vocab_size > run.config.model.vocab_size:
        raise UserError(
            f"the tokenizer in {existing[0]} has {tokenizer.vocab_size} tokens, more than the "
            f"{run.config.model.vocab_size} of the model; give the right one with --tokenizer=DIR"
        )
    return tokenizer


def _default_folders(run: Run) -> Iterator[Path]:
    """Where a run's tokenizer may be, in order of preference: work directory, data."""
    if run.workdir:
        yield run.workdir
    yield from map(storage_path, run.config.data.sources)
