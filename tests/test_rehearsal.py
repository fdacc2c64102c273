"""A rehearsal tries the longest sequences of a run at its start, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seqcompress import Budget, Linear, SequenceScheduler, Strategy, compress, get_strategy, rehearse

RELAXING = Linear(Strategy(0.75, 16), Strategy())


def _scheduler(vit: Any) -> SequenceScheduler:
    return SequenceScheduler(compress(vit, RELAXING).train(), total_steps=100)


def test_the_step_runs_once_at_the_most_expensive_strategy(tiny_vit: Any, first_tokens: Any) -> None:
    vit = tiny_vit()
    scheduler, lengths = _scheduler(vit), []
    rehearsal = rehearse(scheduler, lambda: lengths.append(first_tokens(vit, torch.randn(2, 3, 32, 32)).shape[1]))
    assert lengths == [17]
    assert rehearsal.strategy == Strategy()
    assert (rehearsal.peak_bytes, rehearsal.total_bytes) == (None, None)
    assert str(rehearsal) == "the longest sequences (base) fit"


@pytest.mark.parametrize("fails", [False, True])
def test_strategy_random_state_and_budget_are_as_before(fails: bool, tiny_vit: Any) -> None:
    vit = tiny_vit()
    scheduler = _scheduler(vit)
    scheduler.step(20)
    budget = Budget(vit)
    vit(torch.randn(2, 3, 32, 32))
    before = scheduler.state_dict(), get_strategy(vit), torch.get_rng_state(), budget.units

    def step() -> None:
        vit(torch.randn(2, 3, 32, 32))[:, 0].sum().backward()
        if fails:
            raise KeyError("batch")

    if fails:
        with pytest.raises(KeyError, match="batch"):
            rehearse(scheduler, step)
    else:
        rehearse(scheduler, step)
        assert vit.patch_embed.proj.weight.grad is not None
    after = scheduler.state_dict(), get_strategy(vit), torch.get_rng_state(), budget.units
    assert (after[0], after[1], after[3]) == (before[0], before[1], before[3])
    assert torch.equal(after[2], before[2])


def test_a_rehearsal_does_not_change_what_the_run_draws(tiny_vit: Any, first_tokens: Any) -> None:
    drawn = []
    for rehearsed in (False, True):
        torch.manual_seed(7)
        vit, views = tiny_vit(), torch.randn(2, 3, 32, 32)
        scheduler = _scheduler(vit)
        if rehearsed:
            rehearse(scheduler, lambda vit=vit, views=views: vit(views))
        drawn.append(first_tokens(vit, views))
    assert torch.equal(*drawn)


def _out_of_memory_beyond(limit: int) -> Any:
    def hook(block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > limit:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    return hook


def test_running_out_of_memory_is_an_error_that_names_the_strategy(tiny_vit: Any) -> None:
    vit, views = tiny_vit(), torch.randn(2, 3, 32, 32)
    scheduler = _scheduler(vit)
    vit.blocks[0].register_forward_pre_hook(_out_of_memory_beyond(10))
    vit(views)
    with pytest.raises(MemoryError, match=r"longest sequences .*\(base\).*2\.00 GiB") as raised:
        rehearse(scheduler, lambda: vit(views))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert get_strategy(vit) == Strategy(0.75, 16)
    vit(views)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_says_what_the_longest_sequences_need(tiny_vit: Any) -> None:
    vit = tiny_vit(img_size=128).cuda()
    scheduler, views = _scheduler(vit), torch.randn(64, 3, 128, 128, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    vit(views)[:, 0].sum().backward()
    short = torch.cuda.max_memory_allocated()
    random_state = torch.cuda.get_rng_state()
    rehearsal = rehearse(scheduler, lambda: vit(views)[:, 0].sum().backward())
    assert rehearsal.peak_bytes is not None
    assert rehearsal.total_bytes == torch.cuda.get_device_properties(0).total_memory
    assert short < rehearsal.peak_bytes < rehearsal.total_bytes
    assert "GiB" in str(rehearsal)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
