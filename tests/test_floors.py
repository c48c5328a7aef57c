"""The house has three floors; imports only go down: lbllm_compile -> passes -> codegen."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"lbllm_compile": 2, "lbllm_compile.passes": 1, "lbllm_compile.codegen": 0}
FOLDERS = {"lbllm_compile": "lbllm_compile", "lbllm_compile.passes": "passes", "lbllm_compile.codegen": "codegen"}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the three folders by the name it is imported under."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = file
    return found


def floor_of(name: str) -> int:
    """The floor of a module: that of the longest package it is in."""
    return FLOORS[max((p for p in FLOORS if name == p or name.startswith(p + ".")), key=len)]


def imported(name: str, file: Path) -> set[str]:
    """Absolute names a file imports, at any depth, in functions and for types too, relative ones resolved.

    ``from package import name`` is an import of ``package.name`` where that is a module, and of ``package`` otherwise.
    """
    own = modules()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([node.module] if node.module else []))
            submodules = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in own else base for name in submodules}
    return found


def import_graph() -> nx.DiGraph:
    """An edge from every module of ours to every module of ours that it imports."""
    own = modules()
    graph = nx.DiGraph()
    graph.add_nodes_from(own)
    for name, file in own.items():
        graph.add_edges_from((name, target) for target in imported(name, file) & own.keys() if target != name)
    return graph


GRAPH = import_graph()


def test_the_graph_sees_the_floors() -> None:
    assert {floor_of(n) for n in GRAPH} == {0, 1, 2}
    crossing = [(a, b) for a, b in GRAPH.edges if floor_of(a) != floor_of(b)]
    assert ("lbllm_compile.passes.base", "lbllm_compile.passes.ir.program") in GRAPH.edges
    assert crossing


def test_imports_only_go_down() -> None:
    upward = [f"{a} -> {b}" for a, b in GRAPH.edges if floor_of(a) < floor_of(b)]
    assert upward == []


def test_the_floors_form_a_chain() -> None:
    quotient = nx.DiGraph((floor_of(a), floor_of(b)) for a, b in GRAPH.edges if floor_of(a) != floor_of(b))
    assert nx.is_directed_acyclic_graph(quotient)


def rooms(graph: nx.DiGraph, package: str) -> nx.DiGraph:
    """What the rooms of a package import of each other: its modules, and its folders with all that is in them."""

    def room(name: str) -> str:
        return ".".join(name.split(".")[: package.count(".") + 2])

    inside = [(a, b) for a, b in graph.edges if a.startswith(package + ".") and b.startswith(package + ".")]
    return nx.DiGraph((room(a), room(b)) for a, b in inside if room(a) != room(b))


def circles(graph: nx.DiGraph) -> list[list[str]]:
    return [sorted(names) for names in nx.strongly_connected_components(graph) if len(names) > 1]


PACKAGES = sorted(name for name, file in modules().items() if file.name == "__init__.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_each_other_one_way(package: str) -> None:
    assert circles(rooms(GRAPH, package)) == []


def test_a_circle_of_rooms_is_seen_through_other_modules() -> None:
    graph = nx.DiGraph([("p.a.one", "p.b.one"), ("p.b.two", "p.c"), ("p.c", "p.a.two"), ("p.c", "p.d.one")])
    assert circles(graph) == []
    assert circles(rooms(graph, "p")) == [["p.a", "p.b", "p.c"]]
    assert circles(rooms(graph, "p.a")) == []


def test_no_imports_form_a_circle() -> None:
    assert circles(GRAPH) == []


def test_a_circle_is_seen_wherever_its_imports_stand(tmp_path: Path) -> None:
    inside, types = tmp_path / "inside.py", tmp_path / "types.py"
    inside.write_text("def f():\n    from lbllm_compile.job import Job\n    from lbllm_compile import driver\n")
    types.write_text("if TYPE_CHECKING:\n    from lbllm_compile import __version__, records\n")
    assert imported("lbllm_compile.inside", inside) == {"lbllm_compile.job", "lbllm_compile.driver"}
    assert imported("lbllm_compile.types", types) == {"lbllm_compile", "lbllm_compile.records"}


def test_no_folder_is_imported_under_its_bare_name() -> None:
    bare = [
        f"{name} imports {target}"
        for name, file in modules().items()
        for target in imported(name, file)
        if target.split(".")[0] in ("passes", "codegen")
    ]
    assert bare == []


def test_only_two_modules_import_tvm() -> None:
    importing = {
        name
        for name, file in modules().items()
        if any(target.split(".")[0] in ("tvm", "tvm_ffi") for target in imported(name, file))
    }
    assert importing == {"lbllm_compile.codegen.tvm_api", "lbllm_compile.codegen.tvm_runtime"}


@pytest.mark.parametrize("package", ["lbllm_compile.codegen.format", "lbllm_compile.codegen.reference"])
def test_the_format_needs_no_kernels(package: str) -> None:
    assert "lbllm_compile.codegen.tvm_api" not in nx.descendants(GRAPH, package)


def test_passes_know_the_operators_and_no_kernel() -> None:
    known = {"errors", "format", "latent", "levels", "operators", "progress", "reference", "sizes"}
    used = {
        target
        for name, file in modules().items()
        if floor_of(name) == 1
        for target in imported(name, file) & modules().keys()
        if floor_of(target) == 0
    }
    rooms = {target.removeprefix("lbllm_compile.codegen").removeprefix(".").partition(".")[0] for target in used}
    assert rooms - {""} <= known


def test_every_folder_is_packaged() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    packages = {name if file.name == "__init__.py" else name.rpartition(".")[0] for name, file in modules().items()}
    assert [p for p in sorted(packages) if p not in modules()] == []
    assert [p for p in sorted(packages) if f'"{p}"' not in text] == []


def test_every_data_file_is_packaged() -> None:
    data = {
        file.name
        for folder in FOLDERS.values()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    text = (ROOT / "pyproject.toml").read_text()
    assert [name for name in sorted(data) if f'"{name}"' not in text and f'*{Path(name).suffix}"' not in text] == []
