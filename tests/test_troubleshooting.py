"""Whoever gets a message finds it on the page that answers messages: the page is held to the source, both ways."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted([*(ROOT / "seqcompress").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])
GAP = "…"

# What the package says where nothing is wrong: figures, tables, names of kinds of ViT, and parts of longer messages.
NO_MESSAGES = (
    "in at most …",
    "and at most …",
    "; what it followed",
    "; this is a preset",
    "a model's name in timm",
    "sizes that its patches divide",
    "What it took:",
    "Schedule, in which sequences",
    "One stage says nothing",
    "Gradient error from",
    "absolute, for this is not",
    "± is half a",
    "= not told from it",
    "From sketches, which add",
    "step …: …; … …; … of the compute spent",
    ", but sequences must not",
    "a number of very many digits",
    "… of the plain run's budget (",
    "Plan …, … steps",
    "In all: …",
    "Counted in the encoders' FLOPs",
    "are not in it, so wall-clock",
    "FLOPs of ",
    "cost of a step",
    "share of training that is done",
    ": torch ran out at",
    ": the scheduler comes first",
    ", about … of the plain run's budget…",
    "say what did not fit",
)


def text_of(node: ast.AST) -> str | None:
    """A string of the source with gaps where values come in, or None for what is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else f"{left or GAP}{right or GAP}"
    return None


def messages(source: str) -> Iterator[str]:
    """Its sentences: strings of five words and more, but for docstrings and the help of commands."""
    tree, seen = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            seen.add(node.value)
        if isinstance(node, ast.keyword) and node.arg in ("help", "description"):
            seen.update(ast.walk(node.value))
    for node in ast.walk(tree):
        text = None if node in seen else text_of(node)
        if text is not None:
            seen.update(ast.walk(node))
            text = re.sub(r"%[sd]", GAP, " ".join(text.split()))
            if len(re.findall(r"[A-Za-z_]{2,}", text)) >= 5 and not text.startswith(NO_MESSAGES):
                yield text


def entries(page: str) -> list[str]:
    """The messages of a page: its inline code in which there is more than a name."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    return [" ".join(span.split()) for span in spans if len(span.split()) >= 4]


def answers(entry: str, message: str) -> bool:
    """Whether a message is the entry's: all that the entry says is in it, in the same order."""
    parts = [re.escape(part.strip()) for part in entry.split(GAP) if part.strip()]
    return re.search(".*".join(parts), message) is not None


MESSAGES = {path: list(messages(path.read_text(encoding="utf-8"))) for path in SOURCES}
ENTRIES = entries(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [path for path in SOURCES if MESSAGES[path]], ids=lambda path: path.stem)
def test_every_message_of_a_file_has_a_line_on_the_page(path: Path) -> None:
    assert [message for message in MESSAGES[path] if not any(answers(entry, message) for entry in ENTRIES)] == []


def test_every_line_of_the_page_is_about_a_message_that_there_is() -> None:
    every = [message for found in MESSAGES.values() for message in found]
    assert len(every) > 200
    source = " ".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in SOURCES)
    short = {entry for entry in ENTRIES if not any(answers(entry, message) for message in every)}
    assert [entry for entry in short if not answers(entry, source)] == []


def test_the_check_sees_a_message_that_has_no_line_and_takes_no_other_for_it() -> None:
    source = """def f(x):
    'A docstring of more than five words.'
    raise ValueError(f'x must be above {x} or so it seems')"""
    assert list(messages(source)) == ["x must be above … or so it seems"]
    assert answers("x must be … it seems", "x must be above … or so it seems")
    assert not answers("it seems … x must be", "x must be above … or so it seems")
    assert not answers("y must be … it seems", "x must be above … or so it seems")
