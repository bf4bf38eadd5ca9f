"""What speeds are divided by: multiply-adds and bytes, equal to counts by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvfold.bench.work import LinearWork, TokenWeights, linear_work, num_weights
from kvfold.config import ModelConfig
from kvfold.formats.synthetic import SHAPES, synthetic_checkpoint
from kvfold.formats.tensor_names import KvLayout, expected_tensors
from kvfold.mla.plan import Path, multiply_adds
from kvfold.quant.tensor import QuantTensor, matrices
from kvfold.quant.types import BlockType, by_name

LITE = SHAPES["deepseek-v2-lite"]


def test_multiply_adds_of_v2_lite() -> None:
    """By hand: queries 16 x 192, latents 576, outputs 16 x 128, all times 2048 and 27 layers; one dense layer of 3 x
    10944; in 26 layers 6 + 2 experts of 3 x 1408 and a router of 64."""
    work = linear_work(LITE)
    assert work == LinearWork(
        attention=27 * 2048 * (16 * 192 + 576 + 16 * 128),
        dense=3 * 2048 * 10944,
        experts=26 * 2048 * (8 * 3 * 1408 + 64),
        head=102400 * 2048,
        outputs=2048 * (16 * 128 + 8 * 3 * 1408 + 64),
    )
    up = 27 * 16 * 256 * 512  # expansion of a row's latents: mla/plan.py counts it
    assert round(work.experts / 1e6) == 1803
    assert round((work.attention + up) / 1e6) == 372
    assert round(work.dense / 1e6) == 67
    row = work.total(1, 1) - work.head
    assert round((row + up) / 1e6) == 2242
    assert work.total(512, 1) == 511 * (row - work.outputs) + row + work.head
    assert round(work.head / 1e6) == 210
    prompt = 27 * multiply_adds(Path.DECOMPRESSED, LITE.mla, 512, 0) / 512 - up
    assert round(prompt / 1e6) == 35


def test_multiply_adds_of_a_head_that_is_the_embedding() -> None:
    assert linear_work(replace(LITE, tie_word_embeddings=True)) == linear_work(LITE)


def test_multiply_adds_of_a_dense_model_with_compressed_queries() -> None:
    config = replace(SHAPES["deepseek-v3"], num_layers=2, num_dense_layers=2, moe=None)
    work = linear_work(config)
    assert work.experts == 0
    assert work.attention == 2 * (1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 7168 * 128 * 128)


def weightless(
    config: ModelConfig, types: dict[str, BlockType], others: BlockType
) -> dict[str, QuantTensor | tuple]:
    """Tensors of the right shapes and sizes that take no memory."""

    def empty(name: str, type: BlockType, rows: int, cols: int) -> QuantTensor:
        raw = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (rows, type.row_bytes(cols)), (0, 0))
        return QuantTensor(name, type, (rows, cols), raw)

    tensors: dict[str, QuantTensor | tuple] = {}
    for spec in expected_tensors(config, KvLayout.K_B_V_B):
        type = types.get(spec.name.split(".")[-2], others)
        if len(spec.shape) == 1:
            tensors[spec.name] = empty(spec.name, by_name("F32"), 1, spec.shape[0])
        elif len(spec.shape) == 2:
            tensors[spec.name] = empty(spec.name, type, *spec.shape)
        else:
            tensors[spec.name] = tuple(empty(spec.name, type, *spec.shape[1:]) for _ in range(spec.shape[0]))
    return tensors


def test_bytes_of_a_token_of_v2_lite() -> None:
    """IQ4_NL has 18 bytes for 32 weights, Q6_K 210 for 256, Q8_0 34 for 32."""
    types = {"output": by_name("Q6_K"), "attn_k_b": by_name("Q8_0"), "ffn_gate_inp": by_name("F32")}
    weights = weightless(LITE, types, by_name("IQ4_NL"))
    work = linear_work(LITE)
    routers = 26 * 64 * 2048
    k_b, v_b = 27 * 16 * 512 * 128, 27 * 16 * 128 * 512
    norms = 27 * (2 * 2048 + 512) + 2048
    by_hand = (
        (work.total(1, 1) - work.head - routers + v_b) * 18 // 32
        + routers * 4
        + k_b * 34 // 32
        + work.head * 210 // 256
    )
    found = TokenWeights(LITE, weights).nbytes
    assert found == by_hand + norms * 4 + 2048 * 18 // 32  # and one row of the embedding
    assert round(found / 1e6) == 1459
    assert round(num_weights(weights) / 1e9, 1) == 15.7


def test_a_token_reads_as_many_experts_as_are_chosen_and_other_ones_each_time() -> None:
    checkpoint = synthetic_checkpoint(SHAPES["tiny"], type="q8_0")
    token = TokenWeights(checkpoint.config, checkpoint.tensors)
    owner = {id(part.raw): name for name, tensor in checkpoint.tensors.items() for part in matrices(tensor)}
    rng = np.random.default_rng(1)
    draws = [token.draw(rng) for _ in range(20)]
    for draw in draws:
        assert len(set(draw.tolist())) == len(draw)
        read = [owner[id(token.arrays[i])] for i in draw]
        for kind in ("gate", "up", "down"):
            assert read.count(f"blk.1.ffn_{kind}_exps.weight") == 2
        assert read.count("output.weight") == read.count("blk.0.ffn_up.weight") == 1
        assert "token_embd.weight" not in read
        row = matrices(checkpoint.tensors["token_embd.weight"])[0].raw[0].nbytes
        assert sum(token.arrays[i].nbytes for i in draw) + row == token.nbytes
    assert len({tuple(draw) for draw in draws}) > 5
    # the matrices of one expert come together
    first = [draw for draw in draws[0].tolist() if owner[id(token.arrays[draw])].endswith("_exps.weight")]
    per_kind = [sorted((i - min(first)) % 8 for i in first[kind::3]) for kind in range(3)]
    assert per_kind[0] == per_kind[1] == per_kind[2]


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_embedding_is_read_whole_as_the_head(tied: bool) -> None:
    config = replace(SHAPES["tiny"], tie_word_embeddings=tied)
    weights = weightless(config, {}, by_name("BF16"))
    owners = TokenWeights(config, weights)
    assert sum(array.shape == (1024, 512) for array in owners.arrays) == 1
