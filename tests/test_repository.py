"""Promises about the repository itself: size, import directions, one place for every default."""

import ast
import socket
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from network import Config
from train import PRESETS, TrainConfig

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in ROOT.glob("*.py")}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_line_budget():
    budget = {"model": 420, "train": 420, "data": 450, "flowseg": 320}
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: lines[name] for name, most in budget.items() if lines[name] > most} == {}
    # Planned were 2,200 in all. Downloads, public weights with alignment, the segment tool and the dry run
    # came to some 770 lines more, in modules of their own: a reader of the method need not open them.
    assert sum(lines.values()) <= 2975


def test_imports_point_one_way():
    order = [
        "shapes",
        "download",
        "picture",
        "network",
        "public",
        "model",
        "data",
        "run",
        "train",
        "segment",
        "flowseg",
    ]
    for name in order:
        later = set(order[order.index(name) :])
        assert not later & set(imports(MODULES[name])), name


def test_only_the_declared_dependencies_are_imported():
    declared = {"torch", "typer", "rich", "numpy", "PIL", "safetensors"}
    found = {name for path in MODULES.values() for name in imports(path)}
    assert found - set(sys.stdlib_module_names) - set(MODULES) == declared


def test_modules_of_the_package_are_the_files():
    project = (ROOT / "pyproject.toml").read_text()
    listed = project.split("py-modules = [")[1].split("]")[0]
    assert {name.strip(' "') for name in listed.split(",")} == set(MODULES)


def test_label_tables_are_installed():
    project = (ROOT / "pyproject.toml").read_text()
    tables = {path.parent for path in ROOT.glob("flowseg_data/**/*") if path.is_file()}
    for name in (".".join(folder.relative_to(ROOT).parts) for folder in tables):
        assert f'"{name}"' in project.split("packages = [")[1].split("]")[0]
    assert {path.suffix for path in ROOT.glob("flowseg_data/**/*") if path.is_file()} == {".toml"}


def test_presets_change_known_fields_only():
    training, network = ({field.name for field in fields(kind)} for kind in (TrainConfig, Config))
    assert all(set(preset) <= training | network for preset in PRESETS.values())
    assert not training & network


def test_tests_cannot_reach_the_network():
    with pytest.raises(AssertionError, match="tried to reach"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
