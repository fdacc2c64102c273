"""Both compressors as one module around a ViT's patch embedding.

Prefix tokens and positions do not depend on the image. So a compressed forward lets the model do what it
always does between its patch embedding and its first block, but once, on a single blank view: what comes out
is its prefix tokens and its positions, whatever kind they are. Those are joined with the patches that are
really embedded (few, and perhaps larger) just before position dropout, or before the first block. That this gives
the model's own tokens is proven for every model when it is compressed (``seqcompress.encoders.probe``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from seqcompress.compressors.execution import has_values, in_backward, is_exporting
from seqcompress.compressors.selection import Selection, embed_selection, select
from seqcompress.compressors.token_dropout import num_kept, random_subset
from seqcompress.encoders import notices
from seqcompress.encoders.compression import Compression, say
from seqcompress.encoders.encoder import Encoder, Size, is_frozen
from seqcompress.encoders.joining import Joining
from seqcompress.encoders.sharding import is_tensor_parallel
from seqcompress.encoders.stand_in import StandIn
from seqcompress.schedules import Constant
from seqcompress.strategy import Strategy

__all__ = ["CompressedPatchEmbed", "Forward", "Trial", "When", "student_among"]

When = Literal["grad", "train"]

_ATTENTION_MASKS = ("attn_mask", "attention_mask", "mask")


class Forward(NamedTuple):
    """One kind of training forward, to be counted."""

    view: tuple[int, ...]  # (B, C, H, W)
    tokens: int  # a view, prefix tokens included
    graph: bool  # whether a backward pass follows
    masked: bool = False  # whether some tokens were masked, so that none were dropped


class Trial(NamedTuple):
    """A forward of a probe, and not of training."""

    kept: list[Tensor]  # (B, K) of each crop, in turn; of the last one, for all that follow
    is_marked: bool  # whether to see to it that tokens of blank views are nothing but positions


class _Cut(NamedTuple):
    """How a forward cuts its views into patches."""

    patch: Size
    grid: Size
    full: Size  # the size that its views would have had, had they not been made smaller
    is_plain: bool  # whether the plain model cuts them so, where all patches are kept


_FRESH: dict[str, Any] = {  # what forwards and hosts leave behind, of which a copy has nothing
    "selection": None,
    "_mask": None,
    "small_views": None,
    "_plain_under": None,
    "_was_reached": False,
    "was_trained": False,
    "_is_data_parallel": None,
}


class CompressedPatchEmbed(StandIn):
    """A patch embedding that can drop tokens and scale patches; otherwise the one it wraps.

    Args:
        encoder: the encoder whose patch embedding is to be wrapped.
        compression: strategy and random stream, shared by all encoders compressed together.
        drops_tokens: False for a teacher, which only scales patches.
        when: "grad" compresses forwards in train mode that build a graph, "train" all in train mode.
    """

    encoder: Encoder
    drops_tokens: bool
    when: When
    forward_counts: Counter[Forward]
    blank_per_view: bool  # whether the model takes the batch size from its images: its tokens must be as many
    folds_kept_to_row: bool  # whether kept tokens make a map of one row, as right for a host that averages it at once
    hooked_modules: tuple[nn.Module, ...]  # where patches may meet their positions: what has our hooks
    trial: Trial | None  # what to do while a probe runs
    is_probed: bool  # whether one runs, so that nothing is to be counted or warned of
    host: nn.Module | None  # what masks the encoder's tokens, by a method that we stand in for
    joining: Joining  # what has been embedded and has not met its positions yet
    warned: set[str]  # of what, since a compressed encoder says everything once
    _compression: Compression
    is_copy: bool  # whether it was copied or unpickled together with its encoder, and not compressed since
    _mask: Tensor | None  # (B, P + N) of the forward that runs, if it is a masked one
    # The strategy in force as the last forward in train mode ran, if that was plain, and whether grad was enabled.
    _plain_under: tuple[Strategy, bool] | None
    _was_reached: bool  # whether a training forward has ever come here
    was_trained: bool  # whether one with gradients has, since it was compressed or copied
    _is_data_parallel: bool | None  # whether no process computes parts of another's samples; None before it was asked
    small_views: Tensor | None  # views (B, C, H, W) in whose place the model was given blank ones of its own size
    selection: Selection | None  # of the last forward in train mode; None where that was the plain model's

    def __init__(self, encoder: Encoder, compression: Compression, *, drops_tokens: bool, when: When) -> None:
        super().__init__(encoder.patch_embed)
        vars(self).update(  # none of them is a child, which would add names to the state dict
            encoder=encoder,
            drops_tokens=drops_tokens,
            when=when,
            forward_counts=Counter(),
            blank_per_view=False,
            folds_kept_to_row=False,
            hooked_modules=(),
            trial=None,
            is_probed=False,
            host=None,
            joining=Joining(encoder),
            warned=set(),
            is_copy=False,
            **_FRESH,
        )
        self.compression = compression

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **_FRESH, "is_copy": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.compression.members[self] = None

    def __getattr__(self, name: str) -> Any:
        is_of_grid = name in ("grid_size", "num_patches") and vars(self).get("host") is not None
        if is_of_grid and (self.is_training or self._may_go_by_student()):
            return self._own_or_scaled(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compression":  # whose setter takes leave of those before
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"strategy={self.strategy}, when={self.when}, teacher={not self.drops_tokens}"

    @property
    def is_training(self) -> bool:
        """Whether its encoder is in train mode; a frozen patch embedding may be in eval mode by itself.

        A teacher off which the host has read the grid, to draw masks for both, goes by its student.
        """
        if self.trial is not None or self.encoder.model.training:
            return True
        return self.compression.masks_are_drawn and not is_exporting() and self._may_go_by_student()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _may_go_by_student(self) -> bool:
        if self.drops_tokens or self.host is None or self.is_probed:
            return False
        return any(partner.drops_tokens and partner.encoder.model.training for partner in self.partners())

    @property
    def has_waiting_patches(self) -> bool:
        """Whether patches have been embedded, in training, that have not met their positions yet."""
        return self.is_training and self.joining.has_patches

    @property
    def strategy(self) -> Strategy:
        """The strategy as it concerns this encoder: without dropout for a teacher."""
        strategy = self.compression.strategy
        return strategy if self.drops_tokens else strategy.without_dropout()

    @property
    def compression(self) -> Compression:
        """What this encoder shares with those that it was compressed with."""
        return self._compression

    @compression.setter
    def compression(self, compression: Compression) -> None:
        if "_compression" in vars(self):
            self.release()
        self._compression = compression
        compression.members[self] = None

    def partners(self) -> list[CompressedPatchEmbed]:
        """All embeddings that share this one's compression, itself included."""
        return list(self.compression.members)

    @property
    def is_live(self) -> bool:
        """Whether the encoder still has this patch embedding."""
        return self in self.compression.members and any(module is self for module in self.encoder.model.modules())

    def release(self) -> None:
        """Take leave of the partners: the encoder has its plain patch embedding back."""
        self.compression.members.pop(self, None)

    @property
    def can_be_masked(self) -> bool:
        """Whether forwards may come with a mask, in which no tokens are dropped."""
        return self.host is not None or self.encoder.masks_tokens

    def strategy_for_full_views(self, strategy: Strategy) -> Strategy:
        """What of a strategy holds for views of full size: no dropout where they are masked, or may be masked."""
        if not self.can_be_masked:
            return strategy
        trained = [forward for forward in self.forward_counts if forward.graph]
        is_masked = not trained or any(forward.masked for forward in trained)
        return strategy.without_dropout() if is_masked else strategy

    @contextmanager
    def masking(self, mask: Tensor) -> Iterator[None]:
        """Run a forward whose tokens are masked, (B, P + N): it drops none."""
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None

    def num_blanks(self, views: int, *, is_masked: bool) -> int:
        """How many blank views stand in for so many."""
        if self.blank_per_view:
            return max(2, views) if is_masked else views
        # One view's positions are all there is to know, beside what masked tokens are replaced by. Under
        # DistributedDataParallel it takes two: the gradient of what the model expands for each view (its class token)
        # is then a sum, laid out in memory as the parameter is; otherwise DistributedDataParallel warns.
        is_distributed = views > 1 and distributed.is_available() and distributed.is_initialized()
        return 2 if is_masked or is_distributed else 1

    def masked_grid(self, views: Any) -> Size | None:
        """Patches along each side of views (B, C, H, W) in a forward that drops none; None if it is the plain one."""
        if not self.is_training or self.trial is not None or not isinstance(views, Tensor) or views.ndim != 4:
            return None
        cut = self._cut(views, self.when == "train" or _builds_graph(views, self.encoder.model))
        return None if cut.is_plain else cut.grid

    def _own_or_scaled(self, name: str) -> Any:
        """The grid of the views that the encoder was built for, or its patches: for a host that draws masks on it.

        The model's own code asks while it runs, and means the grid that its positions are for.
        """
        strategy = self.strategy
        was_plain = self._plain_under == (strategy, torch.is_grad_enabled())  # and may be running, or would be again
        if self.joining.is_under_way or self.is_probed or was_plain or strategy.patch_size is None:
            return getattr(self.embed, name)
        self.compression.masks_are_drawn = True
        grid = self.encoder.grid(self.encoder.image_size, (strategy.patch_size, strategy.patch_size))
        return grid if name == "grid_size" else math.prod(grid)

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """The grid that timm folds tokens into for feature maps: that of the last forward.

        Raises:
            RuntimeError: the last forward dropped tokens.
        """
        if not self.is_training or self.selection is None:
            size: Size = self.embed.dynamic_feat_size(img_size)
            return size
        return self.feature_grid(self.selection)

    def feature_grid(self, selection: Selection) -> Size:
        """The grid of the tokens of a forward.

        Raises:
            RuntimeError: tokens were dropped, and those that were kept are not to be folded into a row.
        """
        if selection.kept is None:
            return selection.grid
        if not self.folds_kept_to_row:
            raise RuntimeError("dropped tokens leave no feature map: use eval mode, or output_fmt='NLC'")
        return 1, selection.kept.shape[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Embed views; compressed forwards return a blank and keep the patches for ``join``.

        Hooks run within, as everywhere: around what is really embedded, not around the blank.
        """
        embedded: Tensor = super().__call__(*args, **kwargs)
        return self._wait_for_positions(embedded) if self.joining.is_under_way and self.is_training else embedded

    def forward(self, views: Tensor) -> Tensor:
        """Embed views (B, C, H, W): all of their patches, or those that are kept, (B, K, D)."""
        if isinstance(views, torch.fx.Proxy):
            return self._traced(views)
        if self.is_training:
            return self._forward_in_training(views)
        if not self.drops_tokens and not is_exporting():
            self._count_in_eval(views)
        tokens: Tensor = self.embed.forward(views)
        if self.drops_tokens and tokens.requires_grad and "eval mode" not in self.warned and not is_exporting():
            notices.look_for_training_in_eval(self, tokens)
        return tokens

    def _traced(self, views: torch.fx.Proxy) -> Any:
        """What torch.fx sees, whatever is in force: a graph has no place for what changes from forward to forward."""
        self.joining.forget()
        self.selection = None
        if self.is_training:
            self.warn_once(
                "traced",
                "torch.fx traces the plain model, in train mode too: a graph that it makes trains uncompressed",
            )
        return self.embed.forward(views)

    def __prepare_scriptable__(self) -> None:
        """What ``torch.jit.script`` asks for first.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a compressed encoder cannot be scripted: restore(model) first")

    def join(self, blank: Tensor, *, is_last: bool) -> Tensor:
        """What ``Joining.join`` says, where the encoder trains; ``blank`` itself, (1 or more, P + N, D), elsewhere."""
        if is_last and self.is_training and not self._was_reached:
            notices.of_plain_blocks(self)
        return self.joining.join(blank, is_last=is_last) if self.is_training else blank

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _count_in_eval(self, views: Tensor) -> None:
        """A teacher may train its student in eval mode: plain, and not for nothing."""
        if self.is_probed or not any(partner.drops_tokens and partner.is_training for partner in self.partners()):
            return
        if not isinstance(views, Tensor) or views.ndim != 4:
            return  # for the model to refuse
        grid = self.encoder.plain_grid((views.shape[2], views.shape[3]))
        if grid is None:
            return
        tokens = self.encoder.num_prefix_tokens + math.prod(grid)
        self.forward_counts[Forward(tuple(views.shape), tokens, False)] += 1
        notices.of_teacher_in_eval(self)

    # Random seeds, counters, tensors that wait between two modules: left out of compiled graphs. The blocks, where
    # the time goes, are compiled once for each length, or once for all lengths.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward_in_training(self, views: Tensor) -> Tensor:
        if torch.jit.is_tracing() or is_exporting():  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError("a compressed encoder cannot be traced in train mode: eval() or restore(model) first")
        if self.joining.has_patches and self.trial is None:
            self.joining.check_ended()
            self.warn_once(
                "lost patches",
                "the last forward did not come from its patch embedding to its first block: it failed in between, or "
                "its features depend on no view, since other views were embedded before these came to the blocks, or "
                "another model has been given this patch embedding",
            )
        if self.small_views is not None:
            views, self.small_views = self.small_views.to(views.dtype), None
        self.joining.forget()
        self._was_reached = True
        self.selection = selection = self._select(views) if self.trial is None else self._trial_selection(views)
        self._plain_under = (self.strategy, torch.is_grad_enabled()) if selection is None else None
        if selection is None:
            tokens: Tensor = self.embed.forward(views)
            return tokens
        self.joining.begin()
        self._check_places()
        return self._embed_patches(views, selection)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _wait_for_positions(self, tokens: Tensor) -> Tensor:
        selection = self.selection
        if selection is None:
            return tokens
        if tokens.ndim != 3 or tokens.shape[1] != selection.patches:
            raise RuntimeError(
                f"the patch embedding of a compressed encoder must make {selection.patches} tokens of a view, got a "
                f"tensor of shape {tuple(tokens.shape)}: it has been changed since compress(), or a hook changes what "
                "it gives"
            )
        mask = self._mask
        blanks = self.num_blanks(len(tokens), is_masked=mask is not None)
        # Masks for a batch do fit where there is a blank for each view. Looked for once for each size of views, since
        # looking waits for the device.
        if self.trial is None and mask is not None:
            is_marked = False
        elif self.trial is None:
            is_marked = blanks == len(tokens) > 1 and self.joining.must_look_at(selection.view) and has_values(tokens)
        else:
            is_marked = self.trial.is_marked
            blanks = max(2, blanks) if is_marked else blanks
        return self.joining.wait(
            tokens,
            selection,
            blanks=blanks,
            per_view=self.blank_per_view,
            is_marked=is_marked,
            is_trial=self.trial is not None,
            mask=mask,
        )

    def check_mask(self, named: dict[str, Any]) -> None:
        """Refuse a mask or bias of attention, which is made for all tokens, where tokens have been joined.

        Args:
            named: what a block is given by name.

        Raises:
            ValueError: there is one.
        """
        for name in _ATTENTION_MASKS:  # looked for first: compiled code is guarded by what it looks at
            if named.get(name) is not None and self.is_training and self.selection is not None:
                raise ValueError(
                    f"{name} must be None in a compressed forward, got a mask or bias for all tokens of the plain "
                    "model, of which some are dropped or cut in another size"
                )

    def _select(self, views: Tensor) -> Selection | None:
        if not isinstance(views, Tensor):
            number = f" of {len(views)}" if isinstance(views, (list, tuple)) else ""
            raise TypeError(
                f"views must be a tensor of shape (B, C, H, W), got a {type(views).__name__}{number}: "
                f"a {type(self.encoder.model).__name__} takes the views of one size at a time"
            )
        if views.ndim != 4:
            raise ValueError(f"views must have the shape (B, C, H, W), got {tuple(views.shape)}")
        if views.shape[1] != self.encoder.channels:
            raise ValueError(f"views must have {self.encoder.channels} channels, got the shape {tuple(views.shape)}")
        graph = _builds_graph(views, self.encoder.model)
        self.was_trained = self.was_trained or graph
        compressing = graph or self.when == "train"
        if not compressing:
            notices.of_a_pass_without_gradients(self)
        elif self.drops_tokens:
            if missing := self.compression.notice_missing_driver():
                say(missing)
            if missing := self.compression.notice_missing_step():
                say(missing)
        cut = self._cut(views, compressing)
        base, view = self.encoder.patch_size, (views.shape[2], views.shape[3])
        patch, grid, full = cut.patch, cut.grid, cut.full
        patches = grid[0] * grid[1]
        # Where something is predicted, all that predicts it and all that is to be predicted is there.
        is_whole = self._mask is not None or not compressing
        kept = patches if is_whole else num_kept(patches, self.strategy.token_dropout)
        prefix = self.encoder.num_prefix_tokens
        if not in_backward():
            self.forward_counts[Forward(tuple(views.shape), prefix + kept, graph, self._mask is not None)] += 1
        if kept == patches and cut.is_plain:
            return None
        plain = self.encoder.plain_grid(view)
        if plain is None and full == view:
            notices.of_another_size(self, view)
        if not self.encoder.model.training:
            self.warn_once(
                "goes by its student",
                "a teacher in eval mode gets larger patches all the same while its student trains, since one mask is "
                "for both; to evaluate it in between, put the student in eval mode, too",
            )
        subset = None
        if kept < patches:
            self._check_parallel()
            # Without values, or with a batch that a function transform hides, there is no stream of numbers to follow.
            seed = self.compression.stream.next_seed() if has_values(views) else None
            subset = random_subset(len(views), patches, kept, seed=seed, device=views.device)
        # What the plain model cuts off is cut off too; of other views, all of it is seen.
        is_own = patch == base and full == view and grid == plain
        area = (grid[0] * patch[0], grid[1] * patch[1]) if is_own else view
        return select(views, grid, patch, base, subset, area)

    def _check_parallel(self) -> None:
        """Raise RuntimeError where several processes compute one sample: each would drop patches of its own choice."""
        if self._is_data_parallel is None:
            self._is_data_parallel = not is_tensor_parallel(self.encoder.model)
        if not self._is_data_parallel:
            raise RuntimeError(
                "token dropout cannot be combined with tensor parallelism, whose processes would drop different "
                "patches of the same views: scale patches alone, or use DistributedDataParallel or fully_shard"
            )

    def _cut(self, views: Tensor, compressing: bool) -> _Cut:
        """How these views (B, C, H, W) are cut by the strategy in force, if this forward is compressed at all."""
        size = self.strategy.patch_size if compressing else None
        base, view = self.encoder.patch_size, (views.shape[2], views.shape[3])
        self.compression.observe(view)
        full = self.compression.full_size(view)
        patch = base if size is None else (size, size)
        # A run must not end at a later stage, whose patches are larger than a local crop.
        if size is not None and size > min(full) and not isinstance(self.compression.plan, Constant):
            patch = (max(base[0], min(size, full[0])), max(base[1], min(size, full[1])))
            self.warn_once(
                "small view",
                f"views of {full[0]} x {full[1]} px are smaller than patches of {size} px, and are cut into patches as "
                "large as they are",
            )
        grid = self.encoder.grid(full, patch)
        if full != view:  # made smaller: the same grid, whose patches have fewer pixels here
            patch = (max(base[0], round(view[0] / grid[0])), max(base[1], round(view[1] / grid[1])))
        # Views that the plain model refuses: compressed or not, training takes them, so that a schedule that ends
        # at the base strategy does not end in an error.
        takes_it = self.encoder.plain_grid(view) is not None or not compressing
        return _Cut(patch, grid, full, patch == base and full == view and takes_it)

    def _trial_selection(self, views: Tensor) -> Selection:
        assert self.trial is not None
        patch = self.encoder.patch_size
        grid = self.encoder.grid((views.shape[2], views.shape[3]), patch)
        kept = self.trial.kept.pop(0) if len(self.trial.kept) > 1 else self.trial.kept[0]
        return select(views, grid, patch, patch, kept, (grid[0] * patch[0], grid[1] * patch[1]))

    def _check_places(self) -> None:
        """Raise RuntimeError unless the patches will meet their positions."""
        hooked = [place for place in self.hooked_modules if any(hook.embed is self for hook in _hooks_of(place))]
        if not any(module is place for module in self.encoder.model.modules() for place in hooked):
            raise RuntimeError(
                "the first block of a compressed encoder has been replaced since compress(), or its hooks have been "
                "taken out: restore(model) before such a change, and compress(model, ...) after it"
            )

    def warn_once(self, what: str, message: str) -> None:
        """Warn, unless this encoder has said so before; ``what`` is a name for it."""
        if what not in self.warned:
            self.warned.add(what)
            say(message)

    def _embed_patches(self, views: Tensor, selection: Selection) -> Tensor:
        if self.encoder.maps_patches:
            # A projection that is all of the embedding has its hooks called around this one.
            projection = self.encoder.projection
            return self.encoder.apply_norm(
                embed_selection(views, selection, projection, with_hooks=projection is not self.embed)
            )
        tokens = self.encoder.embed_all_patches(views)
        patches = math.prod(selection.grid)
        if tokens.shape[1] != patches:
            raise RuntimeError(
                f"the patch embedding of a compressed encoder must make {patches} tokens of a view, got "
                f"{tokens.shape[1]}: its patches overlap, or it has been changed since compress()"
            )
        if selection.kept is None:
            return tokens
        return tokens.gather(1, selection.kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def _hooks_of(place: nn.Module) -> list[Any]:
    """Those by which patches meet their positions."""
    return [hook for hook in place._forward_pre_hooks.values() if hasattr(hook, "is_last")]


def student_among(embeds: Sequence[CompressedPatchEmbed]) -> CompressedPatchEmbed:
    """The first that drops tokens; the first of all, if they are teachers'."""
    return next((embed for embed in embeds if embed.drops_tokens), embeds[0])


def _builds_graph(views: Tensor, model: nn.Module) -> bool:
    """Whether this forward will be differentiated.

    The first pass of reentrant gradient checkpointing runs without grad, but its input requires grad; that of
    a teacher does not.
    """
    if views.requires_grad:
        return True
    return torch.is_grad_enabled() and not is_frozen(model)
