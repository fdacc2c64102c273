"""lightly-train's own ``pretrain``, unmodified, with a ViT that was compressed before: one line, and no other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import seqcompress
from seqcompress import Strategy
from seqcompress.gradients import online
from seqcompress.schedules import Constant, Online, Stepwise

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightly_train") is None,
    reason="lightly-train is not installed: it brings many packages of its own (docs/lightly-train.md)",
)

EPOCHS = 5
# Four stages over 20 steps, for views of 4 x 4 patches: patches twice as large with and without dropout, then own.
STUDENT = [3] * 10 + [5] * 5 + [9] * 4 + [17]
TEACHER = [5] * 15 + [17] * 5
SMALL = [2] * 15 + [3] * 4 + [5]  # local views of 2 x 2 patches, or one
FULL = 17


def staged(patch: int = 8) -> Stepwise:
    """These four stages, for a ViT with this patch size."""
    large = 2 * patch
    return Stepwise({0.0: Strategy(0.5, large), 0.5: Strategy(0.0, large), 0.75: Strategy(0.5), 0.95: Strategy()})


class BrokenOffError(RuntimeError):
    """What ends a run early, as a machine that fails does."""


class Noted:
    """Tokens at the first block, for the ViT that the user holds and for what lightly-train has copied from it.

    A hook as an object of a class of this file: lightly-train copies the ViT and pickles it into checkpoints.
    """

    seen: dict[int, list[int]] = {}
    in_eval: dict[int, list[int]] = {}
    stop_after: int | None = None

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        tokens: Tensor = args[0][0] if isinstance(args[0], list) else args[0]  # Meta's blocks may take lists of crops
        if tokens.is_meta:  # those of our budget, which counts without running
            return
        noted = Noted.seen if block.training else Noted.in_eval
        noted.setdefault(id(block), []).append(tokens.shape[1])
        if Noted.stop_after is not None and len(noted[id(block)]) > Noted.stop_after:
            raise BrokenOffError


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIGHTLY_TRAIN_EVENTS_DISABLED", "1")  # it would tell its makers that a run has started
    Noted.seen, Noted.in_eval, Noted.stop_after = {}, {}, None
    yield
    Noted.stop_after = None


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    make_photos(folder)
    return folder


def make_photos(folder: Path) -> None:
    """Sixty-four JPEG files: four batches of 16."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(64):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.jpg")


def timm_vit() -> Any:
    torch.manual_seed(3)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,
    )
    vit.blocks[0].register_forward_pre_hook(Noted())
    return vit


def dinov2_vit() -> Any:
    from lightly_train._models.dinov2_vit.dinov2_vit_package import DINOv2ViTPackage  # as its own log shows it

    vit = DINOv2ViTPackage.get_model("_vittest14", model_args={"img_size": 56})
    vit.blocks[0].register_forward_pre_hook(Noted())
    return vit


def dinov3_vit() -> Any:
    from lightly_train._models.dinov3.dinov3_package import DINOv3Package

    vit = DINOv3Package.get_model("_vittest16", model_args={"patch_size": 16})
    vit.blocks[0].register_forward_pre_hook(Noted())
    return vit


def pretrain(vit: Any, data: Path, out: Path, method: str = "dino", patch: int = 8, **settings: Any) -> None:
    import lightly_train

    transform: dict[str, Any] = {"image_size": (4 * patch, 4 * patch)}
    arguments: dict[str, Any] = {"hidden_dim": 32, "output_dim": 64} if method in ("dino", "simclr") else {}
    if method == "dino":
        transform["local_view"] = {"view_size": (2 * patch, 2 * patch), "num_views": 2}
        arguments["bottleneck_dim"] = 16
    lightly_train.pretrain(
        **{
            "out": out,
            "data": data,
            "model": vit,
            "method": method,
            "epochs": EPOCHS,
            "batch_size": 16,
            "num_workers": 0,
            "accelerator": "cpu",
            "devices": 1,
            "method_args": arguments,
            "optim_args": {"lr": 1e-3},
            "transform_args": transform,
            "loggers": {"tensorboard": None},
            "trainer_args": {"log_every_n_steps": 1, "enable_model_summary": False},
            **settings,
        }
    )


def tokens_of(vit: Any) -> tuple[list[int], list[int]]:
    """In training: of the ViT that was passed to ``pretrain``, and of its copy."""
    own = id(vit.blocks[0])
    return Noted.seen.get(own, []), next((seen for block, seen in Noted.seen.items() if block != own), [])


def logged(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


TWO_RANKS = """
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(sys.argv[2]).parent))
from test_lightly_train import logged, pretrain, seqcompress, staged, timm_vit, tokens_of

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    vit = seqcompress.compress(timm_vit(), staged())
    pretrain(vit, folder / "photos", folder / "run", devices=2)
    teacher, student = tokens_of(vit)
    seen = {"student": student, "teacher": teacher, "weights": vit.state_dict()}
    torch.save(seen, folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")
"""


@pytest.mark.parametrize(
    ("build", "patch"), [(timm_vit, 8), (dinov2_vit, 14), (dinov3_vit, 16)], ids=["timm", "dinov2", "dinov3"]
)
def test_one_line_before_its_dino_shortens_the_student_and_scales_the_teacher(
    build: Callable[[], Any], patch: int, photos: Path, tmp_path: Path
) -> None:
    vit = build()
    seqcompress.compress(vit, staged(patch))  # the one line
    before = {name: value.clone() for name, value in vit.state_dict().items()}

    pretrain(vit, photos, tmp_path / "run", patch=patch)

    teacher, student = tokens_of(vit)
    assert teacher == TEACHER
    assert student[::2] == STUDENT
    assert student[1::2] == SMALL
    assert not all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())  # it has learned
    if build is timm_vit:  # others have no size of their own, by which views are counted
        assert logged(tmp_path / "run", "seqcompress/tokens") == STUDENT
    assert logged(tmp_path / "run", "seqcompress/patch_size") == [2.0 * patch] * 15 + [1.0 * patch] * 5


@pytest.mark.parametrize(("build", "patch"), [(timm_vit, 8), (dinov2_vit, 14)], ids=["timm", "dinov2"])
def test_its_simclr_drops_tokens_of_both_views(
    build: Callable[[], Any], patch: int, photos: Path, tmp_path: Path
) -> None:
    vit = seqcompress.compress(build(), staged(patch))
    pretrain(vit, photos, tmp_path / "run", "simclr", patch=patch)
    assert tokens_of(vit) == (STUDENT, [])


def test_what_its_loss_gets_of_dropped_tokens_is_the_mean_of_those_that_are_kept(photos: Path, tmp_path: Path) -> None:
    vit = seqcompress.compress(timm_vit(), Strategy(0.5))
    kept: list[Tensor] = []
    pooled: list[Tensor] = []

    class Norm(nn.LayerNorm):
        def forward(self, tokens: Tensor) -> Tensor:
            normed = super().forward(tokens)
            if not tokens.is_meta:
                kept.append(normed[:, 1:].mean(1).detach())
            return normed

    class Flatten(nn.Flatten):
        def forward(self, features: Tensor) -> Tensor:
            pooled.append(features.detach())
            return super().forward(features)

    from lightly_train._methods.simclr import simclr

    vit.norm.__class__ = Norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simclr, "Flatten", Flatten)
        patch.setattr(torch, "save", lambda *args, **kwargs: None)  # what is looked at here cannot be pickled
        pretrain(vit, photos, tmp_path / "run", "simclr", epochs=1)

    assert len(kept) == len(pooled) == 4
    for tokens, features in zip(kept, pooled, strict=True):
        assert features.shape == (32, 32, 1, 1)
        torch.testing.assert_close(features[:, :, 0, 0], tokens)


def test_distillation_scales_the_students_patches_and_refuses_to_drop_its_tokens(photos: Path, tmp_path: Path) -> None:
    teacher = timm_vit()
    vit = seqcompress.compress(timm_vit(), "default")
    with pytest.raises(ValueError, match="no token dropout for lightly-train's DistillationV3, whose loss takes a map"):
        pretrain(vit, photos, tmp_path / "refused", "distillation", method_args={"teacher": teacher})
    assert Noted.seen == {}

    seqcompress.compress(vit, patch_size=16)
    pretrain(vit, photos, tmp_path / "run", "distillation", method_args={"teacher": teacher})
    assert tokens_of(vit) == ([5] * 20, [])
    assert Noted.in_eval[id(teacher.blocks[0])] == [FULL] * 20


def test_the_other_distillations_and_what_masks_tokens_do_what_the_page_says(photos: Path, tmp_path: Path) -> None:
    teacher, settings = "dinov3/_vittest16", {"epochs": 1}
    vit = seqcompress.compress(timm_vit(), Strategy(0.5, 16))
    for method, tokens in (("distillationv1", [3] * 4), ("distillationv2", [5] * 4)):
        if method == "distillationv2":
            with pytest.raises(ValueError, match="no token dropout for lightly-train's DistillationV2"):
                pretrain(vit, photos, tmp_path / "refused", method, method_args={"teacher": teacher}, **settings)
            seqcompress.compress(vit, patch_size=16)
        Noted.seen = {}
        pretrain(vit, photos, tmp_path / method, method, method_args={"teacher": teacher}, **settings)
        assert tokens_of(vit) == (tokens, [])

    vit = seqcompress.compress(dinov2_vit(), patch_size=28)
    with pytest.raises(ValueError, match="must be uncompressed for lightly-train's DINOv2, which masks tokens"):
        pretrain(vit, photos, tmp_path / "dinov2", "dinov2", patch=14, **settings)


def test_a_wrapper_of_ones_own_gets_no_map_that_lacks_patches(photos: Path, tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        """As lightly-train documents it for models that it does not know."""

        def __init__(self, vit: Any) -> None:
            super().__init__()
            self.vit = vit

        def forward_features(self, views: Tensor) -> dict[str, Tensor]:
            return {"features": self.vit.forward_features(views)[:, 1:].transpose(1, 2).unflatten(2, (-1, 2))}

        def forward_pool(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"pooled_features": features["features"].mean((2, 3), keepdim=True)}

        def feature_dim(self) -> int:
            return 32

        def get_model(self) -> Any:
            return self.vit

    wrapper = Wrapper(seqcompress.compress(timm_vit(), "default"))
    with pytest.raises(ValueError, match=r"no token dropout for a ViT in a wrapper of your own \(Wrapper\)"):
        pretrain(wrapper, photos, tmp_path / "run", "simclr")
    assert Noted.seen == {}


def test_embeddings_from_its_checkpoint_are_those_of_the_plain_model(photos: Path, tmp_path: Path) -> None:
    import lightly_train

    vit = seqcompress.compress(timm_vit(), "patch 16")
    pretrain(vit, photos, tmp_path / "run", epochs=1)
    lightly_train.embed(
        out=tmp_path / "embedded.pt",
        data=photos,
        checkpoint=tmp_path / "run" / "checkpoints" / "last.ckpt",
        format="torch",
        image_size=32,
        num_workers=0,
        accelerator="cpu",
    )

    assert [tokens for seen in Noted.in_eval.values() for tokens in seen] == [FULL]
    plain = timm_vit()
    plain.load_state_dict(torch.load(tmp_path / "run" / "exported_models" / "exported_last.pt", weights_only=True))
    embedded = torch.load(tmp_path / "embedded.pt", weights_only=True)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        pixels = torch.tensor(np.array(Image.open(photos / embedded["filenames"][0]).convert("RGB")))
        view = ((pixels / 255 - mean) / deviation).permute(2, 0, 1)[None]
        expected = plain.eval().forward_features(view)[0, 1:].mean(0)
    torch.testing.assert_close(embedded["embeddings"][0], expected, atol=1e-2, rtol=1e-2)


def test_a_run_that_was_broken_off_goes_on_where_its_plan_was(photos: Path, tmp_path: Path) -> None:
    whole = seqcompress.compress(timm_vit(), staged())
    pretrain(whole, photos, tmp_path / "whole")

    Noted.seen, Noted.stop_after = {}, 2 * 14  # in the fourth epoch
    with pytest.raises(BrokenOffError):
        pretrain(seqcompress.compress(timm_vit(), staged()), photos, tmp_path / "run")
    Noted.seen, Noted.stop_after = {}, None
    vit = seqcompress.compress(timm_vit(), staged())
    pretrain(vit, photos, tmp_path / "run", resume_interrupted=True)

    teacher, student = tokens_of(vit)
    assert teacher == TEACHER[12:]
    assert student[::2] == STUDENT[12:]
    assert student[1::2] == SMALL[12:]
    budgets = [logged(tmp_path / name, "seqcompress/budget")[-1] for name in ("whole", "run")]
    assert budgets[0] == pytest.approx(budgets[1], rel=1e-6)


def test_weights_of_an_earlier_run_begin_a_new_plan(photos: Path, tmp_path: Path) -> None:
    first = seqcompress.compress(timm_vit(), staged())
    pretrain(first, photos, tmp_path / "first")
    Noted.seen = {}

    vit = seqcompress.compress(timm_vit(), staged())
    last = tmp_path / "first" / "checkpoints" / "last.ckpt"
    pretrain(vit, photos, tmp_path / "second", checkpoint=last, optim_args={"lr": 0.0}, epochs=1)

    assert tokens_of(vit)[0] == [5, 5, FULL, FULL]
    expected = first.state_dict()
    assert all(torch.allclose(value, expected[name], atol=1e-2) for name, value in vit.state_dict().items())


def test_the_vit_is_left_as_it_was_given_with_a_plan_that_has_been_run(photos: Path, tmp_path: Path) -> None:
    vit = seqcompress.compress(timm_vit(), staged())
    pretrain(vit, photos, tmp_path / "run")

    assert vit.patch_embed.drops_tokens
    assert vit.patch_embed.when == "grad"
    assert not vit._forward_hooks
    Noted.seen = {}
    pretrain(vit, photos, tmp_path / "again", epochs=1)
    assert tokens_of(vit) == ([FULL] * 4, [FULL, 5] * 4)
    seqcompress.set_strategy(vit, Strategy(0.5))
    with pytest.raises(RuntimeError, match="dropped tokens leave no feature map"):
        vit.train().forward_intermediates(torch.zeros(2, 3, 32, 32), output_fmt="NCHW")
    assert list(seqcompress.restore(vit).state_dict()) == list(timm_vit().state_dict())


def test_without_the_line_it_trains_as_ever(photos: Path, tmp_path: Path) -> None:
    vit = timm_vit()
    pretrain(vit, photos, tmp_path / "run", epochs=1)
    assert tokens_of(vit) == ([FULL] * 4, [FULL, 5] * 4)
    assert logged(tmp_path / "run", "seqcompress/tokens") == []


@pytest.mark.timeout(300)
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos")
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS, encoding="utf-8")
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one["student"][::2] == other["student"][::2] == STUDENT
    assert one["teacher"] == other["teacher"] == TEACHER
    assert len(one["weights"]) > 20
    assert all(torch.equal(value, other["weights"][name]) for name, value in one["weights"].items())


def test_an_online_plan_is_measured_followed_and_kept_in_the_runs_folder(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 0.0)  # always moves
    vit = seqcompress.compress(timm_vit(), Online(Constant(Strategy()), compute_share=1.0, time_share=None))
    pretrain(vit, photos, tmp_path / "run")
    found = seqcompress.Schedule.from_json(tmp_path / "run" / "seqcompress_schedule.json")
    lengths = [seqcompress.num_tokens(vit, found.at_step(step, 20), 32) for step in range(20)]
    teacher, student = tokens_of(vit)
    assert student[::2] == lengths  # the local views' between them
    assert min(lengths[:11]) == FULL > min(lengths[11:])
    assert logged(tmp_path / "run", "seqcompress/online_moves")[-1] == len(found.stages) - 1 >= 1
    assert len(teacher) == 20


def test_accumulated_batches_are_merged_while_sequences_are_short(photos: Path, tmp_path: Path) -> None:
    plan = seqcompress.Stepwise({0.0: Strategy(0.0, 16), 0.5: Strategy()})
    vit = seqcompress.compress(timm_vit(), plan, batch="merge")
    pretrain(vit, photos, tmp_path / "run", gradient_accumulation_steps=2)
    teacher, student = tokens_of(vit)
    assert teacher == student[::2] == [5] * 5 + [FULL] * 10  # ten batches at once in pairs, then ten one by one
    assert logged(tmp_path / "run", "seqcompress/batch_factor") == [2.0] * 5 + [1.0] * 5
