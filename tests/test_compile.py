"""torch.compile: how often a schedule makes it compile, and that compiled models compute what eager ones do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from lightly.models.modules import MaskedVisionTransformerTIMM
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._guards import CompileContext

from seqcompress import (
    Cosine,
    Linear,
    OnlineScheduler,
    Schedule,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    num_tokens,
    rehearse,
)
from seqcompress.schedules import Constant

CONFIG = torch._dynamo.config
LIMIT = "recompile_limit" if hasattr(CONFIG, "recompile_limit") else "cache_size_limit"  # in torch 2.6
STRICT = {"fail_on_recompile_limit_hit": True} if hasattr(CONFIG, "fail_on_recompile_limit_hit") else {}
STEPS = 12
STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy(0.0, 16), 0.5: Strategy(0.5), 0.75: Strategy()})
EVERY_STEP = Linear(Strategy(0.9), Strategy())
BASE, DROPPED, SCALED = Constant(Strategy()), Constant(Strategy(0.5)), Constant(Strategy(0.0, 16))
CROPS = (6, 64), (18, 32)  # batch and side in pixels of two global and six local views of three images
VIEWS = ((2, 64),)


class Compiler:
    """A backend that counts the compilations of code with attention in it: of blocks."""

    def __init__(self, backend: str = "eager") -> None:
        self.backend = lookup_backend(backend)
        self._seen: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if any(node.target is F.scaled_dot_product_attention for node in graph.graph.nodes):
            self._seen.add(str(CompileContext.current_compile_id()))  # torch may call a backend twice for one
        return self.backend(graph, inputs)

    @property
    def compilations(self) -> int:
        return len(self._seen)


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    """Going on without compiling, once the limit is reached, is an error in the tests that use it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch({LIMIT: 8, **STRICT}):
        yield Compiler()
    torch._dynamo.reset()


def _compile_blocks(vit: Any, backend: Any, *, dynamic: bool = True) -> None:
    vit.blocks.compile(backend=backend, dynamic=dynamic)


def _train(model: Any, scheduler: SequenceScheduler, views: tuple[tuple[int, int], ...] = VIEWS) -> None:
    """One step on views of each batch and size."""
    for batch, side in views:
        model(torch.randn(batch, 3, side, side))[:, 0].sum().backward()
    scheduler.step()


def _validate(model: Any, batch: int) -> None:
    model.eval()
    with torch.no_grad():
        model(torch.randn(batch, 3, 64, 64))
    model.train()


def _lengths(vit: Any, plan: Schedule, views: tuple[tuple[int, int], ...] = VIEWS) -> set[int]:
    strategies = [plan(step / STEPS) for step in range(STEPS + 1)]
    return {num_tokens(vit, strategy, (side, side)) for strategy in strategies for _, side in views}


@pytest.fixture
def vit(tiny_vit: Any) -> Any:
    return tiny_vit(img_size=64, dynamic_img_size=True).train()


@pytest.fixture
def shallow(tiny_vit: Any) -> Any:
    """One block: compiling a whole model takes long enough."""
    return tiny_vit(img_size=64, dynamic_img_size=True, depth=1).train()


# The recipe: all blocks, dynamic


@pytest.mark.parametrize("views", [VIEWS, CROPS], ids=["one size", "crops"])
@pytest.mark.parametrize("plan", [BASE, DROPPED, SCALED, STAGES, EVERY_STEP, Cosine(Strategy(0.8, 16), Strategy())])
def test_blocks_are_compiled_once_for_all_lengths_and_batch_sizes(
    plan: Schedule, views: tuple[tuple[int, int], ...], vit: Any, compiler: Compiler
) -> None:
    scheduler = SequenceScheduler(compress(vit, plan), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    for _ in range(STEPS + 1):
        _train(vit, scheduler, views)
        assert compiler.compilations == 1


def test_student_and_teacher_bring_one_compilation_each_at_the_first_step(vit: Any, compiler: Compiler) -> None:
    teacher = copy.deepcopy(vit).requires_grad_(False)
    scheduler = SequenceScheduler(compress(vit, STAGES, teacher=teacher), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    _compile_blocks(teacher, compiler)
    for _ in range(STEPS + 1):
        with torch.no_grad():
            teacher(torch.randn(4, 3, 64, 64))
        _train(vit, scheduler, CROPS)
        assert compiler.compilations == 2


def test_validation_compiles_once_more_and_so_does_a_batch_of_one_image(vit: Any, compiler: Compiler) -> None:
    scheduler = SequenceScheduler(compress(vit, STAGES), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    counts = []
    for batch in (3, 5, 1):
        for _ in range(4):
            _train(vit, scheduler)
            _validate(vit, batch)
        counts.append(compiler.compilations)
    assert counts == [2, 2, 3]


def test_a_validation_before_the_first_step_leaves_nothing_to_compile_later(vit: Any, compiler: Compiler) -> None:
    scheduler = SequenceScheduler(compress(vit, EVERY_STEP), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    _validate(vit, 3)
    _train(vit, scheduler)
    first = compiler.compilations
    for _ in range(STEPS):
        _train(vit, scheduler)
        _validate(vit, 3)
    assert first == compiler.compilations == 2


@pytest.mark.parametrize("settings", [{"pos_embed": "none"}, {"pre_norm": True}, {"reg_tokens": 4}])
def test_models_without_positions_with_pre_norm_or_registers_compile_once_too(
    settings: dict[str, Any], tiny_vit: Any, compiler: Compiler
) -> None:
    vit = compress(tiny_vit(img_size=64, **settings), EVERY_STEP).train()
    scheduler = SequenceScheduler(vit, total_steps=STEPS)
    _compile_blocks(vit, compiler)
    for _ in range(STEPS + 1):
        _train(vit, scheduler)
    assert compiler.compilations == 1


def test_blocks_inside_lightlys_wrapper_compile_once_too(vit: Any, compiler: Compiler) -> None:
    wrapper = MaskedVisionTransformerTIMM(vit=vit).train()
    scheduler = SequenceScheduler(compress(wrapper, EVERY_STEP), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    for _ in range(STEPS + 1):
        wrapper(torch.randn(2, 3, 64, 64)).sum().backward()
        scheduler.step()
    assert compiler.compilations == 1


def test_gradient_checkpointing_needs_each_block_compiled_and_they_share_one_compilation(
    vit: Any, compiler: Compiler
) -> None:
    vit.set_grad_checkpointing(True)
    scheduler = SequenceScheduler(compress(vit, STAGES), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    _train(vit, scheduler)
    assert compiler.compilations == 0
    for block in vit.blocks:
        block.compile(backend=compiler, dynamic=True)
    for _ in range(STEPS):
        _train(vit, scheduler)
    assert compiler.compilations == 1


@pytest.mark.skipif(not STRICT, reason="torch 2.6 compiles some more there")
def test_stochastic_depth_brings_no_compilation_unless_each_block_is_compiled(
    tiny_vit: Any, compiler: Compiler
) -> None:
    vit = tiny_vit(img_size=64, depth=3, drop_path_rate=0.1).train()
    scheduler = SequenceScheduler(compress(vit, EVERY_STEP), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    for _ in range(STEPS + 1):
        _train(vit, scheduler)
    assert compiler.compilations == 1
    for block in vit.blocks:
        block.compile(backend=compiler, dynamic=True)
    for block in vit.blocks:
        block(torch.randn(2, 9, 32))
    assert compiler.compilations == 1 + 3  # every block has its own rate


def test_rehearsing_and_measuring_other_strategies_bring_no_compilation(tiny_vit: Any, compiler: Compiler) -> None:
    vit = compress(tiny_vit(img_size=64, num_classes=3), Strategy(0.5)).train()
    _compile_blocks(vit, compiler)
    views, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])

    def loss(batch: Tensor) -> Tensor:
        return F.cross_entropy(vit(batch), labels)

    rehearse(SequenceScheduler(vit, STAGES, total_steps=STEPS), lambda: loss(views).backward())
    scheduler = OnlineScheduler(vit, loss, total_steps=60, compute_share=1.0)
    for _ in range(60):
        loss(views).backward()
        scheduler.step(views)
    assert len(scheduler.decisions) > 0
    assert compiler.compilations == 1


def test_compiled_blocks_leave_names_alone_and_a_copy_is_not_compiled(vit: Any, compiler: Compiler) -> None:
    names = list(vit.state_dict())
    _compile_blocks(compress(vit, STAGES), compiler)
    copied = copy.deepcopy(vit)
    copied(torch.randn(2, 3, 64, 64))
    assert list(vit.state_dict()) == names
    assert compiler.compilations == 0


def test_equal_batch_and_length_at_the_first_step_bring_one_compilation_more(vit: Any, compiler: Compiler) -> None:
    scheduler = SequenceScheduler(compress(vit, EVERY_STEP), total_steps=STEPS)
    _compile_blocks(vit, compiler)
    batch = num_tokens(vit, EVERY_STEP(0), (64, 64))
    for _ in range(STEPS + 1):
        _train(vit, scheduler, ((batch, 64),))
    assert compiler.compilations == 2  # torch takes the two for one, until they differ


@pytest.mark.parametrize("single", [((1, 64),), ((2, 8),)], ids=["one view", "one token"])
def test_a_batch_of_one_view_or_views_of_one_token_are_compiled_for_themselves(
    single: tuple[tuple[int, int], ...], tiny_vit: Any, compiler: Compiler
) -> None:
    vit = tiny_vit(img_size=64, dynamic_img_size=True, class_token=False, global_pool="avg").train()
    scheduler = SequenceScheduler(compress(vit, EVERY_STEP), total_steps=STEPS + 1)  # short of its end
    _compile_blocks(vit, compiler)
    for views in (*4 * [VIEWS], *4 * [single], *4 * [VIEWS]):
        for batch, side in views:
            vit(torch.randn(batch, 3, side, side)).sum().backward()
        scheduler.step()
    assert compiler.compilations == 2


# The whole model


@pytest.mark.parametrize(
    ("dynamic", "plan", "expected"),
    [
        (None, DROPPED, 1),
        (None, STAGES, 3),  # for the first length, for all, and for the base strategy, where nothing is joined
        (None, EVERY_STEP, 3),
        (True, STAGES, 2),
        (False, STAGES, 4),
    ],
)
def test_a_whole_model_is_compiled_at_most_once_for_each_length_of_its_schedule(
    dynamic: bool | None, plan: Schedule, expected: int, shallow: Any, compiler: Compiler
) -> None:
    scheduler = SequenceScheduler(compress(shallow, plan), total_steps=STEPS)
    compiled = torch.compile(shallow, backend=compiler, dynamic=dynamic)
    for _ in range(STEPS + 1):
        _train(compiled, scheduler)
    assert compiler.compilations <= len(_lengths(shallow, plan))
    if STRICT:  # torch 2.6 counts otherwise
        assert compiler.compilations == expected


def test_a_whole_student_and_teacher_with_crops_and_validation_stay_within_the_limit(
    shallow: Any, compiler: Compiler
) -> None:
    teacher = copy.deepcopy(shallow).requires_grad_(False)
    scheduler = SequenceScheduler(compress(shallow, STAGES, teacher=teacher), total_steps=STEPS)
    student, momentum = (torch.compile(model, backend=compiler) for model in (shallow, teacher))
    for _ in range(STEPS + 1):
        with torch.no_grad():
            momentum(torch.randn(4, 3, 64, 64))
        _train(student, scheduler, CROPS)
        _validate(student, 3)
    lengths_of_teacher = {num_tokens(shallow, strategy.without_dropout(), (64, 64)) for strategy in STAGES.strategies()}
    assert compiler.compilations <= len(_lengths(shallow, STAGES, CROPS)) + len(lengths_of_teacher) + 1
    if STRICT:
        assert compiler.compilations == 6


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"), reason="needs torch 2.7")
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "blocks"])
def test_only_without_dynamic_lengths_does_a_length_at_every_step_reach_the_limit(
    whole: bool, shallow: Any, compiler: Compiler
) -> None:
    scheduler = SequenceScheduler(compress(shallow, EVERY_STEP), total_steps=STEPS)
    if whole:
        model = torch.compile(shallow, backend=compiler, dynamic=False)
    else:
        _compile_blocks(model := shallow, compiler, dynamic=False)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # noqa: PT012
        for _ in range(STEPS + 1):
            _train(model, scheduler)


# What is computed


def _assert_equal_steps(eager: Any, compiled: Any, plan: Schedule, gradients: Any) -> None:
    """Runs both along the schedule with the same subsets; outputs and gradients must agree at every step."""
    schedulers = [SequenceScheduler(compress(model, plan), total_steps=4) for model in (eager, compiled)]
    for _ in range(5):
        views, outputs = torch.randn(2, 3, 64, 64), []
        for model, scheduler in zip((eager, compiled), schedulers, strict=True):
            model.zero_grad()
            outputs.append(model(views))
            outputs[-1][:, 0].sum().backward()
            scheduler.step()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        expected, computed = gradients(eager), gradients(compiled)
        assert computed.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(computed[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "plan", [STAGES, pytest.param(EVERY_STEP, marks=pytest.mark.soak)], ids=["four stages", "every step"]
)
def test_compiled_blocks_compute_what_eager_ones_do_with_one_compilation_for_training(
    plan: Schedule, vit: Any, compiler: Compiler, gradients: Any
) -> None:
    compiler.backend = lookup_backend("aot_eager")
    eager = copy.deepcopy(vit)
    _compile_blocks(vit, compiler)
    _assert_equal_steps(eager, vit, plan, gradients)
    assert compiler.compilations == 1
    views = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(vit.eval()(views), eager.eval()(views), rtol=1e-4, atol=1e-5)
