"""Public names: one table, seen by type checkers, listed by dir, found by the nearest name; nothing shadows ours."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mmdit

SOURCE = Path(mmdit.__file__)


def imported_for_type_checkers() -> dict[str, str]:
    block = next(node for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    found = {}
    for node in block.body:
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name} is not exported to type checkers"
            whole = node.module if isinstance(node, ast.ImportFrom) else alias.name
            found[alias.name] = f"{whole}.{alias.name}" if alias.name in mmdit._MODULES and "." in whole else whole
    return found


def test_the_table_is_what_type_checkers_see():
    assert imported_for_type_checkers() == mmdit._HOME | mmdit._MODULES
    assert len(mmdit.__all__) == len(set(mmdit.__all__)) == len(mmdit._HOME) + len(mmdit._MODULES)


def test_every_name_is_there():
    assert dir(mmdit) == sorted(mmdit.__all__)
    for name, module in mmdit._HOME.items():
        assert getattr(mmdit, name) is getattr(import_module(module), name)
    for name, module in mmdit._MODULES.items():
        assert getattr(mmdit, name) is import_module(module)


@pytest.mark.parametrize(("wrong", "right"), [("Pipelin", "Pipeline"), ("captre", "capture"), ("sampler", "samplers")])
def test_the_nearest_name_is_given(wrong, right):
    with pytest.raises(AttributeError, match=f"'{wrong}'.*{right}"):
        getattr(mmdit, wrong)
    with pytest.raises(ImportError):
        exec(f"from mmdit import {wrong}")


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Python in a folder, whose files come before ours."""
    path = os.pathsep.join([str(folder), str(SOURCE.parent.parent)])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["samplers.py", "encoders.py", "quant/__init__.py"])
def test_a_file_that_shadows_ours_is_named(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    done = run("import mmdit", tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError")
    assert str(file) in last


def test_importing_loads_no_torch(tmp_path):
    done = run("import sys, mmdit; print('torch' in sys.modules, 'samplers' in sys.modules)", tmp_path)
    assert done.stdout.split() == ["False", "False"], done.stderr
