"""Lets Hydra find the configs that lie here, so that ``+seqcompress=mocov3_vit`` works in any of its applications.

Installed as ``hydra_plugins.seqcompress``: Hydra imports whatever lies in that namespace.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

__all__ = ["SeqcompressSearchPath"]


class SeqcompressSearchPath(SearchPathPlugin):
    """Adds the config group ``seqcompress``."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put this package last, so that a group of the same name in the application's own folder wins."""
        search_path.append(provider="seqcompress", path=f"pkg://{__name__}")
