"""Ways to run a model that a long run may use, each with compression: what comes out is what it should be."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seqcompress import SequenceScheduler, Stepwise, Strategy, compress, restore

STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy(0.0, 16), 0.5: Strategy(0.5), 0.75: Strategy()})
BOTH = Strategy(0.5, 16)
VIEWS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def _loss(model: Any, views: Tensor) -> Tensor:
    return model(views).float().sin().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_schedule_under_autocast_with_a_scaler_survives_a_bad_batch(dtype: torch.dtype, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES).train()
    exact = copy.deepcopy(vit)
    scheduler, exact_scheduler = (SequenceScheduler(model, total_steps=8) for model in (vit, exact))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.01)
    for step in range(8):
        views = VIEWS * torch.inf if step == 3 else VIEWS
        before = vit.pos_embed.detach().clone()
        with torch.autocast("cpu", dtype):
            torch.manual_seed(step)
            loss = _loss(vit, views)
        if step != 3:
            exact.load_state_dict(vit.state_dict())
            torch.manual_seed(step)
            assert loss.item() == pytest.approx(_loss(exact, views).item(), rel=0.05)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, vit.pos_embed) == (step == 3)
        scheduler.step()
        exact_scheduler.step()
    assert scaler.get_scale() == 2.0**7
    assert all(bool(value.isfinite().all()) for value in vit.parameters())


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.5), BOTH], ids=str)
def test_gradients_that_are_accumulated_are_the_sum_of_those_of_the_parts(
    strategy: Strategy, tiny_vit: Any, gradients: Any
) -> None:
    vit, parts = compress(tiny_vit(), strategy).train(), []
    for seed, views in enumerate(VIEWS.split(2)):
        vit.zero_grad()
        torch.manual_seed(seed)
        _loss(vit, views).backward()
        parts.append(gradients(vit))
    vit.zero_grad()
    for seed, views in enumerate(VIEWS.split(2)):
        torch.manual_seed(seed)
        _loss(vit, views).backward()
    for name, total in gradients(vit).items():
        assert torch.equal(total, parts[0][name] + parts[1][name]), name


@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.5), BOTH], ids=str)
def test_a_functional_call_is_the_call_with_other_parameters(strategy: Strategy, tiny_vit: Any) -> None:
    vit, other = compress(tiny_vit(), strategy).train(), compress(tiny_vit(), strategy).train()
    with torch.no_grad():
        for value in other.parameters():
            value += 0.1
    parameters = {name: value.detach().clone().requires_grad_() for name, value in other.named_parameters()}
    torch.manual_seed(3)
    loss = _loss(lambda views: functional_call(vit, parameters, (views,)), VIEWS)
    torch.manual_seed(3)
    expected = _loss(other, VIEWS)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for name, value in other.named_parameters():
        assert torch.equal(parameters[name].grad, value.grad), name
    assert all(value.grad is None for value in vit.parameters())


def test_an_averaged_model_is_that_of_the_weights_and_evaluates_as_a_plain_one(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), STAGES).train()
    scheduler = SequenceScheduler(vit, total_steps=6)
    average = AveragedModel(vit, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer, expected = torch.optim.SGD(vit.parameters(), lr=0.1), [value.clone() for value in vit.parameters()]
    for step in range(6):
        optimizer.zero_grad()
        _loss(vit, VIEWS).backward()
        optimizer.step()
        average.update_parameters(vit)
        for mean, value in zip(expected, vit.parameters(), strict=True):
            mean.copy_(value) if step == 0 else mean.lerp_(value, 0.5)
        scheduler.step()
    torch.testing.assert_close([value.detach() for value in average.parameters()], [mean.detach() for mean in expected])
    plain = tiny_vit().eval()
    plain.load_state_dict(average.module.state_dict())
    assert torch.equal(average.eval()(VIEWS), plain(VIEWS))


@pytest.mark.parametrize("strategy", [Strategy(0.5), BOTH], ids=str)
def test_frozen_embeddings_stay_and_blocks_train(strategy: Strategy, tiny_vit: Any, gradients: Any) -> None:
    vit = compress(tiny_vit(), strategy).train()
    frozen = [vit.pos_embed, vit.cls_token, *vit.patch_embed.parameters()]
    before = [value.detach().clone() for value in frozen]
    for value in frozen:
        value.requires_grad_(False)
    optimizer = torch.optim.AdamW((value for value in vit.parameters() if value.requires_grad), lr=0.1)
    _loss(vit, VIEWS).backward()
    optimizer.step()
    assert all(map(torch.equal, frozen, before))
    assert set(gradients(vit)) == {name for name, _ in vit.named_parameters() if name.startswith(("blocks", "norm"))}


def test_lora_trains_its_adapters_alone_and_merges_into_a_plain_model(tiny_vit: Any, gradients: Any) -> None:
    peft = pytest.importorskip("peft")
    vit = compress(tiny_vit(), BOTH)
    adapted = peft.get_peft_model(vit, peft.LoraConfig(target_modules=["qkv"], r=2)).train()
    _loss(adapted, VIEWS).backward()
    trained = gradients(adapted)
    assert len(trained) == 4
    assert all("lora" in name for name in trained)
    torch.optim.SGD((value for value in adapted.parameters() if value.requires_grad), lr=1.0).step()
    features = adapted.eval()(VIEWS)
    merged = restore(adapted.merge_and_unload())
    plain = tiny_vit().eval()
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(plain(VIEWS), features, rtol=1e-5, atol=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("restored", [False, True], ids=["evaluating", "restored"])
def test_an_onnx_file_has_the_features_of_the_plain_model(restored: bool, tiny_vit: Any) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    plain = tiny_vit().eval()
    vit = compress(copy.deepcopy(plain), BOTH).train()
    _loss(vit, VIEWS).backward()
    (restore(vit) if restored else vit).eval()
    file = io.BytesIO()
    torch.onnx.export(vit, (VIEWS,), dynamo=True).save(file)
    (found,) = ReferenceEvaluator(onnx.load_from_string(file.getvalue())).run(None, _inputs(file, onnx))
    np.testing.assert_allclose(found, plain(VIEWS).detach().numpy(), rtol=1e-4, atol=1e-4)


def _inputs(file: io.BytesIO, onnx: Any) -> dict[str, Any]:
    (views,) = onnx.load_from_string(file.getvalue()).graph.input
    return {views.name: VIEWS.numpy()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strategy", [Strategy(), Strategy(0.0, 16)], ids=str)
def test_on_a_gpu_a_captured_evaluation_is_that_of_the_plain_model(strategy: Strategy, tiny_vit: Any) -> None:
    plain = tiny_vit().cuda().eval()
    vit, views = compress(copy.deepcopy(plain), strategy), VIEWS.cuda()
    _train_once(vit, views)
    vit.load_state_dict(plain.state_dict())
    vit.eval()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            vit(views)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            features = vit(views)
        for shift in (0.0, 1.0):
            views.copy_(VIEWS.cuda() + shift)
            graph.replay()
            torch.testing.assert_close(features, plain(views))


def _train_once(model: nn.Module, views: Tensor) -> None:
    model.train()
    _loss(model, views).backward()
