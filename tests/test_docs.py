"""What the documentation shows works: code in docstrings, code and commands in Markdown files.

In a Markdown file, the ``python`` blocks run from top to bottom as one program; a ``text`` block that directly follows
one is what it prints. A block under the comment ``<!-- not run: reason -->`` is left out.
"""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import sys
import types
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import cast

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("solvers", "implicit", "imixer")
MARKDOWN = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {"compile.md", "scaling.md"}

FENCED_BLOCK = re.compile(
    r"^(?P<comment><!-- not run: .+? -->\n+)?(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=fence)[ ]*$",
    re.MULTILINE | re.DOTALL,
)
FRACTION = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    language: str
    body: str
    line: int
    is_run: bool
    follows_directly: bool


def blocks_of(markdown: str) -> list[Block]:
    blocks = []
    end = 0
    for found in FENCED_BLOCK.finditer(markdown):
        blocks.append(
            Block(
                language=found["language"],
                body=found["body"],
                line=markdown.count("\n", 0, found.start("body")) + 1,
                is_run=found["comment"] is None,
                follows_directly=not markdown[end : found.start()].strip(),
            )
        )
        end = found.end()
    return blocks


def assert_printed(printed: str, expected: str, complaint: str) -> None:
    """Compare texts; other processors round other ways, so that a fraction may differ by one in its last digit."""
    assert FRACTION.sub("0", printed) == FRACTION.sub("0", expected), complaint
    for one, other in zip(FRACTION.findall(printed), FRACTION.findall(expected), strict=True):
        unit = Decimal((0, (1,), cast(int, Decimal(other).as_tuple().exponent)))
        assert abs(Decimal(one) - Decimal(other)) <= unit, complaint


def run_blocks(path: Path) -> None:
    """Run the Python blocks of a file in one namespace and compare what they print with the blocks that tell."""
    program = types.ModuleType("__main__")
    printed: str | None = None
    for block in blocks_of(path.read_text("utf-8")):
        if block.language == "text" and block.follows_directly and printed is not None:
            assert_printed(
                printed, block.body, f"{path.name}, line {block.line}: this is not what the code above prints"
            )
        printed = None
        if block.language == "python" and block.is_run:
            source = "\n" * (block.line - 1) + block.body  # so that a traceback names the line of the file
            with contextlib.redirect_stdout(io.StringIO()) as output, pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, "__main__", program)  # where compiled functions look their globals up
                exec(compile(source, path, "exec"), vars(program))
            printed = output.getvalue()


def modules() -> list[str]:
    found = list(PACKAGES)
    for package in PACKAGES:
        found += [info.name for info in pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")]
    return found


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    failures, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert failures == 0


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.long) if path.name in LONG else path for path in MARKDOWN],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_markdown_code_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(path)


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_markdown_commands_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for block in blocks_of(path.read_text("utf-8")):
        if block.language in ("bash", "console", "sh", "shell"):
            unknown = set(re.findall(r"\bmake (?:[A-Z]+=\S+ )*([a-z][\w-]*)", block.body)) - targets
            assert not unknown, f"{path.name}, line {block.line}: not in the Makefile"
            scripts = re.findall(r"\bpython3? ((?:examples|benchmarks)/\S+\.py)", block.body)
            missing = [script for script in scripts if not (ROOT / script).is_file()]
            assert not missing, f"{path.name}, line {block.line}: no such script"


@pytest.mark.parametrize(
    ("markdown", "complaint"),
    [
        ("```python\nprint(1)\n```\n\n```text\n1\n```\n", None),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "line 6: this is not what"),
        ("```python\nprint('a', 0.124)\n```\n```text\na 0.123\n```\n", None),
        ("```python\nprint('a', 0.125)\n```\n```text\na 0.123\n```\n", "line 5: this is not what"),
        ("```python\nprint('a', 1.24e-3)\n```\n```text\na 0.00124\n```\n", None),
        ("```python\nprint(1)\n```\nElsewhere:\n```text\n2\n```\n", None),
        ("```python\na = 1\n```\n```python\nprint(a)\n```\n```text\n2\n```\n", "line 8: this is not what"),
        ("<!-- not run: needs a data set -->\n```python\n1 / 0\n```\n```text\n2\n```\n", None),
    ],
)
def test_markdown_output_is_compared(markdown: str, complaint: str | None, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(markdown)
    expected = pytest.raises(AssertionError, match=complaint) if complaint else contextlib.nullcontext()
    with expected:
        run_blocks(path)
