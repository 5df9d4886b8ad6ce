"""The house's own order: imports come from rows above and never form a ring, and files and functions are short."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import audioflamingo

PACKAGE = Path(audioflamingo.__file__).parent
MAX_FILE, MAX_FUNCTION = 450, 80  # lines; of a function, those behind its docstring
# From the top down. A name is a module or a folder of the package.
ROWS = (
    *(
        "errors",
        "lazy",
        "fields",
        "json_config",
        "config",
        "tasks",
        "files",
        "figures",
        "hub",
        "kernels",
        "audio",
        "quantization",
        "network",
        "processor",
        "checkpoint",
    ),
    *(
        "datasets",
        "engine",
        "model",
        "quantize_folder",
        "transcription",
        "evaluation",
        "training",
        "corpus",
        "server",
        "cli",
    ),
)


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in inner}
    return {name for name in found if name in MODULES and name != module}


def row(module: str) -> str:
    return module.split(".")[1]


def test_every_part_of_the_package_has_a_row() -> None:
    assert {row(module) for module in MODULES if "." in module} == set(ROWS)


@pytest.mark.parametrize("module", [module for module in MODULES if "." in module])
def test_imports_come_from_rows_above(module: str) -> None:
    upward = {
        name for name in imports(module) if "." in name and ROWS.index(row(name)) > ROWS.index(row(module))
    }
    assert not upward, f"{module} imports from rows below its own: {sorted(upward)}"


def test_no_modules_import_each_other_in_a_ring() -> None:
    graph = {module: imports(module) for module in MODULES if module != "audioflamingo"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a ring of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", MODULES.values(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            described = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            assert (node.end_lineno or 0) - (described or 0) <= MAX_FUNCTION, node.name


def test_the_list_of_rooms_in_the_documentation_is_todays() -> None:
    from docs.rooms import rooms

    page = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
    listed = page.split("<!-- rooms -->\n")[1].split("\n<!-- end of rooms -->")[0]
    assert listed == rooms(), "write what `python -m docs.rooms` prints into docs/architecture.md"
