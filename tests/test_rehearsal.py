"""A rehearsal tries the longest sequences of a run at its start, and leaves no trace."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from seqcompress import (
    Budget,
    Constant,
    Linear,
    SequenceScheduler,
    Strategy,
    compress,
    get_strategy,
    rehearse,
    set_strategy,
)

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
def test_strategy_random_states_and_budget_are_as_before(fails: bool, tiny_vit: Any) -> None:
    vit = tiny_vit()
    scheduler = _scheduler(vit)
    scheduler.step(20)
    budget = Budget(vit)
    vit(torch.randn(2, 3, 32, 32))
    before = scheduler.state_dict(), get_strategy(vit), torch.get_rng_state(), budget.units
    others = random.getstate(), np.random.get_state()[1:3]

    def step() -> None:
        vit(torch.randn(2, 3, 32, 32))[:, 0].sum().backward()
        random.random()
        np.random.rand()
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
    assert random.getstate() == others[0]
    assert all(map(np.array_equal, np.random.get_state()[1:3], others[1]))


def test_the_budget_of_a_teacher_that_the_scheduler_was_not_given_is_as_before_too(tiny_vit: Any) -> None:
    student, teacher, views = tiny_vit().train(), tiny_vit().train().requires_grad_(False), torch.randn(2, 3, 32, 32)
    scheduler = SequenceScheduler(compress(student, RELAXING, teacher=teacher), total_steps=10)
    budget = Budget(student)
    rehearse(scheduler, lambda: (student(views) - teacher(views)).square().sum().backward())
    assert budget.units == 0


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


@pytest.mark.parametrize("forwards", [1, 2, 3])
def test_a_rehearsal_of_any_number_of_forwards_leaves_a_resumed_step_its_subsets(
    forwards: int, tiny_vit: Any, first_tokens: Any
) -> None:
    drawn = []
    for rehearsed in (False, True):
        torch.manual_seed(7)
        vit, views = tiny_vit(), torch.randn(2, 3, 32, 32)
        scheduler = _scheduler(vit)
        vit(views)  # a step has begun
        if rehearsed:
            scheduler_step = lambda vit=vit, views=views: [vit(views) for _ in range(forwards)]  # noqa: E731
            rehearse(scheduler, scheduler_step)
        drawn.append(torch.stack([first_tokens(vit, views) for _ in range(2)]))
    assert torch.equal(*drawn)


def test_swapped_arguments_are_one_line_that_says_so(tiny_vit: Any) -> None:
    vit = tiny_vit()
    scheduler = _scheduler(vit)
    with pytest.raises(TypeError, match="got a VisionTransformer: the scheduler comes first, then the step") as raised:
        rehearse(vit, scheduler)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="step must be a function without arguments, got a VisionTransformer"):
        rehearse(scheduler, vit)


def _out_of_memory_beyond(limit: int) -> Any:
    def hook(block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[1] > limit:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    return hook


def test_running_out_of_memory_is_an_error_that_names_the_strategy_and_the_step_ran_once(tiny_vit: Any) -> None:
    vit, views, tokens = tiny_vit(), torch.randn(2, 3, 32, 32), []
    scheduler = _scheduler(vit)
    vit.blocks[0].register_forward_pre_hook(lambda block, args: tokens.append(args[0].shape[1]))
    vit.blocks[0].register_forward_pre_hook(_out_of_memory_beyond(10))
    vit(views)
    with pytest.raises(
        MemoryError, match=r"^a training step at 'base' \(17 tokens a view\) does not fit .*2\.00 GiB$"
    ) as raised:
        rehearse(scheduler, lambda: vit(views))
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert get_strategy(vit) == Strategy(0.75, 16)
    vit(views)
    assert tokens == [2, 17, 2]


def test_out_of_memory_is_told_by_its_words_where_it_has_no_type(tiny_vit: Any) -> None:
    def step() -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 18.10 GB, ...)")

    with pytest.raises(MemoryError, match=r"'base' .*18\.10 GB"):
        rehearse(_scheduler(tiny_vit()), step)


def test_an_error_holds_nothing_of_the_step_that_did_not_fit(tiny_vit: Any) -> None:
    vit, kept = tiny_vit(), []
    vit.blocks[1].register_forward_pre_hook(_out_of_memory_beyond(10))

    def step() -> None:
        images = torch.randn(2, 3, 32, 32)
        kept.append(weakref.ref(images))
        vit(images).mean().backward()

    with pytest.raises(MemoryError) as raised:
        rehearse(_scheduler(vit), step)
    gc.collect()
    assert kept[0]() is None
    assert raised.value.__cause__ is not None


def test_other_errors_are_passed_on(tiny_vit: Any) -> None:
    def step() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        rehearse(_scheduler(tiny_vit()), step)


RANK_OF_TWO = """
import sys
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from seqcompress import SequenceScheduler, Strategy, compress, rehearse

rank, folder, first_that_fails = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
scheduler = SequenceScheduler(compress(vit, Strategy()).train(), total_steps=10)
steps = []

def step():
    steps.append(vit(torch.zeros(1, 3, 32, 32)))
    if rank >= first_that_fails:
        raise torch.OutOfMemoryError("too much")

try:
    rehearse(scheduler, step)
except MemoryError as error:
    print(error)
print("steps:", len(steps))
"""


@pytest.mark.parametrize("failing", [{1}, {0, 1}])
def test_every_rank_on_which_it_does_not_fit_says_so_with_its_number(
    failing: set[int], tmp_path: Path, run_ranks: Any
) -> None:
    printed = run_ranks(*([sys.executable, "-c", RANK_OF_TWO, rank, tmp_path, min(failing)] for rank in range(2)))
    for rank, lines in enumerate(printed):
        said = f"rank {rank}: a training step at 'base' (17 tokens a view) does not fit into memory"
        assert lines.startswith(said) == (rank in failing)
        assert lines.endswith("steps: 1\n")


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_error_says_how_much_memory_was_in_use(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(img_size=128, embed_dim=128), RELAXING).train().cuda()
    scheduler, views = SequenceScheduler(vit, total_steps=100), torch.randn(256, 3, 128, 128, device="cuda")

    def step() -> None:
        vit(views).square().mean().backward()

    step()  # from now on there are gradients
    needed = rehearse(scheduler, step).peak_bytes
    assert needed is not None
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    try:
        with pytest.raises(MemoryError, match=r"'base' .* torch ran out at [\d.]+ [MG]iB of [\d.]+ GiB\.") as raised:
            rehearse(scheduler, step)
        assert raised.value.__cause__ is not None
        step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_encoders_of_their_own_have_their_own_strategies_back(tiny_vit: Any) -> None:
    one, other = (compress(tiny_vit().train(), Constant(Strategy(0.5))) for _ in range(2))
    scheduler = SequenceScheduler([one, other], total_steps=10)
    with pytest.warns(UserWarning, match="will not stay|next step"):
        set_strategy(other, Strategy(0.75))
    rehearse(scheduler, lambda: None)
    assert (get_strategy(one), get_strategy(other)) == (Strategy(0.5), Strategy(0.75))


def test_memory_that_does_not_suffice_on_the_cpu_is_named(tiny_vit: Any) -> None:
    with pytest.raises(MemoryError, match=r"at 'base' \(17 tokens a view\) does not fit"):
        rehearse(_scheduler(tiny_vit()), lambda: torch.empty(2**60))
