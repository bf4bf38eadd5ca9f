"""Names of models: paths that exist never reach the network, hub names choose exactly the files that are needed."""

from __future__ import annotations

import socket
import sys
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from kit.tiny_models import tiny_model, write_gguf, write_hf_dir
from kvfold.errors import ModelFileError, SettingError
from kvfold.formats.checkpoint import open_checkpoint
from kvfold.formats.hub import repository_of, resolve

HF_FILES = [
    ".gitattributes",
    "README.md",
    "config.json",
    "configuration_deepseek.py",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "original/consolidated.safetensors",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer_config.json",
]
GGUF_FILES = [
    "README.md",
    "config.json",
    "mmproj-F16.gguf",
    "V3-IQ4_K.gguf",
    "V3-Q4_K.gguf",
    "V3-Q8_0.gguf",
    *(f"Q4_K_M/V3-Q4_K_M-{i:05d}-of-00003.gguf" for i in (1, 2, 3)),
]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository. `.files` is its list, `.downloaded` what was asked for, `.error` what it raises."""
    state = SimpleNamespace(files=[], downloaded=None, error=None, cached=[])
    folder = tmp_path / "models--org--repo" / "snapshots" / "0123"

    def model_info(self, repository, timeout):
        if state.error is not None:
            raise state.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in state.files])

    def snapshot_download(repository, *, allow_patterns=None, local_files_only=False):
        if local_files_only and not state.cached:
            raise LocalEntryNotFoundError("nothing cached")
        present = state.cached if state.error is not None else state.files
        wanted = [f for f in present if allow_patterns is None or any(fnmatch(f, p) for p in allow_patterns)]
        if not local_files_only:
            state.downloaded = wanted
        for file in wanted:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    state.folder = folder
    return state


def http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, "from the server")
    return error


def test_local_paths_never_touch_the_network(tmp_path, no_network, monkeypatch):
    file = write_gguf(tiny_model("v3"), tmp_path / "model.gguf")
    directory = write_hf_dir(tiny_model("v3"), tmp_path / "org" / "repo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it now would fail
    for name in (file, str(file), "model.gguf", directory, "org/repo"):
        path = resolve(name)
        assert path.samefile(file if str(name).endswith(".gguf") else directory)
        open_checkpoint(path)


def test_home_directory(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.gguf").touch()
    assert resolve("~/model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize(
    "name", ["model.gguf", "./org/repo", "../x/y", "/a/b", "a/b/c", "", "org/", "a b/c", "~/x"]
)
def test_what_is_neither_path_nor_hub_name(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":
        return  # the current directory
    with pytest.raises(ModelFileError, match="no such file or directory"):
        resolve(name)


def test_a_safetensors_repository_downloads_what_a_model_needs(hub):
    hub.files = HF_FILES
    assert resolve("org/repo") == hub.folder
    assert hub.downloaded == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("choice", "downloaded"),
    [
        ("Q8_0", ["V3-Q8_0.gguf"]),
        ("q8_0", ["V3-Q8_0.gguf"]),
        ("Q4_K", ["V3-Q4_K.gguf"]),
        ("IQ4_K", ["V3-IQ4_K.gguf"]),
        ("V3-Q8_0.gguf", ["V3-Q8_0.gguf"]),
        ("Q4_K_M", GGUF_FILES[-3:]),
        ("Q4_K_M/V3-Q4_K_M-00001-of-00003.gguf", GGUF_FILES[-3:]),
    ],
)
def test_a_gguf_model_is_chosen_by_file_or_quantization(hub, choice, downloaded):
    hub.files = GGUF_FILES
    assert resolve(f"org/repo:{choice}") == hub.folder / downloaded[0]
    assert hub.downloaded == downloaded


@pytest.mark.parametrize("choice", ["", ":Q5_K", ":absent.gguf", ":V3"])
def test_an_unclear_choice_lists_what_there_is(hub, choice):
    hub.files = GGUF_FILES
    with pytest.raises(SettingError) as caught:
        resolve(f"org/repo{choice}")
    assert "org/repo:V3-Q8_0.gguf" in str(caught.value)
    assert "mmproj" not in str(caught.value)
    assert hub.downloaded is None


def test_the_only_gguf_model_needs_no_choice(hub):
    hub.files = ["README.md", "V3-Q8_0.gguf", "mmproj-F16.gguf"]
    assert resolve("org/repo") == hub.folder / "V3-Q8_0.gguf"


@pytest.mark.parametrize(
    ("files", "named"),
    [(["pytorch_model.bin", "config.json"], "only PyTorch pickles"), (["README.md"], "no such file")],
)
def test_a_repository_without_a_model(hub, files, named):
    hub.files = files
    with pytest.raises(ModelFileError, match=named):
        resolve("org/repo")


@pytest.mark.parametrize(
    ("error", "named"),
    [(GatedRepoError, "gated. Accept its terms"), (RepositoryNotFoundError, "no such repository")],
)
def test_the_hubs_refusals_say_what_to_do(hub, error, named):
    hub.error = http_error(error)
    with pytest.raises(ModelFileError, match=named):
        resolve("org/repo")


def test_without_a_network_the_cache_answers(hub):
    hub.error, hub.cached = ConnectionError("unreachable"), GGUF_FILES
    assert resolve("org/repo:Q8_0") == hub.folder / "V3-Q8_0.gguf"


def test_without_a_network_and_without_a_copy(hub):
    hub.error = ConnectionError("unreachable")
    with pytest.raises(
        ModelFileError, match=r"the hub cannot be reached \(ConnectionError\).*hf download org/repo"
    ):
        resolve("org/repo")


def test_a_real_attempt_without_a_network_is_answered_in_words(tmp_path, monkeypatch):
    """huggingface_hub itself, its sockets refused: a sentence, no traceback of an HTTP library, and soon."""

    def refuse(*args, **kwargs):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(ModelFileError, match="the hub cannot be reached"):
        resolve("org/repo")
    assert time.monotonic() - start < 10.0  # 0.04 s on an idle machine; its retrying calls take 23 s


def test_a_download_that_does_not_finish(hub, monkeypatch):
    hub.files = ["V3-Q8_0.gguf"]

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelFileError, match=r"did not finish: .*No space left.*goes on from there"):
        resolve("org/repo")


def test_the_cache_knows_the_name_of_a_model(hub):
    hub.files = HF_FILES
    assert repository_of(resolve("org/repo")) == "org/repo"
    assert repository_of(Path("/models/DeepSeek-V3")) == ""
