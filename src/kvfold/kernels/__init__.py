"""GPU kernels written in Python (Triton, and Gluon which ships inside it), one per file, launcher beside it.

Owns launches and nothing else: no model, no cache, no step. A launcher takes torch tensors of one device, checks nothing
that costs time, never synchronizes with the host, never copies between devices, and allocates only what it returns (and
`mla_prefill` the partial results of few rows over many keys), so every one of them may be captured in a CUDA graph.
Element types are float32, bfloat16 and float16; sums are float32, and products of float32 inputs are exact
(`input_precision="ieee"`). Sizes are free: no dimension has to be a power of two. Everything multiplied by a page, slot
or row number is int64. Importing this package imports neither torch nor triton.

The two attention kernels have one calling form each, so that a kernel made for one card and a plain-Triton twin that
runs on any (and in the CPU interpreter) can stand in for one another. Which one runs is decided by card, types and
sizes; `form="triton"` or `"gluon"` forces one, for tests and benchmarks.

    mla_decode.py
        workspace = DecodeWorkspace(batch, rows_per_sequence, num_heads, kv_lora, device)
            Buffers of one captured graph, shared by its layers: the step-wide tile list, partial results. The grid is
            fixed when it is made; `max_tokens` is not asked: any lengths that the pool can hold are served.
        schedule_decode(kv_lens, workspace)
            Once a step, before the layers: one launch that deals the step's 64-token tiles to the grid, on device. Another
            launch has to come before mla_decode.
        mla_decode(q, pool, pages, page_starts, kv_lens, out, workspace, *, scale, kv_lora)
            q           [B * s_q, H, latent]      rows of a sequence are neighbours, its last row sees all its keys
            pool        [num_pages, 64, latent]   one layer; rows [c_kv | k_rope]; element type of its own
            pages       int32 [..]                page list of sequence b: pages[page_starts[b] : page_starts[b + 1]]
            page_starts int32 [B + 1]
            kv_lens     int32 [B]                 this step's rows included; row i of s_q sees kv_len - s_q + 1 + i keys
            out         [B * s_q, H, kv_lora]     written whole; a sequence with kv_len 0 (padding) gets zeros
            Queries, and weights of values, are rounded to the type of `out`; cached rows are converted to it.

    mla_prefill.py
        mla_prefill(q, k_nope, k_rope, v, out, lse, *, scale, first_row, first_key, merge, kv_len=None)
            q      [R, H, nope + rope]   rows first_row .. first_row + R of one sequence
            k_nope [K, H, nope]          keys first_key .. first_key + K; any strides but the last, which is 1
            k_rope [K, H or 1, rope]     shared by the heads where there is 1
            v      [K, H, v]
            out    [R, H, v]             of q's type or float32
            lse    float32 [H, R]        log of the sum of exp(scale * score), natural; -inf where no key was seen
            Row i sees key j iff first_key + j <= first_row + i. merge: `out` and `lse` hold the attention over other keys
            and get that over both; else they are written. A row that sees no key is zero (merge: stays as it was).
            kv_len int32 [1]: the first so many keys are there, and the rows are the last of them; zeros are behind.
"""
