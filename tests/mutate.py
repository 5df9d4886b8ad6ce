"""Breaks a module in one place at a time and shows what its tests do not notice.

    python -m tests.mutate audioflamingo/processor/thoughts.py tests/unit/processor/test_thoughts.py

Works on a copy of the repository. Each change costs a run of the tests: for one module, by hand, not for CI.
"""

from __future__ import annotations

import ast
import copy
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch  # noqa: F401  # once, for all runs of the tests

TIMEOUT_S = 300
ROOT = Path(__file__).parents[1]
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
WORDS = {ast.And: ast.Or, ast.Or: ast.And}


def mutations(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what was changed, and the module with the change."""
    tree = ast.parse(source)
    for place, node in enumerate(ast.walk(tree)):
        broken = copy.deepcopy(tree)
        target = next(n for i, n in enumerate(ast.walk(broken)) if i == place)
        before = ast.unparse(target) if isinstance(target, ast.expr) else ""
        if change(target):
            line = getattr(node, "lineno", 0)
            yield line, f"{before}  ->  {ast.unparse(target)}", ast.unparse(ast.fix_missing_locations(broken))


def change(node: ast.AST) -> bool:
    """Breaks a node in place, if it is of a kind that can be."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        node.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        node.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        node.op = WORDS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
    else:
        return False
    return True


def notice(copied: Path, tests: Sequence[str]) -> bool:
    """Whether tests fail in a copy of the repository; a change that never ends is noticed, too."""
    child = multiprocessing.get_context("fork").Process(target=run_tests, args=(copied, tests))
    child.start()
    child.join(TIMEOUT_S)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode != 0


def run_tests(copied: Path, tests: Sequence[str]) -> None:
    """Runs tests in this process, which ends with their status and has torch already: that takes the longest."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    os.chdir(copied)
    sys.path[0] = str(copied)
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


def main(module: str, *tests: str) -> int:
    """Prints each change that the tests do not notice; exits with how many there are."""
    missed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder) / "repository"
        ignored = shutil.ignore_patterns(
            ".git", ".venv", "site", "__pycache__", ".*cache", ".hypothesis", ".coverage*"
        )
        shutil.copytree(ROOT, copied, ignore=ignored)
        if notice(copied, tests):
            sys.exit("the tests fail as it is")
        for line, about, broken in mutations((ROOT / module).read_text(encoding="utf-8")):
            (copied / module).write_text(broken, encoding="utf-8")
            total += 1
            if not notice(copied, tests):
                missed += 1
                print(f"{module}:{line}: not noticed: {about}", flush=True)
    print(f"{total - missed} of {total} changes are noticed")
    return missed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
