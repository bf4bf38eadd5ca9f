"""Our renderings are what jinja2 makes of the published templates.

The published texts are not part of this repository. What jinja2 made of each, over 500 seeded conversations, is
recorded here as a digest; with the texts at hand, KVFOLD_TEMPLATES=DIR (files *.jinja) compares string by string.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvfold.text.known_templates import KNOWN, Conversation, Render, known_template
from text.conversations import conversations

BOS, EOS = "<bos>", "<{eos}>"  # braces, as a renderer might format strings

# SHA-256 of the template -> SHA-256 of jinja2's renderings of conversations(500, seed=1), as one JSON list
DIGESTS = {
    "8aeba567270fa9a8d5372caf4b04affea947c4421d96adc01e3ff94021b0ae8e": (
        "a7a8df08aad8a05b1abb864d85466513c9607b7bf71d64c20f08ba306f39df78"
    ),
    "cac8d3ea82bac9a92114e474c67bed1497208570426258f9c447a1b355322117": (
        "3d7b2ed0dfada7660e7adaaa33cdc151179579d458d0baccaff8cbe1d0242ec5"
    ),
    "3b8267e54b67df6500f231ffa969955cc9d26b3444a291ced4eb96ca7d3ca1ea": (
        "3b71b09f93f409d934c86e9280a4a6a96ff75790d3473536d4ed0eb41f468231"
    ),
    "3a3036eeb96ca0e48565fc1f19b4d7d3fa17ada32bb1b3d5ed539ae74cf22923": (
        "19a24c11f4a78ec6c2dd773175f07886a472789e4d08dc901839a383f56875e3"
    ),
    "22e97ba043dacf9df1f071a9de9d2bb6b0757491f16e96e810834b86e1641286": (
        "5f32c0a4febd2f7ba3e212748288a9878dd3f0d58b40f5aa3bbcccfa4344b9ac"
    ),
    "b6835114b7303ddd78919a82e4d9f7d8c26ed0d7dfc36beeb12d524f6144eab1": (
        "cd74267d4228b7387971e31aae69058db472b7ab94059a4f246316029f43dd03"
    ),
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": (
        "f2a4197acad3f815c8bd43f3e5e9f2de550b3dae88afda18d3e7d6adbd7439eb"
    ),
    "197ecb0f6315af9121078b3f966dfd9d9f1debcd4baf5ac229671b4818d33e26": (
        "41d20a37815af454cf4121a63daca4bd5e681e621ba16dc1edbdb7f17da0a544"
    ),
    "45690185067ea25c073bff2d3e425a45ee2564d2bbf6cdf7d885e139d460b8e0": (
        "d1926804792701d316a1a42d58156a122ef4c522579351c097152e4049079f79"
    ),
    "0af7f5845651f3ba85a82d70d8af968a1da0a60f4c7bb662a9c305cfc9cc224c": (
        "a9aa262bca080f9667cc7aed28fcc2da9d39547bf7f031d91385b75776ba2869"
    ),
    "0d19c3a601c02d8f788799efcaceee9f0cda955e165b9c137ea9f7198fea4d37": (
        "a9aa262bca080f9667cc7aed28fcc2da9d39547bf7f031d91385b75776ba2869"
    ),
}


def ours(render: Render) -> list[str]:
    return [
        render(Conversation([(m["role"], m["content"]) for m in messages], BOS, EOS, generation, thinking))
        for messages, generation, thinking in conversations(500, seed=1)
    ]


def jinjas(source: str) -> list[str]:
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    return [
        template.render(
            messages=messages, add_generation_prompt=generation, thinking=thinking, bos_token=BOS, eos_token=EOS
        )
        for messages, generation, thinking in conversations(500, seed=1)
    ]


@pytest.fixture
def storyteller_template(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    from training.tokenizer import CHAT_TEMPLATE

    return CHAT_TEMPLATE


@pytest.mark.parametrize("template", DIGESTS)
def test_a_published_template_is_rendered_as_jinja2_renders_it(template: str) -> None:
    rendered = ours(KNOWN[template])
    assert hashlib.sha256(json.dumps(rendered).encode()).hexdigest() == DIGESTS[template]
    assert len(set(rendered)) > 200


def test_the_storytellers_template_is_known_and_rendered_as_jinja2_renders_it(storyteller_template: str) -> None:
    render = known_template(storyteller_template)
    assert render is not None, "the template changed: write its hash and its form to known_templates.py"
    assert ours(render) == jinjas(storyteller_template)


def test_every_known_template_is_tested(storyteller_template: str) -> None:
    storyteller = hashlib.sha256(storyteller_template.encode()).hexdigest()
    assert set(KNOWN) == {*DIGESTS, storyteller}


def test_only_the_exact_text_is_known(storyteller_template: str) -> None:
    assert known_template(storyteller_template + "\n") is known_template(storyteller_template)
    changes: tuple[Callable[[str], str], ...] = (
        lambda t: t + " ",
        lambda t: t + "\n\n",
        lambda t: t.replace("user", "User", 1),
    )
    for change in changes:
        assert known_template(change(storyteller_template)) is None


@pytest.mark.skipif("KVFOLD_TEMPLATES" not in os.environ, reason="KVFOLD_TEMPLATES=DIR names the published texts")
def test_the_published_texts_themselves() -> None:
    files = sorted(Path(os.environ["KVFOLD_TEMPLATES"]).glob("*.jinja"))
    assert files
    for file in files:
        source = file.read_text(encoding="utf-8")
        render = known_template(source)
        assert render is not None, file
        assert ours(render) == jinjas(source), file
