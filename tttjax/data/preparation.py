"""`prepare`: tokenises text into a folder of shards, resuming an interrupted run.

Documents are tokenised in parallel and written in input order, so the result does not depend on the
number of workers. The manifest is written last: a folder with a manifest is finished.
"""

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tttjax.data.duplicates import DIGESTS_FILE
from tttjax.data.encode import default_workers
from tttjax.data.manifest import (
    MASKED_VERSION,
    VERSION,
    describe_split,
    parts_of,
    token_dtype,
)
from tttjax.data.near_duplicates import check_datasketch
from tttjax.data.parts import InputPart, join
from tttjax.data.prepare_pass import InputSource, Log, PreparePass, write_json
from tttjax.data.prepare_settings import NEAR, PrepareSettings
from tttjax.data.shards import JOURNAL, MANIFEST, PARTS, TOKENIZER_DIR, PreparedData, open_prepared
from tttjax.data.splits import VAL, SplitRule, read_split_manifest
from tttjax.data.tokenizers.base import CONFIG_FILE, Tokenizer, copy_tokenizer, load_tokenizer
from tttjax.data.tokenizers.vocabulary import make_tokenizer
from tttjax.errors import ResumableError, UnreachableError, UserError
from tttjax.io.block_cache import cache_folder
from tttjax.io.locks import FOLDER_LOCK, Lock, hold
from tttjax.io.paths import (
    file_sizes,
    is_bucket,
    path_text,
    remove_tree,
    storage_path,
    text_path,
)
from tttjax.io.sealed import SEAL, read_object

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
    folder = storage_path(out_dir, "--out")
    try:
        if chosen:
            folder = _prepare_part(parsed, chosen.of(source), folder, chosen, num_workers, log)
        else:
            _prepare(parsed, source, folder, num_workers, overwrite, log)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space left for {folder}; free some and run the same command again to continue."
            ) from error
        raise UserError(f"Cannot write to {folder}: {error}.") from error
    return open_prepared(folder)


def _prepare_part(
    settings, source: InputSource, folder: Path, part: InputPart, num_workers, log: Log
) -> Path:
    """Prepares one part, and joins all that are finished; the folder of the whole or the part."""
    if (folder / MANIFEST).exists():
        _claim(folder, _request(settings, source), replaceable=False)
        log(f"prepare: {folder} is already prepared with these settings")
        return folder
    part.check_folder(folder)
    _prepare(settings, source, folder / part.name, num_workers, False, log)
    join(folder, part.count, log)
    return folder if (folder / MANIFEST).exists() else folder / part.name


def _request(settings: PrepareSettings, source: InputSource) -> dict[str, Any]:
    """What a manifest records of the inputs."""
    request = {"settings": _plain(settings), "inputs": source.identity}
    return request | ({"part": list(source.part)} if source.part else {})


def _prepare(settings, source: InputSource, folder: Path, num_workers, overwrite: bool, log: Log):
    request = _request(settings, source)
    manifest_path = folder / MANIFEST
    if (
        not overwrite
        and manifest_path.exists()
        and not _differences(_read_json(manifest_path), request)
    ):
        # The folder may be read-only, so no lock is taken.
        log(f"prepare: {folder} is already prepared with these settings")
        return
    prepare_alone = _prepare_in_bucket if is_bucket(folder) else _prepare_alone
    with hold(folder) as lock:
        prepare_alone(settings, source, folder, request, num_workers, overwrite, log, lock)


def _prepare_alone(
    settings,
    source: InputSource,
    folder: Path,
    request,
    num_workers,
    overwrite: bool,
    log: Log,
    lock: Lock,
) -> None:
    build_dir = _choose_build_dir(folder, request, overwrite)
    existed = build_dir.exists()
    journal = _claim(build_dir, request, replaceable=build_dir != folder)
    if journal is None and build_dir == folder:
        log(f"prepare: {folder} is already prepared with these settings")
        return
    if journal is not None:
        try:
            _write_all(settings, source, build_dir, num_workers, journal, log, lock)
        except (ResumableError, UnreachableError):
            raise
        except UserError:
            # Started by this call; the work of an earlier one, or of another process, stays.
            if journal is request and not lock.lost.is_set():
                remove_prepared(build_dir, keep_folder=existed)
            raise
    if build_dir != folder:
        _replace_folder(build_dir, folder)


def _prepare_in_bucket(
    settings,
    source: InputSource,
    folder: Path,
    request,
    num_workers,
    overwrite: bool,
    log: Log,
    lock: Lock,
) -> None:
    """Builds the shards in a local folder, and uploads each when it is complete."""
    from tttjax.io.buckets import is_bucket_error  # slow to import

    if overwrite and (folder / MANIFEST).exists():
        remove_prepared(folder, keep_folder=True)
    if _claim(folder, request, replaceable=overwrite) is None:
        log(f"prepare: {folder} is already prepared with these settings")
        return
    digest = hashlib.blake2b(str(folder).encode(), digest_size=8).hexdigest()
    local = cache_folder().with_name("prepare") / digest
    journal = _claim(local, request, replaceable=True)
    if journal is None or not _are_uploaded(journal, folder):
        remove_prepared(local)
        journal = _claim(local, request, replaceable=True)
    try:
        _write_all(settings, source, local, num_workers, journal, log, lock, folder)
    except (ResumableError, UnreachableError):
        raise
    except UserError as error:
        refused = is_bucket_error(error)  # credentials that have expired, for example
        if journal is request and not refused and not lock.lost.is_set():
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


def _choose_build_dir(folder: Path, request: dict[str, Any], overwrite: bool) -> Path:
    """`folder`, or a sibling if `folder` holds data to replace only on success."""
    if not overwrite:
        return folder
    sibling = _sibling(folder, "preparing")
    journal_path = folder / JOURNAL
    if (folder / MANIFEST).exists() or sibling.exists():
        return sibling
    if journal_path.exists() and (
        _differences(_read_json(journal_path), request) or not _is_current_journal(journal_path)
    ):
        return sibling
    return folder


def _is_current_journal(journal: Path) -> bool:
    """Whether this version wrote the journal; earlier ones grouped inputs into other tasks."""
    return SEAL in _read_json(journal)


def _sibling(folder: Path, state: str) -> Path:
    """A hidden sibling, on the same file system even if `folder` is a symbolic link."""
    real = Path(os.path.realpath(folder))
    return real.with_name(f".{real.name}.{state}")


def _replace_folder(new: Path, folder: Path) -> None:
    """Replaces a data set with a finished one. Unrelated files stay in `folder`.

    If killed between the two renames, the same command finds `new` finished and repeats this.
    """
    folder, old = Path(os.path.realpath(folder)), _sibling(folder, "replaced")
    lock = folder / FOLDER_LOCK
    shutil.copy2(lock, new)  # keeps the folder locked throughout
    if any(path != lock for path in folder.iterdir()):
        if old.exists():
            remove_prepared(old)
        os.rename(folder, old)
        (old / FOLDER_LOCK).unlink()
    else:  # the rename below was interrupted, and the folder recreated for the lock
        lock.unlink()
    os.rename(new, folder)
    if not old.exists():
        return
    remove_prepared(old, keep_folder=True)
    for path in old.iterdir():
        os.replace(path, folder / path.name)
    old.rmdir()


def _write_all(
    settings,
    source: InputSource,
    folder: Path,
    num_workers,
    journal,
    log: Log,
    lock: Lock,
    bucket: Path | None = None,
) -> None:
    """bucket: where the data set goes from the local `folder`; None: it stays."""
    listed = read_split_manifest(settings.split_manifest) if settings.split_manifest else None
    rule = SplitRule(settings.val_fraction, settings.seed, listed, journal.get("forced", {}))
    if not (folder / TOKENIZER_DIR / CONFIG_FILE).exists():
        tokenizer = make_tokenizer(settings, source.files, rule, log)
        tokenizer.save(folder / TOKENIZER_DIR)
    tokenizer = load_tokenizer(folder / TOKENIZER_DIR)
    if settings.add_eos and tokenizer.eos_id is None:
        raise UserError(
            f"The tokenizer {settings.tokenizer} has no EOS; give its id with --eos-id."
        )
    workers = default_workers(source.total_bytes) if num_workers is None else num_workers
    run = PreparePass(
        settings, source, folder, rule, tokenizer, workers, journal, log, lock, bucket
    )
    splits = run.write()
    if second_pass := run.plan_second_pass(splits):
        what = next(iter(second_pass.get("forced", ["the end of the only document"])))
        log(f"prepare: a split would be empty; repeating with {what} in it")
        journal = {key: journal[key] for key in ("settings", "inputs")} | second_pass
        write_json(folder / JOURNAL, journal)
        rule = replace(rule, forced=second_pass.get("forced", {}))
        run = PreparePass(
            settings, source, folder, rule, tokenizer, workers, journal, log, lock, bucket
        )
        splits = run.write()
    lock.check()
    if bucket:
        copy_tokenizer(folder / TOKENIZER_DIR, bucket / TOKENIZER_DIR)
    _finish(bucket or folder, journal, splits, run, tokenizer, log)


def _plain(settings: PrepareSettings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(settings)))


def _claim(folder: Path, request: dict[str, Any], *, replaceable: bool) -> dict[str, Any] | None:
    """The journal to resume from, or None if `folder` already holds the requested data set.

    A new journal is `request` itself. Raises UserError if the folder holds anything else, unless
    it is another data set and `replaceable`.
    """
    manifest_path, journal_path = folder / MANIFEST, folder / JOURNAL
    existing = manifest_path if manifest_path.exists() else journal_path
    if existing.exists():
        recorded = _read_json(existing)
        differing = _differences(recorded, request)
        if not differing and existing is manifest_path:
            return None
        if not differing and _is_current_journal(journal_path):
            return recorded
        differing = differing or "tasks, by an earlier version of tttjax"
        if not replaceable:
            state = "was prepared" if existing is manifest_path else "is half prepared"
            remedy = "delete it" if "part" in request else "pass --overwrite to replace it"
            raise UserError(
                f"{folder} {state} with other {differing}; choose another folder, or {remedy}."
            )
        remove_prepared(folder)
    elif folder.exists() and any(path.name != FOLDER_LOCK for path in folder.iterdir()):
        raise UserError(
            f"{folder} is not empty and has no prepared data in it; choose another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(journal_path, request)
    return request


def _differences(recorded: dict[str, Any], request: dict[str, Any]) -> str:
    # A setting newer than the data set had its default value.
    defaults = _plain(PrepareSettings(inputs=()))
    old, new = {**defaults, **recorded.get("settings", {})}, request["settings"]
    names = [f"{name} ({old.get(name)!r})" for name in new if old.get(name) != new[name]]
    if not names and recorded.get("inputs") != request["inputs"]:
        names = ["content of its input files"]
    return ", ".join(names)


def remove_prepared(folder: Path, *, keep_folder: bool = False) -> None:
    """Deletes the files of a prepared data set, the manifest first, and nothing else."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in _shard_paths(folder):
        path.unlink()
    for part in folder.glob(PARTS):
        remove_prepared(part)
    remove_tree(folder / TOKENIZER_DIR)
    (folder / JOURNAL).unlink(missing_ok=True)
    (folder / DIGESTS_FILE).unlink(missing_ok=True)
    if not keep_folder and not any(folder.iterdir()):
        folder.rmdir()


def _remove_strays(folder: Path, splits: dict[str, dict[str, Any]]) -> None:
    """Deletes shards of an interrupted or repeated pass that are not in `splits`."""
    named = {shard["name"] for entry in splits.values() for shard in entry["shards"]}
    for path in _shard_paths(folder):
        if path.stem not in named:
            path.unlink()


def _shard_paths(folder: Path) -> list[Path]:
    patterns = [f"*-[0-9][0-9][0-9][0-9][0-9].{part}" for part in parts_of(is_masked=True)]
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _finish(
    folder: Path, journal, splits, run: PreparePass, tokenizer: Tokenizer, log: Log
) -> None:
    skipped = run.skipped()
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
    manifest = {
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
    _remove_strays(folder, nonempty)
    write_json(folder / MANIFEST, manifest)
    (folder / JOURNAL).unlink(missing_ok=True)
    (folder / DIGESTS_FILE).unlink(missing_ok=True)
    if skipped["duplicates"]:
        log(f"prepare: {skipped['duplicates']:,} documents repeat an earlier one, and are dropped")
    for split, entry in nonempty.items():
        log(f"prepare: {describe_split(split, entry)}")
    if not nonempty.get(VAL) and not run.source.zarr_root and not run.source.part:
        log("prepare: nothing is held out, so this data set cannot be used for evaluation")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete {path.parent} and prepare it again."
        ) from error
