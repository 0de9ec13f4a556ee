"""The library stays small enough to read in an afternoon."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fastlora", "kernels", "bert")
# The house's limit is 4,000 and is exceeded: until it is met, this number may only go down. It went
# up five times: from 5,900, when the paper's tables, the search and the reports came; from 7,630,
# with what mends some thirty faults that a review of every room found; from 7,681, with CUDA
# graphs of the encoder and steps of fused optimisers that count as changes; and from 7,824, when
# graphs took in the whole step and the CPU's step lost an eighth of its time; and from 7,945, with
# memory that glibc keeps.
LIBRARY_LINES, FILE_LINES, FUNCTION_LINES = 7954, 350, 80


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def lines(path):
    return len(path.read_text().splitlines())


@pytest.fixture
def counts(capsys):
    counts = {package: sum(map(lines, sources(package))) for package in PACKAGES}
    with capsys.disabled():
        parts = ", ".join(f"{package} {count}" for package, count in counts.items())
        print(f"\nlines: {parts}; library {sum(counts.values())} of {LIBRARY_LINES}")
    return counts


def test_library_is_small(counts):
    assert all(counts.values()), "a package is empty: is the tree laid out as expected?"
    assert sum(counts.values()) <= LIBRARY_LINES


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_small(package):
    long = {path.name: lines(path) for path in sources(package) if lines(path) > FILE_LINES}
    assert long == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_functions_are_small(package):
    long = {
        f"{path.name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    }
    assert long == {}
