"""One pass of `prepare` over its inputs: documents in, shards out, with a journal.

Every few seconds the journal records how much of the output is complete on disk; an interrupted
pass resumes from there.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tttjax.data import shards, zarr
from tttjax.data.duplicates import Duplicates
from tttjax.data.encode import EncodeTask, encode_in_order, make_tasks
from tttjax.data.input_source import InputSource
from tttjax.data.manifest import token_dtype
from tttjax.data.prepare_settings import NEAR, PrepareSettings
from tttjax.data.prepared_folder import write_json
from tttjax.data.shards import JOURNAL, TOKENIZER_DIR
from tttjax.data.splits import TRAIN, VAL, SplitRule
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.data.writer import SKIPPED, EncodedSpan, SplitWriter
from tttjax.io.atomic import upload
from tttjax.io.locks import Lock
from tttjax.runtime.progress import report_activity

JOURNAL_SECONDS = 5.0
PROGRESS_SECONDS = 2.0
Log = Callable[[str], None]


class PreparePass:
    """One pass over the inputs, resumed from the state in the journal.

    bucket: where complete shards go from the local `folder`; None: they stay.
    """

    def __init__(
        self,
        settings: PrepareSettings,
        source: InputSource,
        folder: Path,
        rule: SplitRule,
        tokenizer: Tokenizer,
        workers: int,
        journal: dict[str, Any],
        log: Log,
        lock: Lock,
        bucket: Path | None = None,
    ):
        self.settings, self.source, self.folder = settings, source, folder
        self.rule, self.tokenizer, self.workers = rule, tokenizer, workers
        self.journal, self.log, self.lock = journal, log, lock
        self._bucket = bucket
        self._tail_of: str = journal.get("tail_of", "")  # the only document; its tail is held out
        self._tail_at: int = journal.get("tail_at", 0)
        self._position = 0  # in that document
        kind, digests = settings.drop_duplicates, journal.get("digests")
        self._duplicates = Duplicates(folder, kind, digests) if kind else None
        self.writers: dict[str, SplitWriter] = {}
        for split, state in journal.get("writers", {}).items():
            self.writers[split] = self._make_writer(split, state)

    def _make_writer(self, split: str, state: dict[str, Any] | None = None) -> SplitWriter:
        from_text = not self.source.zarr_root
        return SplitWriter(
            self.folder,
            split,
            token_dtype(self.tokenizer.vocab_size),
            shard_tokens=self.settings.shard_tokens,
            bos=self.tokenizer.bos_id if self.settings.add_bos and from_text else None,
            eos=self.tokenizer.eos_id if self.settings.add_eos and from_text else None,
            min_tokens=self.settings.min_document_tokens,
            is_masked=self.settings.chat,
            state=state,
            on_closed=self._upload,
        )

    def _upload(self, shard: dict[str, Any]) -> None:
        if self._bucket is None:
            return
        with report_activity(f"writing {self._bucket / shard['name']}"):
            for part in shard["files"]:
                name = f"{shard['name']}.{part}"
                upload(self.folder / name, self._bucket / name)

    def write(self) -> dict[str, dict[str, Any]]:
        """Writes all shards; split -> manifest entry."""
        done = self.journal.get("tasks", 0)
        progress = _Progress(self.source, self.journal.get("covered", 0), self.log)
        last_record = time.monotonic()
        try:
            with contextlib.closing(self._encoded(done)) as encoded:
                for number, (task, spans) in enumerate(encoded, start=done + 1):
                    for span in spans:
                        self._append(span)
                    progress.add(task, spans)
                    between = not spans or spans[-1].is_last
                    if between and time.monotonic() - last_record >= JOURNAL_SECONDS:
                        self._record(number, progress.covered)
                        last_record = time.monotonic()
            return {split: writer.finish() for split, writer in sorted(self.writers.items())}
        finally:
            for writer in self.writers.values():
                writer.abandon()
            progress.report()

    def _append(self, span: EncodedSpan) -> None:
        repeats = self._duplicates is not None and self._duplicates.repeats(span)
        stays = False
        for part in self._split_tail(span) if span.document == self._tail_of else [span]:
            stays = self._writer_for(part).append(part, repeats)
        if stays and self._duplicates:
            self._duplicates.remember()

    def _encoded(self, done: int) -> Generator[tuple[EncodeTask, list[EncodedSpan]]]:
        if self.source.zarr_root:
            return zarr.zarr_documents(self.source.zarr_root, self.tokenizer, skip=done)
        tasks = islice(make_tasks(self.source.files), done, None)
        is_near = self.settings.drop_duplicates == NEAR
        return encode_in_order(tasks, self.folder / TOKENIZER_DIR, self.workers, is_near)

    def _writer_for(self, span: EncodedSpan) -> SplitWriter:
        split = span.split or self.rule(span.document)
        if split not in self.writers:
            self.writers[split] = self._make_writer(split)
        return self.writers[split]

    def _record(self, tasks: int, covered: int) -> None:
        self.lock.check()
        writers = {split: writer.state() for split, writer in self.writers.items()}
        state = {**self.journal, "tasks": tasks, "covered": covered, "writers": writers}
        if self._duplicates:
            state["digests"] = self._duplicates.state()
        write_json(self.folder / JOURNAL, state)
        if self._bucket:  # not before the journal says that they are complete
            for writer in writers.values():
                for shard in writer["shards"]:
                    for part in shard["files"]:
                        (self.folder / f"{shard['name']}.{part}").unlink(missing_ok=True)

    def missing_purpose(self, nonempty: Collection[str]) -> str:
        """What the missing documents are needed for; "" if none is missing."""
        if not nonempty:
            return "at all" * (self.source.part is None)
        if self._chooses_splits():
            return "to train on" * (TRAIN not in nonempty) or "to hold out" * (VAL not in nonempty)
        return ""

    def _chooses_splits(self) -> bool:
        """Whether documents are assigned by hash, not by a table, and some are to be held out.

        Of a part no split needs to have any.
        """
        by_hash = self.rule.listed is None and not self.source.zarr_root and not self.source.part
        return by_hash and self.settings.val_fraction > 0

    def plan_second_pass(self, splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Journal entries for a second pass that leaves neither split empty; `{}` if not needed.

        With two or more documents, the one whose hash is nearest moves to the empty split. With a
        single document, its tail is held out.
        """
        counts = {split: splits.get(split, {}).get("documents", 0) for split in (TRAIN, VAL)}
        if not self._chooses_splits() or all(counts.values()):
            return {}
        full = TRAIN if counts[TRAIN] else VAL
        if not counts[full] or "mended" in self.journal:
            return {}
        dtype = token_dtype(self.tokenizer.vocab_size)
        names = shards.TokenSplit(
            self._bucket or self.folder, full, splits[full], dtype
        ).document_names()
        if counts[full] == 1:
            content = splits[full]["tokens"] - self.settings.add_bos - self.settings.add_eos
            tail_at = int(content * (1 - self.settings.val_fraction))
            return {"mended": True, "tail_of": next(names), "tail_at": tail_at}
        nearest = (min if full == TRAIN else max)(names, key=self.rule.position)
        return {"mended": True, "forced": {nearest: VAL if full == TRAIN else TRAIN}}

    def _split_tail(self, span: EncodedSpan) -> Iterator[EncodedSpan]:
        """Splits a span of the only document at token `tail_at`: train before it, val after."""
        head_len = min(max(self._tail_at - self._position, 0), len(span.tokens))
        head_bytes = self._count_bytes(span, head_len)
        if head_len or span.is_first:
            is_last = self._position + head_len >= self._tail_at or span.is_last
            head = _part(span, slice(head_len), head_bytes)
            yield replace(head, is_last=is_last, split=TRAIN)
        if head_len < len(span.tokens) or span.is_last:
            tail = _part(span, slice(head_len, None), span.num_bytes - head_bytes)
            name, is_first = f"{span.document}#tail", self._position <= self._tail_at
            yield replace(tail, document=name, split=VAL, is_first=is_first)
        self._position += len(span.tokens)

    def _count_bytes(self, span: EncodedSpan, head_len: int) -> int:
        if self.tokenizer.lossless:
            return int(self.tokenizer.token_bytes()[span.tokens[:head_len]].sum())
        return round(span.num_bytes * head_len / max(len(span.tokens), 1))

    def skipped(self) -> dict[str, int]:
        writers = self.writers.values()
        return {name: sum(writer.skipped[name] for writer in writers) for name in SKIPPED}


def _part(span: EncodedSpan, part: slice, num_bytes: int) -> EncodedSpan:
    targets = None if span.targets is None else span.targets[part]
    return replace(span, tokens=span.tokens[part], targets=targets, num_bytes=num_bytes)


class _Progress:
    """Logs documents, tokens, tokens/s and the share of the input every two seconds."""

    def __init__(self, source: InputSource, covered: int, log: Log):
        self._total, self._log = max(source.total_bytes, 1), log
        self.covered = covered
        self._covered_before = covered
        self._documents = self._tokens = 0
        self._start = self._last = time.monotonic()

    def add(self, task: EncodeTask, spans: list[EncodedSpan]) -> None:
        self.covered += task.size
        self._documents += sum(span.is_last for span in spans)
        self._tokens += sum(len(span.tokens) for span in spans)
        if time.monotonic() - self._last >= PROGRESS_SECONDS:
            self.report()

    def report(self) -> None:
        self._last = time.monotonic()
        seconds = max(self._last - self._start, 1e-9)
        share = min(self.covered / self._total, 1.0)
        covered_now = max(self.covered - self._covered_before, 1)
        remaining_s = max(self._total - self.covered, 0) * seconds / covered_now
        self._log(
            f"prepare: {self._documents:,} documents, {self._tokens:,} tokens, "
            f"{self._tokens / seconds:,.0f} tokens/s, {share:.0%} of the input, "
            f"{remaining_s:,.0f} s left"
        )
