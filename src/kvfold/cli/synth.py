"""`kvfold synth`: writes a model of random weights in a real shape."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli.terminal import ByteProgress, human_bytes, note


def synth(
    shape: Annotated[
        str,
        typer.Argument(
            metavar="SHAPE",
            envvar="KVFOLD_SHAPE",
            help="deepseek-v2-lite, deepseek-v2, deepseek-v3, kimi-k2, moonlight-16b, glm-4.7-flash or tiny.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", envvar="KVFOLD_OUT", help="The file to write.")],
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            envvar="KVFOLD_LAYERS",
            show_default="all",
            help="Only so many layers: at most the model's dense ones, at least one MoE layer from 2 on.",
        ),
    ] = None,
    type: Annotated[
        str, typer.Option("--type", envvar="KVFOLD_TYPE", help="Type of the matrices, such as q4_k or bf16.")
    ] = "iq4_nl",
    legacy_kv_b: Annotated[
        bool,
        typer.Option(
            "--legacy-kv-b",
            envvar="KVFOLD_LEGACY_KV_B",
            help="One attn_kv_b a layer, as older files have, instead of attn_k_b and attn_v_b.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", "-s", envvar="KVFOLD_SEED", help="The same seed gives the same bytes.")
    ] = 0,
) -> None:
    """Writes a model of random weights in a released model's shape.

    It behaves like the released one on a machine, before 400 GB are downloaded.
    """
    from kvfold.formats.synthetic import estimate_bytes, named_shape, synthesize

    config = named_shape(shape, layers)
    note(f"{out}: about {human_bytes(estimate_bytes(config, type=type, legacy_kv_b=legacy_kv_b))} to write")
    with ByteProgress("writing") as progress:
        written = synthesize(config, out, type=type, legacy_kv_b=legacy_kv_b, seed=seed, progress=progress)
    note(f"{out}: {config.num_layers} layers, {human_bytes(written)} in {progress.seconds:.1f} s")
