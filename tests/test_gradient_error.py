"""Gradient error of real encoders: against closed forms where there are any, and without leaving a trace."""

from __future__ import annotations

import array
import contextvars
import copy
import functools
import importlib
import itertools
import random
import threading
import weakref
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from seqcompress import (
    Budget,
    Constant,
    GradientErrorReport,
    Linear,
    SequenceScheduler,
    Strategy,
    compress,
    get_strategy,
    gradient_error,
    is_compressed,
    restore,
)
from seqcompress.adapters.lightly import accelerate

HALF, LARGE = Strategy(0.5), Strategy(0.0, 16)
BOTH = Strategy(0.5, 16)


class _MeanOfPatches:
    """A ViT that averages embedded patches and nothing else, and a loss linear in them.

    Its gradient with respect to the kernel is ``direction`` times the mean of the patches that were kept.
    """

    def __init__(self) -> None:
        self.vit = VisionTransformer(
            img_size=16,
            patch_size=4,
            embed_dim=8,
            depth=1,
            num_heads=1,
            num_classes=0,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            norm_layer=nn.Identity,
            pos_embed="none",
        )
        self.vit.blocks = nn.Sequential(nn.Identity())
        self.vit.patch_embed.proj.bias.requires_grad_(False)
        self.direction = torch.randn(8)

    def loss(self, views: Tensor) -> Tensor:
        return (self.vit(views) @ self.direction).mean()

    def patches(self, views: Tensor) -> Tensor:
        return F.unfold(views.double(), 4, stride=4).transpose(1, 2)  # (B, 16, 48)


def _loader(batches: int = 4, size: int = 32, images: int = 4) -> list[Tensor]:
    return list(torch.randn(batches, images, 3, size, size))


def _loss_of(vit: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda views: vit(views).sin().mean()


def test_token_dropout_is_unbiased_with_the_variance_of_sampling_without_replacement() -> None:
    model, views = _MeanOfPatches(), torch.randn(3, 3, 16, 16)
    report = gradient_error(model.vit, model.loss, [views] * 150, [HALF, Strategy(0.75)], cost="flops")
    patches, scale = model.patches(views), float(model.direction.square().sum())
    spread = patches.var(dim=1).sum(dim=1).mean()  # over the 16 patches of an image, with N - 1
    assert report.base_norm2 == pytest.approx(scale * float(patches.mean(dim=(0, 1)).square().sum()), rel=1e-4)
    assert report[Strategy()].variance == pytest.approx(0.0, abs=1e-6 * report.base_norm2)
    for strategy, kept in ((HALF, 8), (Strategy(0.75), 4)):
        measured = report[strategy]
        variance = scale * float(spread) * (1 - kept / 16) / kept / len(views)
        assert measured.variance == pytest.approx(variance, rel=0.05)
        low, high = measured.bias2_interval
        assert low <= 0.0 <= high
        assert abs(measured.bias2) < 0.05 * variance
        assert (high - low) / 2 < 0.05 * variance


def test_patch_scaling_has_the_bias_of_the_gradients_difference_and_no_variance() -> None:
    model, views = _MeanOfPatches(), torch.randn(3, 3, 16, 16)
    gradients = {}
    for strategy in (Strategy(), Strategy(0.0, 8)):
        compress(model.vit, strategy)
        (gradients[strategy],) = torch.autograd.grad(model.loss(views), [model.vit.patch_embed.proj.weight])
    restore(model.vit)
    first, second = gradients.values()
    report = gradient_error(model.vit, model.loss, [views] * 3, gradients, cost="flops")
    expected = float((first - second).double().square().sum())
    measured = report[Strategy(0.0, 8)]
    assert measured.bias2 == pytest.approx(expected, rel=1e-5)
    assert measured.bias2_interval == pytest.approx((expected, expected), rel=1e-5)
    assert measured.variance == pytest.approx(0.0, abs=1e-6 * report.base_norm2)
    assert measured.relative_ca_mse == pytest.approx(expected / report.base_norm2, rel=1e-4)


def test_variance_between_batches_is_found_as_well() -> None:
    model = _MeanOfPatches()
    batches = [torch.randn(2, 3, 16, 16) + 0.5 for _ in range(200)]
    report = gradient_error(model.vit, model.loss, batches, [HALF], cost="flops")
    scale = float(model.direction.square().sum())
    for strategy, kept in ((Strategy(), 16), (HALF, 8)):  # means of independent patches, of 48 pixels each
        assert report[strategy].variance == pytest.approx(scale * 48 / (2 * kept), rel=0.1)
    assert report.base_norm2 == pytest.approx(scale * 48 * 0.25, rel=0.05)


def test_the_base_is_measured_listed_or_not_and_named_in_any_way(tiny_vit: Any) -> None:
    vit = tiny_vit()
    report = gradient_error(vit, _loss_of(vit), _loader(), [Strategy(0.0, 8), HALF, Strategy(0.5, 8)], cost="flops")
    assert report.strategies == (Strategy(), HALF)
    base = report[Strategy()]
    assert (base.bias2, base.bias2_interval, base.cost) == (0.0, (0.0, 0.0), 1.0)
    assert report[Strategy(0.0, 8)] == base
    assert report[Strategy(0.5, 8)] == report[HALF]
    assert (report.num_batches, report.complete, report.level) == (4, True, 0.95)


class _OfSmallSize(VisionTransformer):
    def __init__(self) -> None:
        super().__init__(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)


class _Doubled(_OfSmallSize):
    def _pos_embed(self, x: Tensor) -> Tensor:
        return super()._pos_embed(2 * x)


class _BatchSizeOfTheImages(_OfSmallSize):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        batch = x.shape[0]
        x = self.patch_embed(x)
        return self.norm(self.blocks(torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1) + self.pos_embed))


@pytest.mark.parametrize("place", ["model", "teacher"])
def test_a_model_that_compress_refuses_is_not_measured_either(place: str, tiny_vit: Any) -> None:
    models = {"model": tiny_vit().train(), "teacher": tiny_vit().train(), place: _Doubled().train()}
    with pytest.raises(TypeError, match=f"{place} must be a supported ViT, got a _Doubled whose tokens would not be"):
        gradient_error(
            models["model"],
            lambda views: models["model"](views).square().mean(),
            torch.randn(2, 2, 3, 32, 32).unbind(),
            [Strategy(0.5)],
            teacher=models["teacher"],
        )
    for model in models.values():
        assert not is_compressed(model)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_needs_a_blank_for_each_view_is_measured_compressed_or_not() -> None:
    vit, batches, reports = _BatchSizeOfTheImages().train(), torch.randn(3, 4, 3, 32, 32).unbind(), []
    for compressed in (False, True):
        if compressed:
            compress(vit, Strategy())
        reports.append(gradient_error(vit, lambda views: vit(views).square().mean(), batches, [Strategy(0.5)]))
    one, other = (report[Strategy(0.5)] for report in reports)
    assert one.variance > 0
    assert (one.bias2, one.variance) == pytest.approx((other.bias2, other.variance))


def test_the_same_seed_gives_the_same_report_and_another_seed_another(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader()
    reports = [gradient_error(vit, _loss_of(vit), batches, [HALF, BOTH], cost="flops", seed=seed) for seed in (1, 1, 2)]
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]


def test_every_strategy_sees_the_same_views_even_between_two_forwards(tiny_vit: Any) -> None:
    vit, seen = tiny_vit(), SimpleQueue[Any]()  # not a list: that would be put back

    def step(batch: Tensor) -> Tensor:
        draws = []
        loss = torch.zeros(())
        for _ in range(2):
            draws += [torch.rand(1).item(), np.random.rand(), random.random()]
            loss = loss + vit(batch + torch.randn_like(batch)).square().mean()
        seen.put((get_strategy(vit), draws))
        return loss

    gradient_error(vit, step, _loader(3), [HALF, BOTH, LARGE], cost="flops")
    everything = [seen.get() for _ in range(seen.qsize())]
    draws = [tuple(drawn) for _, drawn in everything]
    assert {strategy for strategy, _ in everything} == {Strategy(), HALF, BOTH, LARGE}
    assert len(set(draws)) == 3  # one a batch, whatever the strategy
    assert len(set(draws[0])) == 6


def test_gradient_checkpointing_sees_the_same_tokens_twice(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader(3)

    def checkpointed(batch: Tensor) -> Tensor:
        tokens: Tensor = checkpoint(vit, batch, use_reentrant=False)
        return tokens.sin().mean()

    plain, twice = (gradient_error(vit, step, batches, [HALF], cost="flops") for step in (_loss_of(vit), checkpointed))
    assert twice[HALF].bias2 == pytest.approx(plain[HALF].bias2, rel=1e-4)


def test_a_teacher_scales_patches_and_drops_nothing(tiny_vit: Any) -> None:
    student = tiny_vit()
    teacher = copy.deepcopy(student).requires_grad_(False)
    seen = SimpleQueue[tuple[Strategy, int]]()
    for vit in (student, teacher):
        vit.blocks[0].register_forward_pre_hook(lambda block, args: seen.put((get_strategy(student), args[0].shape[1])))

    def step(batch: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(batch)
        return (student(batch) - target).square().mean()

    report = gradient_error(student, step, _loader(), [HALF, BOTH], teacher=teacher, cost="flops")
    assert {seen.get() for _ in range(seen.qsize())} == {
        *((Strategy(), 17), (HALF, 9), (HALF, 17), (BOTH, 3), (BOTH, 5))
    }
    assert not is_compressed(student)
    assert not is_compressed(teacher)
    # of 4 equal parts a view, the student's forward and backward are 3: dropout acts on these only
    assert 0.25 < report[HALF].cost < 0.75
    assert report[BOTH].cost < report[HALF].cost


def test_cost_in_flops_counts_three_for_the_student_and_one_for_the_teacher(tiny_vit: Any) -> None:
    from seqcompress import relative_cost

    student = tiny_vit()
    teacher = copy.deepcopy(student).requires_grad_(False)

    def step(batch: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(batch)
        return (student(batch) - target).square().mean()

    report = gradient_error(student, step, _loader(3), [HALF, BOTH], teacher=teacher, cost="flops")
    half, both, large = (relative_cost(student, strategy, 32) for strategy in (HALF, BOTH, LARGE))
    assert report[HALF].cost == pytest.approx((3 * half + 1) / 4)
    assert report[BOTH].cost == pytest.approx((3 * both + large) / 4)
    assert report[HALF].cost_interval == pytest.approx((report[HALF].cost,) * 2)
    assert report.cost_kind == "flops"


def test_measured_cost_is_the_time_of_the_whole_step_with_what_completes_it(monkeypatch: Any, tiny_vit: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr("seqcompress.gradients.running.time.perf_counter", lambda: clock[0])
    vit = tiny_vit()

    def step(batch: Tensor) -> Tensor:
        clock[0] += 5.0 if get_strategy(vit) == HALF else 9.0
        return vit(batch).square().mean()

    def after_backward() -> None:
        clock[0] += 1.0

    report = gradient_error(vit, step, _loader(3), [HALF], after_backward=after_backward)
    assert (report.cost_kind, report[HALF].cost, report[Strategy()].cost) == ("measured", 0.6, 1.0)
    assert report[HALF].ca_mse == report[HALF].bias2 + 0.6 * report[HALF].variance


def test_a_shorter_sequence_is_measured_to_be_cheaper(tiny_vit: Any) -> None:
    vit = tiny_vit(img_size=128, embed_dim=64)  # 257 tokens
    strong = Strategy(0.9)
    report = gradient_error(vit, _loss_of(vit), _loader(5, 128, 8), [strong])
    assert report[strong].cost < 0.6


class _Method(nn.Module):
    """What a method of self-supervised learning may keep: batch norm, a queue, centres, counters, an EMA teacher."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.backbone = vit
        self.teacher = copy.deepcopy(vit).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long), persistent=False)
        self.queue = [torch.randn(8) for _ in range(3)]
        self.bank = torch.randn(5, 8)
        self.steps = 0
        self.history: dict[str, Any] = {"losses": []}
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, parameter in zip(self.teacher.parameters(), self.backbone.parameters(), strict=True):
                mean.data = 0.9 * mean.data + 0.1 * parameter.data
            target = self.head(self.teacher(batch))
            self.centre.mul_(0.9).add_(target.mean(dim=0))
            self.pointer += 1
            self.queue.append(target[0])
            self.bank[0] = target[0]
        noise = torch.randn(8, generator=self.generator)
        self.steps += 1
        self.teacher.eval()
        self.new_attribute = batch
        loss = F.mse_loss(self.head(self.backbone(batch)) + noise, target - self.centre)
        self.history["losses"].append(loss.detach())
        return loss


def _state_of(module: nn.Module) -> list[Any]:
    """Everything about a module that could be compared."""
    state: list[Any] = []
    for name, child in module.named_modules():
        state.append((name, type(child), sorted(set(vars(child)) - {"forward_counts"}), child.training))
        for values in (child._parameters, child._buffers):
            for key, value in values.items():
                if value is not None:
                    grad = None if value.grad is None else value.grad.tolist()
                    state.append((key, id(value), value.data_ptr(), value.tolist(), value.requires_grad, grad))
    for name in ("queue", "bank", "history", "steps"):
        value = getattr(module, name, None)
        state.append((name, id(value) if name != "steps" else value, repr(value)))
    if hasattr(module, "generator"):
        state.append(module.generator.get_state().tolist())
    return state


def _random_states() -> list[Any]:
    numpy_state = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), repr(numpy_state), torch.initial_seed()]


def _interrupting(method: _Method, error: BaseException, after: int) -> Callable[[Tensor], Tensor]:
    calls = SimpleQueue[None]()

    def step(batch: Tensor) -> Tensor:
        batch.mul_(2)
        loss = method.training_step(batch)
        calls.put(None)
        if calls.qsize() > after:
            raise error
        return loss

    return step


@pytest.mark.parametrize("ending", ["well", "error", "early interrupt", "late interrupt"])
@pytest.mark.parametrize("compressed", [False, True])
def test_everything_is_as_before_however_it_ends(ending: str, compressed: bool, tiny_vit: Any) -> None:
    method = _Method(tiny_vit(drop_path_rate=0.1))
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.1)
    rate = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    if compressed:
        compress(method.backbone, Linear(Strategy(0.75), Strategy()), teacher=method.teacher)
    method.training_step(torch.randn(4, 3, 32, 32)).backward()
    optimizer.step()
    parameters = list(method.parameters())

    def finish() -> None:
        nn.utils.clip_grad_norm_(parameters, 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()

    step: Callable[[Tensor], Tensor] = method.training_step
    if ending != "well":
        error = RuntimeError("no") if ending == "error" else KeyboardInterrupt()
        step = _interrupting(method, error, after=20 if ending == "late interrupt" else 6)
    model = method if compressed else method.backbone
    teacher = None if compressed else method.teacher
    batches = _loader(5)
    before = _state_of(method), copy.deepcopy(optimizer.state_dict()), rate.state_dict(), _random_states()
    values = [batch.clone() for batch in batches]
    run = functools.partial(
        gradient_error, model, step, iter(batches), [HALF, BOTH], teacher=teacher, after_backward=finish
    )
    if ending == "error":
        with pytest.raises(RuntimeError, match="no"):
            run()
    elif ending == "early interrupt":
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        assert run().complete == (ending == "well")
    after = _state_of(method), optimizer.state_dict(), rate.state_dict(), _random_states()
    assert after[0] == before[0]
    assert repr(after[1]) == repr(before[1])
    assert after[2:] == before[2:]
    assert all(map(torch.equal, batches, values))
    assert is_compressed(method.backbone) == compressed


def test_after_an_interrupt_there_is_what_the_complete_batches_said(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader(6)
    calls = SimpleQueue[None]()

    def step(batch: Tensor) -> Tensor:
        calls.put(None)
        if calls.qsize() > 11:  # a warm-up, three batches of three, and the base of the fourth
            raise KeyboardInterrupt
        return _loss_of(vit)(batch)

    stopped = gradient_error(vit, step, batches, [HALF, BOTH], cost="flops")
    short = gradient_error(vit, _loss_of(vit), batches[:3], [HALF, BOTH], cost="flops")
    assert not stopped.complete
    assert stopped.num_batches == 3
    assert stopped.entries == short.entries
    assert "3 batches, interrupted" in str(stopped)


def test_a_compressed_model_keeps_plan_strategy_tally_and_random_stream(tiny_vit: Any, first_tokens: Any) -> None:
    drawn = []
    for analysed in (False, True):
        torch.manual_seed(5)
        vit = compress(tiny_vit(), Linear(Strategy(0.75), Strategy()), when="train")
        scheduler, budget = SequenceScheduler(vit, total_steps=10), Budget(vit)
        scheduler.step(4)
        views = torch.randn(2, 3, 32, 32)
        vit(views)
        units, tally = budget.units, vit.patch_embed.forward_counts
        if analysed:
            gradient_error(vit, _loss_of(vit), _loader_of(views), [HALF], cost="flops")
        assert scheduler.is_current
        assert budget.units == units
        assert vit.patch_embed.forward_counts is tally
        assert get_strategy(vit) == scheduler.strategy
        assert vit.patch_embed.when == "train"
        assert vit.patch_embed.compression.plan == scheduler.schedule
        drawn.append(first_tokens(vit, views))
    assert torch.equal(*drawn)


def _loader_of(views: Tensor) -> list[Tensor]:
    return [views, views + 1, views - 1]


def test_a_module_of_a_framework_is_measured_with_its_heads(tiny_vit: Any) -> None:
    method = accelerate(_Method(tiny_vit(global_pool="avg")), HALF)
    report = gradient_error(method, method.training_step, _loader(), [HALF], cost="flops")
    backbone_only = gradient_error(method.backbone, method.training_step, _loader(), [HALF], cost="flops")
    assert report[Strategy()].variance > backbone_only[Strategy()].variance
    assert get_strategy(method) == HALF


def test_what_a_step_keeps_elsewhere_is_protected_if_it_is_named(tiny_vit: Any) -> None:
    vit, queue = tiny_vit(), threading.local()  # an object of Python's own is not looked into
    queue.keys = torch.zeros(4, 32)

    def step(batch: Tensor) -> Tensor:
        features = vit(batch)
        loss = (features - queue.keys).square().mean()
        queue.keys.copy_(5 * features.detach())
        return loss

    with pytest.warns(UserWarning, match="not reproducible: .* protect="):
        gradient_error(vit, step, _loader(), [HALF], cost="flops")
    queue.keys.zero_()
    gradient_error(vit, step, _loader(), [HALF], cost="flops", protect=queue)
    assert queue.keys.abs().max() == 0


def test_the_object_that_a_step_is_a_method_of_is_put_back(tiny_vit: Any) -> None:
    class Training:
        def __init__(self) -> None:
            self.vit = tiny_vit()
            self.keys, self.steps = torch.zeros(4, 32), 0

        def loss(self, batch: Tensor) -> Tensor:
            features = self.vit(batch)
            loss = (features - self.keys).square().mean()
            self.keys, self.steps = 5 * features.detach(), self.steps + 1
            return loss

    training = Training()
    keys = training.keys
    gradient_error(training.vit, training.loss, _loader(), [HALF], cost="flops")
    assert training.keys is keys
    assert training.steps == 0
    assert keys.abs().max() == 0


def test_generators_of_ones_own_give_the_same_views_under_every_strategy(tiny_vit: Any) -> None:
    vit = tiny_vit()
    nothing_dropped = Strategy(1e-6)
    torch_generator, numpy_generator, python_generator = (
        torch.Generator().manual_seed(1),
        np.random.default_rng(2),
        random.Random(3),
    )
    before = torch_generator.get_state(), numpy_generator.bit_generator.state, python_generator.getstate()
    noises = SimpleQueue[float]()

    def step(batch: Tensor) -> Tensor:
        scale = numpy_generator.random() + python_generator.random()
        noises.put(scale)
        return vit(batch + scale * torch.randn(batch.shape, generator=torch_generator)).square().mean()

    report = gradient_error(vit, step, _loader(), [nothing_dropped], cost="flops")
    assert report[nothing_dropped].bias2 == 0
    assert (
        len({noises.get() for _ in range(noises.qsize())}) == report.num_batches
    )  # another one for each batch, the same for every strategy
    assert torch.equal(torch_generator.get_state(), before[0])
    assert (numpy_generator.bit_generator.state, python_generator.getstate()) == before[1:]


def test_modules_are_found_in_closures_partials_and_the_functions_that_are_called(tiny_vit: Any) -> None:
    vit = tiny_vit()
    norms = [nn.BatchNorm1d(32, momentum=0.5) for _ in range(3)]
    by_name = {"third": norms[2]}

    def helper(features: Tensor) -> Tensor:
        return by_name["third"](norms[0](features))

    def step(norm: nn.Module, batch: Tensor) -> Tensor:
        return helper(norm(vit(batch))).abs().mean()

    gradient_error(vit, functools.partial(step, norms[1]), _loader(), [HALF], cost="flops")
    assert all(norm.num_batches_tracked == 0 and norm.weight.grad is None for norm in norms)


def test_batches_are_drawn_one_at_a_time_in_their_own_random_state(tiny_vit: Any) -> None:
    vit, alive, drawn = tiny_vit(), [], []

    class Batch:
        def __init__(self, views: Tensor) -> None:
            self.views = views

    def batches() -> Iterator[Batch]:
        for _ in range(4):
            assert not any(reference() for reference in alive)
            batch = Batch(torch.randn(4, 3, 32, 32))
            alive.extend([weakref.ref(batch), weakref.ref(batch.views)])
            drawn.append(batch.views.sum().item())
            yield batch
            del batch

    torch.manual_seed(11)
    gradient_error(vit, lambda batch: _loss_of(vit)(batch.views), batches(), [HALF], cost="flops")
    torch.manual_seed(11)
    assert drawn == [torch.randn(4, 3, 32, 32).sum().item() for _ in range(4)]


def test_a_parameter_without_gradient_counts_as_zero(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader()
    plain = gradient_error(vit, _loss_of(vit), batches, [HALF], cost="flops")
    vit.unused = nn.Parameter(torch.ones(1000))
    more = gradient_error(vit, _loss_of(vit), batches, [HALF], cost="flops")
    assert more.base_norm2 == pytest.approx(plain.base_norm2, rel=1e-6)
    assert more[HALF].ca_mse == pytest.approx(plain[HALF].ca_mse, rel=1e-6)


def test_what_follows_the_backward_pass_may_change_gradients_in_place(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(embed_dim=64), _loader()  # large enough for sums that are kept apart from sketches
    after_backward = functools.partial(nn.utils.clip_grad_norm_, list(vit.parameters()), 1e-6)
    clipped = gradient_error(vit, _loss_of(vit), batches, [HALF], after_backward=after_backward)
    plain = gradient_error(vit, _loss_of(vit), batches, [HALF])
    for strategy in (Strategy(), HALF):
        assert clipped[strategy].bias2 == plain[strategy].bias2
        assert clipped[strategy].variance == plain[strategy].variance


def test_frozen_parameters_do_not_count(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader()
    every = gradient_error(vit, _loss_of(vit), batches, [], cost="flops")
    vit.blocks.requires_grad_(False)
    some = gradient_error(vit, _loss_of(vit), batches, [], cost="flops")
    assert some[Strategy()].variance < every[Strategy()].variance


def test_sketches_alone_keep_to_their_stated_error(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader(5)
    exact, sketched = (
        gradient_error(vit, _loss_of(vit), batches, [HALF], cost="flops", sketch=sketch) for sketch in (None, 8192)
    )
    assert exact.sketch_error == 0.0
    assert sketched.sketch_error == pytest.approx(1 / 64)
    assert sketched[HALF].variance == pytest.approx(exact[HALF].variance, rel=0.1)
    assert sketched.base_norm2 == pytest.approx(exact.base_norm2, rel=0.1)
    assert gradient_error(vit, _loss_of(vit), batches, [HALF], cost="flops", sketch=10**6).sketch_error == 0.0


def test_eval_mode_is_refused(tiny_vit: Any) -> None:
    vit = tiny_vit().eval()
    with pytest.raises(ValueError, match="model must be in train mode"):
        gradient_error(vit, _loss_of(vit), _loader(), [HALF])
    with pytest.raises(ValueError, match="model must be in train mode"):
        gradient_error(compress(vit, HALF), _loss_of(vit), _loader(), [HALF])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda loss: loss * torch.nan, r"step on batch 1 under drop 0\.5 must return a finite loss, got nan"),
        (lambda loss: loss.detach(), r"batch 1 under drop 0\.5 must return a loss that can be differentiated"),
        (lambda loss: loss.expand(2), r"batch 1 under drop 0\.5 must return a scalar loss, got shape \(2,\)"),
        (lambda loss: None, r"batch 1 under drop 0\.5 must return a scalar loss, got None"),
        (lambda loss: (loss * 0).sqrt(), r"batch 1 under drop 0\.5 must give a finite gradient"),
    ],
)
def test_a_bad_loss_is_an_error_that_names_strategy_and_batch(bad: Any, message: str, tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader()

    def step(batch: Tensor) -> Tensor:
        loss = _loss_of(vit)(batch)
        return bad(loss) if batch is batches[1] and get_strategy(vit) == HALF else loss

    before = _state_of(vit)
    with pytest.raises(ValueError, match=message):
        gradient_error(vit, step, batches, [HALF], cost="flops")
    assert _state_of(vit) == before
    assert not is_compressed(vit)


def test_a_step_that_does_not_use_the_model_is_refused(tiny_vit: Any) -> None:
    vit, other = tiny_vit(), tiny_vit()
    with pytest.raises(ValueError, match="did not pass through it"):
        gradient_error(vit, _loss_of(other), _loader(), [HALF])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batches": _loader(1)}, ValueError, "batches must be at least 2, got 1"),
        ({"batches": []}, ValueError, "batches must be at least 2, got 0"),
        ({"batches": 3}, TypeError, "batches must be an iterable, got 3"),
        ({"step": None}, TypeError, "step must be a function, got None"),
        ({"after_backward": 1}, TypeError, "after_backward must be a function, got 1"),
        ({"strategies": HALF}, TypeError, "strategies must be several"),
        ({"strategies": [0.5]}, TypeError, "strategies must be of type Strategy, got 0.5"),
        ({"strategies": [Strategy(0.0, 64)]}, ValueError, "strategies: patch 64 does not suit the model"),
        ({"cost": "time"}, ValueError, "cost must be 'measured' or 'flops', got 'time'"),
        ({"sketch": 1}, ValueError, "sketch must be at least 2, got 1"),
        ({"sketch": 2.5}, TypeError, "sketch must be a whole number or None, got 2.5"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a supported ViT"),
        ({"teacher": nn.Linear(2, 2)}, TypeError, "teacher must be a supported ViT"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_vit: Any
) -> None:
    vit = tiny_vit()
    arguments = {"model": vit, "step": _loss_of(vit), "batches": _loader(), "strategies": [HALF], **changes}
    positional = [arguments.pop(name) for name in ("model", "step", "batches", "strategies")]
    with pytest.raises(error, match=message):
        gradient_error(*positional, **arguments)
    assert not is_compressed(vit)


def test_whole_numbers_of_numpy_are_whole_numbers(tiny_vit: Any) -> None:
    vit, batches = tiny_vit(), _loader()
    reports = [
        gradient_error(vit, _loss_of(vit), batches, [HALF], cost="flops", seed=kind(1), sketch=kind(64))
        for kind in (int, np.int64)
    ]
    assert reports[0] == reports[1]


def test_two_batches_give_estimates_without_intervals(tiny_vit: Any) -> None:
    vit = tiny_vit()
    report = gradient_error(vit, _loss_of(vit), _loader(2), [HALF], cost="flops")
    assert report[HALF].variance > 0
    assert report[HALF].variance_interval == (-float("inf"), float("inf"))
    assert set(report.tied()) == {Strategy(), HALF}
    assert GradientErrorReport.from_json(report.to_json()) == report


def test_a_teacher_of_another_kind_is_refused_as_compress_does(tiny_vit: Any) -> None:
    student, teacher = tiny_vit(), tiny_vit(patch_size=4)
    with pytest.raises(ValueError, match="teacher must have the patch size of model, 8 x 8 px, got 4 x 4 px"):
        gradient_error(student, _loss_of(student), _loader(2), [HALF], teacher=teacher, cost="flops")


def test_a_model_compressed_with_another_teacher_gets_it_back(tiny_vit: Any) -> None:
    student, old, new = tiny_vit(), tiny_vit(), tiny_vit()
    compress(student, BOTH, teacher=old)
    gradient_error(student, _loss_of(student), _loader(), [HALF], teacher=new, cost="flops")
    assert (get_strategy(student), get_strategy(old), is_compressed(new)) == (BOTH, LARGE, False)
    assert student.patch_embed.compression is old.patch_embed.compression
    assert student.patch_embed.compression.plan == Constant(BOTH)


def test_a_progress_bar_is_shown_on_demand(tiny_vit: Any, capsys: Any) -> None:
    vit = tiny_vit()
    for shown in (None, True):
        gradient_error(vit, _loss_of(vit), _loader(), [HALF], cost="flops", progress=shown)
        assert ("4/4" in capsys.readouterr().err) == bool(shown)


POINTER, CENTRE = 0, torch.zeros(4, 32)


def _enqueue(features: Tensor) -> None:
    global POINTER, CENTRE, NEW
    POINTER += 1
    CENTRE = CENTRE + features
    NEW = features  # type: ignore[name-defined]


def test_names_that_a_step_binds_anew_are_put_back_in_closures_and_among_globals(tiny_vit: Any) -> None:
    vit, queue, steps, keys = tiny_vit(), torch.zeros(4, 32), 0, torch.zeros(3)
    first, centre = queue, CENTRE

    def step(batch: Tensor) -> Tensor:
        nonlocal queue, steps
        features = vit(batch)
        loss = (features - queue - CENTRE + steps + POINTER).square().mean()
        queue, steps = queue + features.detach(), steps + 1
        keys.add_(1)
        _enqueue(features.detach())
        return loss

    gradient_error(vit, step, _loader(), [HALF], cost="flops")
    assert (queue is first, steps, POINTER, CENTRE is centre) == (True, 0, 0, True)
    assert "NEW" not in globals()
    assert [float(each.abs().max()) for each in (queue, keys, CENTRE)] == [0.0, 0.0, 0.0]


def test_objects_of_ones_own_are_put_back_several_deep(tiny_vit: Any) -> None:
    class Queue:
        __slots__ = ("keys",)
        updates = 0

        def __init__(self) -> None:
            self.keys = [torch.zeros(4, 32)]

    class Algorithm:
        def __init__(self) -> None:
            self.queue, self.pointer = Queue(), 0

    class Runner:
        def __init__(self) -> None:
            self.vit, self.algorithm = tiny_vit(), Algorithm()

        def loss(self, batch: Tensor) -> Tensor:
            features = self.vit(batch)
            self.algorithm.pointer += 1
            Queue.updates += 1
            self.algorithm.queue.keys[0].add_(1)
            self.algorithm.queue.keys = [*self.algorithm.queue.keys, features.detach()]
            return features.square().mean()

    runner = Runner()
    keys = runner.algorithm.queue.keys
    gradient_error(runner.vit, lambda batch: runner.loss(batch) + 0 * Queue.updates, _loader(), [HALF], cost="flops")
    assert (runner.algorithm.pointer, Queue.updates) == (0, 0)
    assert runner.algorithm.queue.keys is keys
    assert (len(keys), float(keys[0].abs().max())) == (1, 0.0)


class _Singleton(type):
    made: dict[type, Any] = {}

    def __call__(cls) -> Any:
        return _Singleton.made.setdefault(cls, super().__call__())


class _Bank(metaclass=_Singleton):
    def __init__(self) -> None:
        self.keys = torch.zeros(4, 32)


class _Push:
    """Changes a global name in a method of an object that a step only makes, two methods down."""

    newest = 0

    def __init__(self, features: Tensor) -> None:
        self._features = features

    def go(self) -> None:
        self._through(self._features)

    @staticmethod
    def _through(features: Tensor) -> None:
        _enqueue(features)
        _Push.newest += 1
        _Push.seen = True  # type: ignore[attr-defined]
        _Bank().keys = _Bank().keys + 1


class _Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _enqueue(gradients[0])
        return gradients[0]


class _Runner:
    """Reaches its state only through methods that call methods, a property, and a name that it looks up."""

    kept: Any = ()

    def __init__(self, vit: nn.Module) -> None:
        self.vit = vit

    def loss(self, batch: Tensor) -> Tensor:
        return self._first(self.vit(batch))

    def _first(self, features: Tensor) -> Tensor:
        return getattr(self, "_second")(features)  # noqa: B009 - as scripts choose a loss by its name

    def _second(self, features: Tensor) -> Tensor:
        self.centre = self.centre + features.detach()
        type(self).kept = (*self.kept, 1)
        return features.square().mean()

    @property
    def centre(self) -> Tensor:
        return CENTRE

    @centre.setter
    def centre(self, value: Tensor) -> None:
        global CENTRE
        CENTRE = value


def test_state_that_only_methods_and_classes_lead_to_is_put_back(tiny_vit: Any) -> None:
    runner, keys, centre = _Runner(tiny_vit()), _Bank().keys, CENTRE

    def step(batch: Tensor) -> Tensor:
        loss = runner.loss(batch)
        _Push(_Counting.apply(runner.vit(batch)).detach()).go()
        return loss

    gradient_error(runner.vit, step, _loader(), [HALF], cost="flops")
    assert (POINTER, CENTRE is centre, "NEW" in globals()) == (0, True, False)
    assert (_Runner.kept, _Push.newest, hasattr(_Push, "seen")) == ((), 0, False)
    assert _Bank().keys is keys


def test_what_a_backward_function_of_ones_own_changes_is_put_back(tiny_vit: Any) -> None:
    vit = tiny_vit()
    gradient_error(vit, lambda batch: _Counting.apply(vit(batch)).sin().mean(), _loader(), [HALF], cost="flops")
    assert (POINTER, "NEW" in globals()) == (0, False)


def test_state_in_caches_functions_tensors_contexts_and_behind_weak_references_is_put_back(tiny_vit: Any) -> None:
    vit, bytes_seen, numbers, layers = tiny_vit(), bytearray(1), array.array("d", [0.0]), ChainMap[str, int]({"n": 0})
    weight, context = next(vit.parameters()), contextvars.ContextVar("keys", default=0)
    context.set(0)
    holders = [_Runner(vit), _Runner(vit)]
    for holder in holders:
        holder.steps = 0  # type: ignore[attr-defined]
    reference, proxy = weakref.ref(holders[0]), weakref.proxy(holders[1])
    by_key = weakref.WeakKeyDictionary({holders[0]: 0})
    newest: deque[Tensor] = deque(maxlen=2)
    push = newest.append
    weight.seen = 0

    @functools.lru_cache
    def bank(size: int) -> Tensor:
        return torch.zeros(size)

    @functools.cache
    def state() -> dict[str, int]:
        return {"steps": 0}

    bank(3), state()

    def step(batch: Tensor) -> Tensor:
        push(batch.mean())
        bank(3).add_(1)
        state()["steps"] += 1
        step.calls += 1  # type: ignore[attr-defined]
        weight.seen += 1
        context.set(context.get() + 1)
        reference().steps += 1  # type: ignore[union-attr]
        proxy.steps += 1
        by_key[holders[0]] += 1
        bytes_seen[0] += 1
        numbers[0] += 1
        layers["n"] += 1
        from sys import modules  # noqa: F401 - of a host, so it is not looked into

        return vit(batch).square().mean()

    step.calls = 0  # type: ignore[attr-defined]
    gradient_error(vit, step, _loader(), [HALF], cost="flops")
    assert (len(newest), float(bank(3).sum()), state()["steps"], bank.cache_info().currsize) == (0, 0.0, 0, 1)
    assert (step.calls, weight.seen, context.get()) == (0, 0, 0)  # type: ignore[attr-defined]
    assert [holder.steps for holder in holders] == [0, 0]  # type: ignore[attr-defined]
    assert (by_key[holders[0]], bytes_seen[0], numbers[0], layers["n"]) == (0, 0, 0.0, 0)


def test_state_of_a_module_that_is_imported_within_the_step_is_put_back(
    tiny_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "banks_of_a_script.py").write_text("count = 0\ndef push():\n    global count\n    count += 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module, vit = importlib.import_module("banks_of_a_script"), tiny_vit()

    def step(batch: Tensor) -> Tensor:
        from banks_of_a_script import push  # type: ignore[import-not-found]

        push()
        return vit(batch).square().mean()

    gradient_error(vit, step, _loader(), [HALF], cost="flops")
    assert module.count == 0


def test_an_object_that_lies_too_deep_is_named(tiny_vit: Any) -> None:
    class Part:
        inner: Any
        steps = 0

    vit, deepest = tiny_vit(), Part()
    outermost: Any = deepest
    for _ in range(8):
        part = Part()
        part.inner, outermost = outermost, part

    def step(batch: Tensor) -> Tensor:
        part = outermost
        while hasattr(part, "inner"):
            part = part.inner
        part.steps += 1
        return vit(batch).square().mean()

    with pytest.warns(UserWarning, match=r"cannot put back: outermost(\.inner){8}\. "):
        gradient_error(vit, step, _loader(), [HALF], cost="flops")
    assert deepest.steps > 0


def test_what_cannot_be_put_back_is_named_once(tiny_vit: Any) -> None:
    vit, noises, loader = tiny_vit(), iter(range(1000)), (number for number in range(1000))

    def step(batch: Tensor) -> Tensor:
        return vit(batch).square().mean() + 0 * next(noises) + 0 * next(loader)

    with pytest.warns(UserWarning, match="cannot put back") as caught:
        gradient_error(vit, step, _loader(), [HALF], cost="flops")
    assert [str(each.message).split(". ")[0] for each in caught] == [
        "measuring has changed what it cannot put back: loader, noises"
    ]


def test_the_batches_own_generator_is_put_back(tiny_vit: Any) -> None:
    vit, generator = tiny_vit(), torch.Generator().manual_seed(7)
    loader = DataLoader(torch.randn(8, 3, 32, 32), batch_size=2, shuffle=True, generator=generator)
    before = generator.get_state()
    reports = [gradient_error(vit, _loss_of(vit), loader, [HALF], cost="flops") for _ in range(2)]
    assert torch.equal(generator.get_state(), before)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("taken_by", ["islice", "map", "generator expression"])
def test_the_generator_of_a_loader_behind_an_iterator_is_put_back(taken_by: str, tiny_vit: Any) -> None:
    vit, generator = tiny_vit(), torch.Generator().manual_seed(7)
    loader = DataLoader(torch.randn(16, 3, 32, 32), batch_size=2, shuffle=True, generator=generator)
    batches: Iterator[Tensor] = {
        "islice": lambda: itertools.islice(loader, 3),
        "map": lambda: map(torch.clone, loader),
        "generator expression": lambda: (batch for _, batch in zip(range(3), loader, strict=False)),
    }[taken_by]()
    before = generator.get_state()
    gradient_error(vit, _loss_of(vit), batches, [HALF], cost="flops")
    assert torch.equal(generator.get_state(), before)


def test_an_optimizer_that_parameters_hold_themselves_is_put_back(tiny_vit: Any) -> None:
    vit = tiny_vit()
    _apply_optimizer_in_backward(torch.optim.SGD, vit.parameters(), {"lr": 0.1, "momentum": 0.9})
    _loss_of(vit)(_loader()[0]).backward()
    momenta = [each._in_backward_optimizers[0].state[each]["momentum_buffer"] for each in vit.blocks.parameters()]
    before = [each.clone() for each in momenta]
    with pytest.raises(ValueError, match=r"base must leave its gradients in \.grad, got 30 of 30 that were gone"):
        gradient_error(vit, _loss_of(vit), _loader(), [HALF], cost="flops")
    assert all(map(torch.equal, momenta, before))


class _LoadsWhatIsAskedFor(OrderedDict[str, Any]):
    """As transformers' maps of models, which import all of them."""

    def items(self) -> Any:
        raise ValueError("nobody asked for all of it")

    def __iter__(self) -> Any:
        raise ValueError("nobody asked for all of it")


class _Counts:
    loaded = _LoadsWhatIsAskedFor()

    def __call__(self, vit: nn.Module, views: Tensor) -> Tensor:
        self.loaded["views"] = len(views)
        return vit(views).square().mean()


def test_a_map_that_loads_what_it_is_asked_for_is_put_back_and_not_asked(tiny_vit: Any) -> None:
    vit, step = tiny_vit(), _Counts()
    gradient_error(vit, lambda batch: step(vit, batch), _loader(), [HALF], cost="flops")
    assert len(_Counts.loaded) == 0


def test_a_gradient_of_zeros_on_every_batch_is_an_error(tiny_vit: Any) -> None:
    vit = tiny_vit()
    for parameter in vit.parameters():  # as LOMO does it
        parameter.register_hook(torch.zeros_like)
    with pytest.raises(ValueError, match="must give model a gradient, got one of zeros under every strategy"):
        gradient_error(vit, _loss_of(vit), _loader(), [HALF], cost="flops")


def test_an_optimizer_that_steps_inside_the_backward_pass_is_an_error_and_is_put_back(tiny_vit: Any) -> None:
    vit = tiny_vit()
    optimizers = {each: torch.optim.SGD([each], lr=0.1, momentum=0.9) for each in vit.blocks.parameters()}

    def finish(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(finish)
    _loss_of(vit)(_loader()[0]).backward()
    weights = [each.clone() for each in optimizers]
    momenta = [each.state[parameter]["momentum_buffer"].clone() for parameter, each in optimizers.items()]
    with pytest.raises(ValueError, match=r"base must leave its gradients in \.grad, got 24 of 30 that were gone"):
        gradient_error(vit, _loss_of(vit), _loader(), [HALF], cost="flops")
    assert all(map(torch.equal, optimizers, weights))
    after = [each.state[parameter]["momentum_buffer"] for parameter, each in optimizers.items()]
    assert all(map(torch.equal, after, momenta))


def test_no_gradient_at_all_is_an_error_and_not_zero(tiny_vit: Any) -> None:
    vit, head = tiny_vit(), nn.Linear(32, 1)

    def step(batch: Tensor) -> Tensor:
        return head(vit(batch).detach()).mean()

    with pytest.raises(ValueError, match="must give model a gradient, got none on any of its parameters"):
        gradient_error(vit, step, _loader(), [HALF], cost="flops")


def test_a_step_that_calls_backward_itself_is_told_so(tiny_vit: Any) -> None:
    vit = tiny_vit()

    def step(batch: Tensor) -> Tensor:
        loss = _loss_of(vit)(batch)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="under base must leave the backward pass to the analysis"):
        gradient_error(vit, step, _loader(), [HALF], cost="flops")
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_gradients_that_lie_in_anothers_buckets_are_copied(tiny_vit: Any, tmp_path: Path) -> None:
    vit, batches = tiny_vit(embed_dim=64), _loader(4)  # large enough for sums that are kept apart from sketches
    plain = gradient_error(vit, _loss_of(vit), batches, [LARGE], cost="flops")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(vit, gradient_as_bucket_view=True)
        report = gradient_error(vit, _loss_of(parallel), batches, [LARGE], cost="flops")
    finally:
        dist.destroy_process_group()
    assert plain[LARGE].bias2 > 0
    assert report[LARGE].bias2 == pytest.approx(plain[LARGE].bias2, rel=1e-5)


def test_a_static_graph_is_refused_and_a_model_that_is_none_named(tiny_vit: Any, tmp_path: Path) -> None:
    vit = tiny_vit()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(vit, static_graph=True)
        with pytest.raises(ValueError, match="model must not be a DistributedDataParallel with static_graph=True"):
            gradient_error(parallel, _loss_of(parallel), _loader(4), [HALF], cost="flops")
    finally:
        dist.destroy_process_group()
    with pytest.raises(TypeError, match="model must be a supported ViT, got 'vit'"):
        gradient_error("vit", _loss_of(vit), _loader(4), [HALF])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be a whole number, got a VisionTransformer"):
        gradient_error(vit, _loss_of(vit), _loader(4), [HALF], seed=vit)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_leaves_no_trace_either(tiny_vit: Any) -> None:
    method = _Method(tiny_vit()).cuda()
    method.queue = [keys.cuda() for keys in method.queue]
    method.bank, method.generator = method.bank.cuda(), torch.Generator("cuda")
    compress(method.backbone, HALF, teacher=method.teacher)
    random_state = torch.cuda.get_rng_state()
    before = _state_of(method)

    def step(batch: Tensor) -> Tensor:
        noise = torch.randn_like(batch)
        return method.backbone(batch + noise).square().mean()

    report = gradient_error(method, step, [batch.cuda() for batch in _loader(4)], [HALF, BOTH])
    assert _state_of(method) == before
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert report[HALF].variance > 0
