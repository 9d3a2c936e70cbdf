"""The shape of the distribution: four packages, who may import whom, and what a wheel holds."""

import ast
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("encoders", "mmdit", "quant", "samplers")
SOURCES = sorted((ROOT / "src").rglob("*.py"))
REFERENCES = {"diffusers", "transformers"}
# Modules whose job is the comparison with the references; they import them inside functions.
COMPARERS = {"verify.py", "traces.py", "bench_models.py", "bench_picture.py", "cli_compare.py"}


def imported(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the packages that a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("leaf", ["encoders", "quant", "samplers"])
def test_leaves_import_none_of_ours(leaf):
    files = sorted((ROOT / "src" / leaf).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) & set(PACKAGES) <= {leaf}, file


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_run_time_needs_no_reference(file):
    allowed = REFERENCES if file.name in COMPARERS else set()
    assert imported(file, top_level_only=True) & REFERENCES == set()
    assert imported(file) & REFERENCES <= allowed


def test_model_code_does_not_name_quantization():
    for name in ("model", "blocks", "layers", "config"):
        text = (ROOT / "src" / "mmdit" / f"{name}.py").read_text(encoding="utf-8").lower()
        assert "quant" not in text
        assert "float8" not in text


@pytest.mark.parametrize("package", PACKAGES)
def test_no_submodule_shares_a_public_name(package):
    module = import_module(package)
    submodules = {path.stem for path in (ROOT / "src" / package).iterdir() if path.stem != "__init__"}
    assert set(module.__all__) & submodules == set()
    assert all(hasattr(module, name) for name in module.__all__)
    assert (ROOT / "src" / package / "py.typed").exists()


def test_import_is_lazy():
    heavy = ["torch", "quant", "triton", "encoders", "samplers", "numpy", "PIL"]
    code = f"import sys, mmdit; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_unknown_attribute():
    import mmdit

    with pytest.raises(AttributeError, match="no attribute 'MMDit'"):
        mmdit.MMDit  # noqa: B018


def test_wheel_holds_exactly_the_four_packages(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("mmdit_lab-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    tops = {path.name for path in (tmp_path / "site").iterdir()}
    assert {name for name in tops if not name.endswith(".dist-info")} == set(PACKAGES)
    code = (
        "import sys, importlib; sys.path.insert(0, sys.argv[1]);"
        f"modules = [importlib.import_module(name) for name in {PACKAGES}];"
        "assert all(module.__file__.startswith(sys.argv[1]) for module in modules); import mmdit; mmdit.Pipeline"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "site")], check=True, cwd=tmp_path)
