"""The pages about placement: their examples run, their tables are whole."""

import re
from pathlib import Path

import yaml
from pydantic import BaseModel

from placement import OBJECTIVES, SOLVERS, Cluster
from placement.contract.spec import ClusterSpec
from placement.objectives.prices import HOP_IMBALANCE_PRICE, PRICE_ONE_NODE, PRICE_SEVERAL_NODES

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "placement.md").read_text(encoding="utf-8")


def rows(title):
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]


def leaves(model, prefix=""):
    """Dotted names of all keys of a section; lists and mappings of sections are entered."""
    for name, field in model.model_fields.items():
        inner = [one for one in _models(field.annotation) if issubclass(one, BaseModel)]
        if inner:
            yield from leaves(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _models(annotation):
    arguments = getattr(annotation, "__args__", ())
    found = [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    return found + [one for argument in arguments for one in _models(argument)]


def test_every_key_of_a_cluster_file_is_in_the_table():
    words = {word for row in rows("The cluster file") for word in re.findall(r"`([^`]+)`", row[0])}
    last = {word.rpartition(".")[2] for word in words}
    whole = {"gpus": {"type", "count"}, "nic": {"count", "bandwidth"}, "dram": {"size", "bandwidth", "reserve"}}
    whole["ssd"] = whole["dram"]
    missing = []
    for key in leaves(ClusterSpec):
        section, _, name = key.rpartition(".")
        as_a_whole = name in whole.get(section.rpartition(".")[2], ())
        if not as_a_whole and name not in last and key.partition(".")[0] != "tiers":
            missing.append(key)
    assert not missing
    assert "tiers" in words


def test_the_example_of_a_cluster_file_loads():
    text = re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1]
    cluster = Cluster.from_mapping(yaml.safe_load(text))
    assert (cluster.num_gpus, cluster.num_nodes) == (32, 4)
    assert cluster.model.bytes_per_expert == 3 * 7168 * 2048


def test_every_objective_and_solver_is_in_its_table():
    named = {word for row in rows("Objectives") for word in re.findall(r"`([^`]+)`", row[0])}
    assert set(OBJECTIVES) - {"imbalance-price"} <= named
    assert set(SOLVERS) == {word for row in rows("Solvers") for word in re.findall(r"`([^`]+)`", row[0])}


def test_the_page_has_the_prices_of_the_code():
    assert f"price x imbalance ({PRICE_ONE_NODE} on one node, {PRICE_SEVERAL_NODES} on several)" in PAGE
    assert f"plus {HOP_IMBALANCE_PRICE} x imbalance" in PAGE
    assert f"on one node is {PRICE_ONE_NODE}" in PAGE


def test_sentences_are_short():
    text = re.sub(r"```.*?```", "", PAGE, flags=re.S)
    prose = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "    ", "#")))
    lengths = sorted(len(one.split()) for one in re.split(r"(?<=[.:])\s+", prose) if len(one.split()) > 2)
    assert lengths[len(lengths) // 2] <= 25
    assert lengths[int(len(lengths) * 0.9)] <= 30
