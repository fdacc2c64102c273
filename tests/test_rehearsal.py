"""A rehearsal tries the longest sequences of a run at its start, and leaves no trace."""

from __future__ import annotations

import math
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqcompress import (
    Budget,
    Constant,
    Linear,
    SequenceScheduler,
    Strategy,
    compress,
    get_strategy,
    num_tokens,
    rehearse,
)
from seqcompress.training.rehearsal import StepMemory, rehearse_in

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


def test_without_figures_it_finds_what_fits_by_trying(tiny_vit: Any) -> None:
    vit, views = tiny_vit(), torch.randn(2, 3, 32, 32)
    scheduler = _scheduler(vit)
    vit.blocks[0].register_forward_pre_hook(_out_of_memory_beyond(10))
    # 1 + round(0.55 * 16) = 10 of 17 tokens; a dropout of 0.4 would leave 11.
    with pytest.raises(
        MemoryError, match=r"batch size to about 58 % .* schedule at 'drop 0.45' \(10 tokens\)"
    ) as raised:
        rehearse(scheduler, lambda: vit(views).mean().backward())
    assert "need" not in str(raised.value)


def test_out_of_memory_is_told_by_its_words_where_it_has_no_type(tiny_vit: Any) -> None:
    vit = tiny_vit()

    def step() -> None:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 18.10 GB, ...)")

    with pytest.raises(MemoryError, match=r"Not even 'drop 0\.95' fits\. .*18\.10 GB"):
        rehearse(_scheduler(vit), step)


def test_other_errors_are_passed_on(tiny_vit: Any) -> None:
    def step() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        rehearse(_scheduler(tiny_vit()), step)


def test_that_the_run_does_not_fit_is_said_even_if_nothing_else_can_be_tried(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), iter([torch.randn(2, 3, 32, 32)])
    vit.blocks[0].register_forward_pre_hook(_out_of_memory_beyond(10))
    with pytest.raises(MemoryError, match=r"\(base\) do not fit .* could not be tried: StopIteration\(\)"):
        rehearse(_scheduler(vit), lambda: vit(next(batches)))


def test_a_step_adds_memory_in_proportion_to_its_tokens() -> None:
    measured = StepMemory(held=100, peak=400, tokens=60)
    assert measured.needed(60) == 400
    assert measured.needed(200) == 100 + 200 * 5
    assert measured.tokens_within(1100) == 200


class LimitedMemory(TorchDispatchMode):
    """Keeps books on all tensors that torch's operators see, and runs out of memory beyond a limit, on any device."""

    def __init__(self, total: float = math.inf) -> None:
        super().__init__()
        self.total: Any = total
        self.peak = 0
        self._blocks: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def held(self) -> int:
        self._blocks = {key: block for key, block in self._blocks.items() if not block[0].expired()}
        return sum(size for _, size in self._blocks.values())

    def restart(self) -> None:
        self.peak = self.held

    def tidy(self) -> None:
        pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, outputs)):
            if isinstance(tensor, torch.Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self._blocks[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        held = self.held
        if held > self.total:
            raise torch.OutOfMemoryError(f"{held} bytes are more than {self.total}")
        self.peak = max(self.peak, held)
        return outputs


def _told(error: BaseException) -> tuple[float, float, Strategy, int]:
    """Bytes that are needed, share of the batch, strategy and tokens that fit."""
    pattern = r"need about ([\d.]+) ([MG])iB; .* about (\d+) % .* at '(.*)' \((\d+) tokens\)\. The last was tried"
    found = re.search(pattern, str(error))
    assert found is not None, error
    unit = {"M": 2**20, "G": 2**30}[found[2]]
    return float(found[1]) * unit, int(found[3]) / 100, Strategy.parse(found[4]), int(found[5])


@pytest.mark.parametrize(("schedule", "share"), [(RELAXING, 0.8), (RELAXING, 0.4), (Constant(Strategy(0.1)), 0.6)])
def test_it_says_what_is_needed_and_what_would_fit(schedule: Any, share: float, tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(img_size=64, embed_dim=96), schedule).train(), torch.randn(32, 3, 64, 64)
    scheduler = SequenceScheduler(vit, total_steps=100)
    longest = scheduler.most_expensive()

    def step(strategy: Strategy, batch: int = 32) -> None:
        scheduler.use(strategy)
        vit(views[:batch]).square().mean().backward()

    with LimitedMemory() as memory:
        step(longest)  # from now on there are gradients
        memory.restart()
        step(longest)
        peak = memory.peak
        memory.total = share * peak
        with pytest.raises(MemoryError) as raised:
            rehearse_in(memory, scheduler, lambda: vit(views).square().mean().backward())
        needed, batch, fits, tokens = _told(raised.value)

        assert needed == pytest.approx(peak, rel=0.15)
        assert tokens == num_tokens(vit, fits, 64)
        step(fits)
        with pytest.raises(torch.OutOfMemoryError):
            step(Strategy(round(fits.token_dropout - 0.05, 2)))
        step(longest, math.floor(32 * batch))


def test_all_views_of_the_batch_count(tiny_vit: Any) -> None:
    student = compress(tiny_vit(img_size=64, dynamic_img_size=True), RELAXING, teacher=tiny_vit(img_size=64)).train()
    views, crops = torch.randn(8, 3, 64, 64), torch.randn(24, 3, 32, 32)
    scheduler = SequenceScheduler(student, total_steps=100)
    student.blocks[0].register_forward_pre_hook(_out_of_memory_beyond(33))
    with pytest.raises(MemoryError) as raised:
        rehearse(scheduler, lambda: (student(views).mean() + student(crops).mean()).backward())
    # A dropout of 0.5 leaves 1 + 32 of 65 tokens of a view, and 1 + 8 of 17 of a crop.
    share = (8 * 33 + 24 * 9) / (8 * 65 + 24 * 17)
    assert f"to about {math.floor(100 * share)} % of this one" in str(raised.value)
    assert "at 'drop 0.5' (33 tokens)" in str(raised.value)


def test_what_failed_holds_no_memory_while_something_shorter_is_tried(tiny_vit: Any) -> None:
    vit, views, held = tiny_vit(), torch.randn(8, 3, 32, 32), []
    scheduler = _scheduler(vit)
    with LimitedMemory() as memory:
        vit(views).mean().backward()
        vit.blocks[1].register_forward_pre_hook(_out_of_memory_beyond(10))

        def step() -> None:
            held.append(memory.held)
            tokens = vit(views)
            tokens.mean().backward()

        with pytest.raises(MemoryError):
            rehearse_in(memory, scheduler, step)
    assert len(held) == 5
    one_block = 8 * 17 * 32 * 4  # bytes of what a block puts out
    assert max(held[1:]) - held[0] < one_block


ONE_OF_TWO = """
import sys
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import distributed as dist
from seqcompress import SequenceScheduler, Strategy, compress, rehearse

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0)
scheduler = SequenceScheduler(compress(vit, Strategy()).train(), total_steps=10)
steps = []

def step():
    steps.append(vit(torch.zeros(1, 3, 32, 32)))
    if rank == 1:
        raise torch.OutOfMemoryError("too much")

try:
    rehearse(scheduler, step)
except MemoryError as error:
    print(error)
print("steps:", len(steps))
"""


def test_a_rank_that_does_not_fit_tries_nothing_for_which_others_would_have_to_wait(
    tmp_path: Path, run_ranks: Any
) -> None:
    printed = run_ranks(*([sys.executable, "-c", ONE_OF_TWO, rank, tmp_path] for rank in range(2)))
    assert printed[0] == "steps: 1\n"
    assert "(base) do not fit into memory" in printed[1]
    assert printed[1].endswith("steps: 1\n")


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
def test_on_a_gpu_it_says_what_is_needed_and_what_would_fit(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(img_size=128, embed_dim=128), RELAXING).train().cuda()
    scheduler, views = SequenceScheduler(vit, total_steps=100), torch.randn(256, 3, 128, 128, device="cuda")

    def step() -> None:
        vit(views).square().mean().backward()

    step()  # from now on there are gradients
    memory = rehearse(scheduler, step).peak_bytes
    assert memory is not None
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * memory / total)
    try:
        with pytest.raises(MemoryError) as raised:
            rehearse(scheduler, step)
        needed, batch, fits, _ = _told(raised.value)
        assert needed == pytest.approx(memory, rel=0.2)
        assert 0.3 < batch < 0.65
        scheduler.use(fits)
        step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
