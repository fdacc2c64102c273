"""MoCo (version 3), SimCLR and DINO in a few lines each, from Lightly's heads and losses.

Each is a module with a ``backbone``, a ``backbone_momentum`` if the method has one, ``loss(views, epoch)``,
``after_backward(epoch)`` and ``update_teacher(momentum)``. None knows anything of sequence compression.
"""

from __future__ import annotations

import copy

from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def small_vit(image_size: int, patch_size: int) -> VisionTransformer:
    """A ViT for small grayscale images, small enough for a CPU."""
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=1,
        num_classes=0,
        embed_dim=64,
        depth=4,
        num_heads=2,
        dynamic_img_size=True,  # DINO's local views are smaller
    )


class Method(nn.Module):
    """What the training loop needs of a method."""

    def __init__(self, backbone: VisionTransformer, *, has_teacher: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.backbone_momentum = _teacher(backbone) if has_teacher else None

    def loss(self, views: list[Tensor], epoch: int) -> Tensor:
        """Loss of a batch of views, each (B, 1, H, W)."""
        raise NotImplementedError

    def after_backward(self, epoch: int) -> None:
        """What happens to gradients before the optimizer's step."""

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher, if there is one, towards the student."""


class MoCo(Method):
    """MoCo-v3: each view's query must find the other view's key among the batch's (arXiv 2104.02057)."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__(backbone, has_teacher=True)
        dim = backbone.embed_dim
        self.projection_head = MoCoProjectionHead(dim, 256, 64, num_layers=3, batch_norm=True)
        self.prediction_head = MoCoProjectionHead(64, 256, 64, num_layers=2, batch_norm=True)
        self.projection_head_momentum = _teacher(self.projection_head)
        self.criterion = NTXentLoss(temperature=0.2)

    def loss(self, views: list[Tensor], epoch: int) -> Tensor:
        queries = [self.prediction_head(self.projection_head(self.backbone(view))) for view in views]
        keys = [self.projection_head_momentum(self.backbone_momentum(view)).detach() for view in views]
        return 0.5 * (self.criterion(queries[0], keys[1]) + self.criterion(queries[1], keys[0]))

    def update_teacher(self, momentum: float) -> None:
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)


class SimCLR(Method):
    """SimCLR: two views of an image must find each other in the batch (arXiv 2002.05709)."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__(backbone, has_teacher=False)
        self.projection_head = SimCLRProjectionHead(backbone.embed_dim, 256, 64)
        self.criterion = NTXentLoss(temperature=0.2)

    def loss(self, views: list[Tensor], epoch: int) -> Tensor:
        first, second = (self.projection_head(self.backbone(view)) for view in views)
        return self.criterion(first, second)


class DINO(Method):
    """DINO: the student's every view must predict the teacher's global views (arXiv 2104.14294)."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__(backbone, has_teacher=True)
        # The weight norm in this head cannot be copied, so the teacher's is a new one with the same weights.
        self.head, self.head_momentum = (
            DINOProjectionHead(backbone.embed_dim, 256, 64, 1024, freeze_last_layer=1) for _ in range(2)
        )
        self.head_momentum.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.head_momentum)
        self.criterion = DINOLoss(output_dim=1024, warmup_teacher_temp_epochs=5)

    def loss(self, views: list[Tensor], epoch: int) -> Tensor:
        teacher = [self.head_momentum(self.backbone_momentum(view)) for view in views[:2]]
        student = [self.head(self.backbone(view)) for view in views]
        return self.criterion(teacher, student, epoch=epoch)

    def after_backward(self, epoch: int) -> None:
        self.head.cancel_last_layer_gradients(epoch)

    def update_teacher(self, momentum: float) -> None:
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.head, self.head_momentum, m=momentum)


METHODS: dict[str, type[Method]] = {"moco": MoCo, "simclr": SimCLR, "dino": DINO}


def _teacher(module: nn.Module) -> nn.Module:
    teacher = copy.deepcopy(module)
    deactivate_requires_grad(teacher)
    return teacher
