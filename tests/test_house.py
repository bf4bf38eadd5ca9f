"""The rules of the house: who imports whom, where torch may be, what may never be called, what importing costs."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kit.tiny_models import tiny_model, write_gguf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kvfold"

# Room -> what it may import of ours, itself aside. A name stands for everything below it.
MAY_IMPORT = {
    "errors": (),
    "config": ("errors",),
    "quant": ("errors",),
    "text": ("errors",),
    "cache": ("config", "errors"),
    "formats": ("quant", "config", "errors"),
    "mla": ("cache", "quant", "config", "errors"),
    "model": ("mla", "cache", "quant", "config", "errors"),
    "kernels": (),
    "backends": ("model", "mla", "cache", "quant", "config", "errors", "kernels", "_native"),
    "machine": ("_native",),
    "prompt_window": ("model.program", "mla.plan", "cache.latent"),
    "weight_memory": ("formats.file_map", "quant.tensor", "quant.types.BlockType", "errors", "_native"),
    "load": (
        "machine",
        "prompt_window",
        "weight_memory",
        "backends",
        "formats",
        "model",
        "mla",
        "cache",
        "quant",
        "config",
        "errors",
    ),
    "engine": ("model", "mla.plan", "cache", "errors"),
    "check": (
        *("backends.native", "formats.synthetic", "model", "mla", "cache", "quant", "config", "errors"),
        "_native",
    ),
    "llm": ("load", "engine", "text", "cache.session", "errors"),
    "explain": (
        "load",
        "machine",
        "prompt_window",
        "backends.choose",
        "formats",
        "model",
        "mla",
        "cache",
        "quant",
        "config",
        "errors",
    ),
    "bench": (
        *(
            "load",
            "machine",
            "backends.profile",
            "backends.choose.OnDevice",
            "engine.batch",
            "formats",
            "mla.plan",
            "cache",
            "quant.tensor",
            "config",
            "errors",
        ),
        *("_native", "__version__"),
    ),
    "cli": (
        "llm",
        "load",
        "explain",
        "check",
        "bench",
        "formats",
        "engine.sampler",
        "config",
        "errors",
        "__version__",
    ),
    "__init__": ("llm", "load", "engine.sampler", "errors"),  # names for type checkers; run-time imports are lazy
    "__main__": ("cli",),
}
ROOM_OF_FILE = {"config_readers": "config"}  # a room that is a file may have a second one

# These import torch: the judge, kernels written in Python, and the function that builds the judge.
TORCH_FILES = ("backends/plain.py", "backends/cuda", "kernels/")
TORCH_INSIDE_FUNCTIONS = ("backends/choose.py", "backends/gpu.py")

PYTHON_ROOTS = ("src", "tests", "training", "bench", "csrc")
LARGEST_FILE_BYTES = 16 << 20
STARTUP_SECONDS = 0.3


def python_files() -> list[Path]:
    return sorted(path for root in PYTHON_ROOTS for path in (ROOT / root).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every module or name imported anywhere in a file, in full: "kvfold.mla.plan.Fa"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return ROOM_OF_FILE.get(first, first)


def test_every_room_imports_only_what_the_table_allows() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        assert room in MAY_IMPORT, f"{path}: the table has no room {room}"
        allowed = (room, *MAY_IMPORT[room])
        for name, node in imports(ast.parse(path.read_text())):
            if name.split(".")[0] != "kvfold":
                continue
            target = name.removeprefix("kvfold.")
            target = ".".join(
                [ROOM_OF_FILE.get(target.split(".")[0], target.split(".")[0]), *target.split(".")[1:]]
            )
            if not any(target == rule or target.startswith(f"{rule}.") for rule in allowed):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_plain_backend_kernels_and_training_import_torch() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        where = path.relative_to(PACKAGE).as_posix()
        tree = ast.parse(path.read_text())
        lines = [node.lineno for name, node in imports(tree) if name.split(".")[0] in ("torch", "triton")]
        if where in TORCH_INSIDE_FUNCTIONS:
            lines = [
                node.lineno for name, node in imports(ast.Module(at_import(tree), [])) if name.startswith("torch")
            ]
        assert not lines or where.startswith(TORCH_FILES), f"{where}: imports torch in lines {lines}"


def at_import(tree: ast.Module) -> list[ast.stmt]:
    """The statements that run when a module is imported."""
    return [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_BUILTINS = {"eval", "exec"}
FORBIDDEN_CALLS = {"torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}


def test_no_file_can_run_code_from_data() -> None:
    wrong = []
    for path in python_files():
        tree = ast.parse(path.read_text())
        found = [(node, name) for name, node in imports(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS:
                    found.append((node, name))
                for keyword in node.keywords:
                    is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                    if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and is_true:
                        found.append((node, f"{keyword.arg}=True"))
        wrong += [f"{path.relative_to(ROOT)}:{node.lineno} {name}" for node, name in found]
    assert not wrong, "\n".join(wrong)


def test_no_file_of_the_repository_is_larger_than_16_mib() -> None:
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    large = [
        f"{file}: {file.stat().st_size} bytes"
        for file in files
        if file.is_file() and file.stat().st_size > LARGEST_FILE_BYTES
    ]
    assert not large, "\n".join(large)


def test_versions_are_pinned_once() -> None:
    """Hooks and extras run the linters that constraints.txt pins, and everything we depend on is pinned."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = re.findall(r"([\w-]+)==([\w.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    for name, version in hooks:
        assert pins[name] == version, f".pre-commit-config.yaml has {name} {version}, constraints.txt {pins[name]}"
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in ("torch", "cuda", "test", "dev"):
        wanted += project["project"]["optional-dependencies"][extra]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}  # type: ignore[index]
    assert names <= set(pins), f"not pinned: {sorted(names - set(pins))}"


# --- what importing costs and touches --------------------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the package under test."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )


HEAVY = ("numpy", "torch", "tokenizers", "jinja2", "huggingface_hub", "safetensors", "gguf", "rich")


@pytest.mark.parametrize(
    "code",
    [
        "import kvfold",
        "import kvfold; kvfold.__version__, dir(kvfold), kvfold.errors",
        "from kvfold.cli.main import app; app(['--help'], standalone_mode=False)",
        "from kvfold.cli.main import app; app(['run', '--help'], standalone_mode=False)",
    ],
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    done = python("-c", f"{code}\nimport sys; print([name for name in {HEAVY} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [("-c", "import kvfold"), ("-m", "kvfold", "--help")])
def test_import_and_help_take_less_than_a_third_of_a_second(arguments: tuple[str, ...]) -> None:
    def cpu_seconds() -> float:
        """Of one run: on an idle machine the wall time, on a busy one still the work that was done."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < STARTUP_SECONDS


NO_NETWORK = """
import pkgutil, socket, sys
def refuse(*arguments, **settings):
    raise AssertionError(f"network: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
"""


def test_importing_and_opening_local_files_never_touch_the_network(tmp_path: Path) -> None:
    file = write_gguf(tiny_model("v3"), tmp_path / "tiny.gguf")
    code = f"""{NO_NETWORK}
NEED_TORCH = ("kvfold.kernels.", "kvfold.backends.cuda")
import kvfold
for module in pkgutil.walk_packages(kvfold.__path__, "kvfold."):
    if not module.name.endswith((".__main__", ".plain")) and not module.name.startswith(NEED_TORCH):
        __import__(module.name)
from kvfold.explain import inspect_file, model_path
print(inspect_file(model_path({str(file)!r})).refusal, "huggingface_hub" in sys.modules)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"]


def test_a_native_run_never_imports_torch(tmp_path: Path) -> None:
    file = write_gguf(tiny_model("v3"), tmp_path / "tiny.gguf", ftype="Q8_0")
    code = f"""{NO_NETWORK}
from kvfold import LLM, SamplingParams
llm = LLM({str(file)!r}, backend="native", n_ctx=64)
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, seed=1))
llm.logits([1, 2, 3])
print([name for name in ("torch", "transformers", "huggingface_hub", "gguf") if name in sys.modules])
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
