"""The rules that keep the house in order: which way imports point, what files may be called, what may not be called."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PACKAGES = ("longlora", "pipeline")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
METHOD_MAY_IMPORT = {"longlora", "torch", "transformers", "peft", "numpy", "safetensors", "flash_attn"}
RAY_FREE = (
    "config",
    "packing",
    "order",
    "ledger",
    "timeline",
    "audit",
)  # pure parts, usable and testable without a cluster
LOCKED_EXTRAS = ("s3", "gcs", "postgres", "gpu", "dev")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.parent.name if node.level else (node.module or "").split(".")[0])
    return names


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def source_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_source = pytest.mark.parametrize("path", SOURCES, ids=source_id)


@pytest.mark.parametrize("path", sorted((ROOT / "longlora").rglob("*.py")), ids=source_id)
def test_the_method_knows_nothing_of_the_system(path: Path) -> None:
    assert imports(path) - set(sys.stdlib_module_names) <= METHOD_MAY_IMPORT


def modules_loaded_by(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*(name for name in sys.modules if '.' not in name))"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(finished.stdout.split())


def test_config_is_light() -> None:
    """A wrong config is reported before torch and Ray have been waited for."""
    assert not modules_loaded_by("import pipeline.config") & {"torch", "ray", "transformers", "deepspeed", "mlflow"}


def test_pure_parts_work_without_ray() -> None:
    loaded = modules_loaded_by("import " + ", ".join(f"pipeline.{name}" for name in RAY_FREE))
    assert "pipeline" in loaded
    assert not loaded & {"ray", "deepspeed", "mlflow"}


def test_no_stage_hides_an_installed_module() -> None:
    """With `python pipeline/main.py`, that folder comes first on the path: a tokenize.py there would break inspect."""
    names = {path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert [name for name in sorted(names - {"__init__", "__pycache__"}) if find_spec(name)] == []


def test_tests_do_not_hide_the_packages() -> None:
    """A tests/pipeline/__init__.py would be imported in place of pipeline/."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert "--import-mode=importlib" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]


@each_source
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(path)}
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}


@each_source
def test_public_functions_say_what_they_return(path: Path) -> None:
    assert [node.name for node in functions(path) if not node.name.startswith("_") and node.returns is None] == []


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *sorted((ROOT / "examples").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))],
    ids=source_id,
)
def test_nothing_read_is_executed(path: Path) -> None:
    """Files are data: no pickle, no code from a model's folder, no shell."""
    assert not imports(path) & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not {ast.unparse(call.func) for call in calls} & {
        *("torch.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "os.system", "eval", "exec")
    }
    assert not {word.arg for call in calls for word in call.keywords} & {"shell", "allow_pickle"}
    for call in calls:
        # Unless it is told not to, transformers asks on the terminal whether to run code that comes with a model.
        if re.fullmatch(r"Auto\w+\.from_(pretrained|config)", ast.unparse(call.func)):
            assert "trust_remote_code=False" in map(ast.unparse, call.keywords), ast.unparse(call)


def listed_in_readme() -> list[str]:
    """Paths of the README's file tree: two spaces of indentation a level, folders end in a slash."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"^## Layout$.*?^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert match, "README.md has no code block under the heading '## Layout'"
    paths, parents = [], []
    for line in match[1].splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        paths.append("".join(parents))
    return paths


def test_the_readmes_file_tree_is_true() -> None:
    listed = listed_in_readme()
    assert [name for name in listed if not (ROOT / name).exists()] == []
    modules = {source_id(path) for path in SOURCES if path.name != "__init__.py" or path.parent.name == "attention"}
    assert {name for name in listed if name.endswith(".py")} == modules
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {name.split("/")[0] + "/" for name in tracked if "/" in name and not name.startswith(".")}
    assert {name for name in listed if name.count("/") == 1 and name.endswith("/")} == folders


def locked() -> Iterator[tuple[Requirement, list[str]]]:
    """The requirements of the lock with their hashes."""
    for entry in re.split(r"\n(?=\w)", LOCK):
        requirement, *rest = (line.strip().rstrip("\\").strip() for line in entry.splitlines())
        yield Requirement(requirement), [line for line in rest if line.startswith("--hash=")]


def test_the_lock_is_pinned_hashed_and_free_of_addresses() -> None:
    for requirement, hashes in locked():
        assert str(requirement.specifier).startswith("=="), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), requirement
    assert "://" not in LOCK
    assert "--index" not in LOCK


def test_the_lock_holds_what_the_project_asks_for() -> None:
    pins: dict[str, set[str]] = {}
    for requirement, _ in locked():
        pins.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier)[2:])
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(line for extra in LOCKED_EXTRAS for line in extras[extra])]
    for requirement in map(Requirement, wanted):
        versions = pins.get(canonicalize_name(requirement.name), set())
        assert versions, f"{requirement} is not locked"
        assert all(version in requirement.specifier for version in versions), f"{requirement}: locked at {versions}"
