"""Every example of Lightly's ``examples/pytorch_lightning``, its own source, with a ViT in the place of its ResNet.

Their transforms, heads, losses, memory banks and training steps are run under a real Trainer, on generated images.
The sources are no part of Lightly's package: ``SEQCOMPRESS_LIGHTLY_SOURCE`` names a checkout of its repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import seqcompress
from seqcompress import Strategy, schedules

SOURCES = Path(os.environ.get("SEQCOMPRESS_LIGHTLY_SOURCE", "")) / "examples" / "pytorch_lightning"

pytestmark = pytest.mark.skipif(
    not (SOURCES / "simclr.py").exists(),
    reason="SEQCOMPRESS_LIGHTLY_SOURCE does not name a checkout of Lightly's repository (docs/lightly.md)",
)

# Views are of 32 px (16 patches of 8 px; 4 of 16 px), or of 224 and 96 px (196 and 36 patches of 16 px; 49 and 9 of
# 32 px). For two steps both, for one larger patches alone, for one nothing: tokens of a view, class token included.
STUDENT = {32: [3, 3, 5, 17], 224: [25, 25, 50, 197], 96: [5, 5, 10, 37]}
TEACHER = {32: [5, 5, 5, 17], 224: [50, 50, 50, 197]}

PAIR, MULTI_CROP = [32, 32], [224, 224, *[96] * 6]

# What a training step puts through the student and through the teacher, by the sides of the views.
TRAINED: dict[str, tuple[list[int], list[int]]] = {
    "barlowtwins": (PAIR, []),
    "byol": (PAIR, PAIR),
    "dcl": (PAIR, []),
    "dino": (MULTI_CROP, [224, 224]),
    "fastsiam": (PAIR * 2, []),
    "fda": (PAIR, []),
    "frossl": (PAIR, []),
    "lejepa": (MULTI_CROP, []),
    "mmcr": (PAIR * 4, PAIR * 4),
    "moco": ([32], [32]),
    "nnclr": (PAIR, []),
    "simclr": (PAIR, []),
    "simsiam": (PAIR, []),
    "smog": ([32], [32]),
    "swav": (MULTI_CROP, []),
    "swav_queue": (MULTI_CROP, []),
    "tico": ([32], [32]),
    "vicreg": (PAIR, []),
}
# Their losses take a map of patches: sides of views, and tokens while patches are larger.
MAPS = {"densecl": ([32, 32], [5, 5]), "detcon": ([96, 96], [10, 10]), "vicregl": ([224, 224], [50, 50])}
MASKED = ("aim", "capi", "mae", "msn", "pixio", "pmsn", "simmim")
MASKED_ON_THE_GRID = ("dinov2", "ibot")  # run in test_masked_methods.py
NO_EXAMPLE = ("ijepa",)  # one line, which says so


class Images(Dataset[Any]):
    """In the place of CIFAR-10 and Pascal VOC: sixteen images, the same ones whenever they are looked up."""

    def __init__(self, root: str, download: bool, transform: Callable[..., Any], target_transform: Any = None) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
        self.images = [Image.fromarray(image) for image in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), 0


class Noted:
    """The sides in pixels of the views that an encoder is given in training, and the tokens at its first block.

    What is copied from the encoder meanwhile is told apart from it.
    """

    def __init__(self, vit: Any) -> None:
        self.own = vit
        self.seen: list[tuple[bool, int]] = []
        self.sides: list[int] = []
        vit.patch_embed.register_forward_pre_hook(self._note_view)
        vit.blocks[0].register_forward_pre_hook(self._note)

    def __deepcopy__(self, memo: dict[int, Any]) -> Noted:
        return self

    def _note_view(self, embed: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.sides.append(args[0].shape[-1])

    def _note(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append((block is self.own.blocks[0], args[0].shape[1]))

    @property
    def tokens(self) -> list[int]:
        return [tokens for is_own, tokens in self.seen if is_own]

    @property
    def tokens_of_copies(self) -> list[int]:
        return [tokens for is_own, tokens in self.seen if not is_own]


class Map(nn.Module):
    """A ViT whose patches are a map (B, C, H, W), as the layers of a ResNet are before they are pooled."""

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, views: Tensor) -> Tensor:
        (features,) = self.vit.forward_intermediates(views, indices=1, norm=True, intermediates_only=True)
        return features


def example(name: str) -> tuple[Any, Any]:
    """The module and the loader that an example makes, with a ViT of two blocks and images that cost nothing."""
    source = (SOURCES / f"{name}.py").read_text(encoding="utf-8").partition("\naccelerator = ")[0]
    is_small = re.search(r"input_size=32\b|crop_sizes=\(32\b", source) is not None

    def vit() -> Any:
        size = {"img_size": 32, "patch_size": 8} if is_small else {"img_size": 224, "patch_size": 16}
        return timm.create_model(
            "vit_tiny_patch16_224", **size, embed_dim=512, depth=2, num_heads=8, num_classes=0, dynamic_img_size=True
        )

    for pattern, ours in (
        (r"nn\.Sequential\(\s*\*list\(resnet\.children\(\)\)\[:-1\](, nn\.AdaptiveAvgPool2d\(1\)\s*)?\)", "make_vit()"),
        (r"nn\.Sequential\(\*list\(resnet\.children\(\)\)\[:-2\]\)", "Map(make_vit())"),
        (r"torchvision\.datasets\.(CIFAR10|VOCDetection)\(", "Images("),
        (r"batch_size=\d+", "batch_size=4"),
        (r"num_workers=\d+", "num_workers=0"),
        (r"= vit_small_patch16_224\(", "= vit_small_patch16_224(depth=2, "),
        (r"\b(depth|num_layers)=(12|32)", r"\1=2"),
        (r"self\.global_step % 300 == 0", "self.global_step == 1"),  # SMoG: its teacher is made anew
        (r"self\.n_groups = 300", "self.n_groups = 4"),
        (r"memory_bank_size = 10000", "memory_bank_size = 8"),
        (r"lr=0\.06", "lr=1e-3"),  # for batches of 256
    ):
        source = re.sub(pattern, ours, source)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": name, "Images": Images, "Map": Map, "make_vit": vit}
    exec(compile(source, f"{name}.py", "exec"), names)
    return names["model"], names["dataloader"]


def train(module: Any, loader: Any, tmp_path: Path) -> list[float]:
    """Four steps; returns their losses."""
    losses: list[float] = []

    class Noting(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(float(outputs["loss"]))

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, callbacks=[Noting()], **quiet
    )
    trainer.fit(module, loader)
    return losses


def plan(patch_size: int, token_dropout: float = 0.5) -> schedules.Stepwise:
    scaled = 2 * patch_size
    return schedules.Stepwise({0.0: Strategy(token_dropout, scaled), 0.5: Strategy(0.0, scaled), 0.75: Strategy()})


def encoders(module: nn.Module) -> list[Any]:
    """Student and teacher, if it has one: the frozen one."""
    vits = [child for child in module.modules() if isinstance(child, timm.models.VisionTransformer)]
    return sorted(vits, key=lambda vit: not next(vit.parameters()).requires_grad)


def steps_of(sides: list[int], tokens: dict[int, list[int]]) -> list[int]:
    """What is seen in four steps of so many views each."""
    return [tokens[side][step] for step in range(4) for side in sides]


@pytest.mark.parametrize("name", TRAINED)
def test_an_example_trains_on_the_tokens_of_the_plan(name: str, tmp_path: Path) -> None:
    module, loader = example(name)
    vits = encoders(module)
    noted = [Noted(vit) for vit in vits]
    before = [parameter.clone() for parameter in vits[0].parameters()]

    seqcompress.accelerate(module, plan(vits[0].patch_embed.patch_size[0]))  # the one line
    losses = train(module, loader, tmp_path)

    through_student, through_teacher = TRAINED[name]
    assert noted[0].sides == through_student * 4 or name == "smog"
    assert noted[0].tokens == steps_of(through_student, STUDENT)
    assert len(vits) == (2 if through_teacher else 1)
    if name == "smog":
        # Made anew in the second step, from the student: it runs plain in that one, which says so, and is a teacher
        # from the next on.
        assert noted[1].tokens + noted[0].tokens_of_copies == [5, 17, 5, 17]
    elif through_teacher:
        assert noted[1].tokens == steps_of(through_teacher, TEACHER)
        assert noted[1].sides == through_teacher * 4
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert not all(torch.equal(*pair) for pair in zip(before, vits[0].parameters(), strict=True))


@pytest.mark.parametrize("name", MAPS)
def test_an_example_whose_loss_takes_a_map_trains_on_larger_patches_and_refuses_to_drop_tokens(
    name: str, tmp_path: Path
) -> None:
    module, loader = example(name)
    seqcompress.accelerate(module, plan(encoders(module)[0].patch_embed.patch_size[0]))
    with pytest.raises(RuntimeError, match="dropped tokens leave no feature map"):
        train(module, loader, tmp_path)

    module, loader = example(name)
    student = encoders(module)[0]
    noted = Noted(student)
    scales = plan(student.patch_embed.patch_size[0], token_dropout=0.0)
    if name == "densecl":  # its second view goes through the student as well, without gradients
        seqcompress.compress(student, scales, when="train")
    else:
        seqcompress.accelerate(module, scales)
    losses = train(module, loader, tmp_path)

    sides, scaled = MAPS[name]
    plain = [(side // student.patch_embed.patch_size[0]) ** 2 + 1 for side in sides]
    assert noted.sides == sides * 4
    assert noted.tokens == [*scaled * 3, *plain]
    assert np.isfinite(losses).all()


def test_two_maps_of_which_one_is_made_without_gradients_are_not_matched_without_a_word(tmp_path: Path) -> None:
    module, loader = example("densecl")
    seqcompress.accelerate(module, "patch 16")
    with pytest.warns(UserWarning, match="ran in train mode without gradients"), pytest.raises(RuntimeError):
        train(module, loader, tmp_path)


@pytest.mark.parametrize("name", MASKED)
def test_an_example_that_masks_tokens_itself_ends_in_an_error_at_its_first_step(name: str, tmp_path: Path) -> None:
    module, loader = example(name)
    seqcompress.accelerate(module, "default")
    with pytest.raises((RuntimeError, ValueError)):
        train(module, loader, tmp_path)
    assert module.trainer.global_step == 0


def test_every_example_is_run_here_and_has_its_row_on_the_page() -> None:
    names = {path.stem for path in SOURCES.glob("*.py")}
    assert names == {*TRAINED, *MAPS, *MASKED, *MASKED_ON_THE_GRID, *NO_EXAMPLE}
    page = (Path(__file__).parents[2] / "docs" / "lightly.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `.*?\|", page, re.MULTILINE)))
    assert names <= set(rows)
