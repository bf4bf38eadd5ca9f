"""The compiled half of kvfold (csrc/). Arrays are C-contiguous and are never converted: a wrong dtype is a TypeError."""

import numpy as np
from numpy.typing import NDArray

def decodable_types() -> dict[int, tuple[int, int, int, int]]: ...
def decode(type_id: int, raw: NDArray[np.uint8], out: NDArray[np.float32], threads: int = 1) -> None: ...
def decode_rows(
    type_id: int, raw: NDArray[np.uint8], rows: NDArray[np.int32], out: NDArray[np.float32]
) -> None: ...
def decode_fp8(
    raw: NDArray[np.uint8], scale: NDArray[np.float32], out: NDArray[np.float32], threads: int = 1
) -> None: ...
def put_side_by_side(type_id: int, raw: NDArray[np.uint8], threads: int = 1) -> None: ...
def read_weights(
    descriptor: int, start: int, to: NDArray[np.uint8], type_id: int = 0, row_bytes: int = 0
) -> int: ...
def usable_cpus() -> int: ...
def guard_file(start: int, size: int, path: str) -> bool: ...
def release_file(start: int) -> None: ...
def quota_cpus(own: str, root: str) -> int: ...
def core_of(cpu: int, topology: str) -> set[int]: ...
def isa_names() -> list[str]: ...
def isa() -> str: ...
def force_isa(name: str) -> None: ...
def attention_numbers() -> str: ...
def kernel_types() -> dict[int, str]: ...
def side_by_side_types(isa: str) -> set[int]: ...
def absorbed_run_keys(num_keys: int) -> int: ...

HEAD_LANES: int  # heads of one row in a tile of absorbed attention where products round, zeros after the last

class Kernels:
    """Products of a team of threads, for tests and benchmarks."""

    def __init__(self, threads: int) -> None: ...
    def linear(
        self, type_id: int, raw: NDArray[np.uint8], x: NDArray[np.float32], out: NDArray[np.float32]
    ) -> float: ...

class Meter:
    """The ceilings of this machine, measured by a team of threads over given arrays."""

    def __init__(self, arrays: list[NDArray[np.uint8]], threads: int) -> None: ...
    def read(self, indices: NDArray[np.int32]) -> float: ...
    @property
    def streams(self) -> int: ...
    @property
    def checksum(self) -> int: ...
    def multiply_adds(self, kind: str, seconds: float) -> tuple[str, float]: ...

# Fields of model/program.py in their order: (buffer, start, width), (width, domain, first, last), (kind, name, inputs,
# outputs, weights, ints, floats), (name, ops, buffers, x_out, outputs).
_Value = tuple[int, int, int]
_Buffer = tuple[int, int, int, int]
_Op = tuple[str, str, list[_Value], list[_Value], list[int], list[int], list[float]]
_Segment = tuple[str, list[_Op], list[_Buffer], _Value | None, list[tuple[str, _Value]]]
_Part = tuple[NDArray[np.uint8], NDArray[np.float32] | None]  # rows and fp8 scale
_Weight = tuple[str, int, int, int, list[_Part]]  # name, type, rows of a part, cols, parts

class Calm:
    """Whether a team has its CPUs to itself, by what its threads tell (csrc/team_binding.h). Times in ns."""

    def __init__(self, now: int) -> None: ...
    def tell(self, now: int, ran: int, waited: int) -> None: ...
    def holds(self, now: int) -> bool: ...

class Program:
    """Wrong arrays, and parts that do not fit each other, are a ValueError."""

    def __init__(
        self,
        segments: list[_Segment],
        weights: list[_Weight],
        cache_type: int,  # 0 f32, 1 f16, 2 bf16, halves as uint16; 3 q8_0 as uint8
        cache: list[NDArray[np.generic]],
        threads: int,
        workspace_bytes: int,
        rounds_activations: bool = False,
        by_role: bool = False,
        checks_numerics: bool = False,
        times_ops: bool = False,
    ) -> None: ...
    @staticmethod
    def least_workspace(
        segments: list[_Segment],
        weights: list[_Weight],
        cache_type: int,
        cache: list[NDArray[np.generic]],
        threads: int,
        rounds_activations: bool,
        isa: str,
        sequences: list[tuple[int, bool, int]],  # path, whether it is fused, keys
    ) -> int: ...
    def move_weights(self, moved: list[tuple[int, int, list[_Part]]]) -> None: ...  # handle, type, parts
    @property
    def spins(self) -> bool: ...
    @property
    def kernels(self) -> dict[str, tuple[str, str]]: ...  # by weight: the sets whose row dots and tiles it has
    @property
    def num_segments(self) -> int: ...
    @property
    def outputs(self) -> list[tuple[str, int]]: ...

class StepRun:
    """`outputs`: arrays [R, width] in the order of Program.outputs. Wrong arrays are a ValueError."""

    def __init__(
        self,
        program: Program,
        token_ids: NDArray[np.int32],
        slots: NDArray[np.int64],
        row_starts: NDArray[np.int32],
        kv_lens: NDArray[np.int32],
        page_starts: NDArray[np.int32],
        pages: NDArray[np.int32],
        segments: NDArray[np.int32],
        output_rows: NDArray[np.int32],
        is_prompt: NDArray[np.int32],
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        outputs: list[NDArray[np.float32]],
    ) -> None: ...
    def run(self, last: int) -> bool: ...
    def cancel(self) -> None: ...
    @property
    def op_times(self) -> list[tuple[int, int]]: ...
    @property
    def position(self) -> int: ...
