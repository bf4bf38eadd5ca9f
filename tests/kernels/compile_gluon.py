"""Compiles Hopper kernels for sm_90a where there is no GPU: their names come by line, what each needs leaves as a line of JSON.

A process of its own, because Triton decides between its interpreter and its compiler when it is first imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kvfold.kernels import mla_decode_fp8_gluon, mla_decode_gluon, mla_prefill_gluon, tile_product_gluon

COMMON = {
    **{name: "*i32" for name in ("pages", "page_starts", "kv_lens", "part_starts")},
    **{name: "*bf16" for name in ("q", "pool", "out")},
    **{name: "*fp32" for name in ("partial", "partial_lse")},
    "scale_log2": "fp32",
    "rows": "i32",
}


def box(*shape: int, dtype: str = "bf16", swizzle_bytes: int = 128) -> str:
    bits = {"u8": 8, "bf16": 16, "fp16": 16, "i32": 32, "fp32": 32}[dtype]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle_bytes, element_bitwidth=bits, rank=len(shape))
    return f"tensordesc<{dtype}[{', '.join(map(str, shape))}],{layout!r}>"


def experts(type: str, tokens: int, gated: bool) -> tuple[dict[str, str], dict[str, object], dict[str, int]]:
    """Types of the arguments, sizes and options of V2-Lite's experts: gate and up, or `down`, in tiles of `tokens` rows."""
    tile, options = tile_product_gluon.sizes(type, tokens)
    codes, more = tile_product_gluon.words_of_pass(type), tile_product_gluon.more_words(type)
    boxes = {
        name: box(tile["STRIP"], codes, dtype="i32", swizzle_bytes=4 * codes) for name in ("w0_desc", "w1_desc")
    }
    other = box(tile["STRIP"], more, dtype="i32", swizzle_bytes=4 * more // 32 * 32) if more else boxes["w0_desc"]
    types = boxes | {"more0_desc": other, "more1_desc": other, "x_desc": box(tokens, 128), "out": "*bf16"}
    types |= {name: "*u8" for name in ("w0", "w1")} | {name: "*i32" for name in ("pairs", "starts", "tiles")}
    types |= {name: "i32" for name in ("num_experts", "rows", "row_bytes")}
    sizes = {"COLS": 2048, "TYPE": type, "ORDER": tile_product_gluon.ORDERS[type], "GATED": gated}
    return types, sizes | tile, options


def exponentials_beside_products(sass: str) -> int:
    """The fewest exponentials between a wait that leaves one group of products running and the wait for that group."""
    counts = []
    count = None
    for line in sass.splitlines():
        if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line:
            count = 0
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line:
            counts += [] if count is None else [count]
            count = None
        elif "MUFU.EX2" in line and count is not None:
            count += 1
    return min(counts, default=0)


def needs(kind: str) -> dict[str, object]:
    sizes: dict[str, object] = {}
    options: dict[str, object] = {"num_warps": 4}
    types = dict(COMMON)
    if kind == "few":
        kernel = mla_decode_gluon._few_rows_kernel
        types |= {"k_desc": box(64, 512), "k_rope_desc": box(64, 64)}
        sizes = {"HEADS": 16, "BLOCK_ROWS": 16, "S_Q": 1, "PDL": True}
    elif kind.startswith("fp8"):
        kernel = mla_decode_fp8_gluon._fp8_kernel
        block_rows = int(kind.removeprefix("fp8_"))
        types |= {
            "codes_desc": box(64, 512, dtype="u8", swizzle_bytes=mla_decode_fp8_gluon.CODES_SWIZZLE),
            "scales_desc": box(64, 4, dtype="fp32", swizzle_bytes=0),
        }
        types |= {"rope_desc": box(64, 64), "nothing": "i32"}
        sizes = {"HEADS": 16, "BLOCK_ROWS": block_rows, "S_Q": block_rows // 16, "PDL": True}
        sizes["STAGES"] = mla_decode_fp8_gluon.STAGES[block_rows]
        sizes["A_REGISTERS"], sizes["B_REGISTERS"] = mla_decode_fp8_gluon.REGISTERS[block_rows]
    elif kind.startswith("many"):
        kernel = mla_decode_gluon._many_rows_kernel
        types |= {"q_desc": box(64, 256), "k_desc": box(64, 256 // mla_decode_gluon.CHUNKS.value), "nothing": "i32"}
        types |= {f"{name}_desc": box(64, 64) for name in ("q_rope", "k_rope")}
        types |= {"partial_scale": "*fp32"} | ({"partial": "*fp16"} if kind == "many_halves" else {})
        types |= {"out_desc": box(1, 64, 256), "partial_desc": box(1, 64, 256, dtype="fp16")}
        sizes = {"HEADS": 128, "S_Q": 1, "PDL": True, "WORKER_REGISTERS": 256}
        options["ptx_options"] = mla_decode_gluon.PTXAS_OPTIONS
    elif kind.startswith("experts"):  # experts_TYPE_TOKENS_gated
        kernel = tile_product_gluon._experts_kernel
        *type, tokens, form = kind.removeprefix("experts_").split("_")
        types, sizes, options = experts("_".join(type), int(tokens), form == "gated")
    else:
        kernel = mla_prefill_gluon._prefill_kernel
        types |= {"q_desc": box(64, 128), "q_rope_desc": box(64, 64), "k_rope_desc": box(128, 64)}
        types |= {"lse": "*fp32", "kv_len": "*i32"}
        types |= {"out_desc": box(64, 128)} | {f"{name}_desc": box(128, 128) for name in ("k", "v")}
        types |= {
            name: "i32"
            for name in kernel.arg_names
            if name.endswith("stride") or name.startswith("num_") or name == "ahead"
        }
        sizes = {what: what.lower() in kind.split("_") for what in ("PARTED", "BOXED", "MERGE", "COUNTED")}
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if types.get(name, "").startswith("*") or name in ("rows", "row_bytes")
    }
    source = GluonASTSource(
        kernel, signature, {(names.index(name),): value for name, value in sizes.items()}, aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", *str(options.get("ptx_options", "")).split()]
        command += [str(file), "-o", str(file.with_suffix(".cubin"))]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [knobs.nvidia.nvdisasm.path, "-c", str(file.with_suffix(".cubin"))]
        is_prefill = kernel is mla_prefill_gluon._prefill_kernel
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout if is_prefill else None
    found = {
        "shared_bytes": compiled.metadata.shared,
        "registers": int(re.search(r"Used (\d+) registers", listing)[1]),
        "spill_bytes": int(re.search(r"(\d+) bytes spill stores", listing)[1]),
        "wgmma": ptx.count("wgmma.mma_async"),
        "serialized": "wgmma.mma_async instructions are serialized" in listing,
    }
    return found if sass is None else found | {"exponentials_beside_products": exponentials_beside_products(sass)}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(needs(line.strip())), flush=True)
