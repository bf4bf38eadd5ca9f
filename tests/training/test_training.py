"""The promises of training/ that a wrong export or a leaked tale would break. Seconds on the CPU."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from training.model import Storyteller, StorytellerConfig, weight_type  # noqa: E402
from training.quantize import BLOCK_BYTES, decode, encode, fake_quant  # noqa: E402
from training.train import Packed, Windows  # noqa: E402

from training import data, fables, tokenizer, train  # noqa: E402

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


def test_made_stories_are_whole_sentences_about_what_they_name() -> None:
    rng = random.Random(4)
    assert len(fables.PLOTS) == 99
    for plot in fables.PLOTS * 10:
        made = fables.make(plot, rng)
        parts = [made.text, made.moral, made.short, *(part for pair in made.questions for part in pair)]
        everything = " ".join(filter(None, parts))
        assert not set("{}<>|") & set(everything)
        assert made.text.lstrip('"')[0].isupper() and made.text[-1] in '."', made.text
        assert not re.search(r'\ba [aeio]|[.!?]"\.|  | ,', everything), everything
        assert all(a[0].isupper() and a[-1] in ".!?" for _, a in made.questions), made.questions
        named = [about for slot, about in zip(plot.about, made.about, strict=True) if slot in plot.slots]
        assert all(word in made.text for word in named), made


def test_a_wanted_animal_is_in_the_story_as_often_as_its_plot_allows() -> None:
    rng = random.Random(5)
    plot = fables.read_plots(
        "@ A B P\n<aA!> met <aB> in the <P>.\n= Be kind.\n~ Two meet.\n? Who? | The <A>.\n---\n"
    )[0]
    assert plot.slots == {"A": "animal", "B": "animal", "P": "place"} and plot.about == ("A", "B")
    stories = [fables.make(plot, rng, "otter") for _ in range(200)]
    assert sum("otter" in s.about for s in stories) > 150
    assert all(s.questions == (("Who?", f"The {s.about[0]}."),) for s in stories)


def test_a_made_chat_answers_what_was_asked() -> None:
    rng = random.Random(6)
    for _ in range(400):
        made, (request, answer) = data.told(rng, "otter")
        assert made.text in answer
        assert "fable" not in request or answer.endswith(f"The moral: {made.moral}")
        if "bout" in request:
            assert any(about.split()[0] in request for about in made.about), (request, made.about)
    for chat in [data.made_chat(rng) for _ in range(400)]:
        assert all(question.strip() and answer.strip() for question, answer in chat)


def test_a_story_is_cut_after_a_sentence_and_nothing_is_lost() -> None:
    rng = random.Random(7)
    for plot in fables.PLOTS:
        text = fables.make(plot, rng).text
        opening, rest = data.cut(text, rng)
        assert opening[-1] in '.!?"' and text == opening + text[len(opening) : -len(rest)] + rest
        assert not text[len(opening) : -len(rest)].strip()


def test_a_pace_by_steps_takes_them_all_and_ends_at_one() -> None:
    pace, seen = train.Pace(10, 0.0, torch.device("cpu")), [0.0]
    while pace.advance():
        seen.append(pace.progress)
    np.testing.assert_allclose(seen, np.arange(10) / 10)


def test_a_pace_by_the_clock_ends_at_the_time_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    pace = train.Pace(10**9, 1000.0 + 300, torch.device("cpu"))
    steps, seen = 1, [0.0]
    now[0] += 60  # the first step compiles
    while pace.advance():
        seen.append(pace.progress)
        steps += 1
        now[0] += 20.0 if steps == 500 else 0.1  # a second compilation
    assert 270 < now[0] - 1000 <= 301
    assert seen == sorted(seen) and 0.97 < seen[-1] <= 1


TOY = {
    "hidden_size": 64, "num_layers": 2, "num_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32, "v_head_dim": 32, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 4,
    "num_experts_per_token": 2, "num_shared_experts": 1,
}  # fmt: skip


@pytest.mark.full  # three starts of torch
@pytest.mark.parametrize("mode", [(), ("--tune",)])
def test_two_processes_train_as_one(tmp_path: Path, mode: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    for name in ("tales", "children", "novels", "made", "tune", "val"):
        documents = [np.r_[0, np.cumsum(rng.integers(1, 4, 60)) % 290 + 4, 1].astype(np.uint16) for _ in range(60)]
        if name == "tune":  # a question of another length each: processes have different counts of targets
            documents = [
                np.r_[d[:n] | data.NO_LOSS, d[n:]] for d, n in zip(documents, rng.integers(5, 50, 60), strict=True)
            ]
        np.save(tmp_path / f"{name}.npy", np.concatenate(documents))
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 300, "bytes": {"val": 4000}}))
    arguments = ["-m", "training.train", "--data", str(tmp_path), "--out", str(tmp_path), "--config", json.dumps(TOY),
                 "--no-compile", "--no-heldout", "--batch-tokens", "512", "--length", "64", "--long-length", "128",
                 "--rate", "3e-3", "--warmup", "5", "--dropout", "0", "--log-every", "4", "--tokens", "6144", *mode]  # fmt: skip
    root = Path(__file__).resolve().parents[2]

    def losses(*launcher: str) -> list[float]:
        done = subprocess.run([sys.executable, *launcher, *arguments], cwd=root, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)  # fmt: skip
        return [line["loss"] for line in map(json.loads, done.stdout.splitlines()) if "loss" in line]

    alone = losses()
    together = losses("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert len(alone) == 3 and alone[0] > alone[-1]
    # the balance loss is a product of two means, and those of half a batch differ a little
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_pre_tokenizer_splits_as_llama_cpp() -> None:
    trained = tokenizer.train_tokenizer(
        ['Once upon a time, in 1894, the King\'s fox said: "No!"\n\nThen 12345.'] * 3, 280
    )
    pieces = [p for p, _ in trained.pre_tokenizer.pre_tokenize_str("the King's 12345\n\nEnd")]
    assert pieces == ["the", "ĠKing", "'s", "Ġ", "123", "45", "ĊĊ", "End"]
