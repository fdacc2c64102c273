"""MoCo-v3, SimCLR and DINO from Lightly's heads and, but for MoCo-v3's, its losses.

None knows anything of sequence compression.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from images import View
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MethodSettings:
    """What a method is made with, beside its encoder.

    Attributes:
        hidden: width of the heads' hidden layers.
        out: of a projection.
        prototypes: outputs of DINO's head.
        local_views: DINO's small views of an image.
        teacher_temperature: of DINO's teacher, after a rise from 0.04 during the first tenth of the run.
        head_norm: whether DINO's head has batch norm.
    """

    hidden: int
    out: int
    prototypes: int
    local_views: int
    teacher_temperature: float
    head_norm: bool


class Method(nn.Module):
    """What a training loop needs of a method.

    Attributes:
        backbone: the encoder that is trained.
        backbone_momentum: its teacher, or None.
        teacher_views: how many full views the teacher sees.
    """

    teacher_views = 0

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone_momentum: nn.Module | None = None

    def views(self, size: int, least: float) -> list[View]:
        """What is cropped of an image: ``least`` is the smallest share of its area."""
        blurred = size >= 64  # as usual, pictures of 32 px are not blurred
        return [
            View(size, (least, 1.0), blur=1.0 * blurred),
            View(size, (least, 1.0), blur=0.1 * blurred, solarize=0.2 * blurred),
        ]

    def loss(self, views: list[Tensor], progress: float) -> Tensor:
        """Loss of a batch of views, each (B, 3, H, W), ``progress`` of the run being done."""
        raise NotImplementedError

    def after_backward(self, progress: float) -> None:
        """What happens to gradients before the optimizer's step."""

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher, if there is one, towards the student."""


class MoCoV3(Method):
    """MoCo-v3: each view's query must find the other view's key among the batch's keys (arXiv 2104.02057)."""

    teacher_views = 2
    temperature = 0.2

    def __init__(self, backbone: VisionTransformer, settings: MethodSettings) -> None:
        super().__init__(backbone)
        self.backbone_momentum = _teacher(backbone)
        self.projection_head = MoCoProjectionHead(
            backbone.embed_dim, settings.hidden, settings.out, num_layers=3, batch_norm=True
        )
        self.prediction_head = MoCoProjectionHead(
            settings.out, settings.hidden, settings.out, num_layers=2, batch_norm=True
        )
        self.projection_head_momentum = _teacher(self.projection_head)

    def loss(self, views: list[Tensor], progress: float) -> Tensor:
        queries = [self.prediction_head(self.projection_head(seen)) for seen in _features(self.backbone, views)]
        with torch.no_grad():
            keys = [self.projection_head_momentum(seen) for seen in _features(self.backbone_momentum, views)]
        return self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        # Lightly's NTXentLoss holds queries against each other, too, which MoCo-v3 does not.
        alike = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T
        own = torch.arange(len(queries), device=queries.device)
        return 2 * self.temperature * F.cross_entropy(alike / self.temperature, own)

    def update_teacher(self, momentum: float) -> None:
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)


class SimCLR(Method):
    """SimCLR: two views of an image must find each other in the batch (arXiv 2002.05709)."""

    def __init__(self, backbone: VisionTransformer, settings: MethodSettings) -> None:
        super().__init__(backbone)
        self.projection_head = SimCLRProjectionHead(backbone.embed_dim, settings.hidden, settings.out)
        self.criterion = NTXentLoss(temperature=0.2)

    def loss(self, views: list[Tensor], progress: float) -> Tensor:
        first, second = (self.projection_head(self.backbone(view)) for view in views)
        return self.criterion(first, second)


class DINO(Method):
    """DINO: the student's every view must predict the teacher's two global views (arXiv 2104.14294).

    The teacher's temperature rises, and the last layer rests, during the first tenth and hundredth of the run.
    """

    teacher_views = 2

    def __init__(self, backbone: VisionTransformer, settings: MethodSettings) -> None:
        super().__init__(backbone)
        self.settings = settings
        self.backbone_momentum = _teacher(backbone)
        # The weight norm in this head cannot be copied, so the teacher's is a new one with the same weights.
        widths = (backbone.embed_dim, settings.hidden, settings.out, settings.prototypes)
        self.head, self.head_momentum = (DINOProjectionHead(*widths, batch_norm=settings.head_norm) for _ in range(2))
        self.head_momentum.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.head_momentum)
        self.criterion = DINOLoss(output_dim=settings.prototypes)

    def views(self, size: int, least: float) -> list[View]:
        blurred = size >= 64
        patch = self.backbone.patch_embed.patch_size[0]
        local = max(patch, round(size * 96 / 224 / patch) * patch)
        between = max(0.25, least)
        return [
            View(size, (between, 1.0), blur=1.0 * blurred),
            View(size, (between, 1.0), blur=0.1 * blurred, solarize=0.2 * blurred),
            *(View(local, (0.05, between), blur=0.5 * blurred) for _ in range(self.settings.local_views)),
        ]

    def loss(self, views: list[Tensor], progress: float) -> Tensor:
        teacher = [self.head_momentum(seen) for seen in _features(self.backbone_momentum, views[:2])]
        student = [self.head(seen) for seen in _features(self.backbone, views)]
        temperature = 0.04 + (self.settings.teacher_temperature - 0.04) * min(1.0, progress / 0.1)
        return self.criterion(teacher, student, teacher_temp=temperature)

    def after_backward(self, progress: float) -> None:
        if progress < 0.01:
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    def update_teacher(self, momentum: float) -> None:
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.head, self.head_momentum, m=momentum)


METHODS: dict[str, type[Method]] = {"mocov3": MoCoV3, "simclr": SimCLR, "dino": DINO}


def _features(encoder: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """Of each view (B, 3, H, W); neighbours of one size in one call."""
    found: list[Tensor] = []
    for _, alike in itertools.groupby(views, key=lambda view: view.shape):
        of_one_size = list(alike)
        found += encoder(torch.cat(of_one_size)).chunk(len(of_one_size))
    return found


def _teacher(module: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(module)
    deactivate_requires_grad(teacher)
    return teacher
