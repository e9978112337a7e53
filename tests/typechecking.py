"""What is checked at run time in the tests: the shapes and types of tensors.

Wrong arguments of users are refused by the package's own errors, which tests must be able to
see; so functions whose annotations name no tensor are left alone. So are functions inside of
functions: they would be prepared anew at each call.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import jaxtyped

TENSORS = ("Float[", "Int[", "Bool[")


def check(what: Callable[..., Any]) -> Callable[..., Any]:
    """A function, with shapes of what it takes and gives checked against each other; or a
    dataclass, with shapes of its fields."""
    checked: Callable[..., Any] = jaxtyped(typechecker=check_tensors)(what)
    return checked


def check_tensors(part: Callable[..., Any]) -> Callable[..., Any]:
    """What is taken is looked at if it holds tensors, and so is what is given."""
    checked: Callable[..., Any] = beartype(part) if names(part.__annotations__.values()) else part
    return checked


def names(annotations: Iterable[Any]) -> bool:
    """Whether one of them is a tensor's, as text or as type."""
    return any(name in str(annotation) for annotation in annotations for name in TENSORS)


def names_tensors(function: ast.FunctionDef) -> bool:
    """Whether an annotation of the function does."""
    found = [node.annotation for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    return names(ast.unparse(item) for item in (*found, function.returns) if item is not None)


def is_dataclass_of_tensors(node: ast.ClassDef) -> bool:
    fields = [ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)]
    is_dataclass = any("dataclass" in ast.unparse(item) for item in node.decorator_list)
    return is_dataclass and names(fields)


class Decorating(ast.NodeTransformer):
    """Puts `check` next to functions and above dataclasses that name tensors."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if names_tensors(node):
            node.decorator_list.append(decorator(node))
        return node  # without looking inside

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        if is_dataclass_of_tensors(node):
            node.decorator_list.insert(0, decorator(node))
        self.generic_visit(node)
        return node


def decorator(node: ast.stmt) -> ast.expr:
    found = ast.parse(f"__import__({__name__!r}).check", mode="eval").body
    return ast.copy_location(found, node)


class CheckedLoader(SourceFileLoader):
    """Compiles a module with its functions decorated; nothing of it is cached."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = Decorating().visit(ast.parse(self.get_data(path), path))
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        return code


class CheckedFinder(MetaPathFinder):
    """Finds the modules of a package for the loader above."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.split(".")[0] != self.package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = CheckedLoader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str) -> None:
    """From now on, the package's modules are imported with their functions checked."""
    sys.meta_path.insert(0, CheckedFinder(package))
