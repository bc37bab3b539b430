"""The examples of CONTRIBUTING.md: each is added to its table from the text, and passes the contract of its kind."""

import contextlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from experiments.variants.catalogue import model_overrides
from moe import architectures
from routing.routers import catalogue
from tests import test_moe_architectures, test_routing_contract

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Section:
    """A section whose first Python block is a file, named in its first line, and whose second is a row of a table.

    Args:
        home: the module whose names the row may use, besides those of the file.
        table: the table that takes the row.
        contract: called with the new name and the fixtures below; raises if the new member breaks the contract.
    """

    home: ModuleType
    table: dict[str, Any]
    contract: Callable[[str, SimpleNamespace], None] = field(repr=False)


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


def contract_of(module):
    return [value for name, value in vars(module).items() if name.startswith("test_")]


def call(test, given):
    """A test with those of the given arguments that it takes."""
    with contextlib.suppress(pytest.skip.Exception):
        test(**{name: given[name] for name in inspect.signature(test).parameters})


CONTRACT_OF_A_ROUTER = contract_of(test_routing_contract)
CONTRACT_OF_AN_ARCHITECTURE = contract_of(test_moe_architectures)

SECTIONS = {
    "Adding a router": Section(catalogue, catalogue.ROUTERS, router_contract),
    "Adding an architecture": Section(architectures, architectures.ARCHITECTURES, architecture_contract),
}


def blocks_of(title):
    """The Python blocks of a section."""
    (body,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```$", body, flags=re.DOTALL | re.MULTILINE)


def test_every_section_that_adds_something_is_executed():
    assert re.findall(r"^## (Adding .*)$", TEXT, flags=re.MULTILINE) == list(SECTIONS)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_of_a_section_passes_the_contract_tests(title, tiny_config, tolerance, tmp_path, monkeypatch):
    section, (source, row) = SECTIONS[title], blocks_of(title)
    path = Path(source.splitlines()[0].removeprefix("# "))
    assert (ROOT / path.parent / "__init__.py").is_file(), "the file's room exists"
    assert not (ROOT / path).exists(), "the example stays an example"
    module = ModuleType(".".join(path.with_suffix("").parts))
    module.__package__ = ".".join(path.parent.parts)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, str(path), "exec"), vars(module))
    ((name, member),) = eval(f"{{{row}}}", vars(section.home) | vars(module)).items()
    monkeypatch.setitem(section.table, name, member)
    section.contract(name, SimpleNamespace(tiny_config=tiny_config, tolerance=tolerance, tmp_path=tmp_path))
