"""Tokenises documents in worker processes.

The order of the output does not depend on the number of workers: the coordinator submits tasks in
order, keeps a bounded number in flight, and takes results in order.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tttjax.data.chat import ChatTemplate
from tttjax.data.documents import ChatLine, Item, item_size, item_spans, read_items
from tttjax.data.inputs import InputFile
from tttjax.data.near_duplicates import signature
from tttjax.data.text_spans import encode_spans
from tttjax.data.tokenizers.base import Tokenizer, load_tokenizer
from tttjax.data.writer import EncodedSpan
from tttjax.errors import ResumableError, UserError

_TASK_BYTES = 1 << 20


@dataclass(frozen=True)
class EncodeTask:
    """A unit of work. size: approximate bytes of input."""

    items: tuple[Item, ...]
    size: int


def make_tasks(files: Sequence[InputFile]) -> Iterator[EncodeTask]:
    """Groups the documents of `files`, in order, into tasks of about one MiB of text."""
    items: list[Item] = []
    size = 0
    for file in files:
        for item in read_items(file):
            items.append(item)
            size += item_size(item)
            if size >= _TASK_BYTES:
                yield EncodeTask(tuple(items), size)
                items, size = [], 0
    if items:
        yield EncodeTask(tuple(items), size)


def encode_task(tokenizer: Tokenizer, task: EncodeTask, is_near: bool = False) -> list[EncodedSpan]:
    """is_near: with signatures, to find near duplicates.

    Raises UserError for text that cannot be read, and conversations that do not fit.
    """
    is_chat = isinstance(task.items[0], ChatLine)
    needs_text = is_near or not is_chat
    spans = [span for item in task.items for span in item_spans(item)] if needs_text else []
    if is_chat:
        template = ChatTemplate(tokenizer)
        encoded = [_encode_chat(template, line) for line in task.items]
    else:
        encoded = [
            EncodedSpan(span.document, tokens, num_bytes, span.is_first, span.is_last)
            for span, (tokens, num_bytes) in zip(spans, encode_spans(tokenizer, spans), strict=True)
        ]
    if is_near:
        marks = [signature(span.carried, span.text, span.is_last) for span in spans]
        encoded = [replace(span, signature=mark) for span, mark in zip(encoded, marks, strict=True)]
    return encoded


def _encode_chat(template: ChatTemplate, line: Item) -> EncodedSpan:
    assert isinstance(line, ChatLine)
    messages = line.messages()
    try:
        chat = template.encode(messages)
    except UserError as error:
        raise UserError(f"{line.where}: {error}.") from error
    return EncodedSpan(line.document, chat.tokens, chat.num_bytes, targets=chat.targets)


class _Worker:
    """State of a worker process between tasks."""

    tokenizer: Tokenizer
    is_near: bool

    @classmethod
    def start(cls, tokenizer_dir: str, is_near: bool) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator stops the workers
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        cls.tokenizer, cls.is_near = load_tokenizer(tokenizer_dir), is_near

    @classmethod
    def run(cls, task: EncodeTask) -> list[EncodedSpan]:
        return encode_task(cls.tokenizer, task, cls.is_near)


def _exit_with_parent() -> None:
    """Ends the worker when the coordinator is killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def encode_in_order(
    tasks: Iterator[EncodeTask], tokenizer_dir: Path, num_workers: int, is_near: bool = False
) -> Generator[tuple[EncodeTask, list[EncodedSpan]]]:
    """Results of all tasks in order; computed in this process if num_workers is 0."""
    if num_workers == 0:
        tokenizer = load_tokenizer(tokenizer_dir)
        yield from ((task, encode_task(tokenizer, task, is_near)) for task in tasks)
        return
    # Spawned, not forked: the caller may have JAX's or Grain's threads running.
    with _pool(num_workers, _Worker.start, (str(tokenizer_dir), is_near)) as pool:
        running = deque((t, pool.submit(_Worker.run, t)) for t in islice(tasks, 2 * num_workers))
        while running:
            task, future = running.popleft()
            try:
                result = future.result()
            except BrokenProcessPool as error:
                raise ResumableError(
                    "A worker process of `tttjax prepare` died (out of memory?); run the same "
                    "command again with fewer --num-workers to continue."
                ) from error
            running.extend((t, pool.submit(_Worker.run, t)) for t in islice(tasks, 1))
            yield task, result


@contextlib.contextmanager
def _pool(num_workers: int, start: Callable, args: tuple) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=start, initargs=args)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers(total_bytes: int) -> int:
    """One per core; 0 for a corpus that takes less time than starting workers."""
    if total_bytes < 4 << 20:
        return 0
    if hasattr(os, "sched_getaffinity"):  # cores available to this process
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
