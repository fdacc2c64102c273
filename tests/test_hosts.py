"""Hosts that use a compressed encoder in ways of their own, and users who change their minds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from seqcompress import (
    Budget,
    Constant,
    SequenceScheduler,
    Strategy,
    compress,
    get_strategy,
    is_compressed,
    num_tokens,
    rehearse,
    restore,
    set_strategy,
)


class WithoutPositionDropout(VisionTransformer):
    """A subclass as people wrote them: it goes from the patch embedding straight to the blocks."""

    def forward_features(self, x: Any, **_: Any) -> Any:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.norm(self.blocks(x))


def test_a_host_that_goes_straight_to_the_blocks_gets_the_tokens_of_every_view(first_tokens: Any) -> None:
    vit = WithoutPositionDropout(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).train()
    views = torch.randn(4, 3, 32, 32)
    plain = first_tokens(vit, views)
    compress(vit, token_dropout=0.5)
    tokens = first_tokens(vit, views)
    assert tokens.shape == (4, 9, 32)
    distances = torch.cdist(tokens[:, 1:], plain[:, 1:])
    assert float(distances.amin(2).max()) < 1e-4


def test_feature_maps_have_the_grid_of_the_scaled_patches(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), patch_size=16).train()
    maps = vit.forward_intermediates(torch.randn(2, 3, 32, 32), intermediates_only=True)
    assert maps[-1].shape == (2, 32, 2, 2)


def test_dropped_tokens_make_no_feature_map_but_a_clear_error(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), token_dropout=0.5).train(), torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match="use eval mode"):
        vit.forward_intermediates(views, intermediates_only=True)
    assert vit.eval().forward_intermediates(views, intermediates_only=True)[-1].shape == (2, 32, 4, 4)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.5), Strategy(0.0, 16)])
def test_views_that_patches_do_not_divide_train_at_every_strategy(
    dynamic: bool, strategy: Strategy, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(dynamic_img_size=dynamic), strategy).train()
    tokens = first_tokens(vit, torch.randn(2, 3, 36, 44))
    assert tokens.shape[1] == num_tokens(vit, strategy, (36, 44))


def test_a_model_that_pads_views_is_refused(tiny_vit: Any) -> None:
    vit = tiny_vit(dynamic_img_size=True, dynamic_img_pad=True)
    with pytest.raises(ValueError, match="dynamic_img_pad=True"):
        compress(vit, token_dropout=0.5)
    assert not is_compressed(vit)


def test_encoders_compressed_apart_draw_different_subsets_under_one_scheduler(tiny_vit: Any, first_tokens: Any) -> None:
    one = tiny_vit().train()
    other = tiny_vit().train()
    other.load_state_dict(one.state_dict())
    SequenceScheduler([compress(one, token_dropout=0.5), compress(other, token_dropout=0.5)], total_steps=4)
    views = torch.randn(4, 3, 32, 32)
    assert not torch.equal(first_tokens(one, views), first_tokens(other, views))


def test_a_scheduler_of_encoders_that_were_compressed_anew_says_so(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5)
    scheduler = SequenceScheduler(vit, total_steps=4)
    compress(vit, token_dropout=0.25)
    assert not scheduler.is_current
    with pytest.raises(RuntimeError, match="make a new SequenceScheduler"):
        scheduler.step()
    assert get_strategy(vit) == Strategy(0.25)
    assert scheduler.last_step == 0


def test_a_scheduler_of_restored_encoders_says_so(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5)
    scheduler = SequenceScheduler(vit, total_steps=4)
    restore(vit)
    with pytest.raises(RuntimeError, match="make a new SequenceScheduler"):
        scheduler.step()


def test_a_budget_goes_on_counting_when_a_student_is_planned_anew_without_its_teacher(tiny_vit: Any) -> None:
    student, teacher = tiny_vit().train(), tiny_vit().train()
    compress(student, Strategy(), teacher=teacher)
    budget = Budget(student)
    compress(student, Strategy())
    assert not is_compressed(teacher)
    student(torch.randn(2, 3, 32, 32))
    assert budget.units == pytest.approx(6.0)


def test_a_plain_model_among_compressed_ones_is_not_overlooked(tiny_vit: Any) -> None:
    models = [compress(tiny_vit(), token_dropout=0.5), tiny_vit()]
    with pytest.raises(ValueError, match="got a plain VisionTransformer"):
        SequenceScheduler(models, total_steps=4)
    with pytest.raises(ValueError, match="got a plain VisionTransformer"):
        Budget(models)


def test_a_schedules_text_as_plan_is_answered_with_what_to_do(tiny_vit: Any) -> None:
    vit = tiny_vit()
    with pytest.raises(ValueError, match=r"Schedule\.from_json"):
        compress(vit, Constant(Strategy(0.5)).to_json())
    with pytest.raises(ValueError, match="plan must be one of"):
        compress(vit, "x" * 5000)
    assert not is_compressed(vit)


@pytest.mark.parametrize(("strategy", "error"), [("drop 0.5", TypeError), (Strategy(0.0, 64), ValueError)])
def test_only_a_strategy_that_suits_the_encoders_can_be_used(strategy: Any, error: Any, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5)
    scheduler = SequenceScheduler(vit, total_steps=4)
    with pytest.raises(error):
        scheduler.use(strategy)
    assert get_strategy(vit) == Strategy(0.5)


def test_a_rehearsal_puts_back_a_strategy_set_by_hand(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5)
    scheduler = SequenceScheduler(vit, total_steps=4)
    with pytest.warns(UserWarning, match="driven by a SequenceScheduler"):
        set_strategy(vit, Strategy(0.25))
    rehearse(scheduler, lambda: vit.train()(torch.randn(2, 3, 32, 32)).sum().backward())
    assert get_strategy(vit) == Strategy(0.25)
    with pytest.raises(TypeError, match="scheduler must be a SequenceScheduler"):
        rehearse(vit, lambda: None)
    with pytest.raises(TypeError, match="step must be a function"):
        rehearse(scheduler, 3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("driven", [False, True])
def test_checkpointing_without_its_random_state_is_refused(driven: bool, reentrant: bool, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5).train()
    if driven:
        SequenceScheduler(vit, total_steps=4)
    views = torch.randn(2, 3, 32, 32, requires_grad=reentrant)
    loss = checkpoint(vit, views, use_reentrant=reentrant, preserve_rng_state=False).sum()
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        loss.backward()


def test_selective_checkpointing_may_keep_what_token_dropout_looks_up(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5).train()
    keeping = partial(create_selective_checkpoint_contexts, [torch.ops.aten.embedding.default])
    views, gradients = torch.randn(2, 3, 32, 32), []
    for run in (vit, partial(checkpoint, vit, use_reentrant=False, context_fn=keeping)):
        torch.manual_seed(3)
        vit.zero_grad()
        run(views).square().sum().backward()
        gradients.append(vit.patch_embed.proj.weight.grad.clone())
    assert torch.equal(*gradients)


def test_an_empty_batch_gives_no_features(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Strategy(0.5, 16)).train()
    assert vit(torch.randn(0, 3, 32, 32)).shape == (0, 32)
