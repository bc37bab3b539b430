"""The structure that docs/architecture.md promises: rooms on floors, who may import whom, what works without what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("routing", "moe", "offload", "placement", "experiments")
MOST_FILES = 15
DOORS = {"__init__", "cli"}
DRAWERS = {"utils", "util", "helpers", "misc", "common", "manager"}

# Which room may use which: a room imports only rooms of its folder that stand on a floor before its own.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "routing": (
        ("ground", "contract"),
        ("choice", "losses", "traces"),
        ("routers", "report"),
        ("__init__", "cli"),
    ),
    "routing/routers": (
        ("options", "constant_weights"),
        ("classic", "row"),
        ("own_rules", "tables", "local"),
        ("catalogue",),
        ("__init__",),
    ),
    "moe": (
        ("parts", "kernels"),
        ("experts", "nnx"),
        ("layers",),
        ("architectures",),
        ("model",),
        ("adapters", "inference", "conversion"),
        ("subnets", "parallel"),
        ("__init__", "cli"),
    ),
    "moe/kernels": (
        ("weights",),
        ("launching",),
        ("grouped",),
        ("decode",),
        ("operators", "tuning"),
        ("experts", "in_parts"),
        ("__init__",),
    ),
    "moe/nnx": (
        ("parts",),
        ("routing",),
        ("model",),
        ("training",),
        ("__init__",),
    ),
    "offload": (
        ("native", "memory", "text"),
        ("codes",),
        ("checkpoint",),
        ("formats", "cache"),
        ("prefetch",),
        ("store", "compute"),
        ("ram", "window"),
        ("gpu", "neurons"),
        ("runtime",),
        ("engine", "forecast", "finetune", "members"),
        ("serve",),
        ("chat", "lowbit"),
        ("quality",),
        ("__init__", "commands"),
        ("cli",),
    ),
    "offload/finetune": (
        ("options", "peers", "storage"),
        ("examples",),
        ("passing",),
        ("methods", "run"),
        ("tune", "forecast"),
        ("__init__",),
    ),
    "placement": (
        ("contract", "data", "heuristics"),
        ("objectives", "run", "checking"),
        ("bounds", "tiers"),
        ("scoring", "search"),
        ("ilp", "formats"),
        ("solving",),
        ("pages",),
        ("__init__", "commands"),
        ("cli",),
    ),
    "experiments": (
        ("evidence", "variants"),
        ("train",),
        ("judging",),
        ("compare", "demo", "placed", "tune_router"),
        ("bench",),
        ("gpu_session",),
        ("__init__", "cli"),
    ),
}

# What one package may use of another: the root, and doors behind which no heavy library stands.
ALLOWED = {
    "routing": set(),
    "moe": {"routing", "routing.ground"},
    "placement": {"routing.traces", "routing.ground"},
    "offload": {"moe", "moe.kernels", "routing", "routing.traces", "routing.ground", "placement.contract"},
    "experiments": {
        *("routing", "routing.traces", "routing.ground", "routing.cli"),
        *("moe", "moe.kernels", "moe.nnx", "moe.parallel", "moe.cli"),
        *("placement", "placement.cli", "offload", "offload.cli"),
    },
}
OWNERS = {
    "triton": ("moe/kernels/",),
    "jax": ("moe/nnx/",),
    "flax": ("moe/nnx/",),
    "pulp": ("placement/ilp/",),
    "fastapi": ("offload/serve/",),
    "uvicorn": ("offload/serve/",),
    "torch.distributed": ("moe/parallel/", "experiments/train/distributed/", "experiments/placed/"),
}
TORCH_FREE = (
    *("routing", "routing.ground", "routing.traces", "routing.cli"),
    *("placement", "placement.contract.plan", "placement.cli"),
    *("offload", "offload.text.conversation", "offload.text.vocabulary", "experiments.cli"),
)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@cache
def import_statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(file: Path, root: Path = ROOT) -> Iterator[str]:
    """Every module that a file imports, by its absolute name; a name taken from a module counts as the module."""
    package = file.relative_to(root).parts[:-1]
    for node in import_statements(file.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                inner = root.joinpath(*base, alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").is_file()
                yield ".".join([*base, alias.name] if is_module else base)


def libraries(file: Path) -> Iterator[str]:
    """Everything that a file imports, with the names that it takes: `from a import b` counts as `a.b`."""
    for node in import_statements(file.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(folder: str, root: Path = ROOT) -> dict[str, set[str]]:
    """Rooms and single files of a folder, and which of them each imports."""
    place = root / folder
    found: dict[str, set[str]] = {}
    for file in sources(place):
        room = file.relative_to(place).parts[0].removesuffix(".py")
        used = found.setdefault(room, set())
        prefix = folder.replace("/", ".")
        for name in imports(file, root):
            if name == prefix:
                used.add("__init__")
            elif name.startswith(f"{prefix}."):
                used.add(name[len(prefix) + 1 :].split(".")[0])
    return {room: used - {room} for room, used in found.items()}


def arrows_up(folder: str, root: Path = ROOT) -> list[str]:
    """Imports between rooms of a folder that do not run to a lower floor; rooms that stand on no floor."""
    floor = {room: height for height, row in enumerate(FLOORS[folder]) for room in row}
    faults = []
    for room, used in rooms(folder, root).items():
        if room not in floor:
            faults.append(f"{folder}/{room} stands on no floor")
            continue
        faults += [f"{folder}/{room} -> {other}" for other in sorted(used) if floor.get(other, 99) >= floor[room]]
    return faults


def circle(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Files that import each other in a circle, in order; empty without one."""
    files = {}
    for package in packages:
        for file in sources(root / package):
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            files[name] = [found for found in imports(file, root) if found != name]
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in files:
            return []
        for used in files[name]:
            if found := visit(used, (*path, name)):
                return found
        done.add(name)
        return []

    return next((found for name in files if (found := visit(name, ()))), [])


def full_folders(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    counts: dict[str, int] = {}
    for package in packages:
        for file in (root / package).rglob("*"):
            if file.suffix in (".py", ".c", ".h"):
                folder = file.parent.relative_to(root).as_posix()
                counts[folder] = counts.get(folder, 0) + 1
    return [folder for folder, count in counts.items() if count > MOST_FILES]


def misleading_names(root: Path, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Files and folders that bear the name of a standard module, or of a drawer that takes anything."""
    bad = set(sys.stdlib_module_names) | DRAWERS
    return [
        path.relative_to(root).as_posix()
        for package in packages
        for path in sorted((root / package).rglob("*"))
        if (path.suffix == ".py" or path.is_dir()) and path.stem in bad and path.stem != "__init__"
    ]


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_run_down_the_floors(folder):
    assert not arrows_up(folder)


@pytest.mark.parametrize("folder", FLOORS)
def test_every_floor_is_lived_on(folder):
    assert {room for row in FLOORS[folder] for room in row} == set(rooms(folder))


def test_no_files_import_each_other_in_a_circle():
    assert not circle(ROOT)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_root_holds_doors_only(package):
    assert {path.stem for path in (ROOT / package).glob("*.py")} <= DOORS


def test_no_folder_is_full():
    assert not full_folders(ROOT)


def test_no_file_is_a_drawer_or_named_like_a_standard_module():
    assert not misleading_names(ROOT)


def test_every_folder_says_in_one_sentence_what_lives_there():
    for package in PACKAGES:
        for file in (ROOT / package).rglob("__init__.py"):
            first = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
            assert first.endswith("."), f"{file}: say in one sentence what lives there"
            assert ". " not in first, f"{file}: one sentence"
    for folder in {file.parent for package in PACKAGES for file in sources(ROOT / package)}:
        assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def test_the_checks_above_see_one_wrong_import_name_and_file(tmp_path):
    for room in ("runtime", "store", "formats"):
        (tmp_path / "offload" / room).mkdir(parents=True)
    (tmp_path / "offload" / "store" / "reads.py").write_text("from ..formats import plain\n")
    (tmp_path / "offload" / "formats" / "plain.py").write_text("x = 1\n")
    assert not arrows_up("offload", tmp_path)
    assert not circle(tmp_path, ("offload",))
    (tmp_path / "offload" / "formats" / "plain.py").write_text("def f():\n    from offload.store.reads import y\n")
    assert arrows_up("offload", tmp_path) == ["offload/formats -> store"]
    assert circle(tmp_path, ("offload",))[0].startswith("offload.")
    (tmp_path / "offload" / "attic").mkdir()
    (tmp_path / "offload" / "attic" / "queue.py").write_text("")
    assert "offload/attic stands on no floor" in arrows_up("offload", tmp_path)
    assert misleading_names(tmp_path, ("offload",)) == ["offload/attic/queue.py"]
    for number in range(MOST_FILES + 1):
        (tmp_path / "offload" / "store" / f"file{number}.py").write_text("")
    assert full_folders(tmp_path, ("offload",)) == ["offload/store"]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages_run_one_way_and_through_doors(package):
    for path in sources(ROOT / package):
        for name in imports(path):
            if name.split(".")[0] in PACKAGES and name.split(".")[0] != package:
                doors = [door for door in ALLOWED[package] if name == door or name.startswith(f"{door}.")]
                behind = (
                    "placement.contract",
                    "routing.ground",
                    "routing.traces",
                    "moe.kernels",
                    "moe.nnx",
                    "moe.parallel",
                )
                is_door = any(name == door or door in behind for door in doors)
                assert is_door, f"{path}: {package} may import {sorted(ALLOWED[package])}, not {name}"


@pytest.mark.parametrize(("library", "homes"), OWNERS.items(), ids=list(OWNERS))
def test_special_libraries_stay_in_their_place(library, homes):
    for package in PACKAGES:
        for path in sources(ROOT / package):
            relative = path.relative_to(ROOT).as_posix()
            if any(f"{name}.".startswith(f"{library}.") for name in libraries(path)):
                assert relative.startswith(homes), f"{relative} imports {library}; only {homes} may"


WITHOUT_TORCH = """
import importlib, sys, traceback

blocked = dict.fromkeys(["torch", "transformers", "safetensors", "jax", "triton"])
packages = sys.argv[1].split(",")
for module in sys.argv[2:]:
    # each is the first of ours to be imported, so that none leans on what another has loaded
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    sys.modules.update(blocked)
    try:
        importlib.import_module(module)
    except ImportError:
        print(module, traceback.format_exc())
"""


def test_works_without_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH, ",".join(PACKAGES), *TORCH_FREE]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert not done.stdout


@pytest.mark.slow  # `OWNERS` says the same of every import; this one imports torch anew
def test_moe_imports_without_triton_jax_and_pulp():
    block = "import sys; sys.modules.update(dict.fromkeys(['triton', 'jax', 'flax', 'pulp']))"
    subprocess.run([sys.executable, "-c", f"{block}; import moe"], cwd=ROOT, check=True)


def test_tests_are_named_after_the_rooms_that_they_test():
    """`test_<package>_<room>[_<file or subject>].py`; tests of the whole house bear no package's name."""
    lost = []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        package, _, rest = file.stem.removeprefix("test_").partition("_")
        if package in PACKAGES:
            homes = {room.parent.name for room in (ROOT / package).glob("*/__init__.py")}
            if not any(rest == room or rest.startswith(f"{room}_") for room in homes):
                lost.append(file.name)
    assert not lost


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_exist(package):
    module = __import__(package)
    for name in getattr(module, "__all__", ()):
        assert getattr(module, name) is not None
