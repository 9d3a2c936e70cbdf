"""Signatures are checked while the suite runs: an import hook decorates every function, method and dataclass.

Every signature is checked by beartype. One with shapes, such as `Float[Tensor, "b l d"]`, is checked in a context of
jaxtyping, in which all arguments and the result must agree on the sizes that have names. `jaxtyped(typechecker=...)`
checks the same, but every argument twice, and binds the signature at each call; only generators, whose calls outlive
the context, and sizes that another argument gives, such as "b {size}", need that. jaxtyping's own hook decorates
functions that are made inside others each time that they are made, and a lazy checkpoint makes one for each tensor:
these are let be. `jaxtyping_disable` of jaxtyping's config turns all of it off.
"""

import ast
import dataclasses
import hashlib
import inspect
import marshal
import os
import re
import struct
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception
from jaxtyping import config, jaxtyped
from torch.compiler import is_compiling

ONLY_FOR_TYPES: dict[str, set[str]] = {}  # by module: the names that it imports under TYPE_CHECKING
SIGNATURES: list[Callable[..., Any]] = []  # all functions and methods that are checked
AS_IMPORTED: dict[str, dict[str, Any]] = {}  # by module: what its names were before any test replaced some
CACHED = "checked" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]  # what is in the names of its files
SHAPES = re.compile(r"\b(Float|Int|Bool)\[")
as_type_error = beartype(conf=BeartypeConf(violation_type=TypeError))


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the call, unless the signature says `Self`, which beartype takes only from classes it decorates itself.

    Its error for that is in a cycle with the frames of all callers, and so with the models that they draw with.
    """
    if any(re.search(r"\bSelf\b", str(one)) for one in function.__annotations__.values()):
        return function
    try:
        return as_type_error(typed(function))
    except BeartypeDecorHintPep673Exception:
        return function


def typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy whose annotations are types, without those that no running program can read."""
    unknown, names = ONLY_FOR_TYPES.get(function.__module__, set()), AS_IMPORTED.get(function.__module__)
    known = {
        name: eval(one, names) if isinstance(one, str) and names else one  # our own annotations
        for name, one in function.__annotations__.items()
        if not (isinstance(one, str) and unknown & {*re.findall(r"\w+", one)})
    }
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    copy = wraps(function)(FunctionType(*parts))
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, known
    return copy


def checked(made: Any) -> Any:
    """What the import hook puts around a function, a method or a dataclass."""
    if inspect.isclass(made):
        if dataclasses.is_dataclass(made):
            made.__init__ = checked(made.__init__)
        return made
    if not made.__annotations__:
        return made
    SIGNATURES.append(made)
    shapes = [text for text in map(str, made.__annotations__.values()) if SHAPES.search(text)]
    if inspect.isgeneratorfunction(made) or any("{" in text for text in shapes):
        return jaxtyped(made, typechecker=_checked)
    return (_with_sizes if shapes else _without_sizes)(made)


def _without_sizes(made: Callable[..., Any]) -> Callable[..., Any]:
    """The checked function; what checks it is made when it is first called, and most are never called."""
    inner: Callable[..., Any] | None = None

    @wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal inner
        if config.jaxtyping_disable or (inner is None and is_compiling()):  # torch cannot trace how a check is made
            return made(*args, **kwargs)
        if inner is None:
            inner = _checked(made)
        return inner(*args, **kwargs)

    return call


def _with_sizes(made: Callable[..., Any]) -> Callable[..., Any]:
    """The same, where each call has sizes of its own by name."""
    inner: Callable[..., Any] | None = None

    @wraps(made)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal inner
        if config.jaxtyping_disable or (inner is None and is_compiling()):  # torch cannot trace how a check is made
            return made(*args, **kwargs)
        if inner is None:
            inner = _checked(made)
        with jaxtyped("context"):
            return inner(*args, **kwargs)

    return call


class _Decorate(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        """The innermost decorator, so that annotations are still there; what is inside is let be."""
        if not any(isinstance(one, ast.Name) and one.id == "no_type_check" for one in node.decorator_list):
            node.decorator_list.append(_decorator(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        """The outermost decorator, so that the class is a dataclass already."""
        self.generic_visit(node)
        node.decorator_list.insert(0, _decorator(node))
        return node


def _decorator(node: ast.stmt) -> ast.expr:
    expression = ast.parse("__import__('typecheck').checked", mode="eval").body
    return ast.fix_missing_locations(ast.copy_location(expression, node))


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """From the source, or from a cache of our own: Python's holds the code without checks."""
        path = self.get_filename(fullname)
        cache, source = Path(cache_from_source(path, optimization=CACHED)), Path(path).stat()
        stamp = struct.pack("<qq", source.st_mtime_ns, source.st_size)
        with suppress(OSError):
            if (kept := cache.read_bytes()).startswith(stamp):
                return self._known(fullname, *marshal.loads(kept[len(stamp) :]))
        tree = ast.parse(self.get_data(path), path)
        guarded = (
            one.body for one in tree.body if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"
        )
        names = {
            alias.asname or alias.name
            for body in guarded
            for one in body
            if isinstance(one, ast.Import | ast.ImportFrom)
            for alias in one.names
        }
        code = compile(_Decorate().visit(tree), path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            with suppress(OSError):  # of a folder that cannot be written to
                cache.parent.mkdir(exist_ok=True)
                part = cache.with_suffix(f".{os.getpid()}")
                part.write_bytes(stamp + marshal.dumps((names, code)))
                part.replace(cache)
        return self._known(fullname, names, code)

    def _known(self, fullname: str, names: set[str], code: CodeType) -> CodeType:
        ONLY_FOR_TYPES[fullname] = names
        return code

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        AS_IMPORTED[module.__name__] = dict(vars(module))


class _Finder(MetaPathFinder):
    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def check_signatures(packages: Sequence[str]) -> None:
    """Check the signatures of these packages from now on; call it before they are imported."""
    sys.meta_path.insert(0, _Finder(packages))
