"""``accelerate`` on modules built the way Lightly's examples and benchmarks build them, with Lightly's parts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import (
    DINOProjectionHead,
    MaskedVisionTransformerTIMM,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import DINOTransform, SimCLRTransform
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import seqcompress
from seqcompress import SequenceScheduler, Strategy, compress, get_strategy, is_compressed, schedules
from seqcompress.adapters.lightly import accelerate

Build = Callable[..., Any]
HALF_AND_16 = Strategy(0.5, 16)
PATCH_16 = Strategy(0.0, 16)


class SimCLR(nn.Module):
    """One encoder for both views."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.backbone = vit
        self.projection_head = SimCLRProjectionHead(32, 32, 16)
        self.criterion = NTXentLoss(temperature=0.2)

    def project(self, views: Tensor) -> Tensor:
        return self.projection_head(self.backbone(views))

    def loss(self, views: list[Tensor]) -> Tensor:
        return self.criterion(self.project(views[0]), self.project(views[1]))


class MoCo(nn.Module):
    """``backbone`` and a frozen copy ``backbone_momentum``; symmetric loss and no queue, as in MoCo-v3."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.backbone = vit
        self.projection_head = MoCoProjectionHead(32, 32, 16, batch_norm=True)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(temperature=0.2)

    def loss(self, views: list[Tensor]) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        queries = [self.projection_head(self.backbone(view)) for view in views]
        keys = [self.projection_head_momentum(self.backbone_momentum(view)).detach() for view in views]
        return self.criterion(queries[0], keys[1]) + self.criterion(queries[1], keys[0])


class DINO(nn.Module):
    """``student_backbone`` and a frozen copy ``teacher_backbone``; every view on its own."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.student_backbone = vit
        self.teacher_backbone = copy.deepcopy(vit)
        self.student_head = DINOProjectionHead(32, 32, 16, 64, freeze_last_layer=1)
        self.teacher_head = DINOProjectionHead(32, 32, 16, 64)
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = DINOLoss(output_dim=64, warmup_teacher_temp_epochs=1)

    def loss(self, views: list[Tensor]) -> Tensor:
        update_momentum(self.student_backbone, self.teacher_backbone, m=0.99)
        update_momentum(self.student_head, self.teacher_head, m=0.99)
        teacher_out = [self.teacher_head(self.teacher_backbone(view)) for view in views[:2]]
        student_out = [self.student_head(self.student_backbone(view)) for view in views]
        return self.criterion(teacher_out, student_out, epoch=1)


class BenchmarkDINO(nn.Module):
    """``student_backbone`` and, under the name ``backbone``, the teacher, which is not frozen.

    Global views come concatenated, and so do local ones.
    """

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.backbone = MaskedVisionTransformerTIMM(copy.deepcopy(vit))
        self.projection_head = DINOProjectionHead(32, 32, 16, 64, norm_last_layer=False)
        self.student_backbone = MaskedVisionTransformerTIMM(vit)
        self.student_projection_head = DINOProjectionHead(32, 32, 16, 64, norm_last_layer=False)
        self.criterion = DINOLoss(output_dim=64, teacher_temp=0.04)

    def loss(self, views: list[Tensor]) -> Tensor:
        update_momentum(self.student_backbone, self.backbone, m=0.99)
        update_momentum(self.student_projection_head, self.projection_head, m=0.99)
        with torch.no_grad():
            teacher_out = self.projection_head(self.backbone(torch.cat(views[:2])))
        student_out = torch.cat(
            [self.student_projection_head(self.student_backbone(torch.cat(crops))) for crops in (views[:2], views[2:])]
        )
        return self.criterion(teacher_out.chunk(2), student_out.chunk(len(views)), teacher_temp=0.04)


@pytest.fixture
def vit(tiny_vit: Build) -> nn.Module:
    return tiny_vit(dynamic_img_size=True, global_pool="avg")


def crops(*sides: int, batch: int = 8) -> list[Tensor]:
    """Views of textures, the same every time: whichever patches are kept tell the samples apart."""
    generator = torch.Generator().manual_seed(5)
    textures = 5 * torch.randn(batch, 3, 8, 8, generator=generator)
    tiled = [textures.repeat(1, 1, side // 8, side // 8) for side in sides]
    return [view + torch.randn(view.shape, generator=generator) for view in tiled]


def encoders(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if type(child).__name__ == "VisionTransformer"]


def holding(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


# Finding student and teacher


@pytest.mark.parametrize(
    ("kind", "student", "teacher"),
    [
        (MoCo, "backbone", "backbone_momentum"),
        (DINO, "student_backbone", "teacher_backbone"),
        (BenchmarkDINO, "student_backbone", "backbone"),
    ],
)
def test_dropout_goes_to_the_student_and_scaling_to_both(kind: Any, student: str, teacher: str, vit: nn.Module) -> None:
    module = kind(vit)
    assert accelerate(module, HALF_AND_16) is module
    assert get_strategy(module.get_submodule(student)) == HALF_AND_16
    assert get_strategy(module.get_submodule(teacher)) == PATCH_16
    assert get_strategy(module) == HALF_AND_16  # one pair, one plan


def test_a_single_encoder_is_a_student_without_teacher(vit: nn.Module) -> None:
    module = accelerate(SimCLR(vit), HALF_AND_16)
    assert get_strategy(module.backbone) == HALF_AND_16


def test_without_a_plan_it_is_the_default_preset(vit: nn.Module) -> None:
    module = accelerate(MoCo(vit))
    scheduler = SequenceScheduler(module, total_steps=100)
    assert get_strategy(module) == scheduler.strategy == HALF_AND_16  # half of the tokens, twice the patch size


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("online_encoder", "target_encoder"),
        ("encoder_q", "encoder_k"),
        ("query", "key"),
        ("net", "net_ema"),
        ("student", "anything"),
        ("encoder", "momentum_encoder"),
    ],
)
def test_names_tell_who_teaches_when_both_are_trainable(first: str, second: str, vit: nn.Module) -> None:
    module = accelerate(holding(**{second: copy.deepcopy(vit), first: vit}), HALF_AND_16)
    assert get_strategy(module.get_submodule(first)) == HALF_AND_16
    assert get_strategy(module.get_submodule(second)) == PATCH_16


def test_a_frozen_encoder_teaches_whatever_it_is_called(vit: nn.Module) -> None:
    module = holding(one=vit, other=copy.deepcopy(vit))
    deactivate_requires_grad(module.one)
    accelerate(module, HALF_AND_16)
    assert get_strategy(module.other) == HALF_AND_16
    assert get_strategy(module.one) == PATCH_16


def test_encoders_are_found_at_any_depth(vit: nn.Module) -> None:
    module = holding(student=nn.Sequential(vit, nn.Linear(32, 8)), teacher=nn.Sequential(copy.deepcopy(vit)))
    accelerate(module, HALF_AND_16)
    assert get_strategy(module.student) == HALF_AND_16
    assert get_strategy(module.teacher) == PATCH_16


def test_a_vit_that_is_held_twice_is_one_encoder(vit: nn.Module) -> None:
    module = accelerate(holding(vit=vit, backbone=MaskedVisionTransformerTIMM(vit)), HALF_AND_16)
    assert get_strategy(module.backbone) == HALF_AND_16


def test_the_encoder_itself_is_a_student(vit: nn.Module) -> None:
    assert get_strategy(accelerate(vit, HALF_AND_16)) == HALF_AND_16


@pytest.mark.parametrize("as_module", [False, True], ids=["by name", "by module"])
@pytest.mark.parametrize("named", [("student",), ("teacher",), ("student", "teacher")])
def test_roles_may_be_given(as_module: bool, named: tuple[str, ...], vit: nn.Module) -> None:
    module = holding(a=nn.Sequential(vit), b=nn.Sequential(copy.deepcopy(vit)))
    names = {"student": "b.0", "teacher": "a.0"}
    given = {role: module.get_submodule(names[role]) if as_module else names[role] for role in named}
    accelerate(module, HALF_AND_16, **given)
    assert get_strategy(module.b) == HALF_AND_16
    assert get_strategy(module.a) == PATCH_16


def test_given_roles_overrule_names(vit: nn.Module) -> None:
    module = DINO(vit)
    with pytest.raises(ValueError, match=r"student must be the encoder that is trained, .* swap them"):
        accelerate(module, HALF_AND_16, student="teacher_backbone")
    module.teacher_backbone.requires_grad_(True)
    accelerate(module, HALF_AND_16, student="teacher_backbone")
    assert get_strategy(module.teacher_backbone) == HALF_AND_16
    assert get_strategy(module.student_backbone) == PATCH_16


def test_a_third_encoder_stays_as_it_is_when_both_roles_are_given(vit: nn.Module) -> None:
    module = holding(a=vit, b=copy.deepcopy(vit), c=copy.deepcopy(vit))
    accelerate(module, HALF_AND_16, student="a", teacher="b")
    assert not is_compressed(module.c)


def test_accelerating_again_plans_anew(vit: nn.Module) -> None:
    module = accelerate(accelerate(MoCo(vit), HALF_AND_16), Strategy(0.25))
    assert get_strategy(module.backbone) == Strategy(0.25)
    assert get_strategy(module.backbone_momentum) == Strategy()


# What is refused changes nothing


def _pair(vit: nn.Module) -> dict[str, nn.Module]:
    return {"a": vit, "b": copy.deepcopy(vit)}


@pytest.mark.parametrize(
    ("children", "arguments", "error", "message"),
    [
        (_pair, {}, ValueError, "found 'a', 'b', and cannot tell which is which"),
        (lambda vit: {**_pair(vit), "teacher": copy.deepcopy(vit)}, {}, ValueError, "found 'a', 'b', 'teacher'"),
        (lambda vit: {"teacher_1": vit, "teacher_2": copy.deepcopy(vit)}, {}, ValueError, "cannot tell which is which"),
        (
            lambda vit: {"backbone_momentum": vit.requires_grad_(False)},
            {},
            ValueError,
            "an encoder that is trained, found only 'backbone_momentum', which is frozen",
        ),
        (_pair, {"student": "bakcbone"}, ValueError, "student must name a module of Module, got 'bakcbone'.*'a', 'b'"),
        (_pair, {"student": "a", "teacher": "b.vit"}, ValueError, "teacher must name a module of Module, got 'b.vit'"),
        (_pair, {"student": "a.blocks"}, TypeError, "student must be a supported ViT, got .*Sequential"),
        (_pair, {"student": "a", "teacher": "a"}, ValueError, "teacher must be another model"),
        (_pair, {"student": 3}, TypeError, "student must be a supported ViT, got 3"),
        (_pair, {"student": "a", "plan": "defualt"}, ValueError, "'default', 'gentle', 'strong'.*'defualt'"),
        (_pair, {"student": "a", "plan": Strategy(0.5, 48)}, ValueError, "patch_size 48 x 48 for a view of 32 x 32"),
        (lambda vit: {"a": vit}, {"teacher": "a"}, ValueError, "module must hold a supported ViT besides its teacher"),
        (
            lambda vit: {"student": vit, "teacher": timm.create_model("resnet18", num_classes=0)},
            {"teacher": "teacher"},
            TypeError,
            "teacher must be a supported ViT, got timm.models.resnet.ResNet",
        ),
        (
            lambda vit: {"backbone": timm.create_model("resnet18", num_classes=0)},
            {},
            ValueError,
            r"found none in Module, which holds \.backbone \(ResNet\); if it is made later .*Supported: .*timm",
        ),
    ],
)
def test_what_is_unclear_or_unsupported_is_refused_and_left_untouched(
    children: Any, arguments: dict[str, Any], error: type[Exception], message: str, vit: nn.Module
) -> None:
    module = holding(**children(vit))
    before = {name: (type(child), len(child._forward_pre_hooks)) for name, child in module.named_modules()}
    with pytest.raises(error, match=message):
        accelerate(module, **arguments)
    assert {name: (type(child), len(child._forward_pre_hooks)) for name, child in module.named_modules()} == before
    assert not is_compressed(module)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got 'backbone'"):
        accelerate("backbone")  # type: ignore[type-var]


# Training with Lightly's heads and losses


def train(module: Any, views: list[Tensor], steps: int = 12) -> list[float]:
    optimizer = torch.optim.AdamW([weight for weight in module.parameters() if weight.requires_grad], lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = module.train().loss(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", [SimCLR, MoCo])
@pytest.mark.parametrize("masked", [False, True], ids=["timm", "Lightly's masked ViT"])
def test_two_view_methods_learn_while_compressed(kind: Any, masked: bool, vit: nn.Module, note_tokens: Build) -> None:
    module = accelerate(kind(MaskedVisionTransformerTIMM(vit) if masked else vit), HALF_AND_16)
    tokens = [note_tokens(encoder) for encoder in encoders(module)]
    losses = train(module, crops(32, 32))
    assert tokens[0] == [1 + 2] * 2 * 12  # 4 patches of 16 px, half of them
    assert tokens[1:] == ([[1 + 4] * 2 * 12] if kind is MoCo else [])
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("strategy", [Strategy(0.5), Strategy(0.5, 16), Strategy(0.9, 16)], ids=str)
def test_dino_compresses_each_view_by_its_own_size(strategy: Strategy, vit: nn.Module, note_tokens: Build) -> None:
    module = accelerate(DINO(vit), strategy)
    student, teacher = (note_tokens(encoder) for encoder in encoders(module))
    losses = train(module, crops(32, 32, 16, 16, 16))
    seen = {
        Strategy(0.5): ([9, 9, 3, 3, 3], [17, 17]),  # 16 patches and 4
        Strategy(0.5, 16): ([3, 3, 2, 2, 2], [5, 5]),  # 4 patches and 1
        Strategy(0.9, 16): ([2, 2, 2, 2, 2], [5, 5]),  # never none
    }[strategy]
    assert student == seen[0] * 12
    assert teacher == seen[1] * 12
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_concatenated_views_keep_their_own_tokens_each(vit: nn.Module, note_tokens: Build) -> None:
    module = accelerate(BenchmarkDINO(vit), Strategy(0.5))
    student, teacher = note_tokens(module.student_backbone.vit), note_tokens(module.backbone.vit)
    losses = train(module, crops(32, 32, 16, 16))
    assert student == [9, 3] * 12
    assert teacher == [17] * 12
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_compression_leaves_the_momentum_update_alone(vit: nn.Module) -> None:
    module = accelerate(MoCo(vit), HALF_AND_16)
    before = copy.deepcopy(module.backbone_momentum.state_dict())
    train(module, crops(32, 32), steps=1)
    for name, value in module.backbone_momentum.state_dict().items():
        torch.testing.assert_close(value, before[name])  # student and teacher were still the same
    student = copy.deepcopy(module.backbone.state_dict())
    module.loss(crops(32, 32))
    for name, value in module.backbone_momentum.state_dict().items():
        torch.testing.assert_close(value, 0.99 * before[name] + 0.01 * student[name])


def test_lightlys_dino_views_go_through(vit: nn.Module, note_tokens: Build) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8))
    transform = DINOTransform(global_crop_size=32, local_crop_size=16, n_local_views=4)
    samples = [transform(photo) for _ in range(4)]
    views = [torch.stack(view) for view in zip(*samples, strict=True)]
    module = accelerate(DINO(vit), HALF_AND_16)
    student, teacher = (note_tokens(encoder) for encoder in encoders(module))
    module.train().loss(views).backward()
    assert student == [3, 3, 2, 2, 2, 2]
    assert teacher == [5, 5]
    assert module.student_backbone.patch_embed.proj.weight.grad.abs().sum() > 0


def test_a_plain_loop_follows_the_schedule(vit: nn.Module, note_tokens: Build) -> None:
    module = accelerate(MoCo(vit), schedules.Linear(Strategy(0.75), Strategy()))
    student, teacher = (note_tokens(encoder) for encoder in encoders(module))
    scheduler = SequenceScheduler(module, total_steps=4)
    for _ in range(4):
        module.train().loss(crops(32, 32)).backward()
        scheduler.step()
    assert student == [5, 5, 8, 8, 11, 11, 17, 17]  # 1 + 16 * (1/4, 7/16, 10/16, and the end)
    assert teacher == [17] * 8
    assert get_strategy(module) == Strategy()


def test_evaluation_while_accelerated_is_that_of_the_plain_module(vit: nn.Module) -> None:
    module = MoCo(vit).eval()
    (views,) = crops(32)
    plain = module.backbone(views), module.backbone_momentum(views)
    accelerate(module, HALF_AND_16).eval()
    assert torch.equal(module.backbone(views), plain[0])
    assert torch.equal(module.backbone_momentum(views), plain[1])


# Under Lightning, as Lightly's examples run


def test_one_line_accelerates_lightlys_simclr_example(
    pl: Any, make_trainer: Build, vit: nn.Module, note_tokens: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    class Example(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = vit
            self.projection_head = SimCLRProjectionHead(32, 32, 16)
            self.criterion = NTXentLoss()

        def forward(self, x: Tensor) -> Tensor:
            return self.projection_head(self.backbone(x).flatten(start_dim=1))

        def training_step(self, batch: Any, batch_index: int) -> Tensor:
            x0, x1 = batch[0]
            return self.criterion(self.forward(x0), self.forward(x1))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.06)

    class Photos(TensorDataset):
        transform = SimCLRTransform(input_size=32)

        def __getitem__(self, index: int) -> Any:
            pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            return self.transform(Image.fromarray(pixels)), 0

    module = Example()
    accelerate(module)
    tokens = note_tokens(module.backbone)
    trainer = make_trainer(max_epochs=5, enable_progress_bar=True)
    trainer.fit(module, DataLoader(Photos(torch.zeros(16)), batch_size=4))
    # The default plan over 20 steps of two views: from 2 of 4 large patches to all 16 of the model's own.
    assert tokens == [3] * 38 + [17] * 2
    printed = capsys.readouterr()
    assert re.search(r"tokens[:=]\s*17\.0", printed.out + printed.err)


def test_compress_without_a_pair_leaves_the_teacher_to_itself(vit: nn.Module) -> None:
    module = MoCo(vit)
    compress(module.backbone, HALF_AND_16)
    assert not is_compressed(module.backbone_momentum)


def test_it_is_one_of_the_cores_verbs() -> None:
    assert seqcompress.accelerate is accelerate
