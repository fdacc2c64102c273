"""Which versions of other packages this one runs with: too old is an error where the package is imported, and too new
one warning."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from packaging.version import InvalidVersion, Version

__all__ = ["SUPPORTED", "check_version", "is_too_old"]


class Supported(NamedTuple):
    """From one version on, up to another."""

    oldest: str
    before: str  # the next major version, which may change anything


SUPPORTED = {
    "torch": Supported("2.6", "3"),
    "timm": Supported("1.0.26", "2"),
    # 2.1, though the extras and the tests ask for 2.5: solo-learn pins 2.1.2, with which its own script was tried.
    "lightning": Supported("2.1", "3"),
    "pytorch-lightning": Supported("2.1", "3"),
    "lightly": Supported("1.6", "2"),
}


def check_version(package: str, version: Any) -> None:
    """Compare what is installed with what is supported; a version that cannot be read is let through.

    Raises:
        ImportError: it is too old.
    """
    supported, release = SUPPORTED[package], _release(version)
    if is_too_old(package, version):
        raise ImportError(f"{package} {version} is not supported; supported: {package} >= {supported.oldest}")
    if release is not None and release >= Version(supported.before).release:
        warnings.warn(
            f"seqcompress: {package} {version} is newer than what this version was made for, {package} < "
            f"{supported.before}: look for a newer seqcompress",
            stacklevel=2,
        )


def is_too_old(package: str, version: Any) -> bool:
    """Whether it is too old. Builds before a release count as the release: containers have nothing else."""
    release = _release(version)
    return release is not None and release < Version(SUPPORTED[package].oldest).release


def _release(version: Any) -> tuple[int, ...] | None:
    try:
        return Version(str(version)).release
    except InvalidVersion:
        return None
