"""The promises of training/ that a wrong export or a leaked tale would break. Seconds on the CPU."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from training.model import Storyteller, StorytellerConfig, weight_type  # noqa: E402
from training.quantize import BLOCK_BYTES, decode, encode, fake_quant  # noqa: E402
from training.train import Packed, Windows  # noqa: E402

from training import data, fables, tokenizer  # noqa: E402

TINY = StorytellerConfig(
    vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, q_lora_rank=32, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=32, v_head_dim=32, intermediate_size=96, moe_intermediate_size=32, num_experts=4,
    num_experts_per_token=2, num_shared_experts=1,
)  # fmt: skip


@pytest.mark.parametrize("kind", sorted(BLOCK_BYTES))
def test_fake_quantizer_equals_the_file_bit_for_bit(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 96, generator=generator) * torch.rand(300, 1, generator=generator) * 5
    weight[1] = 0.0
    weight[2] = 1e-9  # the float16 scale underflows to 0
    weight[3] = weight[3].abs()
    blocks = encode(weight, kind)
    theirs = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert blocks.shape == (300, 96 // 32 * BLOCK_BYTES[kind])
    np.testing.assert_array_equal(fake_quant(weight, kind).numpy(), theirs)
    np.testing.assert_array_equal(decode(blocks, kind).numpy(), theirs)


def test_fake_quantizer_passes_the_gradient_unchanged() -> None:
    weight = torch.randn(4, 64, requires_grad=True)
    fake_quant(weight, "IQ4_NL").mul(torch.arange(64.0)).sum().backward()
    assert weight.grad is not None
    np.testing.assert_array_equal(weight.grad.numpy(), np.tile(np.arange(64.0, dtype=np.float32), (4, 1)))


def test_network_equals_transformers() -> None:
    pytest.importorskip("transformers")
    from training.evaluate import transformers_model

    torch.manual_seed(0)
    model = Storyteller(TINY).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():  # nothing zero, nothing one, as after training
            weight.copy_(fake_quant(torch.rand_like(weight) - 0.3, weight_type(name)))
        tokens = torch.randint(0, 300, (2, 17))
        ours, theirs = model(tokens), transformers_model(model)(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_held_out_titles_and_their_copies_never_reach_training() -> None:
    rng = random.Random(1)
    vocabulary = [
        f"{a}{b}" for a in ("sun", "moon", "troll", "king", "sea") for b in ("", "ly", "er", "ing", "ed", "s")
    ]

    def tale() -> str:
        return "There was once " + " ".join(rng.choice(vocabulary) for _ in range(300)) + "."

    def book(title: str, text: str) -> dict[str, object]:
        return {"kind": "book", "title": title, "author": "L. Frank Baum", "text": "## I\r\n\r\n" + text}

    def record(title: str, origin: str, text: str) -> dict[str, object]:
        return {"title": title, "origin": origin, "sections": [text], "questions": []}

    willows, norwegian, fresh, other = tale(), tale(), tale(), tale()
    works = [
        book("The Wind in the Willows", willows),
        book("Ozma of Oz", fresh),
        book("Reprint", willows[:900] + tale()),
    ]
    records = [
        record("master girl", "norwegian-fairybook", norwegian),
        record("The Master Girl", "blue-fairybook", other),  # the same tale retold
        record("copy", "green-fairybook", norwegian.replace("There was once", "Once there was")),
        record("thumbelina", "first-round", tale()),
    ]
    tales, train_records, held_out, dropped = data.split_documents(works, records)
    assert {t.source for t in tales} == {"Ozma of Oz", "fairytale_qa"}
    assert [r["title"] for r in train_records] == ["thumbelina"]
    assert len(dropped["near_copies"]) == 3
    assert len(held_out["norwegian-fairybook"]) == len(held_out["The Wind in the Willows"]) == 1


def test_windows_visit_every_token_once_an_epoch() -> None:
    windows = Windows(np.arange(1001, dtype=np.uint16), 100, np.random.default_rng(0))
    rows = windows.take(9)
    assert rows.shape == (9, 101)
    assert len(np.unique(rows[:, :-1])) == 900


def test_packed_rows_begin_with_a_document_and_hide_the_filling() -> None:
    tokens = np.concatenate([np.r_[0, np.full(n, 9), 1] for n in (30, 50, 20, 70)]).astype(np.uint16)
    rows = Packed(tokens, 100, np.random.default_rng(0)).take(3)
    assert (rows[:, 0] == 0).all()
    assert all(row[-1] == (tokenizer.EOS_ID | data.NO_LOSS) for row in rows if row[-1] not in (1, 9))


def test_made_fables_are_whole_sentences_about_their_animals() -> None:
    rng = random.Random(4)
    for plot in (*fables.FABLES, *fables.TALES) * 20:
        made = fables.make(plot, rng)
        assert not set("{}<>|") & set(made.text + made.moral)
        assert made.text[0].isupper() and made.text[-1] in '."'
        assert not any(f" a {vowel}" in made.text for vowel in "aeio")
        named = [slot for slot in plot.about if slot in plot.slots]
        assert all(word in made.text for slot, word in zip(plot.about, made.about, strict=True) if slot in named)


def test_pre_tokenizer_splits_as_llama_cpp() -> None:
    trained = tokenizer.train_tokenizer(
        ['Once upon a time, in 1894, the King\'s fox said: "No!"\n\nThen 12345.'] * 3, 280
    )
    pieces = [p for p, _ in trained.pre_tokenizer.pre_tokenize_str("the King's 12345\n\nEnd")]
    assert pieces == ["the", "ĠKing", "'s", "Ġ", "123", "45", "ĊĊ", "End"]
