"""Encodes sources by several processes, into files that later runs and other ranks read.

A file is found by a key of everything that its rows depend on: the content of the source, the
recipe's rules, the tokenizers with their templates, and this code.
"""

from __future__ import annotations

import collections
import datetime
import functools
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import xxhash
from filelock import FileLock
from tqdm.auto import tqdm

from llmdistill.data.table import SCHEMA, to_batch
from llmdistill.data.validate import SHOWN, Encoder, RowCounts, Rules, require_usable
from llmdistill.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("llmdistill")

CHUNK = 256  # rows that a process encodes at a time
IN_PROCESS = 1024  # rows below which starting processes takes longer than encoding
MOST_PROCESSES = 32
SECONDS = 3.0  # a bar appears only if encoding takes longer
CODE = ("data", "models/chat.py", "models/thinking.py", "models/vocabulary.py")


class Encoded(NamedTuple):
    """A table of rows, and the counts of the rows that it was made from."""

    table: pa.Table
    counts: RowCounts


def encode_source(
    rows: Iterable[tuple[str, Any]],
    content: str | None,
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
) -> Encoded:
    """Return the encoded rows of a source from the cache, or encode them into it.

    `content` tells the content of the source from others; None encodes in memory.  One process of a
    machine encodes, and the others wait for it.  Raises DataError as `validate.encode` does.
    """
    if content is None:
        return encode_in_memory(rows, tokenizer, rules)
    folder = cache_folder() / _key(content, tokenizer, rules)
    if (found := _read(folder)) is not None:
        return found
    lock = FileLock(f"{folder}.lock")  # released if its holder is killed
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        logger.warning("encoded rows are not kept, as %s cannot be written: %s", folder, error)
        return encode_in_memory(rows, tokenizer, rules)
    try:
        if (found := _read(folder)) is None:
            _encode_into(folder, rows, tokenizer, rules)
            found = _read(folder)
    finally:
        lock.release()
    assert found is not None
    return found


def encode_in_memory(
    rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> Encoded:
    """Encode (place, row) pairs in this process.  Raises DataError as `validate.encode` does."""
    counts, bad = RowCounts(), list[DataError]()
    parts = [to_batch(kept) for kept in _chunks(Encoder(tokenizer, rules).rows(
        rows, counts, bad.append))]  # fmt: skip
    require_usable(rules, counts, bad)
    return Encoded(pa.Table.from_batches(parts, SCHEMA), counts)


def cache_folder() -> Path:
    """Return the folder of all encoded rows: a part of the cache of `datasets`."""
    from huggingface_hub.constants import HF_HOME

    datasets = os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")
    return Path(datasets).expanduser() / "llmdistill"


# ---- the key ----


def _key(content: str, tokenizer: PreTrainedTokenizerBase, rules: Rules) -> str:
    tokenizers = [_tokenizer_state(one) for one in (tokenizer, *rules.others)]
    own = {one.name: getattr(rules, one.name) for one in fields(rules) if one.name != "others"}
    # A template may write today's date.
    dated = any("strftime_now" in one for one in tokenizers)
    day = str(datetime.date.today()) if dated else ""
    parts = [_code(), content, json.dumps(own, sort_keys=True, default=repr), day, *tokenizers]
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode("utf-8", "surrogatepass"))


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return everything that the ids of a text depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: Any = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # they depend on what was encoded last
            state.pop(name, None)
    more = {name: str(value) for name, value in vars(tokenizer).items() if _is_plain(value)}
    more |= {"special": str(tokenizer.special_tokens_map), "more": str(_extra_tokens(tokenizer))}
    more.pop("name_or_path", None)
    parts = [type(tokenizer).__name__, state, tokenizer.chat_template, more]
    return json.dumps(parts, sort_keys=True, default=str)


def _extra_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    return getattr(tokenizer, "extra_special_tokens", ()) or ()


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None)


@functools.cache
def _code() -> str:
    """Return a digest of the code and the libraries that rows are encoded with."""
    import tokenizers
    import transformers

    found = xxhash.xxh3_128(f"{transformers.__version__} {tokenizers.__version__}".encode())
    root = Path(__file__).parent.parent
    for name in CODE:
        for path in [root / name] if name.endswith(".py") else sorted((root / name).glob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


# ---- encoding into a folder, and reading it ----


def _encode_into(
    folder: Path,
    rows: Iterable[tuple[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
) -> None:
    """Encode rows into a folder, which appears whole."""
    part = folder.with_name(f"{folder.name}.part")
    for old in (part, folder):  # of a process that was killed, or damaged
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    counts, bad = RowCounts(), list[DataError]()
    try:
        with (
            pa.OSFile(str(part / "rows.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMA) as file,
        ):
            for encoded in _encoded_chunks(rows, tokenizer, rules):
                file.write_batch(_shifted(encoded.batch, counts.examples))
                counts += encoded.counts
                bad += encoded.bad[: SHOWN - len(bad)]
        require_usable(rules, counts, bad)
        found = json.dumps(vars(counts))
        (part / "counts.json").write_text(found, encoding="utf-8")
        with (part / "rows.arrow").open("rb") as written:
            os.fsync(written.fileno())
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(folder: Path) -> Encoded | None:
    """Return the rows of a folder, or None if they are not there or damaged."""
    if not folder.is_dir():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    except (pa.ArrowException, OSError, ValueError) as error:
        logger.warning("%s is damaged, so its rows are encoded again: %s", folder, error)
        return None
    unread = collections.Counter(counts.pop("unread"))
    return Encoded(table, RowCounts(**counts, unread=unread))


def _shifted(batch: pa.RecordBatch, examples: int) -> pa.RecordBatch:
    """Return a batch whose row ids count the examples before it, too."""
    ids = pa.array(batch.column("row_id").to_numpy() + examples)
    return batch.set_column(0, SCHEMA.field("row_id"), ids)


class _Chunk(NamedTuple):
    """The result of one chunk of rows; row ids count from its first example."""

    batch: pa.RecordBatch
    counts: RowCounts
    bad: list[DataError]


def _encoded_chunks(
    rows: Iterable[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase, rules: Rules
) -> Iterator[_Chunk]:
    """Yield the encoded chunks of a source in their order."""
    chunks = iter(_chunks(rows))
    encoder = Encoder(tokenizer, rules)
    first = list(itertools.islice(chunks, IN_PROCESS // CHUNK))
    yield from (_encode_chunk(encoder, chunk) for chunk in first)
    hidden = not logger.isEnabledFor(logging.INFO)
    with tqdm(
        desc="encoding rows", unit="row", initial=sum(map(len, first)), delay=SECONDS,
        file=sys.stderr, disable=hidden or None,  # None: on a terminal
    ) as bar:  # fmt: skip
        for number, encoded in _by_processes(chunks, encoder):
            bar.update(number)
            yield encoded


def _by_processes(
    chunks: Iterator[list[tuple[str, Any]]], encoder: Encoder
) -> Iterator[tuple[int, _Chunk]]:
    """Encode chunks in several processes.  Yield the rows read with each result, in order."""
    number = min(len(os.sched_getaffinity(0)), MOST_PROCESSES) if _can_fork() else 1
    if number == 1:
        yield from ((len(chunk), _encode_chunk(encoder, chunk)) for chunk in chunks)
        return
    if (next_one := next(chunks, None)) is None:
        return
    context = multiprocessing.get_context("fork")  # the tokenizer needs no copy
    with ProcessPoolExecutor(
        number, mp_context=context, initializer=_start_worker, initargs=(encoder,)
    ) as pool:
        waiting: collections.deque[tuple[int, Future[_Chunk]]] = collections.deque()
        try:
            for chunk in itertools.chain([next_one], chunks):
                waiting.append((len(chunk), _submit(pool, chunk)))
                if len(waiting) >= 4 * number:  # the rest of the source stays unread
                    size, result = waiting.popleft()
                    yield size, result.result()
            for size, result in waiting:
                yield size, result.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, chunk: list[tuple[str, Any]]) -> Future[_Chunk]:
    with warnings.catch_warnings():
        # Python 3.12 warns if a process with threads forks; these forks only encode text.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        return pool.submit(_in_worker, chunk)


def _can_fork() -> bool:
    return sys.platform == "linux"


_WORKER: list[Encoder] = []  # the encoder of a worker process


def _start_worker(encoder: Encoder) -> None:
    # The threads of the tokenizer do not exist in a forked process.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _WORKER[:] = [encoder]


def _in_worker(chunk: list[tuple[str, Any]]) -> _Chunk:
    return _encode_chunk(_WORKER[0], chunk)


def _encode_chunk(encoder: Encoder, chunk: list[tuple[str, Any]]) -> _Chunk:
    counts, bad = RowCounts(), list[DataError]()
    kept = list(encoder.rows(chunk, counts, bad.append))
    return _Chunk(to_batch(kept), counts, bad[:SHOWN])


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield the items in lists of CHUNK."""
    source = iter(items)
    while chunk := list(itertools.islice(source, CHUNK)):
        yield chunk
