"""Turns what a user calls a model into a local path: a file or directory that exists, or a name on the Hugging Face
hub, whose files huggingface_hub downloads once into its cache, with its own progress bars.

    org/repo            the safetensors of a repository, or its only GGUF model
    org/repo:Q4_K_M     the GGUF model of that quantization (llama.cpp's -hf user/model:quant)
    org/repo:file.gguf  that file; of a split model all shards

Owns the choice of files; downloading, caching and resuming are huggingface_hub's. A path that exists is returned
before huggingface_hub is imported, so local files never touch the network.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from kvfold.errors import ModelFileError, SettingError
from kvfold.formats.gguf import SHARD_NAME
from kvfold.formats.safetensors import PICKLE_SUFFIXES

# A safetensors model: weights, configuration, vocabulary. No pickles, no other frameworks' weights, no code.
SAFETENSORS_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json")
# What the text room reads of a Hugging Face directory, where it exists.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "tiktoken.model",  # Kimi-K2 and Moonlight have no tokenizer.json
)
NETWORK_TIMEOUT = 10.0  # seconds for the hub's answer what a repository holds
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<choice>[^:]+))?")


def resolve(name: str | os.PathLike[str]) -> Path:
    """The local path of a model, downloaded first where `name` is one of the hub's.

    ModelFileError: neither a path nor a repository that can be had. SettingError: the name is empty, or the repository holds
    several models and the name does not say which; the sentence lists them.
    """
    if not str(name):
        raise SettingError("The name of the model is empty: give a file, a directory or a hub name (org/repo).")
    path = Path(name).expanduser()
    if path.exists():
        return path
    match = _NAME.fullmatch(str(name))
    if match is None or str(name).startswith((".", "~")):
        raise ModelFileError(name, "there is no such file or directory, and it is no hub name (org/repo).")
    repository, choice = match["repository"], match["choice"] or ""
    listing = _list_files(repository)
    wanted = _choose(repository, listing, choice)
    folder = _download(repository, wanted)
    return folder / wanted[0] if wanted[0].endswith(".gguf") else folder


def repository_of(path: Path) -> str:
    """The hub name of a directory in huggingface_hub's cache (models--org--repo/snapshots/REVISION), else ""."""
    parts = path.resolve().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return ""
    return parts[-3].removeprefix("models--").replace("--", "/", 1)


def _choose(repository: str, listing: list[str], choice: str) -> list[str]:
    """The files to download: the GGUF shards of one model in order, or everything a safetensors model needs."""
    models: dict[str, list[str]] = {}  # a split model counts once, under the name without its shard number
    for file in sorted(listing):
        if file.endswith(".gguf") and not PurePosixPath(file).name.startswith("mmproj"):
            shard = SHARD_NAME.fullmatch(file)
            models.setdefault(shard["stem"] if shard else file.removesuffix(".gguf"), []).append(file)
    safetensors = [file for file in listing if "/" not in file and file.endswith(".safetensors")]
    if not choice and safetensors:
        patterns = (*SAFETENSORS_PATTERNS, *VOCABULARY_FILES)
        return [file for file in listing if "/" not in file and any(PurePosixPath(file).match(p) for p in patterns)]
    if not models:
        kind = f"a GGUF model {choice!r}" if choice else "a model"
        pickles = any(file.endswith(PICKLE_SUFFIXES) for file in listing)
        reason = "only PyTorch pickles, which kvfold does not open" if pickles else "no such file"
        raise ModelFileError(
            repository, f"expected {kind} as .safetensors or .gguf in this repository, got {reason}."
        )
    # a tag stands between separators: Q4_K does not mean Q4_K_M, nor IQ4_K
    tag = re.compile(rf"(?:^|[-./]){re.escape(choice)}(?=$|[-./])", re.IGNORECASE)
    if choice.endswith(".gguf"):
        found = [files for files in models.values() if choice in files]
    else:
        found = [files for stem, files in models.items() if not choice or tag.search(stem)]
    if len(found) != 1:
        names = ", ".join(f"{repository}:{files[0]}" for files in (found or models.values()))
        raise SettingError(
            f"{repository}{':' * bool(choice)}{choice}: {len(found) or 'no'} models of that name. Name one of {names}."
        )
    return found[0]


def _list_files(repository: str) -> list[str]:
    """The files of the repository; without a network those of the copy in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        # not list_repo_files: without a network that one retries for 23 s
        info = HfApi().model_info(repository, timeout=NETWORK_TIMEOUT)
        return [file.rfilename for file in info.siblings or []]
    except GatedRepoError as error:
        raise ModelFileError(
            repository, "the repository is gated. Accept its terms on huggingface.co, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelFileError(
            repository,
            "there is no such file or directory here, and no such repository on the hub (or it is private: "
            "`hf auth login`).",
        ) from error
    except HFValidationError as error:
        raise ModelFileError(repository, f"this is no hub name: {error}.") from error
    except Exception as unreachable:  # whatever the HTTP library raises without a network
        try:
            folder = Path(snapshot_download(repository, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ModelFileError(
                repository,
                f"there is no such file or directory here, and the hub cannot be reached "
                f"({type(unreachable).__name__}). Download it where there is a network (hf download {repository}) "
                f"and give its directory, or set HF_HOME to a cache that has it.",
            ) from unreachable
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _download(repository: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # network, disk, permissions: the library's own types, all told in one sentence
        raise ModelFileError(
            repository,
            f"the download did not finish: {error}. What has arrived is kept; the same command goes on from there.",
        ) from error
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise ModelFileError(repository, f"{len(missing)} files did not arrive: {', '.join(missing[:8])}.")
    return folder
