"""The structure that docs/architecture.md promises: who may import whom, and what works without what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("routing", "moe", "offload", "placement", "experiments")
ALLOWED = {
    "routing": set(),
    "moe": {"routing"},
    "placement": {"routing.traces"},
    "offload": {"moe", "routing", "placement.contract"},
    "experiments": {"routing", "moe", "placement", "offload"},
}
OWNERS = {
    "triton": ("moe/kernels/",),
    "jax": ("moe/nnx/",),
    "flax": ("moe/nnx/",),
    "pulp": ("placement/",),
}


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """Absolute names that a file imports, and the depth of each import below module level."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages_run_one_way_and_through_the_root(package):
    for path in sources(package):
        for name in imported(path):
            top = name.split(".")[0]
            if top not in PACKAGES or top == package:
                continue
            doors = ("moe.kernels", "moe.nnx", "routing.traces", "routing.ground")
            entry = name.startswith(doors) or name.endswith("cli")
            allowed = name in ALLOWED[package] or entry
            assert top in {entry.split(".")[0] for entry in ALLOWED[package]}, (
                f"{path}: {package} must not import {top}"
            )
            assert allowed, f"{path}: import {top} from its root, not {name}"


@pytest.mark.parametrize(("library", "homes"), OWNERS.items(), ids=list(OWNERS))
def test_special_libraries_stay_in_their_place(library, homes):
    for package in PACKAGES:
        for path in sources(package):
            relative = path.relative_to(ROOT).as_posix()
            if any(name.split(".")[0] == library for name in imported(path)):
                assert relative.startswith(homes), f"{relative} imports {library}; only {homes} may"


TORCH_FREE = (
    "routing",
    "routing.ground",
    "routing.traces",
    "routing.cli",
    "placement",
    "placement.cli",
    "offload",
    "experiments.cli",
)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_works_without_torch(module):
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'safetensors', 'jax', 'triton']))"
    subprocess.run([sys.executable, "-c", f"{block}; import {module}"], cwd=ROOT, check=True)


def test_moe_imports_without_triton_jax_and_pulp():
    block = "import sys; sys.modules.update(dict.fromkeys(['triton', 'jax', 'flax', 'pulp']))"
    subprocess.run([sys.executable, "-c", f"{block}; import moe"], cwd=ROOT, check=True)


def test_no_file_is_a_drawer():
    names = {path.stem for package in PACKAGES for path in sources(package)}
    assert not names & {"utils", "util", "helpers", "misc", "common", "manager"}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist(package):
    module = __import__(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
