"""What a compressed encoder says, once, of a training that may not be what was meant."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqcompress.compressors.execution import has_values, in_backward
from seqcompress.encoders.encoder import Size, is_frozen
from seqcompress.schedules import Constant
from seqcompress.strategy import Strategy

if TYPE_CHECKING:
    from seqcompress.encoders.patch_embed import CompressedPatchEmbed

__all__ = [
    "look_for_training_in_eval",
    "of_a_pass_without_gradients",
    "of_another_size",
    "of_plain_blocks",
    "of_teacher_in_eval",
]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def of_plain_blocks(embed: CompressedPatchEmbed) -> None:
    """Code that holds the plain patch embedding, and the blocks, trains without the compressors."""
    is_of_training = not embed.is_probed and torch.is_grad_enabled() and not in_backward()
    if is_of_training and embed.drops_tokens and embed.strategy != Strategy():
        embed.warn_once(
            "plain blocks",
            "training is uncompressed: the blocks of a compressed encoder are given tokens that its patch "
            "embedding has not made, as stable-pretraining's MAE and IJEPA do, which leave tokens out by "
            "themselves: train such a method plain; or patch_embed was replaced since: restore(model) before that",
        )


def of_teacher_in_eval(embed: CompressedPatchEmbed) -> None:
    """A teacher that trains its student in eval mode sees all patches."""
    if embed.strategy != Strategy():
        embed.warn_once(
            "teacher in eval mode",
            "a teacher in eval mode is not compressed: it sees all patches, at their own size, and costs as much; "
            "call train() on it, as on its student",
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def look_for_training_in_eval(embed: CompressedPatchEmbed, tokens: Tensor) -> None:
    """Who forgets train(), as after ``from_pretrained``, trains plain: a gradient of these tokens will tell."""
    is_plain = isinstance(embed.compression.plan, Constant) and embed.strategy == Strategy()
    if embed.is_probed or is_plain or torch.jit.is_tracing() or is_frozen(embed.encoder.model):  # type: ignore[attr-defined, no-untyped-call]
        return

    def notice(gradient: Tensor) -> None:
        if not embed.encoder.model.training:
            embed.warn_once(
                "eval mode",
                "a backward pass went through a compressed encoder in eval mode, in which it is plain and not counted: "
                "if that was training, call train() on it, which Hugging Face's from_pretrained leaves to you",
            )

    if has_values(tokens):
        tokens.register_hook(notice)


def of_a_pass_without_gradients(embed: CompressedPatchEmbed) -> None:
    """A teacher that is a copy and was not compressed with its student, or one of two passes of a loss."""
    if embed.is_copy and embed.drops_tokens and (is_frozen(embed.encoder.model) or not embed.was_trained):
        if any(strategy.patch_size is not None for strategy in embed.compression.plan.strategies()):
            embed.warn_once(
                "copy",
                "a copy of a compressed encoder runs without gradients, and so uncompressed, at patches of its own "
                "size; if it is a teacher, pass both to compress(student, plan, teacher=...)",
            )
        return
    if "no gradients" in embed.warned or not embed.drops_tokens or embed.strategy == Strategy() or in_backward():
        return
    if not is_frozen(embed.encoder.model):
        embed.warn_once(
            "no gradients",
            "a compressed encoder that is being trained ran in train mode without gradients, and so uncompressed; "
            'if the loss takes two passes (GradCache), have both compressed: compress(..., when="train")',
        )


def of_another_size(embed: CompressedPatchEmbed, view: Size) -> None:
    """Views that the plain model refuses."""
    size = embed.encoder.only_size
    takes = "sizes that its patches divide" if size is None else f"{size[0]} x {size[1]} px"
    embed.warn_once(
        "other size",
        f"training takes views of {view[0]} x {view[1]} px, with interpolated positions, where the plain model "
        f"takes {takes} only and will refuse them in evaluation",
    )
