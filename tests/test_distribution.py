"""The shape of the distribution: four packages, who may import whom, and what a wheel holds."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("encoders", "mmdit", "quant", "samplers")
SOURCES = sorted((ROOT / "src").rglob("*.py"))
REFERENCES = {"diffusers", "transformers"}
# Modules whose job is the comparison with the references; they import them inside functions.
COMPARERS = {
    "mmdit/parity/verify.py",
    "mmdit/parity/traces.py",
    "mmdit/bench/random_models.py",
    "mmdit/bench/picture.py",
    "mmdit/bench/training.py",
    "mmdit/cli/compare.py",
}
# The rooms of `src/mmdit`: a room imports only rooms of lines above its own; rooms of one line do not see each other.
LAYERS = (
    ("_imports", "_version", "embedded", "utils"),
    ("models", "pictures"),
    ("checkpoints",),
    ("runtime",),
    ("pipeline",),
    ("inspection", "parity", "comfyui", "training"),
    ("demo",),
    ("bench",),
    ("cli",),
    ("__init__", "__main__"),
)
LEAVES = ("encoders", "quant", "samplers")


@cache
def imports(file: Path) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """The imports of a file: those at its top, and all."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.Import, ast.ImportFrom)
    top, every = tree.body, statements(tree)
    return [one for one in top if isinstance(one, kinds)], [one for one in every if isinstance(one, kinds)]


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements inside, however deep, as `ast.walk` finds them, without a look at expressions."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.stmt):
            yield inner
        if isinstance(inner, ast.stmt | ast.excepthandler | ast.match_case):
            yield from statements(inner)


def imported(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the packages that a file imports."""
    found = set()
    for node in imports(file)[not top_level_only]:
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


def modules() -> dict[str, Path]:
    """Every module of ours, by dotted name; a package goes by the name of its folder."""
    names = {path: ".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in SOURCES}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def edges() -> dict[str, set[str]]:
    """Which modules of ours each one names in an import, also inside functions and under TYPE_CHECKING."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        targets: set[str] = set()
        for node in imports(path)[1]:
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= inner if inner <= set(known) else inner | {node.module or ""}
        found[name] = (targets & set(known)) - {name}
    return found


def room(name: str) -> str:
    """The room of a module of `mmdit`."""
    return name.split(".")[1] if "." in name else "__init__"


def test_rooms_import_only_those_before_them():
    order = {name: index for index, line in enumerate(LAYERS) for name in line}
    assert {room(name) for name in modules() if name.split(".")[0] == "mmdit"} == set(order)
    wrong = [
        f"{source} imports {target}"
        for source, targets in edges().items()
        for target in targets
        if source.startswith("mmdit.") and target.split(".")[0] == "mmdit"
        if room(source) != room(target) and order[room(target)] >= order[room(source)]
    ]
    assert sorted(wrong) == []


def test_rooms_have_at_most_nine_levels():
    """The longest chain of rooms that import each other."""
    targets: dict[str, set[str]] = {}
    for source, found in edges().items():
        if source.startswith("mmdit."):
            inner = {room(target) for target in found if target.split(".")[0] == "mmdit"}
            targets.setdefault(room(source), set()).update(inner - {room(source)})
    levels = 0
    while targets:
        levels += 1
        free = {name for name, needs in targets.items() if not needs & set(targets)}
        assert free
        targets = {name: needs for name, needs in targets.items() if name not in free}
    assert levels <= 9


def test_models_import_no_leaf():
    wrong = [
        f"{source} imports {target}"
        for source, targets in edges().items()
        for target in targets
        if source.startswith("mmdit.models") and target.split(".")[0] in LEAVES
    ]
    assert wrong == []


def test_no_circle():
    left = {source: set(targets) for source, targets in edges().items() if source != "mmdit"}
    while free := [name for name, targets in left.items() if not targets & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_run_time_needs_no_reference(file):
    allowed = REFERENCES if file.relative_to(ROOT / "src").as_posix() in COMPARERS else set()
    assert imported(file, top_level_only=True) & REFERENCES == set()
    assert imported(file) & REFERENCES <= allowed


def test_model_code_does_not_name_quantization():
    for file in (ROOT / "src" / "mmdit" / "models").glob("*.py"):
        text = file.read_text(encoding="utf-8").lower()
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


FIRST_PICTURE = """
import gc, sys, mmdit
mmdit.Pipeline
print(sum(each["collections"] for each in gc.get_stats()), gc.get_freeze_count(), gc.isenabled())
mmdit.Pipeline.demo()("a circle", num_inference_steps=1)
print("torch._dynamo" in sys.modules)
"""


def test_a_first_picture_waits_for_nothing_that_it_does_not_need():
    """The compiler of torch takes two seconds; decorators of `torch.compiler` and values on the meta device load it.

    Garbage collections while torch is imported take half a second, and find nothing.
    """
    first, second = subprocess.check_output([sys.executable, "-c", FIRST_PICTURE], text=True).splitlines()
    collections, frozen, enabled = first.split()
    assert int(collections) < 100 and int(frozen) > 100_000 and enabled == "True"
    assert second == "False"


def test_unknown_attribute():
    import mmdit

    with pytest.raises(AttributeError, match="no attribute 'MMDit'"):
        mmdit.MMDit  # noqa: B018


def test_wheel_holds_exactly_the_four_packages(tmp_path):
    """As pip builds it, by the backend that pyproject.toml names."""
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["build-backend"]
    code = f"import sys, {backend}; {backend}.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, cwd=ROOT)
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
