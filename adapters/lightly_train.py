"""lightly-train: ``compress(vit, plan)`` before ``lightly_train.pretrain(model=vit)``, and nothing else.

Its user holds only the ViT: the module around it is built later, with a deep copy of the ViT as student and the ViT
itself as teacher. The callback, which Lightning loads from an entry point, makes them a pair at set-up and has the
tokens that are kept folded as lightly-train expects them. Nothing of lightly-train is imported: it is recognised by
the names of its package, its methods and its attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from seqcompress.adapters.driven_encoders import embeds_by_path
from seqcompress.adapters.lightning import SequenceCompression
from seqcompress.messages import described

if TYPE_CHECKING:
    from torch import Tensor, nn

    from seqcompress.encoders import CompressedPatchEmbed

__all__ = ["POOLING", "LightlyTrain"]

POOLING = ("DINO", "Distillation", "SimCLR")
"""Classes of lightly-train's methods whose loss takes nothing but the mean or the class token of each view."""

_MASKING = "DINOv2", "DINOv31"  # methods that draw masks, on a grid that they know before there is a strategy

_PACKAGE = "lightly_train"
_PATCHES = "x_norm_patchtokens"  # in what Meta's ViTs return


class LightlyTrain(SequenceCompression):
    """Makes a pair of what lightly-train has copied, and gives its feature maps the grid of the tokens that are kept.

    All else is [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression]'s, as for any
    LightningModule. Modules of others are left alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fitted: list[_Fitted] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Fit the compressed ViTs of a method in, or raise ValueError for what it cannot do."""
        if stage == "fit" and _is_lightly_trains(pl_module):
            from seqcompress.compression import is_compressed

            if is_compressed(pl_module):
                self._fit_in(pl_module)
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the ViT as its user gave it."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._take_out()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """There will be no ``teardown``."""
        super().on_exception(trainer, pl_module, exception)
        if trainer.state.fn == "fit":
            self._take_out()

    def _fit_in(self, pl_module: Any) -> None:
        """Raises ValueError where tokens are masked, or would be dropped that a loss needs; nothing is changed then."""
        from seqcompress.pairs import names_a_teacher

        self._take_out()
        method = type(pl_module).__name__
        if method in _MASKING:
            raise ValueError(
                f"model must be uncompressed for lightly-train's {method}, which masks tokens on its plain grid: train "
                'it plain, or with method="dino"'
            )
        embeds = embeds_by_path(pl_module)
        pools = method in POOLING
        for path, embed in embeds.items():
            _check_dropout(pl_module, path, embed, pools)
        # The plan, its driver and whether it has been run to its end stay with the ViT that was compressed.
        own = next((embed for embed in embeds.values() if not embed.is_copy), next(iter(embeds.values())))
        for path, embed in embeds.items():
            self._fitted.append(_Fitted(embed, pools))
            if embed is not own and embed.compression.plan == own.compression.plan:
                embed.compression = own.compression
            if names_a_teacher(path):
                embed.drops_tokens, embed.when = False, "train"

    def _take_out(self) -> None:
        for fitted in self._fitted:
            fitted.take_out()
        self._fitted = []


class _Fitted:
    """A compressed ViT in a module of lightly-train's.

    Args:
        embed: its patch embedding.
        pools: whether the module's loss takes nothing but the mean or the class token of each view.
    """

    def __init__(self, embed: CompressedPatchEmbed, pools: bool) -> None:
        self._embed = embed
        self._before = embed.drops_tokens, embed.when
        embed.folds_kept_to_row = pools
        self._handle = embed.encoder.model.register_forward_hook(_Map(embed))

    def take_out(self) -> None:
        """Undo it."""
        self._embed.folds_kept_to_row = False
        self._embed.drops_tokens, self._embed.when = self._before
        self._handle.remove()


class _Map:
    """Behind a ViT of Meta's: gives its patches the grid that they have, where lightly-train would take the plain one.

    An object, not a closure: it is copied and pickled along with the model.
    """

    def __init__(self, embed: CompressedPatchEmbed) -> None:
        self._embed = embed

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        embed, tokens = self._embed, output.get(_PATCHES) if isinstance(output, Mapping) else None
        if tokens is None or not embed.is_training or embed.selection is None:
            return output
        folded: Tensor = tokens.transpose(1, 2).unflatten(2, embed.feature_grid(embed.selection))
        return {**output, _PATCHES: folded}  # (B, K, D) has become (B, D, H, W)


def _check_dropout(pl_module: Any, path: str, embed: CompressedPatchEmbed, pools: bool) -> None:
    """Raise ValueError if tokens would be dropped that the module's loss, or what makes a map of them, needs."""
    if all(strategy.token_dropout == 0 for strategy in embed.compression.plan.strategies()):
        return
    method, plan = type(pl_module).__name__, embed.compression.plan
    instead = "use a plan that only scales patches, such as compress(vit, patch_size=32)"
    if not pools:
        raise ValueError(
            f"plan must have no token dropout for lightly-train's {method}, whose loss takes a map of all patches, "
            f"got {described(plan)}: {instead}"
        )
    wrapper = pl_module.get_submodule(path.rpartition(".")[0].rpartition(".")[0])
    if not _is_lightly_trains(wrapper):
        raise ValueError(
            f"plan must have no token dropout for a ViT in a wrapper of your own ({type(wrapper).__name__}), whose "
            f"feature map would lack patches, got {described(plan)}: {instead}"
        )


def _is_lightly_trains(module: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == _PACKAGE for kind in type(module).__mro__)
