"""Where embedded patches meet prefix tokens and positions, which the model has made on a blank view meanwhile."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seqcompress.compressors.execution import in_backward
from seqcompress.compressors.selection import Selection, positions_of
from seqcompress.encoders.encoder import Encoder, Size

__all__ = ["ChangedTokensError", "Joining"]


class ChangedTokensError(RuntimeError):
    """Something changes tokens between the patch embedding and the first block."""


class _Waiting(NamedTuple):
    """Embedded patches on their way to where positions are known."""

    tokens: Tensor  # (B, K, D)
    selection: Selection
    own_grid: Size  # for which the model makes positions meanwhile,
    blanks: int  # and for how many views
    per_view: bool  # whether each view has prefix tokens of its own
    is_marked: bool  # whether the second blank view is marked, to see that nothing is put in its tokens' place
    is_trial: bool
    mask: Tensor | None  # (B, P + N), where the second blank view has what masked tokens are replaced by


class Joining:
    """Patches of one encoder between its patch embedding and its first block.

    Args:
        encoder: whose patches they are.

    Attributes:
        is_under_way: whether patches of this forward will wait, do so, or have been joined before the last place where
            they may be. Apart from what waits: compiled code may look at it without a guard on lengths.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._looked_at: set[Size] = set()  # sizes of views
        self._of_earlier: WeakIdKeyDictionary | None = None  # by the blank view's tokens that the first block was given
        self.forget()

    def __getstate__(self) -> dict[str, Any]:  # what forwards leave behind, a copy has not
        return {"_encoder": self._encoder, "_looked_at": self._looked_at}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _of_earlier=None)
        self.forget()

    def forget(self) -> None:
        """Nothing waits, nor is any of it to be joined."""
        self._waiting: _Waiting | None = None
        self._joined: int | None = None  # tokens of a view
        self.is_under_way = False
        self._has_ended = False  # the call of the model in which they were embedded

    def begin(self) -> None:
        """A forward has begun whose patches will wait, after what was there before has been forgotten."""
        self.is_under_way = True

    def end(self) -> None:
        """A call of the whole model is over. Patches that still wait may be joined in the next."""
        if self.is_under_way:
            self._has_ended = True

    def check_ended(self) -> None:
        """See to it, as others are embedded, that no call came to its end while patches of it were waiting.

        Raises:
            RuntimeError: one did, and its features were those of no view.
        """
        if self._has_ended:
            self.forget()
            raise RuntimeError(
                "a compressed encoder's last call in train mode ended before its patches had come to its first block, "
                "where they meet their positions (layer drop, block.forward or parts of a block in its place), so that "
                "its features were of no view: call a module with all tokens before the blocks, such as "
                "nn.Dropout(0.0), and compress(model, ...) again, or train it plain"
            )

    @property
    def has_patches(self) -> bool:
        """Whether patches have been embedded that have not met their positions yet."""
        return self._waiting is not None

    def must_look_at(self, view: Size) -> bool:
        """Whether it has not been seen yet that the model leaves tokens of views of this size alone."""
        return view not in self._looked_at

    def wait(
        self,
        tokens: Tensor,
        selection: Selection,
        *,
        blanks: int,
        per_view: bool,
        is_marked: bool,
        is_trial: bool,
        mask: Tensor | None,
    ) -> Tensor:
        """Keep embedded patches (B, K, D) until ``join``.

        Args:
            tokens: the patches.
            selection: what they are of their views.
            blanks: how many blank views stand in for the views meanwhile.
            per_view: whether that is one for each.
            is_marked: whether to see to it that tokens of blank views are nothing but positions.
            is_trial: whether that is a forward of a probe, and not of training.
            mask: tokens that are masked, (B, P + N), or None.

        Returns:
            The blank views' patches, (blanks, N, D), for the model to go on with.
        """
        own_grid = self._encoder.blank_grid(selection.view)
        blank = self._encoder.blank(tokens, blanks, own_grid)
        if is_marked:
            blank[1] = 1
        self._waiting = _Waiting(tokens, selection, own_grid, blanks, per_view, is_marked, is_trial, mask)
        return blank

    def join(self, blank: Tensor, *, is_last: bool) -> Tensor:
        """Replace the model's tokens of the blank views by those of the views that were embedded.

        Args:
            blank: prefix tokens and positions as the model made them for blank views, (1 or more, P + N, D).
            is_last: whether no other place follows where they may be replaced.

        Returns:
            Tokens of shape (B, P + K, D), prefix tokens first; ``blank`` itself if nothing is waiting.

        Raises:
            RuntimeError: something adds or takes away tokens before the first block: masks or prompts, for instance.
        """
        if self.is_under_way:
            return self._join(blank, is_last)
        return self._join_again(blank) if is_last and self._of_earlier is not None else blank

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _join(self, blank: Tensor, is_last: bool) -> Tensor:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            joined = self._joined
            self.forget()
            if joined is not None and blank.shape[1] != joined:
                raise RuntimeError(_changed(blank, f"the {joined} tokens that were kept"))
            return blank
        prefix, grid = self._encoder.num_prefix_tokens, waiting.own_grid
        if blank.shape[0] != waiting.blanks and blank.shape[1] == prefix + grid[0] * grid[1]:
            raise RuntimeError(
                f"a compressed encoder expected tokens of {waiting.blanks} blank view(s) between its patch embedding "
                f"and its first block, got those of {len(blank)}: whatever depends on the views or on the batch there "
                "(conditions, masks) cannot be combined with compression"
            )
        if blank.shape[0] != waiting.blanks or blank.shape[1] != prefix + grid[0] * grid[1]:
            raise RuntimeError(_changed(blank, f"{prefix} prefix tokens and {grid[0] * grid[1]} positions"))
        if waiting.is_marked:
            _look_at_mark(blank[:, prefix:].detach())
            if not waiting.is_trial:
                self._looked_at.add(waiting.selection.view)
        tokens = self._tokens_of(waiting, blank)
        self._joined, self.is_under_way = (None, False) if is_last else (tokens.shape[1], True)
        if is_last and not waiting.is_trial:
            if self._of_earlier is None:
                self._of_earlier = WeakIdKeyDictionary()
            self._of_earlier[blank] = waiting  # as long as somebody holds it, as gradient checkpointing does
        return tokens

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _join_again(self, blank: Tensor) -> Tensor:
        """Gradient checkpointing runs the first block again, from what the model gave it."""
        if self._of_earlier is None or not in_backward():
            return blank
        for given, waiting in self._of_earlier.items():  # reentrant checkpointing gives another tensor on its memory
            if given is blank or (given.shape == blank.shape and given.data_ptr() == blank.data_ptr()):
                return self._tokens_of(waiting, blank)
        return blank

    def _tokens_of(self, waiting: _Waiting, blank: Tensor) -> Tensor:
        """Patches with their positions, behind the prefix tokens."""
        prefix, grid = self._encoder.num_prefix_tokens, waiting.own_grid
        before, positions = blank.split((prefix, grid[0] * grid[1]), dim=1)
        tokens = waiting.tokens + positions_of(positions[:1], grid, waiting.selection)
        if waiting.mask is not None:
            # Replaced before positions were added, in a blank view of the model's own grid.
            replaced = waiting.mask.unsqueeze(-1)  # (B, P + N, 1)
            tokens = torch.where(replaced[:, prefix:], positions_of(positions[1:2], grid, waiting.selection), tokens)
            if prefix:
                tokens = torch.cat((torch.where(replaced[:, :prefix], before[1:2], before[:1]), tokens), dim=1)
        elif prefix:
            before = before if waiting.per_view else before[:1].expand(len(tokens), -1, -1)
            tokens = torch.cat((before, tokens), dim=1)
        return tokens


def _look_at_mark(positions: Tensor) -> None:
    """Raise an error if the second blank view's tokens are not those of the first, plus one."""
    off = (positions[1].float() - positions[0].float() - 1).abs().max()
    if off > (1e-3 if positions.dtype in (torch.float32, torch.float64) else 0.2):
        raise ChangedTokensError(
            "something changes tokens of a compressed encoder between its patch embedding and its first block: "
            "whatever puts others in their place (mask, idx_mask) cannot be combined with compression"
        )


def _changed(tokens: Tensor, expected: str) -> str:
    return (
        f"a compressed encoder expected {expected} between its patch embedding and its first block, got tokens of "
        f"shape {tuple(tokens.shape)}: whatever adds or takes away tokens there (mask, idx_mask, idx_keep, patch_drop, "
        "prompts) cannot be combined with compression"
    )
