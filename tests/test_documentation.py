"""Code in README, guide and docstrings runs as it stands, links lead somewhere, and the pages show what was meant."""

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import seqcompress
import seqcompress.adapters

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(seqcompress.__path__, "seqcompress.")
    if ".lightning_callbacks." not in module.name
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs_from_top_to_bottom(page):
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_print_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_package_lists_exactly_what_it_exports():
    assert all(hasattr(seqcompress, name) for name in seqcompress.__all__)
    assert set(seqcompress.__all__) <= set(dir(seqcompress))


def build(folder: Path, docs: Path) -> subprocess.CompletedProcess[str]:
    """Build the pages of ``docs`` into ``folder/site`` as ``.ci/run`` does, the package as it is installed."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    installed = folder / "installed" / "seqcompress"
    shutil.copytree(Path(seqcompress.__file__).parent, installed, dirs_exist_ok=True)
    shutil.copytree(Path(seqcompress.adapters.__file__).parent, installed / "adapters", dirs_exist_ok=True)
    shutil.copy(ROOT / "mkdocs.yml", docs.parent)

    (options,) = re.findall(r'"\$bin/mkdocs" (build .*) --site-dir', (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "mkdocs", *options.split(), "--site-dir", str(folder / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(installed.parent)}
    config = ["--config-file", str(docs.parent / "mkdocs.yml")]
    return subprocess.run([*command, *config], env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_the_pages_build_without_a_warning_and_show_the_examples_of_docstrings_as_code(tmp_path):
    docs = shutil.copytree(ROOT / "docs", tmp_path / "source" / "docs")
    done = build(tmp_path, docs)
    assert done.returncode == 0, done.stderr

    pages = [page.read_text(encoding="utf-8") for page in (tmp_path / "site" / "reference").glob("*/index.html")]
    assert len(pages) == len(list((ROOT / "docs" / "reference").glob("*.md")))
    for page in pages:
        assert "<blockquote>" not in page  # what ">>>" is in Markdown, if it is not known to be code
    (compress,) = [page for page in pages if 'id="seqcompress.compress"' in page]
    before_the_next = compress.partition('id="seqcompress.restore"')[0]
    (example,) = re.findall(r"Examples:.*?<code>(.*?)</code>", before_the_next, re.DOTALL)
    lines = re.sub(r"<[^>]*>", "", example).strip().splitlines()
    assert len(lines) == 5
    assert lines[0] == "&gt;&gt;&gt; import timm, seqcompress"
    assert lines[-1] == "Strategy(token_dropout=0.5, patch_size=32)"


@pytest.mark.parametrize("fault", ["[a page](nowhere.md)", "[a heading](views.md#nowhere)"])
def test_a_dead_link_in_the_guide_ends_the_build(tmp_path, fault):
    docs = tmp_path / "source" / "docs"
    docs.mkdir(parents=True)
    for page in ROOT.glob("docs/**/*.md"):  # the pages of the navigation without their text, so that it takes no time
        copied = docs / page.relative_to(ROOT / "docs")
        copied.parent.mkdir(exist_ok=True)
        copied.write_text("# A page\n", encoding="utf-8")
    assert build(tmp_path, docs).returncode == 0
    (docs / "index.md").write_text(f"# A page\n\n{fault}\n", encoding="utf-8")
    done = build(tmp_path, docs)
    assert done.returncode != 0
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert "nowhere" in warning


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/**/*.md")], ids=lambda page: page.stem)
def test_links_outside_the_guide_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
