"""`kvfold inspect`: what a file is and whether kvfold runs it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from kvfold.cli.options import Json, ModelArgument
from kvfold.cli.terminal import human_bytes, print_json, print_table, report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from kvfold.config import ModelConfig
    from kvfold.explain import Inspection

SHOWN_CHARACTERS = 100  # of a metadata value; a chat template has thousands


def inspect(
    model: ModelArgument = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", envvar="KVFOLD_TENSORS", help="List every tensor of the file.")
    ] = False,
    json: Json = False,
) -> None:
    """Says what a file holds and whether it loads.

    Metadata, MLA dimensions, bytes per token of cache, tensor types, verdict; only the header is read. The exit code is
    1 where the file is refused.
    """
    from kvfold.explain import inspect_file, model_path

    found = inspect_file(model_path(model))
    if not tensors:
        found = replace(found, tensors=())
    if json:
        print_json(found)
    else:
        _show(report(), found)
    if found.refusal:
        raise typer.Exit(1)


def _show(console: Console, found: Inspection) -> None:
    if found.format:
        files = f"{len(found.files)} file{'s' * (len(found.files) > 1)}"
        count = sum(use.num_tensors for use in found.types)
        console.print(f"{found.path}: {found.format}, {files}, {count:,} tensors, {human_bytes(found.nbytes)}\n")
    if found.metadata:
        rows = [(key, _short(value)) for key, value in found.metadata.items()]
        print_table(console, "Metadata", ("", ""), rows)
    if found.config:
        print_table(console, "Model", ("", ""), _model(found.config, found.kv_layout))
    if found.cache:
        print_table(
            console,
            "Cache, bytes per token",
            ("type", ">latent", ">full K and V", ">ratio"),
            [
                (
                    c.cache_type,
                    "-" if c.latent_bytes is None else f"{c.latent_bytes:,}",
                    "-" if c.full_bytes is None else f"{c.full_bytes:,}",
                    f"{c.full_bytes / c.latent_bytes:.1f}" if c.full_bytes and c.latent_bytes else "-",
                )
                for c in found.cache
            ],
        )
    if found.types:
        print_table(
            console,
            "Tensor types",
            ("type", ">tensors", ">size", ""),
            [
                (use.type, f"{use.num_tensors:,}", human_bytes(use.nbytes), "" if use.decodes else "not decoded")
                for use in found.types
            ],
        )
    if found.tensors:
        print_table(
            console,
            "Tensors",
            ("name", "type", "shape", ">bytes", ">offset", "file"),
            [
                (t.name, t.type, " x ".join(map(str, t.shape)), f"{t.nbytes:,}", f"{t.offset:,}", t.file)
                for t in found.tensors
            ],
        )
    for line in found.info:
        console.print(f"note: {line}")
    if found.refusal:
        console.print(f"refused: {found.refusal}", style="red")
    else:
        console.print(f"loads, backend {found.backend}", style="green")


def _model(config: ModelConfig, kv_layout: str) -> Iterator[tuple[str, str]]:
    mla, moe, yarn = config.mla, config.moe, config.rope.yarn
    yield "family", config.family
    yield "layers", f"{config.num_layers}, of which {config.num_dense_layers} dense"
    yield "hidden size", f"{config.hidden_size:,}"
    yield "vocabulary", f"{config.vocab_size:,}{', head tied to the embedding' * config.tie_word_embeddings}"
    yield "context", f"{config.max_position:,} tokens"
    if moe:
        groups = f", from {moe.num_groups_per_tok} of {moe.num_groups} groups" if moe.num_groups > 1 else ""
        yield "experts", f"{moe.num_experts_per_tok} of {moe.num_experts}{groups}, {moe.scoring.value} scores"
        yield "expert width", f"{moe.expert_intermediate_size:,}, shared {moe.shared_intermediate_size:,}"
    head = f"key {mla.qk_nope_head_dim} nope + {mla.qk_rope_head_dim} rope, value {mla.v_head_dim}"
    yield "heads", f"{mla.num_heads}, {head}"
    parts = f"{mla.kv_lora_rank} (kv_lora_rank) + {mla.qk_rope_head_dim} (rope)"
    yield "latent", f"{parts} = {mla.latent_dim} numbers a token and layer"
    yield "query", f"q_lora_rank {mla.q_lora_rank}" if mla.q_lora_rank else "one matrix, no q_lora_rank"
    yield "up-projection", f"stored as {kv_layout}"
    scaling = f", YaRN factor {yarn.factor:g} over {yarn.original_max_position:,}" if yarn else ""
    yield "rope", f"theta {config.rope.theta:g}, {config.rope.pairing.value} pairs{scaling}"


def _short(value: object) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ... ({len(text):,} characters)"
