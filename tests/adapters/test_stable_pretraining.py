"""stable-pretraining's own MoCov3, SimCLR and DINO, run by its own Manager and accelerated by one line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import pytest
import timm
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import seqcompress
from seqcompress import Strategy
from seqcompress.schedules import Online, Stepwise

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("stable_pretraining") is None,
    reason="stable-pretraining is not installed: it brings many packages of its own (docs/stable-pretraining.md)",
)

EPOCHS = 5
STAGED = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy(0.0, 16), 0.75: Strategy(0.5), 0.95: Strategy()})
# Four stages over 20 steps, for 32 px and patches of 8 px: patches of 16 px with and without dropout, then of 8.
STUDENT = [3] * 10 + [5] * 5 + [9] * 4 + [17]
TEACHER = [5] * 15 + [17] * 5
SMALL = [2] * 15 + [3] * 4 + [5]  # of 16 px, which have one patch of 16 px, or four of 8
FULL = 17

Build = Callable[..., Any]


class Images(Dataset[dict[str, Any]]):
    """Sixteen images of 32 px, the same ones whenever they are looked up."""

    def __init__(self, views: int = 0, local_views: int = 0, gpu_transform: Any = None) -> None:
        self.pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        self.views = views
        self.local_views = local_views
        self.gpu_transform = gpu_transform  # what stable-pretraining runs on whole batches

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.pixels[index]
        sample: dict[str, Any] = {"image": image, "label": index % 2}
        if self.views:
            sample["views"] = [{"image": image.roll(place, -1)} for place in range(self.views)]
            sample["local"] = [image[:, place : place + 16, :16] for place in range(self.local_views)]
        return sample


def two_views_forward(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
    """What stable-pretraining's own scripts put in the place of ``forward``."""
    views = [view["image"] for view in batch["views"]] if self.training else [batch["image"]]
    output = type(self).forward(self, *views)
    label = batch["label"]
    return {"loss": output.loss, "embedding": output.embedding, "label": label.repeat(len(views))}


def dino_forward(self: Any, batch: dict[str, Any], stage: str) -> dict[str, Any]:
    if self.training:
        views = [view["image"] for view in batch["views"]]
        output = type(self).forward(self, global_views=views, local_views=batch["local"])
        return {"loss": output.loss, "embedding": output.embedding, "label": batch["label"].repeat(len(views))}
    output = type(self).forward(self, images=batch["image"])
    return {"loss": output.loss, "embedding": output.embedding, "label": batch["label"]}


class StopAfter(lightning.Callback):
    """Ends a run early, as a queue that takes its machine back does, and keeps what resuming needs."""

    def __init__(self, epochs: int, path: Path) -> None:
        self.epochs = epochs
        self.path = path

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.path)


class Noted:
    """Tokens that reach the first block of an encoder, in training and in validation."""

    def __init__(self, vit: Any) -> None:
        self.vit = vit
        self.training: list[int] = []
        self.validation: list[int] = []
        self.pixels: list[int] = []
        vit.blocks[0].register_forward_pre_hook(self._note)
        vit.register_forward_pre_hook(self._note_view)

    def _note(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        (self.training if block.training else self.validation).append(args[0].shape[1])

    def _note_view(self, vit: nn.Module, args: tuple[Tensor, ...]) -> None:
        if vit.training:
            self.pixels.append(args[0].shape[-1])


@pytest.fixture(autouse=True)
def spt(tmp_path: Path) -> Iterator[Any]:
    import stable_pretraining

    before = stable_pretraining.get_config().cache_dir
    stable_pretraining.set(cache_dir=str(tmp_path / "runs"), progress_bar="none", verbose="error")
    yield stable_pretraining
    stable_pretraining.set(cache_dir=before)


def build(name: str) -> Any:
    """One of its methods around a ViT of two blocks."""
    from stable_pretraining import methods

    torch.manual_seed(3)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,  # its modules try the encoder at 224 px
    )
    sizes: dict[str, dict[str, Any]] = {
        "MoCov3": {"projector_dims": (32, 32, 16), "predictor_hidden_dim": 32},
        "SimCLR": {"projector_dims": (32, 32, 16)},
        "DINO": {"projector_hidden_dim": 32, "projector_bottleneck_dim": 16, "n_prototypes": 32},
    }
    module = getattr(methods, name)(vit, **sizes[name])
    module.forward = types.MethodType(dino_forward if name == "DINO" else two_views_forward, module)
    module.optim = {
        "optimizer": {"type": "AdamW", "lr": 1e-3},
        "scheduler": {"type": "CosineAnnealingLR", "T_max": 20},
    }
    return module


def run(module: Any, images: Images, manager: Any = None, **settings: Any) -> lightning.Trainer:
    """Have the Manager train; returns the Trainer."""
    import stable_pretraining

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=EPOCHS, log_every_n_steps=1, **quiet, **settings)
    data = stable_pretraining.data.DataModule(
        train=DataLoader(images, batch_size=4), val=DataLoader(Images(), batch_size=8)
    )
    stable_pretraining.Manager(trainer=trainer, module=module, data=data, seed=0, **(manager or {}))()
    return trainer


TWO_RANKS = """
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(sys.argv[2]).parent))
from test_stable_pretraining import STAGED, Images, Noted, build, run, seqcompress

if __name__ == "__main__":
    module = seqcompress.accelerate(build("MoCov3"), STAGED)
    student, teacher = Noted(module.backbone.student), Noted(module.backbone.teacher)
    trainer = run(module, Images(views=2), devices=2, strategy="ddp")
    seen = {"student": student.training, "teacher": teacher.training, "weights": module.state_dict()}
    seen["budget"] = trainer.callback_metrics["seqcompress/budget"].item()
    torch.save(seen, Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt")
"""


def times(count: int, lengths: list[int]) -> list[int]:
    """One entry for each of the views that go through an encoder one after the other."""
    return [length for length in lengths for _ in range(count)]


@pytest.mark.parametrize("name", ["MoCov3", "SimCLR", "DINO"])
def test_its_methods_train_on_the_tokens_of_the_plan_and_validate_on_full_sequences(name):
    module = build(name)
    has_teacher = name != "SimCLR"
    student = Noted(module.backbone.student if has_teacher else module.backbone)
    teacher = Noted(module.backbone.teacher) if has_teacher else None

    seqcompress.accelerate(module, STAGED)  # the one line
    run(module, Images(views=2, local_views=2 if name == "DINO" else 0))

    if name == "DINO":
        assert student.training[::2] == STUDENT
        assert student.training[1::2] == SMALL
        assert teacher.training == TEACHER
    else:
        assert student.training == times(2, STUDENT)
        assert teacher is None or teacher.training == times(2, TEACHER)
    judged = teacher if teacher else student
    assert judged.validation == [FULL] * 2 * EPOCHS


def test_its_online_probe_its_queue_and_its_own_metrics_go_on_beside_ours(spt, tmp_path):
    module = build("MoCov3")
    student = Noted(module.backbone.student)
    probe = spt.callbacks.OnlineProbe(
        module,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(32, 2),
        loss=nn.CrossEntropyLoss(),
        metrics={"top1": torchmetrics.classification.MulticlassAccuracy(2)},
    )
    neighbours = spt.callbacks.OnlineKNN(
        name="knn",
        input="embedding",
        target="label",
        queue_length=32,
        input_dim=32,
        k=3,
        metrics={"top1": torchmetrics.classification.MulticlassAccuracy(2)},
    )

    seqcompress.accelerate(module, STAGED)
    trainer = run(module, Images(views=2), callbacks=[probe, neighbours])

    assert student.training == times(2, STUDENT)
    assert trainer.global_step == 20  # a probe's optimizer is not a second step
    (file,) = (tmp_path / "runs").rglob("metrics.csv")
    logged = pd.read_csv(file)
    assert logged["eval/knn_top1"].count() == EPOCHS
    assert logged["eval/probe_top1_epoch"].count() == EPOCHS
    columns = logged.set_index("step")
    assert columns["seqcompress/tokens"].dropna().groupby(level=0).last().tolist() == STUDENT
    assert columns["seqcompress/patch_size"].dropna().groupby(level=0).last().tolist() == [16.0] * 15 + [8.0] * 5


@pytest.mark.parametrize("plan", [None, STAGED])
def test_a_run_that_it_resumes_ends_with_the_weights_of_one_that_never_stopped(plan, tmp_path):
    whole = build("MoCov3")
    if plan:
        seqcompress.accelerate(whole, plan)
    run(whole, Images(views=2))

    stopped = build("MoCov3")
    if plan:
        seqcompress.accelerate(stopped, plan)
    saved = tmp_path / "saved.ckpt"
    run(stopped, Images(views=2), callbacks=[StopAfter(3, saved)])

    resumed = build("MoCov3")
    if plan:
        seqcompress.accelerate(resumed, plan)
    student = Noted(resumed.backbone.student)
    run(resumed, Images(views=2), manager={"ckpt_path": str(saved), "weights_only": False})

    assert student.training == times(2, STUDENT[12:] if plan else [FULL] * 8)
    expected = whole.state_dict()
    assert resumed.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert not all(torch.equal(value, expected[name]) for name, value in stopped.state_dict().items())


@pytest.mark.parametrize("kind", ["stacked", "one_by_one"])
def test_its_transforms_of_whole_batches_make_smaller_views(kind, spt):
    from stable_pretraining.data import gpu_transforms

    def chain():
        crop = gpu_transforms.GPURandomResizedCrop(32)
        blur = gpu_transforms.GPUGaussianBlur(kernel_size=5, p=1.0)
        normalize = gpu_transforms.GPUNormalize(mean=[0.5] * 3, std=[0.5] * 3)
        return gpu_transforms.GPUCompose([crop, blur, normalize], compile=False)

    augment = (
        gpu_transforms.StackedMultiView(chain(), n_views=2)
        if kind == "stacked"
        else gpu_transforms.MultiView([chain(), chain()])
    )
    module = build("MoCov3")
    student, teacher = Noted(module.backbone.student), Noted(module.backbone.teacher)

    seqcompress.accelerate(module, STAGED)
    seqcompress.scale_views(augment, module)
    run(module, Images(gpu_transform=augment))

    assert student.training == times(2, STUDENT)
    assert teacher.training == times(2, TEACHER)
    # It makes a batch before Lightning tells callbacks of it, so the first one of a stage has the size of the last.
    assert student.pixels == teacher.pixels == times(2, [16] * 16 + [32] * 4)


def test_a_blur_before_its_crop_is_refused_since_it_is_measured_in_pixels_of_the_image(spt):
    from stable_pretraining.data import gpu_transforms

    steps = [gpu_transforms.GPUGaussianBlur(kernel_size=5), gpu_transforms.GPURandomResizedCrop(32)]
    module = seqcompress.accelerate(build("SimCLR"), STAGED)
    with pytest.raises(ValueError, match="RandomGaussianBlur before what resizes the image"):
        seqcompress.scale_views(gpu_transforms.GPUCompose(steps, compile=False), module)


@pytest.mark.timeout(300)
def test_two_processes_train_one_model_and_count_one_budget(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS, encoding="utf-8")
    environment = {**os.environ, "SPT_CACHE_DIR": str(tmp_path / "runs")}
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__))]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one["student"] == other["student"] == times(2, [3] * 5 + [5] * 3 + [9] + [17])
    assert one["teacher"] == other["teacher"]
    assert one["budget"] == other["budget"]
    learned = [name for name, value in one["weights"].items() if "running" not in name]
    assert len(learned) > 40
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in learned)


def test_its_functions_for_a_module_of_ones_own_train_on_the_tokens_of_the_plan(spt) -> None:
    from stable_pretraining.forward import byol

    def made() -> Any:
        vit = build("SimCLR").backbone
        return spt.Module(
            forward=byol,
            backbone=spt.TeacherStudentWrapper(vit),
            projector=spt.TeacherStudentWrapper(nn.Linear(32, 16)),
            predictor=nn.Linear(16, 16),
            byol_loss=spt.losses.BYOLLoss(),
            optim={"optimizer": {"type": "AdamW", "lr": 1e-3}, "scheduler": {"type": "CosineAnnealingLR", "T_max": 20}},
        )

    weights = []
    for plan in (None, seqcompress.Strategy()):
        plain = made() if plan is None else seqcompress.accelerate(made(), plan)
        run(plain, Images(views=2))
        weights.append(plain.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    module = seqcompress.accelerate(made(), STAGED)
    student, teacher = Noted(module.backbone.student), Noted(module.backbone.teacher)
    run(module, Images(views=2))
    assert student.training == times(2, STUDENT)
    assert teacher.training == times(2, TEACHER)
    assert set(teacher.validation) == {FULL}


@pytest.mark.parametrize("name", ["MSN", "SimMIM", "BEiT"])
@pytest.mark.parametrize("strategy", [seqcompress.Strategy(0.5), seqcompress.Strategy(0.0, 16)], ids=str)
def test_methods_that_mask_tokens_themselves_are_refused(strategy: seqcompress.Strategy, name: str) -> None:
    from stable_pretraining import methods

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0)
    sizes = {"image_size": 32} if name == "MSN" else {"image_size": 32, "patch_size": 8}
    module = seqcompress.accelerate(getattr(methods, name)(vit, **sizes).train(), strategy)
    views = Images().pixels[:4]
    with pytest.raises(RuntimeError, match="cannot be combined with compression"):
        module(views, views) if name == "MSN" else module(views)


@pytest.mark.parametrize("name", ["MAE", "IJEPA"])
def test_methods_that_leave_tokens_out_say_that_they_train_plain(name: str) -> None:
    from stable_pretraining import methods

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, num_classes=0)
    sizes = {"decoder_depth": 1} if name == "MAE" else {"predictor_depth": 1}
    module = getattr(methods, name)(vit, **sizes).train()
    views = Images().pixels[:4]
    blocks = next(child.blocks for child in module.modules() if isinstance(child, timm.models.VisionTransformer))
    seen: list[int] = []
    blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    torch.manual_seed(1)
    plain = module(views).loss
    seqcompress.accelerate(module, seqcompress.Strategy(0.5, 8))
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="training is uncompressed: the blocks of a compressed encoder are") as told:
        losses = [module(views).loss for _ in range(2)]
    assert torch.equal(losses[0], plain)
    assert len([one for one in told if "training is uncompressed" in str(one.message)]) == 1
    assert seen[1] == seen[0] < 65


@pytest.mark.parametrize(
    ("plan", "batch", "line"),
    [
        (
            Online(STAGED),
            None,
            "backbone: cannot be measured, and goes on with its preset: its training_step optimizes by hand",
        ),
        (STAGED, "merge", "batch='merge': goes on without, since its training_step optimizes by hand"),
    ],
)
def test_what_its_module_does_not_allow_is_said_in_a_line_and_the_preset_is_run(plan, batch, line, caplog):
    module = build("SimCLR")
    student = Noted(module.backbone)
    seqcompress.accelerate(module, plan, batch=batch)
    with caplog.at_level("INFO", "lightning.pytorch.seqcompress"):
        run(module, Images(views=2))
    assert student.training == times(2, STUDENT)
    told = [record.getMessage() for record in caplog.records if "by hand" in record.getMessage()]
    assert told == [f"seqcompress: {line}"]
