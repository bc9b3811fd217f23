"""What the installed libraries document: one row a public class, function or method, under its public name.

A name is the shortest that the library's own import statements give: `numpy.cumsum`, not
`numpy._core.fromnumeric.cumsum`. Order and content depend on nothing but the installed versions.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from peft_recipes.embedded.libraries import PYTHON, installed, no_garbage_collection, syntax_trees
from peft_recipes.embedded.prose import key_of, prose

_INTERNAL = ("pandas.core.", "pandas._", "torch.utils.data.datapipes.")  # public by name, not meant for users
Names = dict[str, tuple[str, str]]  # a name -> (module, name) of its definition
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Documented:
    """One documented object: `text` is the plain prose it opens with, `docstring` the whole as it was written."""

    library: str
    name: str
    kind: str  # "class", "function" or "method"
    text: str
    docstring: str


def documented() -> list[Documented]:
    """Every documented object, sorted by library and name; no name, no text and no docstring stands there twice.

    Of several objects with one text, the one with the shortest path is kept: pandas repeats a method's docstring in
    each class that has it.
    """
    with no_garbage_collection():
        rows = [row for library in [*installed(), PYTHON] for row in _documented_by(library)]
    rows.sort(key=lambda row: (row.name.count("."), row.name))
    unique: dict[str, Documented] = {}
    for row in rows:
        unique.setdefault(key_of(row.text), row)
    by_name: dict[str, Documented] = {}
    for row in unique.values():
        by_name.setdefault(row.name, row)
    return sorted(by_name.values(), key=lambda row: (row.library, row.name))


def _documented_by(library: str) -> Iterator[Documented]:
    modules = {module.name: module for module in (_scan(*parsed) for parsed in syntax_trees(library))}
    public = public_names(modules)
    for module in modules.values():
        named = [(public.get((module.name, top), "") + rest, kind, doc) for top, rest, kind, doc in module.docstrings]
        for name, kind, docstring in named + module.attached:
            text = prose(docstring) if "." in name and not name.startswith((".", *_INTERNAL)) else ""
            if text:
                yield Documented(library, name, kind, text, docstring)


# --- one module ----------------------------------------------------------------------------------------------------


@dataclass
class Module:
    """What is kept of a syntax tree: enough for docstrings and for following imports."""

    name: str
    is_package: bool
    defined: list[str] = field(default_factory=list)
    imports: list[tuple[str, list[ast.alias]]] = field(default_factory=list)  # absolute module, names
    listed: set[str] = field(default_factory=set)  # a literal __all__
    docstrings: list[tuple[str, str, str, str]] = field(default_factory=list)  # name, ".method" or "", kind, docstring
    attached: list[tuple[str, str, str]] = field(default_factory=list)  # full name, kind, docstring


def _scan(dotted: str, source: str, tree: ast.Module) -> Module:
    module = Module(dotted.removesuffix(".__init__"), dotted.endswith(".__init__"))
    for node in _statements(tree.body):
        if isinstance(node, _DEFINITIONS) and not node.name.startswith("_"):
            module.defined.append(node.name)
            module.docstrings += _docstrings_of(node)
        elif isinstance(node, ast.ImportFrom):
            base = dotted.split(".")[: -node.level] if node.level else []
            module.imports.append((".".join([*base, *([node.module] if node.module else [])]), node.names))
        elif isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            module.listed |= {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            module.attached += _attached_by(node.value)
    return module


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A module's statements, those under its `if` and `try` too: numpy imports all of its names under an `else`."""
    for node in body:
        yield node
        if isinstance(node, ast.Try) or (isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"):
            yield from _statements([*node.body, *node.orelse])


def _docstrings_of(node: ast.AST) -> Iterator[tuple[str, str, str, str]]:
    """Of a top-level definition: its own docstring, and a class's public methods'."""
    is_class = isinstance(node, ast.ClassDef)
    if docstring := ast.get_docstring(node):
        yield node.name, "", "class" if is_class else "function", docstring
    for member in node.body if is_class else ():
        if isinstance(member, _DEFINITIONS[:2]) and not member.name.startswith("_"):
            yield node.name, f".{member.name}", "method", ast.get_docstring(member) or ""


def _attached_by(call: ast.Call) -> Iterator[tuple[str, str, str]]:
    """A docstring that a call attaches to what is written in C, as numpy and torch do:
    `add_newdoc("numpy._core.multiarray", "arange", "...")` and `add_docstr(torch.abs, "...")`."""
    function, arguments = getattr(call.func, "id", ""), call.args
    if function == "add_docstr" and len(arguments) >= 2:
        name, document, kind = ast.unparse(arguments[0]), arguments[1], "function"
    elif function == "add_newdoc" and len(arguments) >= 3 and isinstance(arguments[1], ast.Constant):
        name, document, kind = f"numpy.{arguments[1].value}", arguments[2], "function"
        if isinstance(document, ast.Tuple) and len(document.elts) == 2 and isinstance(document.elts[0], ast.Constant):
            name, document, kind = f"{name}.{document.elts[0].value}", document.elts[1], "method"
    else:
        return
    text = _constant_text(document)
    if text and re.fullmatch(r"(numpy|torch)(\.[A-Za-z]\w*)+", name):
        yield name, kind, text


def _constant_text(node: ast.AST) -> str:
    """The text of a string expression; of `"..." + "...".format(...)` the parts that stand there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return inspect.cleandoc(node.value)
    if isinstance(node, ast.BinOp):
        return f"{_constant_text(node.left)}\n{_constant_text(node.right)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _constant_text(node.func.value)
    return ""


# --- public names --------------------------------------------------------------------------------------------------


def public_names(modules: dict[str, Module]) -> dict[tuple[str, str], str]:
    """(module, top-level name) -> the shortest name in public modules (its own, or packages that import it)."""
    names: dict[tuple[str, str], str] = {}
    seen: dict[str, Names] = {}
    for module in modules.values():
        if re.search(r"(^|\.)_", module.name):
            continue
        for name, origin in _exports(module.name, modules, seen).items():
            # what a plain module imports is there for its own use
            if (module.is_package or origin[0] == module.name) and not name.startswith("_"):
                candidate = f"{module.name}.{name}"
                names[origin] = min(names.get(origin, candidate), candidate, key=lambda path: (path.count("."), path))
    return names


def _exports(name: str, modules: dict[str, Module], seen: dict[str, Names]) -> Names:
    """The names that a module holds -> (module, name) of their definition, through any chain of imports."""
    if name in seen or name not in modules:
        return seen.get(name, {})
    # entered before its imports are followed, for modules that import each other
    held = seen[name] = {defined: (name, defined) for defined in modules[name].defined}
    for source, aliases in modules[name].imports:
        theirs = _exports(source, modules, seen)
        for alias in aliases:
            if alias.name == "*":
                listed = modules[source].listed if source in modules else set()
                held.update({key: origin for key, origin in theirs.items() if key in (listed or theirs)})
            elif alias.name in theirs:
                held[alias.asname or alias.name] = theirs[alias.name]
    return held
