"""`prepare`: tokenises text into a folder of shards, resuming an interrupted run.

Documents are tokenised in parallel and written in input order, so the result does not depend on the
number of workers. The manifest is written last: a folder with a manifest is finished.
"""

import errno
import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tttjax.data.duplicates import DIGESTS_FILE
from tttjax.data.encode import default_workers
from tttjax.data.input_source import InputSource
from tttjax.data.manifest import MASKED_VERSION, VERSION, describe_split, token_dtype
from tttjax.data.near_duplicates import check_datasketch
from tttjax.data.parts import InputPart, join
from tttjax.data.prepare_pass import Log, PreparePass
from tttjax.data.prepare_settings import NEAR, PrepareSettings
from tttjax.data.prepared_folder import (
    choose_build_dir,
    claim,
    has_data_set,
    remove_prepared,
    remove_strays,
    replace_folder,
    write_json,
)
from tttjax.data.shards import JOURNAL, MANIFEST, TOKENIZER_DIR, PreparedData, open_prepared
from tttjax.data.splits import VAL, SplitRule, read_split_manifest
from tttjax.data.tokenizers.base import CONFIG_FILE, copy_tokenizer, load_tokenizer
from tttjax.data.tokenizers.vocabulary import make_tokenizer
from tttjax.errors import ResumableError, UnreachableError, UserError
from tttjax.io.block_cache import cache_folder
from tttjax.io.locks import Lock, hold
from tttjax.io.paths import file_sizes, is_bucket, path_text, storage_path, text_path

MOST_WORKERS = 1024


def _silent(line: str) -> None:
    pass


def prepare(
    inputs: Sequence[str | os.PathLike],
    out_dir: str | os.PathLike,
    *,
    num_workers: int | None = None,
    overwrite: bool = False,
    part: str = "",
    log: Log = _silent,
    **settings: Any,
) -> PreparedData:
    """Tokenises `inputs` into `out_dir` and opens the result.

    settings: the fields of `PrepareSettings`. num_workers: processes (None: one per core; 0: this
    one). overwrite: replace an existing data set in `out_dir` once the new one is finished.
    part: "I/N" prepares part I of N, and joins all if the others are finished; the result is the
    whole, or until then the part.
    Called again with the same arguments, it resumes an interrupted run, or returns at once if the
    data set is finished. Raises UserError for bad input or if another process prepares data there,
    and deletes only files of this call.
    """
    for name in ("tokenizer", "split_manifest"):
        if name in settings:
            settings[name] = path_text(settings[name], name)
    parsed = PrepareSettings(inputs=tuple(map(text_path, inputs)), **settings)
    parsed.check()
    if num_workers is not None and not 0 <= num_workers <= MOST_WORKERS:
        raise UserError(f"num_workers={num_workers} must be from 0 to {MOST_WORKERS}.")
    if parsed.drop_duplicates == NEAR:
        check_datasketch()
    chosen = InputPart.parse(part) if part else None
    if chosen:
        chosen.check(parsed, overwrite)
    source = InputSource.find(parsed)
    if source.ignored:
        log(
            f"prepare: {len(source.ignored)} .json files of folders are ignored: they are single "
            f"JSON documents, not JSON lines (the first: {source.ignored[0].path})"
        )
    if chosen:
        source = chosen.of(source)
    folder = storage_path(out_dir, "--out")
    call = _Call(parsed, source, num_workers, overwrite, log)
    try:
        if chosen:
            folder = _prepare_part(call, folder, chosen)
        else:
            _prepare(call, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space left for {folder}; free some and run the same command again to continue."
            ) from error
        raise UserError(f"Cannot write to {folder}: {error}.") from error
    return open_prepared(folder)


@dataclass(frozen=True)
class _Call:
    """The arguments of a call of `prepare`, checked."""

    settings: PrepareSettings
    source: InputSource
    num_workers: int | None
    overwrite: bool
    log: Log

    @cached_property
    def request(self) -> dict[str, Any]:
        """What journal and manifest record of it."""
        request = {"settings": self.settings.to_json(), "inputs": self.source.identity}
        return request | ({"part": list(self.source.part)} if self.source.part else {})

    def log_finished(self, folder: Path) -> None:
        self.log(f"prepare: {folder} is already prepared with these settings")


def _prepare_part(call: _Call, folder: Path, part: InputPart) -> Path:
    """Prepares one part, and joins all that are finished; the folder of the whole or the part."""
    if (folder / MANIFEST).exists():
        claim(folder, call.request, replaceable=False)
        call.log_finished(folder)
        return folder
    part.check_folder(folder)
    _prepare(call, folder / part.name)
    join(folder, part.count, call.log)
    return folder if (folder / MANIFEST).exists() else folder / part.name


def _prepare(call: _Call, folder: Path) -> None:
    if not call.overwrite and has_data_set(folder, call.request):
        # The folder may be read-only, so no lock is taken.
        call.log_finished(folder)
        return
    with hold(folder) as lock:
        (_prepare_in_bucket if is_bucket(folder) else _prepare_on_disk)(call, folder, lock)


def _prepare_on_disk(call: _Call, folder: Path, lock: Lock) -> None:
    """Builds the shards in the folder, or beside the data set that they replace."""
    build_dir = choose_build_dir(folder, call.request, call.overwrite)
    existed = build_dir.exists()
    journal = claim(build_dir, call.request, replaceable=build_dir != folder)
    if journal is None and build_dir == folder:
        call.log_finished(folder)
        return
    if journal is not None:
        try:
            _write_all(call, build_dir, journal, lock)
        except (ResumableError, UnreachableError):
            raise
        except UserError:
            # Started by this call; the work of an earlier one, or of another process, stays.
            if journal is call.request and not lock.lost.is_set():
                remove_prepared(build_dir, keep_folder=existed)
            raise
    if build_dir != folder:
        replace_folder(build_dir, folder)


def _prepare_in_bucket(call: _Call, folder: Path, lock: Lock) -> None:
    """Builds the shards in a local folder, and uploads each when it is complete."""
    from tttjax.io.buckets import is_bucket_error  # slow to import

    if call.overwrite and (folder / MANIFEST).exists():
        remove_prepared(folder, keep_folder=True)
    if claim(folder, call.request, replaceable=call.overwrite) is None:
        call.log_finished(folder)
        return
    digest = hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()
    local = cache_folder().with_name("prepare") / digest
    journal = claim(local, call.request, replaceable=True)
    if journal is None or not _are_uploaded(journal, folder):
        remove_prepared(local)
        journal = claim(local, call.request, replaceable=True)
    assert journal is not None
    try:
        _write_all(call, local, journal, lock, folder)
    except (ResumableError, UnreachableError):
        raise
    except UserError as error:
        refused = is_bucket_error(error)  # credentials that have expired, for example
        if journal is call.request and not refused and not lock.lost.is_set():
            remove_prepared(local)
            remove_prepared(folder, keep_folder=True)
        raise
    shutil.rmtree(local)


def _are_uploaded(journal: dict[str, Any], bucket: Path) -> bool:
    """Whether the bucket has the shards that an interrupted call had completed."""
    sizes = file_sizes(bucket)
    return all(
        sizes.get(f"{shard['name']}.{part}") == file["size"]
        for writer in journal.get("writers", {}).values()
        for shard in writer["shards"]
        for part, file in shard["files"].items()
    )


def _write_all(
    call: _Call, folder: Path, journal: dict[str, Any], lock: Lock, bucket: Path | None = None
) -> None:
    """Writes tokenizer, shards and manifest, continuing after `journal`.

    bucket: where the data set goes from the local `folder`; None: it stays.
    """
    settings, source = call.settings, call.source
    listed = read_split_manifest(settings.split_manifest) if settings.split_manifest else None
    rule = SplitRule(settings.val_fraction, settings.seed, listed, journal.get("forced", {}))
    if not (folder / TOKENIZER_DIR / CONFIG_FILE).exists():
        tokenizer = make_tokenizer(settings, source.files, rule, call.log)
        tokenizer.save(folder / TOKENIZER_DIR)
    tokenizer = load_tokenizer(folder / TOKENIZER_DIR)
    if settings.add_eos and tokenizer.eos_id is None:
        raise UserError(
            f"The tokenizer {settings.tokenizer} has no EOS; give its id with --eos-id."
        )
    workers = default_workers(source.total_bytes) if call.num_workers is None else call.num_workers

    def make_pass(journal: dict[str, Any]) -> PreparePass:
        chosen = replace(rule, forced=journal.get("forced", {}))
        return PreparePass(
            settings, source, folder, chosen, tokenizer, workers, journal, call.log, lock, bucket
        )

    run = make_pass(journal)
    splits = run.write()
    if second_pass := run.plan_second_pass(splits):
        what = next(iter(second_pass.get("forced", ["the end of the only document"])))
        call.log(f"prepare: a split would be empty; repeating with {what} in it")
        journal = {key: journal[key] for key in ("settings", "inputs")} | second_pass
        write_json(folder / JOURNAL, journal)
        run = make_pass(journal)
        splits = run.write()
    lock.check()
    if bucket:
        copy_tokenizer(folder / TOKENIZER_DIR, bucket / TOKENIZER_DIR)
    _finish(bucket or folder, journal, splits, run)


def _finish(
    folder: Path, journal: dict[str, Any], splits: dict[str, dict[str, Any]], run: PreparePass
) -> None:
    """Writes the manifest of the finished pass. Raises UserError if a needed split is empty."""
    tokenizer, log, skipped = run.tokenizer, run.log, run.skipped()
    nonempty = {split: entry for split, entry in splits.items() if entry["documents"]}
    if empty := run.missing_purpose(nonempty):
        minimum = run.settings.min_document_tokens
        raise UserError(
            f"No document is left {empty}: {skipped['empty']} were empty, {skipped['short']} "
            f"shorter than min_document_tokens={minimum}; prepare longer or more texts, or lower "
            "min_document_tokens."
        )
    chat = {}
    if run.settings.chat:
        chat["chat_template_crc32"] = zlib.crc32(tokenizer.chat_template.encode())
    manifest: dict[str, Any] = {
        "format": "tttjax tokens",
        "version": MASKED_VERSION if run.settings.chat else VERSION,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint(),
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "lossless": tokenizer.lossless,
            **chat,
        },
        **{name: journal[name] for name in ("settings", "inputs", "part") if name in journal},
        "skipped": skipped,
        "splits": nonempty,
    }
    remove_strays(folder, nonempty)
    write_json(folder / MANIFEST, manifest)
    (folder / JOURNAL).unlink(missing_ok=True)
    (folder / DIGESTS_FILE).unlink(missing_ok=True)
    if skipped["duplicates"]:
        log(f"prepare: {skipped['duplicates']:,} documents repeat an earlier one, and are dropped")
    for split, entry in nonempty.items():
        log(f"prepare: {describe_split(split, entry)}")
    if not nonempty.get(VAL) and not run.source.zarr_root and not run.source.part:
        log("prepare: nothing is held out, so this data set cannot be used for evaluation")
