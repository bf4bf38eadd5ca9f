"""MLA decode against the absorbed form in float64: any heads, lengths, pages; nothing unused is ever read."""

import itertools
import math
import random

import pytest
import torch

from kvfold.cache.latent import CacheType, decode, encode
from kvfold.kernels import mla_decode
from kvfold.kernels.cached_blocks import Blocks
from kvfold.kernels.merged_unfold import merge_unfold
from kvfold.kernels.mla_decode import DecodeWorkspace, Form, combine, schedule_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 64


class Case:
    """A batch of random queries over a scattered pool whose unused slots and pages are NaN."""

    def __init__(
        self, heads: int, kv_lens: list[int], s_q: int = 1, kv_lora: int = 32, rope: int = 16,
        dtype: torch.dtype = torch.float32, cache_dtype: torch.dtype | None = None, seed: int = 0,
        blocks: Blocks | None = None,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.kv_lens, self.s_q, self.kv_lora = kv_lens, s_q, kv_lora
        latent = kv_lora + rope
        self.scale = 1.7 / math.sqrt(latent)
        counts = [math.ceil(n / PAGE) for n in kv_lens]
        order = list(range(sum(counts) + 3))
        random.Random(seed).shuffle(order)
        self.page_starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.pages = order[: sum(counts)] + [2**30] * 2  # unused entries of a page list are absurd
        pool = torch.full((sum(counts) + 3, PAGE, latent), float("nan"))
        for sequence, length in enumerate(kv_lens):
            rows = torch.randn(length, latent, generator=generator)
            for position in range(0, length, PAGE):
                piece = rows[position : position + PAGE]
                pool[self.pages[self.page_starts[sequence] + position // PAGE], : len(piece)] = piece
        self.pool = pool.to(cache_dtype or dtype)
        self.blocks = blocks
        if blocks is not None:
            stored = encode(pool.numpy(), CacheType(blocks))
            self.pool = torch.from_numpy(decode(stored, CacheType(blocks))).to(dtype)
            self.stored = torch.from_numpy(stored)
        # times 2: scores spread, so that softmax is not flat
        self.q = (2 * torch.randn(len(kv_lens) * s_q, heads, latent, generator=generator)).to(dtype)

    def run(
        self,
        num_parts: int | None = None,
        form: Form | None = "triton",
        num_pages: int | None = None,
        w_uv: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """w_uv [H, v, kv_lora]: parts are merged where they are unfolded."""
        workspace, out = self.launch(num_parts, form, num_pages, merges=w_uv is None)
        if w_uv is None:
            return out.cpu()
        unfolded = torch.full((len(out), w_uv[..., 0].numel()), float("nan"), device=DEVICE)
        merge_unfold(out, workspace, w_uv.to(DEVICE), unfolded)
        return unfolded.cpu()

    def launch(
        self,
        num_parts: int | None,
        form: Form | None = "triton",
        num_pages: int | None = None,
        merges: bool = True,
    ) -> tuple[DecodeWorkspace, torch.Tensor]:
        """num_pages: the pool lies at the end of one of so many pages, and NaN before it."""
        batch, heads = len(self.kv_lens), self.q.shape[1]
        workspace = DecodeWorkspace(batch, self.s_q, heads, self.kv_lora, DEVICE, num_parts)
        workspace.partial.fill_(float("nan"))
        workspace.partial_lse.fill_(float("nan"))
        kv_lens = torch.tensor(self.kv_lens, dtype=torch.int32, device=DEVICE)
        out = torch.full((batch * self.s_q, heads, self.kv_lora), float("nan"), dtype=self.q.dtype, device=DEVICE)
        schedule_decode(kv_lens, workspace)
        pool, q = (self.pool if self.blocks is None else self.stored).to(DEVICE), self.q.to(DEVICE)
        before = 0
        if num_pages is not None:
            nan = 0xFF if pool.dtype == torch.uint8 else float("nan")
            whole = torch.full((num_pages, *pool.shape[1:]), nan, dtype=pool.dtype, device=DEVICE)
            before = num_pages - len(pool)
            whole[before:] = pool
            pool = whole
        pages = torch.tensor([before + page for page in self.pages], dtype=torch.int32, device=DEVICE)
        page_starts = torch.tensor(self.page_starts, dtype=torch.int32, device=DEVICE)
        mla_decode.mla_decode(
            q, pool, pages, page_starts, kv_lens, out, workspace, scale=self.scale, kv_lora=self.kv_lora,
            blocks=self.blocks, form=form, merges=merges,
        )  # fmt: skip
        return workspace, out

    def expected(self) -> torch.Tensor:
        """The same sums in float64, one sequence after another."""
        rows = []
        for sequence, length in enumerate(self.kv_lens):
            first, last = self.page_starts[sequence], self.page_starts[sequence + 1]
            keys = self.pool[self.pages[first:last]].flatten(0, 1)[:length].double()
            for i in range(self.s_q):
                query = self.q[sequence * self.s_q + i].double()
                seen = keys[: max(length - self.s_q + 1 + i, 0)]
                weights = torch.softmax(query @ seen.T * self.scale, -1)
                rows.append(weights @ seen[:, : self.kv_lora])
        return torch.stack(rows)

    def check(
        self, tolerance: float, num_parts: int | None = None, form: Form = "triton", num_pages: int | None = None
    ) -> None:
        out, expected = self.run(num_parts, form, num_pages).double(), self.expected()
        assert not out.isnan().any(), "unwritten or poisoned output"
        error = ((out - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"relative error {error:.2e}, tolerance {tolerance:.0e}"
        # per row too: one wrong row of many must not hide
        for row, (a, b) in enumerate(zip(out.flatten(0, 1), expected.flatten(0, 1), strict=True)):
            assert (a - b).norm() <= 4 * tolerance * max(b.norm().item(), 1.0), f"row {row // out.shape[1]}"


@pytest.mark.parametrize("heads", [1, 5, 16, 128])
@pytest.mark.parametrize("s_q", [1, 2])
def test_any_head_count(heads: int, s_q: int) -> None:
    Case(heads, [65, 130] if heads < 128 else [130], s_q, seed=heads).check(2e-6)


@pytest.mark.parametrize(
    ("heads", "kv_lens", "num_parts"),
    [
        (128, [700, 10], 8),
        (50, [10, 1000, 130], 14),
        (64, [0, 520], 9),
        (128, [1500], 12),
        (33, [64, 700, 1, 65], 40),
    ],
)
def test_partials_of_many_rows_merge_in_turns(
    heads: int, kv_lens: list[int], num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More partials than a program orders together, 4 or 11, and programs with rows of several sequences, cut and whole ones."""
    monkeypatch.setattr(mla_decode, "ROW_PROGRAMS", 60)
    Case(heads, kv_lens, kv_lora=40, seed=num_parts).check(2e-6, num_parts)


@pytest.mark.parametrize(
    ("kv_lens", "s_q", "num_parts", "kv_lora"),
    [([300, 0, 64], 1, 7, 32), ([200, 129], 2, 3, 40), ([4400], 1, 40, 32)],
)
def test_parts_are_merged_where_they_are_unfolded(
    kv_lens: list[int], s_q: int, num_parts: int, kv_lora: int
) -> None:
    """Whole sequences, cut ones, more parts than are merged at once, rows that no power of two is; 21 features a head."""
    case = Case(3, kv_lens, s_q, kv_lora=kv_lora)
    w_uv = torch.randn(3, 21, kv_lora, generator=torch.Generator().manual_seed(9))
    got = case.run(num_parts, w_uv=w_uv)
    expected = torch.einsum("thc,hvc->thv", case.expected().nan_to_num(0.0), w_uv.double()).flatten(1)
    assert not got.isnan().any()
    assert (got - expected).norm() <= 2e-6 * expected.norm()
    assert ((got - expected).norm(dim=1) <= 8e-6 * expected.norm()).all()


@pytest.mark.parametrize(
    ("heads", "magnitude", "num_parts"), [(3, 1.0, 5), (3, 2.0**40, 3), (3, 2.0**-40, 3), (22, 1.0, 5)]
)
def test_partial_results_of_16_bits_merge_to_their_precision(heads: int, magnitude: float, num_parts: int) -> None:
    """Rows relative to a power of two of their own, as the Hopper kernel for many rows leaves them: float16 holds any."""
    case = Case(heads, [1300, 0, 64], 2)
    case.pool *= magnitude
    case.scale /= magnitude
    workspace, out = case.launch(num_parts, merges=False)
    whole = workspace.partial.clone()
    scale = torch.exp2(torch.floor(torch.log2(whole.abs().amax(-1)))).nan_to_num(1.0)
    workspace.partial.fill_(float("nan"))
    workspace.half_partial.copy_(whole / scale[..., None])
    workspace.partial_scale.copy_(scale)
    combine(out, workspace, False, halves=True)
    expected = case.expected().nan_to_num(0.0)
    error = ((out.cpu() - expected).norm() / expected.norm()).item()
    assert 1e-6 < error < 3e-4, "not 16 bits" if error <= 1e-6 else error


@pytest.mark.parametrize("length", [1, 63, 64, 65, 4097])
def test_any_length(length: int) -> None:
    Case(3, [length]).check(2e-6)


@pytest.mark.parametrize("num_parts", [1, 2, 7])
def test_ragged_batches_merge_alike_however_they_are_split(num_parts: int) -> None:
    Case(5, [1, 700, 0, 64, 129], num_parts).check(2e-6, num_parts)


def test_later_rows_see_more_and_padding_is_zero() -> None:
    case = Case(2, [130, 0, 4, 64], s_q=4)
    case.check(2e-6, num_parts=3)
    assert (case.run()[4:8] == 0).all()


def test_rows_before_the_first_key_are_zero() -> None:
    Case(2, [1, 2], s_q=3).check(2e-6)


@pytest.mark.parametrize(("kv_lora", "rope"), [(96, 16), (40, 24), (512, 64)])
def test_dimensions_are_free(kv_lora: int, rope: int) -> None:
    Case(2, [70], kv_lora=kv_lora, rope=rope).check(2e-6)


def page_order_changes_nothing(case: Case, form: Form) -> None:
    first = case.run(form=form)
    mixed = torch.randperm(case.pool.shape[0], generator=torch.Generator().manual_seed(9))
    case.pool = case.pool[mixed]
    if case.blocks is not None:
        case.stored = case.stored[mixed]
    where = {int(page): i for i, page in enumerate(mixed)}
    case.pages = [where.get(page, page) for page in case.pages]
    assert torch.equal(case.run(form=form), first)


def test_page_order_changes_nothing() -> None:
    page_order_changes_nothing(Case(3, [300]), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "blocks"), [(16, None), (128, None), (16, "fp8"), (128, "fp8")])
def test_page_order_changes_nothing_on_hopper(heads: int, blocks: Blocks | None) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    case = Case(heads, [300, 4097, 64], kv_lora=512, rope=64, dtype=torch.bfloat16, blocks=blocks)
    page_order_changes_nothing(case, "gluon")


def test_half_precision_rounds_once() -> None:
    Case(4, [200], kv_lora=64, dtype=torch.float16).check(1e-3)


def test_cached_rows_are_converted_to_the_queries_type() -> None:
    Case(4, [100], dtype=torch.float16, cache_dtype=torch.float32).check(1e-3)


@pytest.mark.parametrize(
    ("blocks", "kv_lora", "rope"), [("q8_0", 96, 32), ("q8_0", 512, 64), ("fp8", 128, 12), ("fp8", 384, 64)]
)
def test_blocks_are_read_by_their_definition(blocks: Blocks, kv_lora: int, rope: int) -> None:
    Case(5, [130, 0, 63, 1], 2, kv_lora, rope, blocks=blocks).check(2e-6, num_parts=3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("blocks", ["q8_0", "fp8"])
@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("heads", [5, 16, 40, 128])
def test_blocks_under_16_bit_queries(heads: int, s_q: int, blocks: Blocks) -> None:
    Case(heads, [4097, 1, 0, 63, 130, 9000], s_q, kv_lora=512, rope=64, dtype=torch.bfloat16, blocks=blocks).check(
        4e-3
    )


def test_a_form_that_cannot_read_blocks_refuses_them() -> None:
    for blocks, kv_lora, dtype, said in (
        ("q8_0", 512, torch.bfloat16, "required is a pool of q8_0, supported are bfloat16, float16 and fp8"),
        ("fp8", 128, torch.bfloat16, "required are 128 of 192 numbers a row, supported are 512 of 576"),
        ("fp8", 512, torch.float16, "required are queries in torch.float16 over fp8, supported is bfloat16"),
    ):
        case = Case(2, [65], kv_lora=kv_lora, rope=64, dtype=dtype, blocks=blocks)
        with pytest.raises(ValueError, match=said):
            case.run(form="gluon")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s_q", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [5, 16, 40, 128])
def test_the_hopper_kernels_agree(heads: int, s_q: int, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-3
    Case(heads, [4097, 1, 0, 63, 65, 9000], s_q, kv_lora=512, rope=64, dtype=dtype).check(tolerance, form="gluon")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "s_q"),
    [
        *[(1, 1), (1, 4), (5, 3), (8, 4), (16, 1), (16, 2), (16, 3), (16, 4), (32, 1), (40, 1)],
        *[(128, 1), (128, 2), (128, 3), (128, 4)],
    ],
)
def test_the_hopper_kernels_read_fp8(heads: int, s_q: int) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    lengths = [4097, 1, 0, 63, 65, 9000, 64, 130]
    Case(heads, lengths, s_q, kv_lora=512, rope=64, dtype=torch.bfloat16, blocks="fp8").check(4e-3, form="gluon")


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "s_q"), [(16, 1), (16, 4), (128, 1), (128, 2)])
def test_hoppers_kernel_over_fp8_is_taken_without_being_named(heads: int, s_q: int) -> None:
    """By its bits, which plain Triton's, with another order of sums, are not."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    case = Case(heads, [300, 4097, 64], s_q, kv_lora=512, rope=64, dtype=torch.bfloat16, blocks="fp8")
    chosen = case.run(form=None)
    assert torch.equal(chosen, case.run(form="gluon"))
    assert not torch.equal(chosen, case.run(form="triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("s_q", [1, 2])
def test_scores_that_rise_along_a_sequence_on_hopper(s_q: int) -> None:
    """Weights are relative to a number that moves only where scores lie 256 times above it: here they do, again and again."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU (sm_90)")
    case = Case(128, [2049, 1000], s_q, kv_lora=512, rope=64, dtype=torch.bfloat16)
    for first, last in itertools.pairwise(case.page_starts):
        for i, page in enumerate(case.pages[first:last]):
            case.pool[page] *= 0.2 + 0.15 * i
    case.check(4e-3, form="gluon")
