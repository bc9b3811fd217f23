"""The documented objects of the installed libraries: public classes, functions and methods under their public names.

A name is the shortest that the library's own import statements give: `numpy.cumsum`, not
`numpy._core.fromnumeric.cumsum`. Order and content depend only on the installed versions.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from peft_recipes.embedded.libraries import PYTHON, installed, no_garbage_collection, syntax_trees
from peft_recipes.embedded.prose import key_of, prose

_INTERNAL = ("pandas.core.", "pandas._", "torch.utils.data.datapipes.")  # public by name, but not for users
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Origins = dict[str, tuple[str, str]]  # name in a module -> (module, name) of its definition


@dataclass(frozen=True)
class Documented:
    """One documented object: `text` is the prose that opens its `docstring`."""

    library: str
    name: str
    kind: str  # "class", "function" or "method"
    text: str
    docstring: str

    @property
    def question(self) -> str:
        """The question that `text` answers."""
        return f"What is {self.name}?" if self.kind == "class" else f"What does {self.name} do?"


def documented() -> list[Documented]:
    """Return every documented object, sorted by library and name; names and texts are unique.

    Of several objects with one text, the one with the shortest path is kept: pandas repeats a method's docstring in
    each class that has it.
    """
    with no_garbage_collection():
        rows = [row for library in [*installed(), PYTHON] for row in _documented_by(library)]
    rows.sort(key=lambda row: (row.name.count("."), row.name))
    texts, by_name = set(), {}
    for row in rows:
        if (key := key_of(row.text)) not in texts:
            texts.add(key)
            by_name.setdefault(row.name, row)
    return sorted(by_name.values(), key=lambda row: (row.library, row.name))


def _documented_by(library: str) -> Iterator[Documented]:
    modules = {module.name: module for module in (_scan(*parsed) for parsed in syntax_trees(library))}
    public = _public_names(modules)
    for module in modules.values():
        rows = [
            (public[module.name, name] + method, kind, docstring)
            for name, method, kind, docstring in module.docstrings
            if (module.name, name) in public
        ]
        for name, kind, docstring in rows + module.attached:
            text = "" if name.startswith(_INTERNAL) else prose(docstring)
            if text:
                yield Documented(library, name, kind, text, docstring)


@dataclass
class Module:
    """What a syntax tree says about docstrings and imports."""

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
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            module.defined.append(node.name)
            module.docstrings += _docstrings_of(node)
        elif isinstance(node, ast.ImportFrom):
            package = dotted.split(".")[: -node.level] if node.level else []
            module.imports.append((".".join([*package, *([node.module] if node.module else [])]), node.names))
        elif isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            module.listed |= {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            module.attached += _attached_by(node.value)
    return module


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield a module's statements, also those under `if` and `try`: numpy's imports are under an `else`."""
    for node in body:
        yield node
        if isinstance(node, ast.Try) or (isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING"):
            yield from _statements([*node.body, *node.orelse])


def _docstrings_of(node: ast.stmt) -> Iterator[tuple[str, str, str, str]]:
    """Yield the docstring of a top-level definition and those of a class's public methods."""
    is_class = isinstance(node, ast.ClassDef)
    yield node.name, "", "class" if is_class else "function", ast.get_docstring(node) or ""
    for member in node.body if is_class else ():
        if isinstance(member, _FUNCTIONS) and not member.name.startswith("_"):
            yield node.name, f".{member.name}", "method", ast.get_docstring(member) or ""


def _attached_by(call: ast.Call) -> Iterator[tuple[str, str, str]]:
    """Yield the docstring that a call attaches to an object written in C, as in numpy and torch.

    `add_newdoc("numpy._core.multiarray", "arange", "...")` and `add_docstr(torch.abs, "...")`.
    """
    function, arguments = getattr(call.func, "id", ""), call.args
    kind = "function"
    if function == "add_docstr" and len(arguments) >= 2:
        name, docstring = ast.unparse(arguments[0]), arguments[1]
    elif function == "add_newdoc" and len(arguments) >= 3 and isinstance(arguments[1], ast.Constant):
        name, docstring = f"numpy.{arguments[1].value}", arguments[2]
        if isinstance(docstring, ast.Tuple) and len(docstring.elts) == 2:
            method, docstring = docstring.elts
            name, kind = f"{name}.{getattr(method, 'value', '')}", "method"
    else:
        return
    text = _constant_text(docstring)
    if text and re.fullmatch(r"(numpy|torch)(\.[A-Za-z]\w*)+", name):
        yield name, kind, text


def _constant_text(node: ast.AST) -> str:
    """Return the text of a string expression; of `"..." + "...".format(...)` its constant parts."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return inspect.cleandoc(node.value)
    if isinstance(node, ast.BinOp):
        return f"{_constant_text(node.left)}\n{_constant_text(node.right)}"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return _constant_text(node.func.value)
    return ""


def _public_names(modules: dict[str, Module]) -> dict[tuple[str, str], str]:
    """Map (module, top-level name) to its shortest name in public modules: its own, or packages that import it."""
    names: dict[tuple[str, str], str] = {}
    known: dict[str, Origins] = {}
    for module in modules.values():
        if re.search(r"(^|\.)_", module.name):
            continue
        for name, origin in _origins(module.name, modules, known).items():
            # a module that is not a package imports for its own use
            if (module.is_package or origin[0] == module.name) and not name.startswith("_"):
                candidate = f"{module.name}.{name}"
                names[origin] = min(names.get(origin, candidate), candidate, key=lambda path: (path.count("."), path))
    return names


def _origins(name: str, modules: dict[str, Module], known: dict[str, Origins]) -> Origins:
    """Map the names in a module to (module, name) of their definitions, through any chain of imports."""
    if name in known or name not in modules:
        return known.get(name, {})
    # stored before its imports are followed: modules may import each other
    origins = known[name] = {defined: (name, defined) for defined in modules[name].defined}
    for source, aliases in modules[name].imports:
        imported = _origins(source, modules, known)
        for alias in aliases:
            if alias.name == "*":
                listed = modules[source].listed if source in modules else set()
                origins.update({key: origin for key, origin in imported.items() if key in (listed or imported)})
            elif alias.name in imported:
                origins[alias.asname or alias.name] = imported[alias.name]
    return origins
