"""MLA prefill against float64: causal, over a cached prefix, in runs of keys that merge."""

import itertools

import pytest
import torch

from kvfold.kernels.mla_prefill import merge_parts, mla_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(
    rows: int, keys: int, heads: int, nope: int, rope: int, v: int, dtype: torch.dtype, shared_rope: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k_nope, k_rope, v; k_nope and v are views of one array of expanded rows, poisoned behind the last key."""
    generator = torch.Generator().manual_seed(rows * 1000 + keys)
    q = (2 * torch.randn(rows, heads, nope + rope, generator=generator)).to(dtype).to(DEVICE)
    expanded = torch.randn(keys, heads, nope + v, generator=generator)
    k_rope = torch.randn(keys, 1 if shared_rope else heads, rope, generator=generator).to(dtype).to(DEVICE)
    poisoned = torch.cat([expanded, torch.full((70, heads, nope + v), float("nan"))]).to(dtype).to(DEVICE)
    return q, poisoned[:keys, :, :nope], k_rope, poisoned[:keys, :, nope:]


def expected(
    q: torch.Tensor, k_nope: torch.Tensor, k_rope: torch.Tensor, v: torch.Tensor, scale: float, ahead: int
) -> tuple[torch.Tensor, torch.Tensor]:
    heads = q.shape[1]
    k = torch.cat([k_nope, k_rope.expand(-1, heads, -1)], -1).double()
    score = torch.einsum("rhd,khd->hrk", q.double(), k) * scale
    sees = ahead + torch.arange(q.shape[0], device=q.device)[:, None]
    score = score.masked_fill(torch.arange(k.shape[0], device=q.device)[None] > sees, float("-inf"))
    lse = torch.logsumexp(score, -1)
    weights = torch.exp(score - lse.clamp_min(-1e300)[..., None])
    return torch.einsum("hrk,khv->rhv", weights, v.double()), lse


def check(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert not got.isnan().any(), "unwritten or poisoned output"
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error <= tolerance, f"relative error {error:.2e}, tolerance {tolerance:.0e}"


@pytest.mark.parametrize(("rows", "cached"), [(1, 0), (17, 0), (65, 0), (100, 37), (1, 130), (63, 64)])
@pytest.mark.parametrize("heads", [1, 3])
def test_rows_see_the_cache_and_what_is_before_them(rows: int, cached: int, heads: int) -> None:
    q, k_nope, k_rope, v = inputs(rows, rows + cached, heads, 32, 16, 32, torch.float32)
    out = torch.full((rows, heads, 32), float("nan"), device=DEVICE)
    lse = torch.full((heads, rows), float("nan"), device=DEVICE)
    mla_prefill(q, k_nope, k_rope, v, out, lse, scale=0.2, first_row=cached, first_key=0, merge=False)
    want, want_lse = expected(q, k_nope, k_rope, v, 0.2, cached)
    check(out, want, 2e-6)
    check(lse, want_lse, 2e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_runs_of_keys_merge_to_the_whole(order: tuple[int, ...]) -> None:
    rows, cached, bounds = 70, 50, [0, 33, 97, 120]
    q, k_nope, k_rope, v = inputs(rows, rows + cached, 2, 16, 16, 48, torch.float32)
    out = torch.full((rows, 2, 48), float("nan"), device=DEVICE)
    lse = torch.full((2, rows), float("nan"), device=DEVICE)
    for n, run in enumerate(order):
        first, last = bounds[run], bounds[run + 1]
        mla_prefill(
            q, k_nope[first:last], k_rope[first:last], v[first:last], out, lse, scale=0.2, first_row=cached,
            first_key=first, merge=n > 0,
        )  # fmt: skip
    want, want_lse = expected(q, k_nope, k_rope, v, 0.2, cached)
    check(out, want, 2e-6)
    check(lse, want_lse, 2e-6)


def test_rows_without_a_key_are_zero_or_stay() -> None:
    q, k_nope, k_rope, v = inputs(40, 30, 2, 16, 16, 16, torch.float32)
    out = torch.full((40, 2, 16), float("nan"), device=DEVICE)
    lse = torch.full((2, 40), float("nan"), device=DEVICE)
    mla_prefill(q, k_nope, k_rope, v, out, lse, scale=0.2, first_row=0, first_key=25, merge=False)
    assert (out[:25] == 0).all() and (lse[:, :25] == float("-inf")).all()
    assert not out.isnan().any()
    before, lse_before = torch.randn_like(out), torch.randn_like(lse)
    out.copy_(before)
    lse.copy_(lse_before)
    mla_prefill(q, k_nope, k_rope, v, out, lse, scale=0.2, first_row=0, first_key=25, merge=True)
    assert torch.allclose(out[:25], before[:25], rtol=1e-6) and torch.allclose(lse[:, :25], lse_before[:, :25])


def test_half_precision_odd_dimensions_and_a_rope_part_per_head() -> None:
    q, k_nope, k_rope, v = inputs(50, 80, 3, 24, 12, 20, torch.float16, shared_rope=False)
    out = torch.full((50, 3, 20), float("nan"), dtype=torch.float16, device=DEVICE)
    lse = torch.full((3, 50), float("nan"), device=DEVICE)
    mla_prefill(q, k_nope, k_rope, v, out, lse, scale=0.2, first_row=30, first_key=0, merge=False)
    check(out, expected(q, k_nope, k_rope, v, 0.2, 30)[0], 1e-3)


def counted(rows: int, kv_len: int, keys: int, heads: int, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The last of `rows` rows are a sequence's last, of kv_len keys in a run of `keys`; those before its first see none."""
    q, k_nope, k_rope, v = inputs(rows, keys, heads, *sizes, dtype)
    for array in (k_nope, k_rope, v):
        array[kv_len:] = 0
    scale = (sizes[0] + sizes[1]) ** -0.5
    out = torch.full((rows, heads, sizes[2]), float("nan"), dtype=dtype, device=DEVICE)
    lse = torch.full((heads, rows), float("nan"), device=DEVICE)
    length = torch.tensor([kv_len], dtype=torch.int32, device=DEVICE)
    mla_prefill(q, k_nope, k_rope, v, out, lse, scale=scale, first_row=0, first_key=0, merge=False, kv_len=length)
    none = max(rows - kv_len, 0)
    assert (out[:none] == 0).all() and (lse[:, :none] == float("-inf")).all()
    keys_seen = (array[:kv_len] for array in (k_nope, k_rope, v))
    want, want_lse = expected(q[none:], *keys_seen, scale, kv_len - (rows - none))
    check(out[none:], want, 2e-6 if dtype == torch.float32 else 5e-3)
    check(lse[:, none:], want_lse, 1e-5)


@pytest.mark.parametrize(("rows", "kv_len", "keys"), [(16, 5, 64), (64, 64, 64), (40, 1, 64), (70, 129, 192)])
def test_keys_are_counted_on_the_device(rows: int, kv_len: int, keys: int) -> None:
    counted(rows, kv_len, keys, 2, (32, 16, 32), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize(
    ("rows", "kv_len", "keys"),
    [(16, 5, 64), (64, 64, 64), (64, 33, 64), (512, 400, 512), (256, 700, 768), (16, 4000, 4096), (64, 2050, 3072)],
)
def test_keys_are_counted_on_the_device_on_hopper(rows: int, kv_len: int, keys: int) -> None:
    """With parts of the keys side by side, of which the last may be empty, and without."""
    counted(rows, kv_len, keys, 16, (128, 64, 128), torch.bfloat16)


@pytest.mark.parametrize("merge", [False, True])
def test_parts_of_the_keys_side_by_side_make_the_whole(merge: bool) -> None:
    rows, cached, bounds = 37, 50, [0, 33, 60, 87]
    q, k_nope, k_rope, v = inputs(rows, rows + cached, 2, 16, 16, 24, torch.float32)
    parts = torch.full((len(bounds) - 1, rows, 2, 24), float("nan"), device=DEVICE)
    parts_lse = torch.full((len(bounds) - 1, 2, rows), float("nan"), device=DEVICE)
    for n, (first, last) in enumerate(itertools.pairwise(bounds)):
        mla_prefill(
            q, k_nope[first:last], k_rope[first:last], v[first:last], parts[n], parts_lse[n], scale=0.2,
            first_row=cached, first_key=first, merge=False,
        )  # fmt: skip
    out, lse = torch.full_like(parts[0], float("nan")), torch.full_like(parts_lse[0], float("nan"))
    if merge:
        out, lse = parts[1].clone(), parts_lse[1].clone()
        parts, parts_lse = parts[::2], parts_lse[::2]
    merge_parts(parts, parts_lse, out, lse, merge)
    want, want_lse = expected(q, k_nope, k_rope, v, 0.2, cached)
    check(out, want, 2e-6)
    check(lse, want_lse, 2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "cached", "heads"), [(300, 0, 16), (64, 1000, 5), (1, 4097, 16), (2050, 65, 40)])
def test_on_hopper_results_of_either_type_stay_within_their_rows(
    rows: int, cached: int, heads: int, kind: str, runs: int
) -> None:
    """Whole blocks of 64 rows leave through TMA; what lies behind the last row keeps its bits."""
    keys = rows + cached
    q, k_nope, k_rope, v = inputs(rows, keys, heads, 128, 64, 128, torch.bfloat16)
    whole = torch.full((rows + 70, heads, 128), float("nan"), dtype=getattr(torch, kind), device=DEVICE)
    out = whole[:rows]
    lse = torch.full((heads, rows), float("nan"), device=DEVICE)
    for first, last in itertools.pairwise([keys * n // runs for n in range(runs + 1)]):
        mla_prefill(
            q, k_nope[first:last], k_rope[first:last], v[first:last], out, lse, scale=192**-0.5, first_row=cached,
            first_key=first, merge=first > 0, form="gluon",
        )  # fmt: skip
    want, want_lse = expected(q, k_nope, k_rope, v, 192**-0.5, cached)
    check(out, want, 5e-3)
    check(lse, want_lse, 1e-5)
    assert whole[rows:].isnan().all(), "written behind the last row"
