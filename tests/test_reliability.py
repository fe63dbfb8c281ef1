"""docs/reliability.md lists the faults that tests are named after. `python tests/test_reliability.py` renews it."""

import ast
import re
from collections import defaultdict
from pathlib import Path

PAGE = Path("docs/reliability.md")
BEGIN, END = "<!-- from the tests -->\n", "<!-- to here -->\n"
COVERED = [*range(1, 12), *range(13, 17), 18, 20, *range(23, 32), *range(33, 48), 50, 51, 53, *range(57, 63)]
"""The rows that must not be without a test."""


def find_faults() -> dict[int, list[tuple[str, str, str, bool]]]:
    """By number: what happens, what follows, the test, and whether it is among the long ones."""
    faults = defaultdict(list)
    for path in sorted(Path("tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        marks = [
            ast.unparse(n.value) for n in tree.body if isinstance(n, ast.Assign) and "pytestmark" in ast.unparse(n)
        ]
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (named := re.match(r"test_fault_(\d\d)_", node.name)):
                continue
            line = (ast.get_docstring(node) or "").splitlines()[0].rstrip(".")
            fault, _, outcome = line.partition(": ")
            assert fault and outcome, f"{path}: {node.name} needs a docstring of the form 'fault: what follows.'"
            long = any("mark.faults" in mark for mark in [*marks, *map(ast.unparse, node.decorator_list)])
            faults[int(named[1])].append((fault, outcome, f"{path.name}::{node.name}", long))
    return dict(sorted(faults.items()))


def make_table() -> str:
    lines = ["| # | what happens | what follows | test |", "| --- | --- | --- | --- |"]
    for number, found in find_faults().items():
        for fault, outcome, test, long in found:
            name = f"`{test}`" + (" (`make test-faults`)" if long else "")
            lines.append(f"| {number} | {fault} | {outcome} | {name} |".replace("<", "&lt;"))
    return "\n".join(lines) + "\n"


def test_every_fault_has_a_test():
    assert set(COVERED) <= find_faults().keys(), sorted(set(COVERED) - find_faults().keys())


def test_the_page_lists_the_faults_as_the_tests_do():
    page = PAGE.read_text()
    assert page.partition(BEGIN)[2].partition(END)[0] == make_table(), "run python tests/test_reliability.py"


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page.partition(BEGIN)[0] + BEGIN + make_table() + END + page.partition(END)[2])
