"""`kvfold check` finds every kernel right, and finds the one that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kit.command_line import Kvfold
from kvfold import _native
from kvfold import check as kvfold_check
from kvfold.check import check, isas_of
from kvfold.errors import SettingError
from kvfold.quant.decode import decode_tensor
from kvfold.quant.types import SIDE_BY_SIDE, TYPES, by_id


def test_every_kernel_is_right_and_every_type_has_its_line() -> None:
    isa = _native.isa_names()[0]
    found = list(check([isa], threads=2))
    assert [f for f in found if not f.is_right] == []
    products = {f.type for f in found if f.kernel == "tiles"}
    assert {t.name for t in TYPES if t.id in _native.kernel_types()} <= products
    for kernel in ("decode", "panels"):
        assert {f.type for f in found if f.kernel == kernel} == {t.name for t in TYPES if t.decodes}
    assert {f.type for f in found if f.kernel == "embed"} == {"Q4_K", "Q6_K", "Q8_0", "IQ4_NL", "BF16"}
    assert len([f for f in found if f.kernel.startswith("route, ")]) == 3
    mixtures = {f.kernel for f in found if f.kernel.startswith("experts")}
    assert {
        "experts",
        "experts beside shared ones of other types",
        "experts, 2 of 5",
        "experts, float32",
    } <= mixtures
    assert ("experts, rows side by side" in mixtures) == bool(_native.side_by_side_types(isa))
    in_memory = {t.name for t in SIDE_BY_SIDE.values() if t.id in _native.side_by_side_types(isa)}
    assert in_memory <= products <= in_memory | {by_id(number).name for number in _native.kernel_types()}
    assert {f.type for f in found if f.kernel == "attention, standard, fused, int8"} == {
        "f32",
        "f16",
        "bf16",
        "q8_0",
    }
    for path in ("absorbed", "decompressed"):
        for parts in ("kv_b", "k_b and v_b"):
            for rows in ("", ", a row over cached ones"):
                in_blocks = {f.type for f in found if f.kernel == f"attention, {path}, {parts}{rows}"}
                assert in_blocks == {"IQ4_NL", "Q4_0", "Q8_0", "F16", "BF16"}
        for form in ("fused, int8", "unfused, int8", "fused, float32", "unfused, float32"):
            assert len([f for f in found if f.kernel == f"attention, {path}, {form}"]) == 4
            assert len([f for f in found if f.kernel == f"attention, {path}, {form}, a row over cached ones"]) == 4
    assert {f.isa for f in found} == {"any", isa}
    assert _native.isa() == _native.isa_names()[0]


@pytest.mark.full
def test_every_kernel_of_every_set_is_right() -> None:
    assert [f for f in check(_native.isa_names(), threads=2) if not f.is_right] == []


def test_a_wrong_kernel_is_an_exit_code(kvfold: Kvfold, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = decode_tensor
    monkeypatch.setattr(
        kvfold_check, "decode_tensor", lambda t: exact(t) * np.float32(1.001 if t.type.name == "Q4_K" else 1)
    )
    for left_out in ("_ops", "_products", "_float_products", "_routes"):
        monkeypatch.setattr(kvfold_check, left_out, lambda *arguments: iter(()))
    monkeypatch.setattr(kvfold_check, "_experts", lambda *arguments: next(kvfold_check._decoders()))
    done = kvfold("check", "--isa", "generic", "--json")
    assert done.code == 1
    report = json.loads(done.out)
    assert (report.keys(), report["num_wrong"]) == ({"threads", "num_wrong", "findings"}, 1)
    wrong = [f for f in report["findings"] if not f["is_right"]]
    assert [(f["kernel"], f["type"], f["isa"]) for f in wrong] == [("decode", "Q4_K", "any")]
    assert "1 wrong" in done.err


def test_a_set_that_is_not_there_is_refused(kvfold: Kvfold) -> None:
    assert (
        kvfold("check", "--isa", "sse9").err == "kvfold: isa=sse9: allowed are auto, generic, avx2, avx512, amx.\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "isa_names", lambda: ["generic"])
        assert isas_of("auto") == ["generic"]
        with pytest.raises(SettingError, match="isa=avx512: this processor, system and build have generic"):
            isas_of("avx512")
