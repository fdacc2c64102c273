"""Versions of other packages: too old is an error, too new one warning, and what is claimed is what is checked."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from packaging.version import Version

from seqcompress.adapters import lightning_callbacks
from seqcompress.versions import SUPPORTED, check_version

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.5.1"), ("torch", "1.13.0+cu117"), ("timm", "1.0.25"), ("timm", "0.9.16"), ("lightly", "1.5.22"),
     ("lightning", "2.0.9"), ("pytorch-lightning", "1.9.5")],
)  # fmt: skip
def test_too_old_is_an_error_that_says_what_is_supported(package: str, version: str) -> None:
    expected = f"{package} {version} is not supported; supported: {package} >= {SUPPORTED[package].oldest}"
    with pytest.raises(ImportError, match=re.escape(expected)):
        check_version(package, version)


@pytest.mark.parametrize(
    ("package", "version"), [("torch", "3.0"), ("timm", "2.0.1"), ("lightning", "3.0.0"), ("lightly", "2.1")]
)
def test_the_next_major_version_is_one_warning(package: str, version: str) -> None:
    with pytest.warns(UserWarning, match=f"{package} {version} is newer than what this version was made for") as told:
        check_version(package, version)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.6.0"), ("torch", "2.10.1+cu130"), ("torch", "2.6.0a0+ecf3bae40a.nv25.01"), ("torch", "main"),
     ("timm", "1.0.26"), ("timm", "1.0.27.dev0"), ("lightning", "2.6.6"), ("lightly", "1.6.0")],
)  # fmt: skip
def test_what_is_supported_or_cannot_be_read_is_let_through_in_silence(package: str, version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_version(package, version)


@pytest.mark.parametrize(
    ("package", "version", "imported"),
    [("torch", "2.5.1", "seqcompress.compression"), ("timm", "0.9.16", "seqcompress.encoders")],
)
def test_the_package_itself_cannot_be_imported_with_what_is_too_old(package: str, version: str, imported: str) -> None:
    script = f"import {package}; {package}.__version__ = {version!r}; import {imported}"
    failed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    oldest = SUPPORTED[package].oldest
    assert failed.stderr.splitlines()[-1] == (
        f"ImportError: {package} {version} is not supported; supported: {package} >= {oldest}"
    )


@pytest.mark.parametrize(
    ("module", "package", "callbacks"),
    [
        ("lightning", "lightning", lightning_callbacks.lightning_callbacks),
        ("pytorch_lightning", "pytorch-lightning", lightning_callbacks.pytorch_lightning_callbacks),
    ],
)
def test_a_lightning_that_is_too_old_trains_without_the_callback_and_that_is_said(
    module: str, package: str, callbacks: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(callbacks)
    assert len(callbacks()) == 1
    monkeypatch.setattr(f"{module}.__version__", "2.0.9")
    with pytest.warns(UserWarning, match=rf"{package} 2.0.9 is not supported, {package} >= 2\.1 is: no callback"):
        assert callbacks() == []


def test_what_is_checked_is_what_the_project_claims() -> None:
    claimed = dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', PYPROJECT.read_text()))
    for package in ("torch", "timm", "lightly"):
        assert SUPPORTED[package].oldest == claimed[package]
    for package in ("lightning", "pytorch-lightning"):  # tested with newer ones than solo-learn's users have
        assert Version(SUPPORTED[package].oldest) <= Version(claimed[package])
