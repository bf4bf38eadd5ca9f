"""Where the weights lie: in the maps of their files, or copied once into anonymous memory on 2 MiB pages.

Owns the copy and its report; knows nothing of models and decides nothing (load.py does). A file map gets 4 KiB pages,
and reading 8.9 GB of weights for each token through those costs a TLB miss a page. The copy is read with pread, never
through the map: a file that has become shorter is then an error with its name, not a SIGBUS, and no byte is resident
twice.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import time
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold import _native
from kvfold.errors import ModelFileError
from kvfold.formats.file_map import FileMap
from kvfold.quant.tensor import QuantTensor, Weights, changed, matrices
from kvfold.quant.types import BlockType

Progress = Callable[[int, int], None]
"""(bytes read, bytes in all)."""

HUGE_PAGE_BYTES = 2 << 20
# The unit of a reader: whole huge pages of the copy, so that no two threads wait for the kernel to clear the same one.
CHUNK_BYTES = 8 * HUGE_PAGE_BYTES
# Tensors nearer to each other than this are read as one range; each range keeps its place within a page of this size,
# and with it the alignment of every number in the file.
PAGE_BYTES = 4096
_READ_AHEAD_BYTES = 16 << 20
# A copy beside answers waits so long for a first step, and then for its answer: both want every CPU.
BEGIN_SECONDS = 0.5
GIVE_WAY_SECONDS = 0.02


@dataclass(frozen=True)
class WeightCopy:
    """What a copy took. huge_bytes: of the copy on 2 MiB pages; None where the system does not tell."""

    nbytes: int
    seconds: float
    huge_bytes: int | None

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds

    @property
    def huge_share(self) -> float | None:
        return None if self.huge_bytes is None else self.huge_bytes / self.nbytes

    @property
    def in_words(self) -> str:
        share = "" if self.huge_share is None else f", {self.huge_share:.0%} of them on 2 MiB pages"
        return f"copied into memory at {self.rate / 1e9:.1f} GB/s{share}"


class MovingWeights:
    """A copy that is made while a model answers from the maps: its weights move when all of it is there.

    move: puts weights elsewhere, for steps under way too. gives_way: whether somebody waits for an answer that the copy
    would delay. memory_types: as `copied` takes them. Should the copy fail, the weights stay mapped.
    """

    def __init__(
        self,
        weights: Weights,
        maps: Sequence[FileMap],
        move: Callable[[Weights], None],
        gives_way: Callable[[], bool],
        readers: int,
        memory_types: Mapping[str, BlockType],
    ) -> None:
        self._copy: WeightCopy | None = None
        self._failure = ""
        self._cancelled = threading.Event()

        def pause() -> None:
            while gives_way() and not self._cancelled.wait(GIVE_WAY_SECONDS):
                pass

        def check(done: int, total: int) -> None:
            if self._cancelled.is_set():
                raise RuntimeError("the copy was cancelled")

        def work() -> None:
            self._cancelled.wait(BEGIN_SECONDS)
            try:
                moved, copy = copied(
                    weights, maps, readers=readers, memory_types=memory_types, progress=check, pause=pause
                )
                move(moved)
                self._copy = copy
            except (OSError, ModelFileError, RuntimeError) as error:
                self._failure = f"mapped: {error}"

        self._thread = threading.Thread(target=work, name="kvfold-move", daemon=True)
        self._thread.start()

    def wait(self) -> WeightCopy | None:
        """Until the weights have moved; None where they stay mapped."""
        self._thread.join()
        return self._copy

    def cancel(self) -> None:
        """Nobody needs the model any more, or the process ends: stops after the chunks that are being read."""
        self._cancelled.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def place(self) -> str:
        """Where the weights lie by now, in a few words."""
        if self._copy is not None:
            return f"{self._copy.in_words}, while the model answered"
        return self._failure or "mapped, and copied onto 2 MiB pages meanwhile"


@dataclass(frozen=True)
class _Range:
    """Bytes [start, stop) of one file, which are to lie `target` bytes into the copy."""

    map: FileMap
    start: int
    stop: int
    target: int

    @property
    def address(self) -> int:
        """Of the first byte in the map."""
        return _address(self.map.data) + self.start

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def copied(
    weights: Weights,
    maps: Sequence[FileMap],
    *,
    readers: int,
    memory_types: Mapping[str, BlockType] = MappingProxyType({}),
    progress: Progress | None = None,
    pause: Callable[[], None] = lambda: None,
) -> tuple[Weights, WeightCopy]:
    """The same weights as views of one read-only copy, and what that took. Arrays outside the maps stay what they are.

    readers: threads that read at the same time, in file order.
    memory_types: types of quant/types.SIDE_BY_SIDE that weights get in the copy, by name. Their bytes are no others'.
    pause: what each reader calls before a chunk, and may wait in.

    Raises ModelFileError where a file is not what was opened any more, or cannot be read; OSError where the system
    gives no memory.
    """
    started = time.perf_counter()
    ranges = _ranges(maps, _arrays(weights))
    target = _huge_page_memory(ranges[-1].target + ranges[-1].nbytes if ranges else 0)
    side_by_side = _side_by_side(weights, memory_types)
    _read_all(ranges, side_by_side, target, readers, progress or _silent, pause)
    moved = _Moved(ranges, target)
    seconds = time.perf_counter() - started
    target.flags.writeable = False
    huge = huge_page_bytes(target)
    nbytes = sum(range.nbytes for range in ranges)

    def place(name: str, tensor: QuantTensor) -> QuantTensor:
        found = moved.tensor(tensor)
        return found if found.raw is tensor.raw else replace(found, type=memory_types.get(name, tensor.type))

    return (
        {name: changed(weight, partial(place, name)) for name, weight in weights.items()},
        WeightCopy(nbytes, seconds, None if huge is None else min(huge, nbytes)),
    )


def put_in_order(weights: Weights, memory_types: Mapping[str, BlockType], threads: int) -> Weights:
    """The same weights where they lie in memory, in the order that `copied` gives them. Their arrays are written, read-only
    ones too: nobody else may hold them."""

    def place(type: BlockType, tensor: QuantTensor) -> QuantTensor:
        raw = tensor.raw[:]
        raw.flags.writeable = True
        _native.put_side_by_side(tensor.type.id, raw, threads)
        raw.flags.writeable = False
        return replace(tensor, type=type, raw=raw)

    placed = {name: changed(weights[name], partial(place, type)) for name, type in memory_types.items()}
    return MappingProxyType({**weights, **placed})


def read_ahead(maps: Iterable[FileMap]) -> threading.Thread:
    """Has the system read mapped files in their order, while the model already answers: what a step needs earlier it
    reads itself. Of a file that is in memory this costs milliseconds. Returns the thread that asks.

    Mapping every page before the first token, while the tokenizer is built, gains nothing to speak of
    (docs/notes/loading.md).
    """

    def ask() -> None:
        for map in maps:
            with suppress(OSError, ModelFileError), ExitStack() as files:
                descriptor = _reopened(map, files)
                for start in range(0, map.data.nbytes, _READ_AHEAD_BYTES):
                    os.posix_fadvise(descriptor, start, _READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)

    thread = threading.Thread(target=ask, name="kvfold-read-ahead", daemon=True)
    if hasattr(os, "posix_fadvise"):
        thread.start()
    return thread


def guarded(maps: Iterable[FileMap]) -> None:
    """Weights are read through these maps from now on: should a file be shortened meanwhile, the process ends with a
    sentence that names it (csrc/file_guard.h), until the map goes."""
    for map in maps:
        address, memory = _address(map.data), map.memory
        if memory not in _guarded and _native.guard_file(address, map.data.nbytes, str(map.path)):
            _guarded.add(memory)
            weakref.finalize(memory, _native.release_file, address)


_guarded: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


def huge_page_bytes(array: NDArray[np.uint8]) -> int | None:
    """How much of an array in anonymous memory is on huge pages, or None where the system does not tell. A mapping
    that reaches beyond the array counts whole, up to the array's size."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    start, stop = _address(array), _address(array) + array.nbytes
    found, is_ours = 0, False
    for line in lines:
        if head := _MAPPING.match(line):
            is_ours = int(head[1], 16) < stop and int(head[2], 16) > start
        elif is_ours and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return min(found, array.nbytes)


_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def _tensors(weights: Weights) -> Iterator[QuantTensor]:
    for weight in weights.values():
        yield from matrices(weight)


def _arrays(weights: Weights) -> Iterator[NDArray[Any]]:
    for tensor in _tensors(weights):
        yield tensor.raw
        if tensor.scale is not None:
            yield tensor.scale


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _ranges(maps: Sequence[FileMap], arrays: Iterable[NDArray[Any]]) -> list[_Range]:
    """What to read, each byte once, in the order of files and bytes."""
    by_address = sorted(range(len(maps)), key=lambda number: _address(maps[number].data))
    starts = [_address(maps[number].data) for number in by_address]
    spans: set[tuple[int, int, int]] = set()  # number of the map, first byte, one past the last
    for array in arrays:
        assert array.flags.c_contiguous
        at = bisect_right(starts, _address(array)) - 1
        if at >= 0 and _address(array) + array.nbytes <= starts[at] + maps[by_address[at]].data.nbytes:
            first = _address(array) - starts[at]
            spans.add((by_address[at], first, first + array.nbytes))
    joined: list[list[int]] = []
    for number, first, stop in sorted(spans):
        if joined and joined[-1][0] == number and first <= joined[-1][2] + PAGE_BYTES:
            joined[-1][2] = max(joined[-1][2], stop)
        else:
            joined.append([number, first, stop])
    ranges: list[_Range] = []
    end = 0
    for number, first, stop in joined:
        target = end + (first - end) % PAGE_BYTES
        ranges.append(_Range(maps[number], first, stop, target))
        end = target + stop - first
    return ranges


def _huge_page_memory(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed anonymous memory, uint8 [nbytes], from a 2 MiB boundary on; on 2 MiB pages where the system has them."""
    whole = -(-nbytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, whole + HUGE_PAGE_BYTES, flags=flags)
    data = np.frombuffer(memory, np.uint8)
    start = -_address(data) % HUGE_PAGE_BYTES
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return data[start : start + nbytes]


@dataclass(frozen=True)
class _Rows:
    """Rows of one type in a map that are to lie side by side. group_bytes: of those that are mixed."""

    address: int
    nbytes: int
    type_id: int
    row_bytes: int
    group_bytes: int

    def continues(self, other: _Rows) -> bool:
        same = (self.type_id, self.row_bytes) == (other.type_id, other.row_bytes)
        return same and self.address == other.address + other.nbytes


def _side_by_side(weights: Weights, memory_types: Mapping[str, BlockType]) -> list[_Rows]:
    """Every part of the weights that get such a type, by address; what lies together, such as experts, as one."""
    parts = []
    for name, type in memory_types.items():
        for part in _tensors({name: weights[name]}):
            row_bytes = part.raw.shape[-1]
            group_bytes = type.interleaved_rows * row_bytes
            parts.append(_Rows(_address(part.raw), part.raw.nbytes, part.type.id, row_bytes, group_bytes))
    joined: list[_Rows] = []
    for rows in sorted(parts, key=lambda rows: rows.address):
        if joined and rows.continues(joined[-1]):
            joined[-1] = replace(joined[-1], nbytes=joined[-1].nbytes + rows.nbytes)
        else:
            joined.append(rows)
    return joined


@dataclass(frozen=True)
class _Chunk:
    range: _Range
    start: int  # byte of the file
    stop: int
    rows: _Rows | None = None  # what its bytes are part of


def _chunks(ranges: Iterable[_Range], side_by_side: Sequence[_Rows]) -> Iterator[_Chunk]:
    """The ranges cut where the copy reaches a multiple of CHUNK_BYTES, within rows side by side after the group that does,
    and where such rows begin and end."""
    addresses = [rows.address for rows in side_by_side]
    for range in ranges:
        first, last = (bisect_left(addresses, range.address + offset) for offset in (0, range.nbytes))
        at = range.start
        for rows in side_by_side[first:last]:
            start = range.start + rows.address - range.address
            yield from _cut(range, at, start)
            at = start + rows.nbytes
            yield from _cut(range, start, at, rows)
        yield from _cut(range, at, range.stop)


def _cut(range: _Range, start: int, stop: int, rows: _Rows | None = None) -> Iterator[_Chunk]:
    unit = rows.group_bytes if rows else 1
    while start < stop:
        size = CHUNK_BYTES - (range.target + start - range.start) % CHUNK_BYTES
        end = min(stop, start + -(-size // unit) * unit)
        yield _Chunk(range, start, end, rows)
        start = end


def _read_all(
    ranges: Sequence[_Range],
    side_by_side: Sequence[_Rows],
    target: NDArray[np.uint8],
    readers: int,
    report: Progress,
    pause: Callable[[], None],
) -> None:
    total = sum(range.nbytes for range in ranges)
    done = 0
    report(0, total)
    with ExitStack() as files:
        descriptors = {map.path: _reopened(map, files) for map in dict.fromkeys(range.map for range in ranges)}

        def read(chunk: _Chunk) -> int:
            pause()
            place = chunk.range.target + chunk.start - chunk.range.start
            part = target[place : place + chunk.stop - chunk.start]
            _read(chunk.range.map, descriptors[chunk.range.map.path], chunk.start, part, chunk.rows)
            return part.nbytes

        pool = ThreadPoolExecutor(readers, thread_name_prefix="kvfold-read")
        try:
            chunks = _chunks(ranges, side_by_side)
            waiting = {pool.submit(read, chunk) for chunk in islice(chunks, 2 * readers)}
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(read, chunk) for chunk in islice(chunks, len(finished))}
                for future in finished:
                    done += future.result()
                report(done, total)
        finally:  # before the files are closed
            pool.shutdown(cancel_futures=True)


def _reopened(map: FileMap, files: ExitStack) -> int:
    """A descriptor of the mapped file, open as long as `files`."""
    try:
        file = files.enter_context(map.path.open("rb", buffering=0))
        status = os.fstat(file.fileno())
    except OSError as error:
        raise ModelFileError(map.path, f"the file cannot be read any more: {error.strerror}.") from error
    if (status.st_dev, status.st_ino) != map.inode:
        raise ModelFileError(
            map.path, "another file has taken its place since it was opened. Load the model again."
        )
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file.fileno()


def _read(map: FileMap, descriptor: int, start: int, into: NDArray[np.uint8], rows: _Rows | None) -> None:
    """Fills `into` from byte `start` of the file on, rows side by side, without the GIL."""
    layout = (rows.type_id, rows.row_bytes) if rows else ()
    try:
        got = _native.read_weights(descriptor, start, into, *layout)
    except OSError as error:
        raise ModelFileError(map.path, f"the file cannot be read: {error.strerror}.", offset=start) from error
    if got < into.nbytes:
        raise ModelFileError(
            map.path,
            f"the file ends here and had {map.data.nbytes} bytes when it was opened: something shortened it. "
            f"Fetch it again.",
            offset=start + got,
        )


class _Moved:
    """Finds views of the maps again in the copy."""

    def __init__(self, ranges: Sequence[_Range], target: NDArray[np.uint8]) -> None:
        self._ranges = sorted(ranges, key=lambda range: range.address)
        self._starts = [range.address for range in self._ranges]
        self._target = target

    def tensor(self, tensor: QuantTensor) -> QuantTensor:
        scale = None if tensor.scale is None else self._array(tensor.scale)
        return replace(tensor, raw=self._array(tensor.raw), scale=scale)

    def _array(self, array: NDArray[Any]) -> NDArray[Any]:
        address = _address(array)
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address + array.nbytes > self._starts[at] + self._ranges[at].nbytes:
            return array
        place = self._ranges[at].target + address - self._starts[at]
        return self._target[place : place + array.nbytes].view(array.dtype).reshape(array.shape)


def _silent(done: int, total: int) -> None:
    """Progress that nobody watches."""
