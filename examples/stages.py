"""Pretrain a small ViT and keep checkpoints of its stages, for gradient error analysis.

    python examples/stages.py --output stages
    python -m seqcompress.gradients examples/stages.py:at --checkpoints 0=stages/0.pt 0.25=stages/0.25.pt ...

With ``--plan`` or ``--online`` the run is accelerated, and the checkpoints are its own.
Whatever the analysis needs, ``at`` reads from the checkpoint: an example of what to write for one's own training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from data import ImageData, digits, fashion_mnist, view_loader
from evaluation import Evaluator
from lightly.utils.scheduler import cosine_schedule
from methods import METHODS, Method, small_vit
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm

from seqcompress import OnlineScheduler, PolynomialDecayLR, SequenceScheduler, Strategy, TrainingStep, compress
from seqcompress.json_files import replacing

STAGES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Training:
    """An ordinary PyTorch loop with Lightly's parts.

    Args:
        settings: ``data``, ``images`` (None for all), ``method``, ``epochs``, ``batch_size``, ``seed`` and, for
            Fashion-MNIST, ``data_dir``.
        views_seed: decides the order of the images.
    """

    def __init__(self, settings: dict[str, Any], views_seed: int) -> None:
        torch.manual_seed(settings["seed"])
        self.settings = settings
        self.data = _images(settings)
        self.model: Method = METHODS[settings["method"]](small_vit(self.data.image_size, self.data.patch_size))
        self.loader = view_loader(
            self.data, settings["method"], batch_size=settings["batch_size"], num_workers=0, seed=views_seed
        )
        self.total_steps = settings["epochs"] * len(self.loader)
        self.optimizer = AdamW([p for p in self.model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.05)
        self.decay = PolynomialDecayLR(self.optimizer, self.total_steps, warmup_steps=self.total_steps // 10)
        self.step = 0

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to; at the end, the last one."""
        return min(self.step, self.total_steps - 1) // len(self.loader)

    def loss(self, views: list[Tensor]) -> Tensor:
        """Loss of a batch of views, each (B, 1, H, W)."""
        return self.model.loss(views, self.epoch)

    def after_backward(self) -> None:
        """What a training step does once it has the gradients."""
        self.model.after_backward(self.epoch)
        self.optimizer.step()
        self.model.update_teacher(cosine_schedule(self.step, self.total_steps, 0.95, 1.0))

    def run(self, output: Path | None = None, after_step: Callable[[list[Tensor]], object] | None = None) -> None:
        """Train to the end.

        Args:
            output: folder for a checkpoint of each stage, named after its progress; None for no checkpoints.
            after_step: called with the views at the end of each step.
        """
        stages = {round(stage * self.total_steps): output / f"{stage:g}.pt" for stage in STAGES} if output else {}
        with tqdm(total=self.total_steps, desc="pretraining", unit="step") as progress:
            for views in self._views():
                self._save(stages.get(self.step))
                loss = self.loss(views)
                self.optimizer.zero_grad()
                loss.backward()
                self.after_backward()
                self.decay.step()
                self.step += 1
                if after_step is not None:
                    after_step(views)
                progress.set_postfix(loss=f"{loss.item():.3f}")
                progress.update()
        self._save(stages.get(self.step))

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go back to a stage."""
        self.step = checkpoint["step"]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def _views(self) -> Iterator[list[Tensor]]:
        while self.step < self.total_steps:
            yield from self.loader

    def _save(self, path: Path | None) -> None:
        if path is not None:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            with replacing(path) as beside:  # whoever is killed here keeps the checkpoint before
                torch.save({**state, "step": self.step, "settings": self.settings}, beside)


def at(checkpoint: Path) -> TrainingStep:
    """The training step as it is at a checkpoint, on views that training did not see in this order.

    The loss goes through the heads too, but what is analysed is the encoder's gradient: the encoder is what is kept.
    """
    saved = torch.load(checkpoint, weights_only=True)
    training = Training(saved["settings"], views_seed=saved["settings"]["seed"] + 1)
    training.load(saved)
    return TrainingStep(
        model=training.model.backbone,
        teacher=training.model.backbone_momentum,
        step=training.loss,
        batches=training.loader,
        after_backward=training.after_backward,
    )


def _images(settings: dict[str, Any]) -> ImageData:
    data = digits() if settings["data"] == "digits" else fashion_mnist(settings["data_dir"])
    return data.limited(settings["images"]) if settings["images"] else data


def _compress(training: Training, plan: Strategy | str) -> None:
    compress(training.model.backbone, plan, teacher=training.model.backbone_momentum)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data-dir", help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--method", choices=tuple(METHODS), default="moco")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--plan", help="accelerate the run: a preset's name or a schedule file")
    parser.add_argument("--online", metavar="STRATEGY", help="let an online schedule begin at 'drop 0.5, patch 7', say")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("stages"), help="folder for the checkpoints")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    output.mkdir(parents=True, exist_ok=True)
    plan, online = arguments.pop("plan"), arguments.pop("online")
    training = Training(arguments, views_seed=arguments["seed"])
    if online is not None:
        _compress(training, Strategy.parse(online))
        scheduler = OnlineScheduler(training.model, training.loss, total_steps=training.total_steps)
        training.run(output, after_step=scheduler.step)
        print(*scheduler.decisions, sep="\n")
        scheduler.schedule.to_json(output / "schedule.json")
    elif plan is not None:
        _compress(training, plan)
        advance = SequenceScheduler(training.model, total_steps=training.total_steps)
        training.run(output, after_step=lambda views: advance.step())
    else:
        training.run(output)
    accuracy = Evaluator(training.data, torch.device("cpu")).knn(training.model.backbone)
    print(f"k-NN accuracy {accuracy:.3f}; checkpoints: {', '.join(f'{output}/{stage:g}.pt' for stage in STAGES)}")


if __name__ == "__main__":
    main()
