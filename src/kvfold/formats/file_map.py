"""A checkpoint file as memory: mapped once, read-only, and known again when it is opened a second time."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class FileMap:
    """memory: the map, which lives as long as a view of it
    data:   uint8 [file size at open], read-only: a view of all of it
    inode:  (device, inode), which a file put in its place under the same name does not have
    """

    path: Path
    memory: mmap.mmap
    data: NDArray[np.uint8]
    inode: tuple[int, int]


def map_file(path: Path, file: BinaryIO) -> FileMap:
    """An open file that is not empty. Raises OSError."""
    status = os.fstat(file.fileno())
    memory = mmap.mmap(file.fileno(), status.st_size, access=mmap.ACCESS_READ)
    return FileMap(path, memory, np.frombuffer(memory, np.uint8), (status.st_dev, status.st_ino))
