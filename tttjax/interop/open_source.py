"""Opens the source of an import: a Hugging Face model or an official TTT-E2E checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from tttjax.config.files import split_spec
from tttjax.errors import UserError
from tttjax.interop.huggingface import supported
from tttjax.interop.huggingface.import_ import is_huggingface_model, open_huggingface
from tttjax.interop.official.checkpoint import is_official_checkpoint
from tttjax.interop.official.import_ import open_official
from tttjax.interop.source import ImportSource, Log
from tttjax.io.paths import local_path
from tttjax.training import checkpoints


def open_source(
    source: str,
    *,
    config: str = "",
    overrides: Sequence[str] = (),
    tokenizer: str = "",
    project: str = "",
    log: Log = print,
) -> ImportSource:
    """Opens the source of the weights. Raises UserError if it cannot be imported.

    source: folder, or gs:// URL of an official checkpoint. config: experiment file (default:
    inferred from the source). project: Google Cloud project to bill for requester-pays buckets.
    """
    if config:
        split_spec(config)  # checks it before any network access
    is_bucket = "://" in source
    folder = Path() if is_bucket else local_path(source)
    if not is_bucket:
        if not folder.exists():
            raise UserError(f"There is no folder {folder} to import; check the spelling.")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file; give the folder of a model or checkpoint.")
        if (folder / checkpoints.CHECKPOINT_DIR).is_dir() or (folder / "meta").is_dir():
            raise UserError(f"{folder} is a tttjax run already; use it directly.")
        if is_huggingface_model(folder):
            return open_huggingface(
                folder, config=config, overrides=overrides, tokenizer=tokenizer, log=log
            )
        if not is_official_checkpoint(folder):
            raise UserError(
                f"{folder} is neither a checkpoint of the official TTT-E2E code (model_weights in "
                "the folder of a step) nor a Hugging Face model (config.json and safetensors); "
                f"supported Hugging Face models: {supported()}."
            )
    return open_official(
        source if is_bucket else str(folder),
        config=config,
        overrides=overrides,
        tokenizer=tokenizer,
        project=project,
        log=log,
    )
