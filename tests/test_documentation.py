"""Code in README, guide and docstrings runs as it stands, links lead somewhere, and the pages show what was meant."""

import doctest
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import seqcompress
import seqcompress.adapters
from seqcompress.encoders import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    module.name
    for module in pkgutil.walk_packages(seqcompress.__path__, "seqcompress.")
    if ".lightning_callbacks." not in module.name
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_on_a_page_runs_from_top_to_bottom(page, monkeypatch):
    monkeypatch.setattr(registry, "_kinds", [*registry._kinds])  # a page may register a kind of ViT: for itself only
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(textwrap.dedent(block), str(page), "exec"), namespace)  # in a list, blocks are indented


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


def test_the_repositorys_address_is_the_one_of_the_project_everywhere_and_links_through_it_lead_to_files():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Repository = "(https://[^"]+)"$', project, re.MULTILINE)
    owned = [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        ROOT / "CITATION.cff",
        ROOT / "CHANGELOG.md",
        ROOT / "mkdocs.yml",
    ]
    owned += [*(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.yml")]
    found = {}
    for page in owned:
        text = page.read_text(encoding="utf-8")
        others = re.findall(r"https://github\.com/[^/\s]+/seqcompress\b", text)
        assert set(others) <= {address}, page
        found[page.name] = len(others)
        for path in re.findall(rf"{re.escape(address)}/(?:blob|raw)/main/([^)#\s]+)", text):
            assert (ROOT / path).is_file(), f"{page}: {path}"
    assert found["README.md"] > 10
    assert found["CITATION.cff"] == found["mkdocs.yml"] == 1


def test_the_readme_has_no_link_that_breaks_where_it_is_shown_alone():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    inline = re.findall(r"\]\(([^)\s]+)", text)
    defined = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", text, re.MULTILINE))
    assert [link for link in [*inline, *defined.values()] if not link.startswith("https://")] == []
    used = {re.sub(r"\s+", " ", name) for name in re.findall(r"\[([^\]]+)\]\[\]", text)}
    assert used | {"picture"} == set(defined)


def test_the_release_check_refuses_what_is_not_ready_and_says_why(tmp_path):
    """On a copy of what it reads."""
    names = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "seqcompress/__init__.py", ".ci/release")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def check(*version):
        command = [".ci/release", "check", *version]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.returncode, (done.stdout + done.stderr).strip()

    def change(name, old, new):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")

    version = seqcompress.__version__
    code, said = check("9.9.9")
    assert code == 1
    assert "the tag is for 9.9.9" in said
    change("CHANGELOG.md", "## [Unreleased]", f"## [Unreleased]\n\n- one line\n\n## [{version}] - 2026-01-02")
    change("CITATION.cff", f"version: {version}", "version: 0.0.9")
    assert f"version in CITATION.cff is not {version}" in check()[1]
    change("CITATION.cff", "version: 0.0.9", f"version: {version}")
    assert "CHANGELOG.md still has 1 lines under Unreleased" in check()[1]
    change("CHANGELOG.md", "- one line\n\n", "")
    change("pyproject.toml", "github.com/OWNER/", "github.com/somebody/")
    assert check(version) == (0, f"version, changelog, citation and address agree: {version}")


def test_a_wheel_that_is_missing_or_older_than_the_source_is_not_tried(tmp_path):
    for name in ("pyproject.toml", "seqcompress/__init__.py", ".ci/release"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "adapters").mkdir()

    def install():
        done = subprocess.run([".ci/release", "install"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr.strip()

    version = seqcompress.__version__
    assert install() == (1, f"not ready: there is no wheel of {version} in dist/: run .ci/release build")
    wheel = tmp_path / "dist" / f"seqcompress-{version}-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    os.utime(wheel, (0, 0))
    os.utime(tmp_path / "pyproject.toml", (0, 0))
    code, said = install()
    assert (code, said.partition("than ")[2]) == (1, "seqcompress/__init__.py: run .ci/release build")
