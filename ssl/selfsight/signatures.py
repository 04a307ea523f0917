"""Signatures of functions and classes of this package, read from source without importing them.

Importing a trunk imports torch, which takes seconds; reading its constructor's argument names and
annotations with `ast` takes a millisecond. The configuration is checked with these, so that a
mistake is reported before anything heavy is loaded.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "None": "null",
}


@dataclass(frozen=True)
class Signature:
    """Argument names of one callable, the required ones, and each one's annotation as source."""

    name: str
    names: tuple[str, ...]
    required: tuple[str, ...]
    annotations: dict[str, str]

    def refuses(self, argument: str, value: Any) -> str | None:
        """What the argument must be, in words, if `value` does not fit; None if it does.

        A mapping or list may be built into an object later, so it is only held against
        annotations made of plain types.
        """
        annotation = self.annotations.get(argument)
        if annotation is None or (isinstance(value, dict) and "_target_" in value):
            return None
        try:
            options = _options(ast.parse(annotation, mode="eval").body)
        except ValueError:
            return None  # an annotation of other than plain types: its constructor checks it
        if any(_fits(option, value) for option in options):
            return None
        return " or ".join(dict.fromkeys(_words(option) for option in options))


@cache
def signature(target: str) -> Signature | None:
    """The signature of `selfsight.a.b.Name`, or None if there is no such function or class."""
    module, _, name = target.rpartition(".")
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _of_function(name, node.args, skip=0)
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(name, node)
    return None


def _of_class(name: str, node: ast.ClassDef) -> Signature:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _of_function(name, item.args, skip=1)
    fields = [
        f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
    ]
    names = tuple(f.target.id for f in fields if isinstance(f.target, ast.Name))
    required = tuple(n for n, f in zip(names, fields, strict=True) if f.value is None)
    texts = {n: ast.unparse(f.annotation) for n, f in zip(names, fields, strict=True)}
    return Signature(name, names, required, texts)


def _of_function(name: str, args: ast.arguments, skip: int) -> Signature:
    positional = [*args.posonlyargs, *args.args][skip:]
    without = len(positional) - len(args.defaults)
    required = [a.arg for a in positional[: max(without, 0)]]
    required += [a.arg for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is None]
    every = positional + args.kwonlyargs
    texts = {a.arg: ast.unparse(a.annotation) for a in every if a.annotation is not None}
    return Signature(name, tuple(a.arg for a in every), tuple(required), texts)


def _options(node: ast.expr) -> list[ast.expr]:
    """The alternatives of a union; ValueError if one of them is not made of plain types."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _options(node.left) + _options(node.right)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id in ("list", "tuple", "Sequence"):
            for part in inner:
                if not (isinstance(part, ast.Constant) and part.value is Ellipsis):
                    _options(part)
            return [node]
        if node.value.id == "Literal":
            return [node]
    if isinstance(node, ast.Name) and node.id in WORDS:
        return [node]
    if isinstance(node, ast.Constant) and node.value is None:
        return [node]
    raise ValueError(ast.unparse(node))


def _fits(option: ast.expr, value: Any) -> bool:
    if isinstance(option, ast.Constant):
        return value is None
    if isinstance(option, ast.Name):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return {
            "int": number and float(value).is_integer() and isinstance(value, int),
            "float": number,
            "str": isinstance(value, str),
            "bool": isinstance(value, bool),
            "None": value is None,
        }[option.id]
    assert isinstance(option, ast.Subscript) and isinstance(option.value, ast.Name)
    inner = option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice]
    if option.value.id == "Literal":
        return value in [c.value for c in inner if isinstance(c, ast.Constant)]
    if not isinstance(value, list | tuple):
        return False
    parts = [p for p in inner if not (isinstance(p, ast.Constant) and p.value is Ellipsis)]
    if option.value.id == "tuple" and len(parts) == len(inner):  # tuple[float, float]
        return len(value) == len(parts) and all(
            any(_fits(o, v) for o in _options(p)) for p, v in zip(parts, value, strict=True)
        )
    return all(any(_fits(o, v) for o in _options(parts[0])) for v in value)


def _words(option: ast.expr) -> str:
    if isinstance(option, ast.Subscript) and isinstance(option.value, ast.Name):
        inner = option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice]
        if option.value.id == "Literal":
            return "one of " + ", ".join(str(c.value) for c in inner if isinstance(c, ast.Constant))
        parts = [_words(p) for p in inner if not isinstance(p, ast.Constant)]
        return f"a list of {' and '.join(dict.fromkeys(parts))} each" if parts else "a list"
    return WORDS.get(ast.unparse(option), ast.unparse(option))
