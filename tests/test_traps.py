"""Where shortening sequences goes wrong unobserved: one test or more for each trap."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqcompress import (
    Linear,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    is_compressed,
    num_tokens,
    restore,
    set_strategy,
)

STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy(0.0, 16), 0.5: Strategy(0.5), 0.75: Strategy()})


# Gradient checkpointing runs the forward twice


def _whole(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda vit, views: checkpoint(vit, views, use_reentrant=reentrant)


def _blocks(vit: Any, views: Tensor) -> Tensor:
    vit.set_grad_checkpointing(True)
    return vit(views)


def _train_step(vit: Any, views: list[Tensor], forward: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """One step on several views, each forwarded on its own. Reentrant checkpointing needs inputs with grad."""
    torch.manual_seed(3)
    outputs = [forward(vit, view.clone().requires_grad_()) for view in views]
    loss = sum((output * torch.linspace(-1, 1, 32)).sum() * (index + 1) for index, output in enumerate(outputs))
    assert isinstance(loss, Tensor)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize(
    "forward", [_blocks, _whole(True), _whole(False)], ids=["blocks", "reentrant", "not reentrant"]
)
@pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "scheduled"])
@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.75, 10), Strategy(0.0, 16)], ids=str)
def test_checkpointing_has_the_gradients_of_a_run_without(
    forward: Any, scheduled: bool, strategy: Strategy, tiny_vit: Any, gradients: Any
) -> None:
    views = [torch.randn(4, 3, 32, 32) for _ in range(3)]
    losses, found = [], []
    for run in (lambda vit, view: vit(view), forward):
        vit = compress(tiny_vit(drop_rate=0.1, proj_drop_rate=0.1), strategy).train()
        torch.manual_seed(3)
        if scheduled:
            SequenceScheduler(vit, total_steps=10)
        losses.append(_train_step(vit, views, run))
        found.append(gradients(vit))
    torch.testing.assert_close(*losses)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_compresses_its_first_pass_too(tiny_vit: Any) -> None:
    vit, lengths = compress(tiny_vit(), token_dropout=0.75).train(), []
    vit.blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    checkpoint(vit, torch.randn(2, 3, 32, 32, requires_grad=True), use_reentrant=True).sum().backward()
    assert lengths == [5, 5]


# Teachers


def test_teachers_without_grad_or_frozen_stay_uncompressed(tiny_vit: Any, first_tokens: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy(0.5, 10)).train(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert first_tokens(vit, views).shape[1] == 17
    vit.requires_grad_(False)
    assert first_tokens(vit, views).shape[1] == 17
    vit.requires_grad_(True)
    assert first_tokens(vit, views).shape[1] == 5


def test_the_usual_momentum_teacher_is_independent_of_its_student(tiny_vit: Any, first_tokens: Any) -> None:
    student = compress(tiny_vit(), Strategy(0.5)).train()
    teacher, views = copy.deepcopy(student), torch.randn(2, 3, 32, 32)
    deactivate_requires_grad(teacher)
    before = first_tokens(teacher, views)
    assert before.shape[1] == 17
    optimizer = torch.optim.SGD(student.parameters(), lr=10.0)
    student(views)[:, 0].sum().backward()
    optimizer.step()
    assert torch.equal(first_tokens(teacher, views), before)
    update_momentum(student, teacher, m=0.0)
    assert torch.equal(teacher.eval()(views), student.eval()(views))


# Multi-crop


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.5), Strategy(0.0, 16), Strategy(0.75, 8), Strategy(0.99)])
def test_global_views_together_and_local_views_alone(
    dynamic: bool, strategy: Strategy, tiny_vit: Any, first_tokens: Any
) -> None:
    vit = compress(tiny_vit(img_size=64, dynamic_img_size=dynamic), strategy).train()
    for views in (torch.randn(8, 3, 64, 64), torch.randn(4, 3, 24, 24), torch.randn(4, 3, 16, 32)):
        tokens = first_tokens(vit, views)
        assert tokens.shape[:2] == (len(views), num_tokens(vit, strategy, tuple(views.shape[-2:])))
        assert tokens.shape[1] >= 2


@pytest.mark.parametrize("dropout", [0.9, 0.99, 0.999999, 1 - 2**-53])
@pytest.mark.parametrize("side", [8, 16, 24])
def test_a_local_view_is_never_without_a_token(dropout: float, side: int, tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(class_token=False, global_pool="avg"), token_dropout=dropout).train()
    assert first_tokens(vit, torch.randn(2, 3, side, side)).shape[1] == 1


def test_views_of_other_sizes_have_interpolated_positions(tiny_vit: Any, first_tokens: Any) -> None:
    fixed, dynamic, views = tiny_vit(), tiny_vit(dynamic_img_size=True), torch.randn(2, 3, 24, 48)
    fixed.load_state_dict(dynamic.state_dict())
    expected = first_tokens(dynamic.train(), views)
    torch.testing.assert_close(first_tokens(compress(fixed, Strategy()).train(), views), expected, rtol=1e-4, atol=1e-5)


def test_a_patch_larger_than_a_local_view_is_a_clear_error_and_the_next_view_works(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(img_size=64), patch_size=32).train()
    with pytest.raises(ValueError, match="patch_size 32 x 32 for a view of 24 x 24"):
        vit(torch.randn(2, 3, 24, 24))
    assert vit(torch.randn(2, 3, 64, 64)).shape == (2, 32)


def test_a_forward_that_failed_halfway_leaves_no_patches_behind(tiny_vit: Any, first_tokens: Any) -> None:
    vit, views = compress(tiny_vit(pre_norm=True), token_dropout=0.5).train(), torch.randn(2, 3, 32, 32)
    vit.patch_embed(views)  # and no further
    plain = restore(copy.deepcopy(vit)).eval()
    assert torch.equal(vit.eval()(views), plain(views))
    assert first_tokens(vit.train(), views[:1]).shape == (1, 9, 32)


# torch.compile


@pytest.fixture
def compiler() -> Iterator[list[int]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield []
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("order", "backend"),
    [("compress, compile", "eager"), ("compress, compile", "aot_eager"), ("compile, compress", "eager")],
)
def test_a_compiled_model_follows_a_schedule_and_computes_what_an_eager_one_does(
    order: str, backend: str, compiler: list[int], tiny_vit: Any, gradients: Any
) -> None:
    eager, vit = compress(tiny_vit(depth=1), STAGES).train(), tiny_vit(depth=1).train()
    if order == "compress, compile":
        compiled = torch.compile(compress(vit, STAGES), backend=backend)
    else:
        compiled = compress(torch.compile(vit, backend=backend), STAGES)
    assert is_compressed(compiled)
    schedulers = [SequenceScheduler(model, total_steps=4) for model in (eager, compiled)]
    assert get_strategy(compiled) == STAGES(0)
    views = torch.randn(2, 3, 32, 32)
    for _ in range(4):
        outputs = []
        for model in (eager, compiled):
            torch.manual_seed(5)
            model.zero_grad()
            outputs.append(model(views))
            outputs[-1][:, 0].sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
        for name, gradient in gradients(eager).items():
            torch.testing.assert_close(gradients(vit)[name], gradient, rtol=1e-3, atol=1e-5)
        for scheduler in schedulers:
            scheduler.step()
    assert torch.equal(compiled.eval()(views), eager.eval()(views)) or backend != "eager"


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"), reason="needs torch 2.7")
def test_a_schedule_of_four_stages_with_local_views_stays_within_the_recompile_limit(
    compiler: list[int], tiny_vit: Any
) -> None:
    assert torch._dynamo.config.recompile_limit == 8
    vit = compress(tiny_vit(depth=1), STAGES).train()
    compiled = torch.compile(vit, backend="eager")
    scheduler = SequenceScheduler(vit, total_steps=4)
    views = torch.randn(2, 3, 32, 32), torch.randn(3, 3, 24, 24)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(5):
            for view in views:
                compiled(view)[:, 0].sum().backward()
            with torch.no_grad():
                compiled.eval()(views[0])
            compiled.train()
            scheduler.step()
    assert torch._dynamo.utils.counters["frames"]["total"] > 0


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "fail_on_recompile_limit_hit"), reason="needs torch 2.7")
def test_dropout_that_changes_every_step_stays_within_the_recompile_limit(compiler: list[int], tiny_vit: Any) -> None:
    vit = compress(tiny_vit(img_size=64, depth=1), Linear(Strategy(0.9), Strategy())).train()
    compiled = torch.compile(vit, backend="eager")
    scheduler = SequenceScheduler(vit, total_steps=20)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(21):
            compiled(torch.randn(2, 3, 64, 64))[:, 0].sum().backward()
            scheduler.step()


def test_restoring_a_compiled_model_restores_the_one_inside(tiny_vit: Any) -> None:
    vit = tiny_vit()
    compiled = torch.compile(vit, backend="eager")
    assert compress(compiled, STAGES(0)) is compiled
    assert get_strategy(vit) == STAGES(0)
    assert restore(compiled) is compiled
    assert not is_compressed(vit)


# Resuming


def _draws(scheduler: SequenceScheduler, vit: Any, views: Tensor, steps: int) -> list[tuple[Strategy, Tensor]]:
    """Strategy and tokens of each step's two views, one of them forwarded under a teacher's no_grad as well."""
    drawn = []
    for _ in range(steps):
        for _ in range(2):
            tokens: list[Tensor] = []
            handle = vit.blocks[0].register_forward_pre_hook(
                lambda block, args, tokens=tokens: tokens.append(args[0].detach())
            )
            vit(views)
            handle.remove()
            drawn.append((get_strategy(vit), tokens[0]))
        torch.rand(3)  # something else of the step draws too: augmentation, dropout
        scheduler.step()
    return drawn


@pytest.mark.parametrize("stopped_at", [1, 3, 5, 7])
def test_a_resumed_run_has_the_strategies_and_subsets_of_one_that_never_stopped(stopped_at: int, tiny_vit: Any) -> None:
    views = torch.randn(2, 3, 32, 32)
    torch.manual_seed(11)
    vit = compress(tiny_vit(), STAGES).train()
    scheduler = SequenceScheduler(vit, total_steps=8)
    uninterrupted = _draws(scheduler, vit, views, 8)

    torch.manual_seed(11)
    vit = compress(tiny_vit(), STAGES).train()
    scheduler = SequenceScheduler(vit, total_steps=8)
    begin = _draws(scheduler, vit, views, stopped_at)
    state = scheduler.state_dict()

    torch.manual_seed(99)  # another process, another seed
    vit = compress(tiny_vit(), STAGES).train()
    scheduler = SequenceScheduler(vit, total_steps=8)
    scheduler.load_state_dict(state)
    resumed = begin + _draws(scheduler, vit, views, 8 - stopped_at)

    assert [strategy for strategy, _ in resumed] == [strategy for strategy, _ in uninterrupted]
    for (_, one), (_, other) in zip(resumed, uninterrupted, strict=True):
        assert torch.equal(one, other)


def test_steps_views_and_seeds_all_have_their_own_subsets(tiny_vit: Any) -> None:
    views, seen = torch.randn(2, 3, 32, 32), []
    for seed in (11, 12):
        torch.manual_seed(seed)
        vit = compress(tiny_vit(), token_dropout=0.5).train()
        seen += [tokens for _, tokens in _draws(SequenceScheduler(vit, total_steps=8), vit, views, 4)]
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == len(seen) == 16


# Models that arrive in another precision, or with patch dropout of their own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.5, 16), Strategy(0.0, 10)], ids=str)
def test_models_of_another_precision_train(dtype: torch.dtype, strategy: Strategy, tiny_vit: Any) -> None:
    vit = compress(tiny_vit().to(dtype), strategy).train()
    output = vit(torch.randn(2, 3, 32, 32, dtype=dtype))
    assert output.dtype == dtype
    output[:, 0].sum().backward()
    assert vit.patch_embed.proj.weight.grad.dtype == dtype
    assert torch.isfinite(vit.patch_embed.proj.weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patch", [10, 12, 16])
def test_half_precision_tokens_are_close_to_those_of_single_precision(
    dtype: torch.dtype, patch: int, tiny_vit: Any, first_tokens: Any
) -> None:
    views = torch.randn(2, 3, 32, 32)
    exact = first_tokens(compress(tiny_vit(), patch_size=patch).train(), views)
    rounded = first_tokens(compress(tiny_vit().to(dtype), patch_size=patch).train(), views.to(dtype)).float()
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.5, 16), Strategy(0.0, 10)], ids=str)
def test_autocast_changes_no_more_than_it_does_to_a_plain_model(
    strategy: Strategy, tiny_vit: Any, first_tokens: Any
) -> None:
    vit, views = compress(tiny_vit(), strategy).train(), torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    exact = first_tokens(vit, views)
    torch.manual_seed(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = first_tokens(vit, views)
        vit(views)[:, 0].sum().backward()
    assert (cast.float() - exact).norm() < 0.01 * exact.norm()
    assert vit.patch_embed.proj.weight.grad.dtype == torch.float32


def test_moving_a_compressed_model_to_another_precision_moves_all_of_it(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Strategy(0.5, 16)).train().double()
    assert {value.dtype for value in vit.parameters()} == {torch.float64}
    assert vit(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64
    assert {value.dtype for value in restore(vit).parameters()} == {torch.float64}


@pytest.mark.parametrize("as_teacher", [False, True])
def test_a_model_that_drops_patches_by_itself_is_refused(as_teacher: bool, tiny_vit: Any) -> None:
    vit, other = tiny_vit(patch_drop_rate=0.25), tiny_vit()
    with pytest.raises(ValueError, match=r"patch_drop_rate=0\.25"):
        compress(other, Strategy(0.5), teacher=vit) if as_teacher else compress(vit, Strategy(0.5))
    assert not is_compressed(vit)
    assert not is_compressed(other)


def test_lightlys_own_gradient_checkpointing_works(tiny_vit: Any, gradients: Any) -> None:
    views, found = torch.randn(4, 3, 32, 32), []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        masked = MaskedVisionTransformerTIMM(tiny_vit(), weight_initialization="skip").train()
        masked.set_grad_checkpointing(checkpointed)
        compress(masked, Strategy(0.5, 10))
        torch.manual_seed(3)
        masked(views)[:, 0].sum().backward()
        found.append(gradients(masked))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


# A light import


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, seqcompress; seqcompress.Strategy(0.5); seqcompress.schedules.Constant; dir(seqcompress); "
        "heavy = {'torch', 'timm', 'numpy', 'lightning', 'pytorch_lightning', 'lightly', 'solo'}; "
        "print(*sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_compressing_imports_no_framework(tmp_path: Path) -> None:
    code = (
        "import sys, seqcompress; from seqcompress import *; "
        "print(*sorted({'lightning', 'pytorch_lightning', 'lightly', 'solo'} & {*sys.modules}), compress.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["compress"]


def test_a_strategy_set_by_hand_between_two_views_of_a_step_holds_for_the_second(
    tiny_vit: Any, first_tokens: Any
) -> None:
    vit, views = compress(tiny_vit(), STAGES).train(), torch.randn(2, 3, 32, 32)
    scheduler = SequenceScheduler(vit, total_steps=8)
    lengths = [first_tokens(vit, views).shape[1]]
    with pytest.warns(UserWarning, match="driven by a SequenceScheduler"):
        set_strategy(vit, Strategy(0.0, 10))
    lengths.append(first_tokens(vit, views).shape[1])
    scheduler.step()
    lengths.append(first_tokens(vit, views).shape[1])
    assert lengths == [3, 10, 3]
