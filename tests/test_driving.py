"""A schedule takes effect while one driver advances it, and is run once."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from seqcompress import SequenceScheduler, Stepwise, Strategy, compress, get_strategy, restore, set_strategy

HALF = Strategy(0.5)
PLAN = Stepwise({0.0: HALF, 0.5: Strategy()})


def _length(vit: Any, first_tokens: Any) -> int:
    return int(first_tokens(vit, torch.randn(2, 3, 32, 32)).shape[1])


def _compression(vit: Any) -> Any:
    return vit.patch_embed.compression


def test_a_schedule_that_nothing_drives_leaves_training_plain_and_says_once_what_is_missing(
    tiny_vit: Any, first_tokens: Any
) -> None:
    plain, views = tiny_vit().train(), torch.randn(2, 3, 32, 32)
    expected = plain(views)
    compress(plain, PLAN)
    assert get_strategy(plain) == Strategy()
    with pytest.warns(UserWarning, match=r"uncompressed: .* nobody drives.*SequenceScheduler\(model") as told:
        assert torch.equal(plain(views), expected)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _length(plain, first_tokens) == 17
        plain.eval()(views)


@pytest.mark.parametrize("plan", [HALF, "drop 0.5"])
def test_a_strategy_takes_effect_at_once_and_without_a_word(plan: Any, tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit().train(), plan if isinstance(plan, Strategy) else Strategy.parse(plan))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _length(vit, first_tokens) == 9


def test_setting_a_strategy_by_hand_drives(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    assert _compression(vit).driven_by is None
    set_strategy(vit, Strategy(0.75))
    assert (_compression(vit).driven_by, _compression(vit).driver) == ("set_strategy", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _length(vit, first_tokens) == 5


def test_a_second_driver_is_refused_with_the_name_of_the_first_and_changes_nothing(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), PLAN)
    first = SequenceScheduler(vit, total_steps=8)
    first.step()
    other = compress(tiny_vit(), PLAN)
    for second in (
        lambda: SequenceScheduler(vit, total_steps=8),
        lambda: SequenceScheduler([other, vit], total_steps=8),
    ):
        with pytest.raises(RuntimeError, match=r"driven by a SequenceScheduler already.*\(del\).*anew"):
            second()
    assert (_compression(vit).driver, _compression(other).driver) == (first, None)
    assert (get_strategy(vit), get_strategy(other), first.last_step) == (HALF, Strategy(), 1)


def test_a_strategy_set_by_hand_holds_until_the_drivers_next_step_and_that_is_said(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), PLAN)
    scheduler = SequenceScheduler(vit, total_steps=8)
    with pytest.warns(UserWarning, match="driven by a SequenceScheduler, whose own strategy is back at its next step"):
        set_strategy(vit, Strategy(0.75))
    assert (get_strategy(vit), _compression(vit).driver) == (Strategy(0.75), scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        set_strategy(vit, Strategy(0.9))
    scheduler.step()
    assert get_strategy(vit) == HALF


def test_compressing_anew_and_letting_go_of_a_driver_make_room_for_another(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), PLAN)
    first = SequenceScheduler(vit, total_steps=8)
    second = SequenceScheduler(compress(vit, PLAN), total_steps=8)
    with pytest.raises(RuntimeError, match="make a new SequenceScheduler"):
        first.step()
    del second
    third = SequenceScheduler(vit, total_steps=8)
    third.step(4)
    assert (get_strategy(vit), _compression(vit).driver) == (Strategy(), third)


def test_a_driver_that_is_gone_leaves_the_encoder_plain_and_that_is_said(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    scheduler = SequenceScheduler(vit, total_steps=8)
    assert _length(vit, first_tokens) == 9
    del scheduler
    gc.collect()
    with pytest.warns(UserWarning, match="a SequenceScheduler drove, which is gone"):
        assert _length(vit, first_tokens) == 17


@pytest.mark.parametrize("again", [lambda vit: compress(vit, "0: drop 0.25; 0.5: base"), copy.deepcopy])
def test_what_was_said_of_one_plan_is_said_of_the_next_and_of_a_copy(
    again: Any, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    for _ in range(2):
        with pytest.warns(UserWarning, match="has a schedule that nobody drives") as told:
            assert [_length(vit, first_tokens) for _ in range(2)] == [17] * 2
        assert len(told) == 1
        vit = again(vit)


def test_an_early_forward_hides_neither_that_the_driver_is_gone_nor_that_the_schedule_has_ended(
    tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    with pytest.warns(UserWarning, match="nobody drives"):
        _length(vit, first_tokens)
    for steps, words in ((1, "a SequenceScheduler drove, which is gone"), (4, "has been run to its end")) * 2:
        compress(vit, PLAN)
        scheduler = SequenceScheduler(vit, total_steps=4)
        for _ in range(steps):
            scheduler.step()
        del scheduler
        gc.collect()
        with pytest.warns(UserWarning, match=words) as told:
            assert [_length(vit, first_tokens) for _ in range(2)] == [17] * 2
        assert len(told) == 1


def test_that_a_schedule_is_run_again_is_said(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), PLAN)
    scheduler = SequenceScheduler(vit, total_steps=1)
    scheduler.step()
    del scheduler
    gc.collect()
    kept = SequenceScheduler(vit, total_steps=3)
    state = kept.state_dict()
    with pytest.warns(UserWarning, match="has been run to its end before, and is run again, from its beginning"):
        kept.step()
    assert get_strategy(vit) == HALF
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for state_of_another_run in ({**state, "last_step": 1}, None):
            kept.step(3)
            del kept
            gc.collect()
            kept = SequenceScheduler(vit, total_steps=3)
            if state_of_another_run is None:
                kept.step(2)
            else:
                kept.load_state_dict(state_of_another_run)
            kept.step()
        kept.step(3)
        del kept
        gc.collect()
        SequenceScheduler(vit, Stepwise({0.0: Strategy(0.25)}), total_steps=2).step()  # another one


def test_what_was_said_of_one_model_is_said_of_the_next_under_pythons_own_filters(
    tiny_vit: Any, first_tokens: Any
) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(2):
            vit = compress(tiny_vit().train(), PLAN)
            assert [_length(vit, first_tokens) for _ in range(2)] == [17] * 2
    assert ["nobody drives" in str(each.message) for each in told] == [True] * 2


def test_a_warning_that_is_an_error_leaves_no_driver_behind(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), "online")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="measures nothing"):
            SequenceScheduler(vit, total_steps=4)
        assert _compression(vit).driver is None
        scheduler = SequenceScheduler(compress(vit, PLAN), total_steps=4)
        with pytest.raises(UserWarning, match="measures nothing"):
            scheduler.follow("online")
    assert scheduler.schedule == PLAN


def test_after_its_end_an_encoder_is_plain_without_its_driver_too(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit().train(), Stepwise({0.0: HALF, 0.5: Strategy(0.0, 16)}))
    scheduler = SequenceScheduler(vit, total_steps=2)
    assert not _compression(vit).finished
    scheduler.step()
    scheduler.step()
    assert _compression(vit).finished
    assert get_strategy(vit) == Strategy(0.0, 16)
    del scheduler
    gc.collect()
    with pytest.warns(UserWarning, match="the schedule of the encoder has been run to its end") as told:
        assert [_length(vit, first_tokens) for _ in range(3)] == [17] * 3
    assert len(told) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_driven_encoder_has_no_driver_and_is_plain(copied: Any, tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    scheduler = SequenceScheduler(vit, total_steps=8)
    twin = copied(vit)
    assert (get_strategy(twin), _compression(twin).driver) == (Strategy(), None)
    assert (_length(vit, first_tokens), _compression(vit).driver) == (9, scheduler)
    own = SequenceScheduler(twin, total_steps=8)
    own.step(4)
    assert (get_strategy(vit), get_strategy(twin)) == (HALF, Strategy())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_scheduler_that_is_copied_with_its_encoder_drives_the_copy(copied: Any, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), PLAN)
    scheduler = SequenceScheduler(vit, total_steps=8)
    twin, twins = copied((vit, scheduler))
    assert (get_strategy(twin), _compression(twin).driver) == (HALF, twins)
    twins.step(4)
    assert (get_strategy(twin), get_strategy(vit)) == (Strategy(), HALF)
    assert (twins.last_step, scheduler.last_step) == (4, 0)


def test_restoring_takes_the_encoder_from_its_driver(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), PLAN)
    scheduler = SequenceScheduler(vit, total_steps=8)
    restore(vit)
    assert not scheduler.is_current
    own = SequenceScheduler(compress(vit, PLAN), total_steps=8)
    assert (own.is_current, get_strategy(vit)) == (True, HALF)


ONE_OF_TWO = """
import copy, sys
from datetime import timedelta
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from seqcompress import SequenceScheduler, Strategy, compress

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(10 + rank)
vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
for world in range(2):  # the second one after the first was destroyed
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=2)
    if world == 0:
        scheduler = SequenceScheduler(compress(vit, Strategy()).train(), total_steps=10)
    scheduler.step()
    dist.barrier()
    dist.destroy_process_group()
twin = copy.deepcopy(scheduler)
twin.step()
print(scheduler.state_dict()["seed"], scheduler.last_step, twin.last_step)
"""


def test_ranks_share_rank_0s_seed_and_a_scheduler_survives_its_process_group_and_a_copy(
    tmp_path: Path, run_ranks: Any
) -> None:
    printed = run_ranks(*([sys.executable, "-c", ONE_OF_TWO, rank, tmp_path] for rank in range(2)))
    assert printed == ["10 2 3\n", "10 2 3\n"]


def _train(forward: Callable[[Tensor], Tensor], optimizer: Optimizer, updates: int) -> None:
    for _ in range(updates):
        forward(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_scheduler_that_is_never_stepped_is_seen_where_a_head_gets_no_gradient(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(num_classes=10).train(), PLAN)
    _scheduler = SequenceScheduler(vit, total_steps=20)
    optimizer = torch.optim.SGD(vit.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="has not been stepped"):
        _train(vit.forward_features, optimizer, 12)


def test_a_new_driver_has_the_end_of_its_own_schedule_said(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    _compression(vit).warns_when_finished = False  # as a host leaves it that has said so itself
    scheduler = SequenceScheduler(vit, total_steps=1)
    scheduler.step()
    del scheduler
    with pytest.warns(UserWarning, match="run to its end"):
        vit(torch.randn(2, 3, 32, 32))


def test_a_scheduler_that_is_never_stepped_is_seen_by_a_fused_optimizer_too(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    _scheduler = SequenceScheduler(vit, total_steps=20)
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3, fused=True)
    with pytest.warns(UserWarning, match="updated 10 times since a SequenceScheduler was made"):
        _train(vit, optimizer, 12)


def test_a_scheduler_may_be_stepped_by_an_optimizers_hook(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().train(), PLAN)
    scheduler = SequenceScheduler(vit, total_steps=4)
    optimizer = torch.optim.SGD(vit.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    for _ in range(4):
        vit(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
    assert scheduler.last_step == 4


@pytest.mark.parametrize("plan", [HALF, PLAN])
def test_training_in_eval_mode_is_told_once_to_be_plain(plan: Any, tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit().eval(), plan), torch.randn(2, 3, 32, 32)
    loss = vit(views).sum()  # an evaluation may forget no_grad()
    with pytest.warns(UserWarning, match=r"a backward pass went through .* eval mode.* call train\(\)"):
        loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit(views).sum().backward()


def test_a_plain_baseline_and_a_frozen_encoder_are_not_told_of_eval_mode(tiny_vit: Any) -> None:
    views = torch.randn(2, 3, 32, 32, requires_grad=True)
    for vit in (compress(tiny_vit().eval(), Strategy()), compress(tiny_vit().eval().requires_grad_(False), HALF)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vit(views).sum().backward()
