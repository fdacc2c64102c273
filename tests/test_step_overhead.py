"""What compression adds to a training step: nothing that waits for the device, and nothing that stays behind."""

from __future__ import annotations

import gc
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from seqcompress import SequenceScheduler, Strategy, compress
from seqcompress.compressors import SubsetStream
from seqcompress.compressors.token_dropout import first_rows, gather_patches, random_subset, rows_of_patches

CPU = torch.device("cpu")
# What reads a tensor's value on the host, and so would wait for a GPU.
WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "index.Tensor")
STRATEGIES = [Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 16), Strategy(0.5, 12), Strategy(0.3, 10)]


class Recorder(TorchDispatchMode):
    """Notes every operation and the shape of its first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        self.calls[str(func).removeprefix("aten."), shape] += 1
        return func(*args, **(kwargs or {}))

    def waiting(self) -> dict[tuple[str, tuple[int, ...]], int]:
        return {call: times for call, times in self.calls.items() if call[0].startswith(WAITING)}


def _train(vit: Any, views: Tensor) -> None:
    vit(views).sum().backward()


# No waiting for the device


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("with_scheduler", [False, True])
def test_a_training_step_reads_no_value_back_but_one_random_number_of_the_cpu(
    strategy: Strategy, with_scheduler: bool, tiny_vit: Any
) -> None:
    vit = compress(tiny_vit(), strategy).train()
    views = torch.randn(4, 3, 32, 32)
    scheduler = SequenceScheduler(vit, total_steps=10) if with_scheduler else None
    _train(vit, views)  # what is made once, is made here
    with Recorder() as recorder:
        _train(vit, views)
        if scheduler is not None:
            scheduler.step()
    draws = 1 if strategy.token_dropout else 0
    assert recorder.waiting() == ({("_local_scalar_dense.default", ()): 1} if draws else {})
    assert recorder.calls["random_.default", ()] == draws


def test_the_recorder_sees_what_reads_values_back() -> None:
    with Recorder() as recorder:
        values = torch.arange(4.0)
        values[values > 1].sum().item()
        values.nonzero()
    assert sum(recorder.waiting().values()) >= 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_on_a_gpu_a_training_step_does_not_wait_for_it(
    strategy: Strategy, memory_format: torch.memory_format, tiny_vit: Any
) -> None:
    vit = compress(tiny_vit().cuda(), strategy).train()
    views = torch.randn(64, 3, 32, 32, device="cuda").to(memory_format=memory_format)
    scheduler = SequenceScheduler(vit, total_steps=10)
    _train(vit, views)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            _train(vit, views)
            scheduler.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_subsets_are_drawn_there() -> None:
    cuda = torch.device("cuda")
    subset = random_subset(64, 196, 49, seed=1, device=cuda)
    assert subset.device.type == "cuda"
    assert torch.equal(subset, random_subset(64, 196, 49, seed=1, device=cuda))


# Nothing that stays


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_later_steps_leave_no_more_tensors_than_the_first(strategy: Strategy, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), strategy).train()
    views = torch.randn(4, 3, 32, 32)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(held), Tensor) for held in gc.get_objects())

    _train(vit, views)
    after_one = tensors()
    for _ in range(5):
        _train(vit, views)
    assert tensors() <= after_one


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy.token_dropout], ids=str)
def test_index_tables_are_made_once(strategy: Strategy, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), strategy).train()
    views = torch.randn(4, 3, 32, 32)
    _train(vit, views)
    with Recorder() as recorder:
        _train(vit, views)
    assert not [name for name, _ in recorder.calls if name.startswith(("arange", "linspace", "eye"))]


def test_tables_for_many_batch_sizes_are_bounded() -> None:
    patch_rows = rows_of_patches(3, (4, 4), (8, 8), CPU)
    for batch in range(1, 101):
        gather_patches(torch.randn(batch, 3, 32, 32), torch.zeros(batch, 1, dtype=torch.int64), patch_rows, (8, 8))
    assert first_rows.cache_info().currsize == 64


def test_a_scheduler_that_is_never_stepped_lets_nothing_pile_up(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(depth=1, embed_dim=8), token_dropout=0.5).train()
    SequenceScheduler(vit, total_steps=10)
    stream: SubsetStream = vit.patch_embed.compression.stream
    for _ in range(12_000):
        stream.next_seed()
    noted = len(pickle.dumps(stream))
    for _ in range(12_000):
        stream.next_seed()
    assert len(pickle.dumps(stream)) == pytest.approx(noted, rel=0.01)


def test_every_forward_of_a_step_has_a_seed_of_its_own_however_many_there_are() -> None:
    stream, other = SubsetStream(), SubsetStream()
    for each in (stream, other):
        each.anchor(seed=0, step=0)
    seeds = [stream.next_seed() for _ in range(12_000)]
    assert len(set(seeds)) == 12_000
    assert [other.next_seed() for _ in range(12_000)] == seeds  # whatever the numbers of the random state were


def test_a_forward_that_is_run_again_finds_its_seed_among_thousands() -> None:
    stream = SubsetStream()
    stream.anchor(seed=0, step=0)
    states, seeds = [], []
    for _ in range(5_000):
        states.append(torch.get_rng_state())
        seeds.append(stream.next_seed())
    for index in (0, 1, 2_500, 4_999):
        torch.set_rng_state(states[index])
        assert stream.next_seed() == seeds[index]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_finds_its_subset_without_a_step(use_reentrant: bool, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.5).train()
    SequenceScheduler(vit, total_steps=10)
    noted: list[Tensor] = []
    vit.blocks[0].register_forward_pre_hook(lambda block, args: noted.append(args[0].detach()))
    views = torch.randn(2, 3, 32, 32, requires_grad=True)
    losses = [checkpoint(vit, views, use_reentrant=use_reentrant).sum() for _ in range(3)]
    torch.stack(losses).sum().backward()
    first, again = noted[:3], noted[3:]
    assert len(again) == 3
    assert all(any(torch.equal(one, other) for other in again) for one in first)
    assert not torch.equal(first[0], first[1])


# Views in channels-last format, as solo-learn makes them


@pytest.mark.parametrize("strategy", [*STRATEGIES, Strategy(0.5, 11)], ids=str)
def test_views_in_channels_last_format_give_the_same_tokens(
    strategy: Strategy, tiny_vit: Any, first_tokens: Any, gradients: Any
) -> None:
    vit = compress(tiny_vit(), strategy).train()
    views = torch.randn(4, 3, 32, 32)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(7)
        vit.zero_grad()
        tokens = first_tokens(vit, views.to(memory_format=memory_format))
        tokens.square().sum().backward()
        ends.append((tokens.detach(), gradients(vit)))
    (tokens, one), (others, other) = ends
    torch.testing.assert_close(others, tokens, rtol=1e-5, atol=1e-5)
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("patch", [(8, 8), (4, 8), (16, 4)], ids=str)
def test_the_same_patches_are_read_from_either_format(channels: int, patch: tuple[int, int]) -> None:
    grid = 32 // patch[0], 48 // patch[1]
    views = torch.randn(5, channels, 32, 48)
    kept = random_subset(5, grid[0] * grid[1], 3, seed=1, device=CPU)
    patch_rows = rows_of_patches(channels, grid, patch, CPU)
    every = views.unflatten(3, (grid[1], patch[1])).unflatten(2, (grid[0], patch[0]))  # (B, C, gh, h, gw, w)
    every = every.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (B, N, C, h, w)
    expected = torch.stack([patches[subset] for patches, subset in zip(every, kept, strict=True)])
    for memory_format in (torch.contiguous_format, torch.channels_last):
        pixels = gather_patches(views.to(memory_format=memory_format), kept, patch_rows, patch)
        assert torch.equal(pixels, expected)
    sliced = torch.cat((views, views), dim=3)[..., :48]
    assert torch.equal(gather_patches(sliced, kept, patch_rows, patch), expected)


def test_views_in_channels_last_format_are_not_copied_as_a_whole() -> None:
    views = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    kept = random_subset(4, 64, 2, seed=1, device=CPU)
    patch_rows = rows_of_patches(3, (8, 8), (8, 8), CPU)
    gather_patches(views, kept, patch_rows, (8, 8))
    with Recorder() as recorder:
        gather_patches(views, kept, patch_rows, (8, 8))
    assert not [name for name, shape in recorder.calls if name.startswith(("clone", "copy", "contiguous"))]


def test_a_gradient_with_respect_to_views_does_not_depend_on_their_format(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Strategy(0.5)).train()
    pixels = torch.randn(2, 3, 32, 32)
    grads = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(3)
        views = pixels.clone(memory_format=memory_format).requires_grad_()
        vit(views).square().sum().backward()
        assert views.grad is not None
        grads.append(views.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
