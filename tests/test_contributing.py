"""The examples of CONTRIBUTING.md: each is added to its table from the text, and passes the contract of its kind."""

import contextlib
import inspect
import itertools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import offload.cache.catalogue
import offload.formats.catalogue
import placement.formats
import placement.objectives.registry
import placement.solving.solvers
from experiments.variants.catalogue import model_overrides
from moe import architectures
from offload.cache.catalogue import make_cache
from placement import OBJECTIVES, SOLVERS, Cluster, Problem, solve, weighted
from placement.bounds.choice import BOUNDS
from routing.routers import catalogue
from routing.traces import import_trace
from routing.traces.importers import catalogue as importers
from tests import (
    test_moe_architectures,
    test_offload_cache_policies,
    test_offload_formats,
    test_placement_formats,
    test_routing_contract,
    test_routing_traces_importers,
)
from tests import test_placement_objectives_table as objectives
from tests import test_placement_solving_table as solvers

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Section:
    """A section whose Python blocks are files, named in their first lines, and rows of tables.

    Args:
        tables: each takes one row of the section, in order.
        contract: called with the new name and the fixtures below; raises if the new member breaks the contract.
        home: the module whose names a row may use, besides those of the files.
    """

    tables: tuple[dict[str, Any], ...]
    contract: Callable[[str, SimpleNamespace], None] = field(repr=False)
    home: ModuleType


def router_contract(name, fixtures):
    """Everything that is asked of every router, of this one."""
    case = test_routing_contract.case_of(name)
    for test in CONTRACT_OF_A_ROUTER:
        given = {"case": case, "model_case": case, "tiny_config": fixtures.tiny_config, "tmp_path": fixtures.tmp_path}
        call(test, given | {"is_training": True})
    call(test_routing_contract.test_counts_are_those_of_the_ids, {"case": case, "is_training": False})
    assert model_overrides(name, {})["router"] == name, "compare knows it"


def architecture_contract(name, fixtures):
    """Everything that is asked of every architecture, of this one."""
    for test in CONTRACT_OF_AN_ARCHITECTURE:
        example = test_moe_architectures.example_of(name)
        model = test_moe_architectures.build(fixtures.tiny_config, name, example)
        call(test, {"model": model, "tolerance": fixtures.tolerance, "tmp_path": fixtures.tmp_path})
    assert model_overrides(name, {})["architecture"] == name, "compare knows it"


def policy_contract(name, fixtures):
    """Everything that is asked of every cache policy; what is pinned stays, if anything else can go."""
    test_offload_cache_policies.test_every_policy_stays_within_capacity_and_keeps_the_token(name)
    test_offload_cache_policies.test_no_policy_beats_belady(name)
    test_offload_cache_policies.test_rank_orders_evictions()
    for pinned in itertools.combinations(range(4), 3):
        cache = make_cache(name, 4, 8)
        for key in (0, 1, 0, 2, 3, 1):
            cache.access([key])
        assert cache.evict(pinned) not in pinned


def form_contract(name, fixtures):
    """Everything that is asked of every stored form: a model packed in it gives the same bits."""
    folder = fixtures.request.getfixturevalue("packed_model")
    for test in (
        test_offload_formats.test_a_packed_copy_in_any_form_gives_the_bits_of_the_resident_model,
        test_offload_formats.test_what_a_form_says_of_its_bytes_fits_together,
    ):
        path = fixtures.tmp_path / test.__name__
        path.mkdir()
        test(name, folder, path)


def objective_contract(name, fixtures):
    """Everything that is asked of every objective, by loops written here."""

    def by_loops(plan, scenario, layer, problem):
        return max(objectives.loads_of(plan, scenario, layer)) / 1e3

    fixtures.monkeypatch.setitem(objectives.BY_LOOPS, name, by_loops)
    for case in objectives.CASES:
        objectives.test_values_equal_plain_loops(name, case)
    for case in objectives.TINY:
        objectives.test_bounds_are_below_the_best_of_all_plans(name, case)
    objectives.test_objectives_of_loads_take_loads(name)
    problem = Problem.from_loads(np.array([[4e3, 3e3, 2e3, 1e3]]), Cluster.grid(1, 2))
    plan = solve(problem, objective=name, time_limit_s=1)
    assert (plan.certificate.objective, plan.certificate.is_proven_optimal) == (5.0, True)
    assert solve(problem, objective=weighted([(2.0, name)]), time_limit_s=1).certificate.objective == 10.0


def solver_contract(name, fixtures):
    """Everything that is asked of every solver; it refuses the problems with replicas."""
    has_copies = {case: make().num_slots > make().num_experts for case, (make, _) in solvers.PROBLEMS.items()}
    refused = {case: "knows no replicas" for case, copies in has_copies.items() if copies}
    fixtures.monkeypatch.setitem(solvers.REFUSALS, name, refused)
    for case in solvers.PROBLEMS:
        solvers.test_a_valid_plan_within_its_bound_or_a_refusal(name, case)
    solvers.test_a_seed_decides_all(name, "tokens")
    plan = solve(Problem.from_loads(np.array([[8.0, 7.0, 2.0, 1.0]]), Cluster.grid(1, 2)), solver=name)
    assert plan.physical_to_logical_LP.tolist() == [[0, 3, 1, 2]]
    assert plan.certificate.objective == 1.0


def format_contract(name, fixtures):
    """Everything that is asked of every engine format: written, read back, other plans told apart."""
    for replicas in (0, 8):
        load_LE = np.random.default_rng(0).lognormal(0, 1, (6, 16))
        load_LE[:2] = 0
        plan = solve(Problem.from_loads(load_LE, Cluster.grid(2, 4), replicas=replicas), solver="lpt")
        path = fixtures.tmp_path / str(replicas)
        path.mkdir()
        test_placement_formats.test_every_format_is_written_and_read_back(plan, name, path)
        test_placement_formats.test_each_export_says_the_flag_and_the_version(plan, name, path)
        (path / "experts.out").write_text("not what the engine reads\n")
        with pytest.raises(ValueError, match=r"experts\.out"):
            placement.formats.FORMATS[name].validate(path / "experts.out", plan)
    test_placement_formats.test_experts_that_do_not_divide_over_the_gpus(name, fixtures.tmp_path)


def importer_contract(name, fixtures):
    """What was recorded is what is imported; a cut file is refused with its format."""
    path = fixtures.tmp_path / "recording.jsonl"
    for seed in range(5):
        rng = np.random.default_rng(seed)
        requests = [np.argsort(rng.random((length, 2, 12)), axis=2)[:, :, :3] for length in rng.integers(1, 7, 4)]
        text = "".join(json.dumps({"experts": request.tolist()}) + "\n" for request in requests)
        path.write_text(text)
        trace = import_trace(path, name, num_experts=12)
        test_routing_traces_importers.expect_requests(trace, requests, None)
        assert trace.metadata["import"]["read"] == {"lines": 4, "tokens": trace.num_tokens, "layers": 2}
    for broken in (text[:-3], "", '{"expert": []}\n', '{"experts": [[[0.5]]]}\n', '{"experts": [[[12]]]}\n'):
        path.write_text(broken)
        with pytest.raises(ValueError, match=f"recording.jsonl.*format {name}"):
            import_trace(path, name, num_experts=12)


def contract_of(module):
    return [value for name, value in vars(module).items() if name.startswith("test_")]


def call(test, given):
    """A test with those of the given arguments that it takes."""
    with contextlib.suppress(pytest.skip.Exception):
        test(**{name: given[name] for name in inspect.signature(test).parameters})


CONTRACT_OF_A_ROUTER = contract_of(test_routing_contract)
CONTRACT_OF_AN_ARCHITECTURE = contract_of(test_moe_architectures)

SECTIONS = {
    "Adding a router": Section((catalogue.ROUTERS,), router_contract, catalogue),
    "Adding an architecture": Section((architectures.ARCHITECTURES,), architecture_contract, architectures),
    "Adding a cache policy": Section((offload.cache.catalogue.CACHES,), policy_contract, offload.cache.catalogue),
    "Adding a stored form": Section((offload.formats.catalogue.FORMS,), form_contract, offload.formats.catalogue),
    "Adding an objective": Section((OBJECTIVES, BOUNDS), objective_contract, placement.objectives.registry),
    "Adding a solver": Section((SOLVERS,), solver_contract, placement.solving.solvers),
    "Adding an engine format": Section((placement.formats.FORMATS,), format_contract, placement.formats),
    "Adding a recording format": Section((importers.IMPORTERS,), importer_contract, importers),
}

packed_model = test_offload_formats.folder


def blocks_of(title):
    """The Python blocks of a section."""
    (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```$", body, flags=re.DOTALL | re.MULTILINE)


def test_every_section_that_adds_something_is_executed():
    assert re.findall(r"^## (Adding .*)$", TEXT, flags=re.MULTILINE) == list(SECTIONS)


def add_file(source, known, monkeypatch):
    """Run a block as the new module that its first line names, or as an addition to that module; gives its names."""
    path = Path(source.splitlines()[0].removeprefix("# "))
    assert (ROOT / path.parent / "__init__.py").is_file(), "the file's room exists"
    name = ".".join(path.with_suffix("").parts)
    module = ModuleType(name)
    if (ROOT / path).exists():
        vars(module).update(vars(sys.modules[name]) | known)
    module.__package__ = ".".join(path.parent.parts)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, str(path), "exec"), vars(module))
    return vars(module)


def member_of(row, names):
    """Name and member of a row: `"name": member,`, or a call whose result has the name."""
    if row.lstrip().startswith('"'):
        ((name, member),) = eval(f"{{{row}}}", names).items()
        return name, member
    (member,) = eval(f"[{row}]", names)
    return member.name, member


@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_of_a_section_passes_the_contract_tests(
    title, tiny_config, tolerance, tmp_path, monkeypatch, request
):
    section, names, rows = SECTIONS[title], {}, []
    for block in blocks_of(title):
        if block.startswith("# "):
            names |= add_file(block, names, monkeypatch)
        else:
            rows.append(member_of(block, vars(section.home) | names))
    for table, (name, member) in zip(section.tables, rows, strict=True):
        assert name not in table
        monkeypatch.setitem(table, name, member)
    fixtures = {"tiny_config": tiny_config, "tolerance": tolerance, "tmp_path": tmp_path}
    section.contract(rows[0][0], SimpleNamespace(**fixtures, monkeypatch=monkeypatch, request=request))


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_has_few_steps_in_order(title):
    body = re.sub(r"^```.*?^```$", "", TEXT.split(f"## {title}\n")[1].split("\n## ")[0], flags=re.DOTALL | re.MULTILINE)
    steps = [int(number) for number in re.findall(r"^(\d)\. ", body, flags=re.MULTILINE)]
    assert steps == list(range(1, len(steps) + 1))
    assert 3 <= len(steps) <= 6


def test_the_table_names_rooms_and_tables_that_exist():
    rows = re.findall(r"^\| ([a-z ]+) \| (.*) \| (.*) \|$", TEXT, flags=re.MULTILINE)
    kinds = [re.sub(r"^Adding an? ", "", title) for title in SECTIONS]
    assert len(rows) > len(kinds)
    assert all(any(kind in row for row, *_ in rows) for kind in kinds)
    for _, place, named in rows:
        paths = [word for word in re.findall(r"`([^`]+)`", f"{place} {named}") if "/" in word]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
        if table := re.match(r"`([A-Z]+)` in `([^`]+)`", named):
            assert re.search(rf"^{table[1]}\b", (ROOT / table[2]).read_text(encoding="utf-8"), flags=re.MULTILINE)
