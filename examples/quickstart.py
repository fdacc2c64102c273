"""Pretrain a small ViT twice, plain and accelerated, and compare.

    python examples/quickstart.py
    python examples/quickstart.py --data fashion-mnist --data-dir FOLDER --method dino

Both runs start from the same weights and see the same number of images; only the length of the sequences
differs. Everything but the lines with ``seqcompress`` is an ordinary PyTorch loop with Lightly's parts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data import ImageData, digits, fashion_mnist, view_loader, view_sizes
from evaluation import Evaluator, Point
from lightly.utils.scheduler import cosine_schedule
from methods import METHODS, small_vit
from report import Report, Run
from tqdm import tqdm

import seqcompress
from seqcompress import Budget, PolynomialDecayLR, SequenceScheduler, Strategy, get_strategy, num_tokens

EVALUATIONS = 2


def pretrain(name: str, plan: str | Strategy, data: ImageData, arguments: argparse.Namespace) -> Run:
    """Pretrain from scratch under a plan; evaluate along the way."""
    torch.manual_seed(arguments.seed)
    device = torch.device(arguments.device)
    model = METHODS[arguments.method](small_vit(data.image_size, data.patch_size)).to(device)
    backbone = model.backbone
    loader = view_loader(
        data,
        arguments.method,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        seed=arguments.seed,
    )
    total_steps = arguments.epochs * len(loader)

    # The one line. The plain run takes it too, with a strategy that changes nothing: its budget is counted.
    seqcompress.compress(backbone, plan, teacher=model.backbone_momentum)
    if arguments.scale_views:
        seqcompress.scale_views(loader, backbone)
    scheduler, budget = SequenceScheduler(model, total_steps=total_steps), Budget(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.05)
    decay = PolynomialDecayLR(optimizer, total_steps, warmup_steps=total_steps // 10, share=scheduler.budget_share)

    evaluator = Evaluator(data, device)
    evaluate_after = {round(arguments.epochs * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    curve = [Point(epoch=0, units=0.0, seconds=0.0, knn=evaluator.knn(backbone))]
    seconds, tokens, views_seen = 0.0, 0, 0
    sides = view_sizes(arguments.method, data)
    with tqdm(total=total_steps, desc=f"{name:<11}", unit="step") as progress:
        for epoch in range(arguments.epochs):
            started = time.perf_counter()
            for views in loader:
                views = [view.to(device) for view in views]
                loss = model.loss(views, epoch)
                optimizer.zero_grad()
                loss.backward()
                model.after_backward(epoch)
                optimizer.step()
                model.update_teacher(cosine_schedule(scheduler.last_step, total_steps, 0.95, 1.0))

                strategy = get_strategy(backbone)
                lengths = [num_tokens(backbone, strategy, side) for side in sides]
                tokens, views_seen = tokens + sum(lengths), views_seen + len(lengths)
                progress.set_postfix(loss=f"{loss.item():.3f}", strategy=strategy, tokens=lengths[0], budget=budget)
                progress.update()
                decay.step()
                scheduler.step()
            seconds += time.perf_counter() - started
            if epoch + 1 in evaluate_after:
                curve.append(Point(epoch + 1, budget.units, seconds, evaluator.knn(backbone)))
    return Run(name, str(plan), curve, tokens / views_seen, evaluator.linear_probe(backbone))


def parsed(argv: list[str] | None = None) -> tuple[argparse.Namespace, ImageData]:
    """The arguments, all of them checked before anything runs, and the images they name."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--images", type=_at_least(1), help="use only so many training images")
    parser.add_argument("--method", choices=tuple(METHODS), default="moco")
    parser.add_argument(
        "--plan",
        default="default",
        help="a preset (default, gentle, strong), a strategy ('drop 0.5'), a schedule file",
    )
    parser.add_argument("--epochs", type=_at_least(1), default=4)
    parser.add_argument("--batch-size", type=_at_least(2), default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument(
        "--num-workers",
        type=_at_least(0),
        default=max(0, min(8, (os.cpu_count() or 1) - 1)),  # the first core is for training
        help="processes that make the views; 0 for the training process itself",
    )
    parser.add_argument(
        "--scale-views", action="store_true", help="make smaller views where patches are larger, which takes less time"
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"), help="folder for the results")
    arguments = parser.parse_args(argv)

    if (arguments.data == "fashion-mnist") != (arguments.data_dir is not None):
        parser.error("argument --data-dir: must be given with --data fashion-mnist, and only then")
    try:
        data = digits() if arguments.data == "digits" else fashion_mnist(arguments.data_dir)
    except (OSError, ValueError) as error:
        parser.error(f"argument --data-dir: {error}")
    if arguments.scale_views and arguments.method == "dino":
        parser.error("argument --scale-views: not with --method dino, whose local views here are half the global ones")
    if arguments.seed >= 2**63:
        parser.error(f"argument --seed: must be below 2**63, got {arguments.seed}")
    if arguments.images is not None:
        if arguments.images > len(data.train_images):
            parser.error(f"argument --images: {data.name} has {len(data.train_images)}, got {arguments.images}")
        data = data.limited(arguments.images)
    if arguments.batch_size > len(data.train_images):
        parser.error(
            f"argument --batch-size: must not exceed the {len(data.train_images)} images, got {arguments.batch_size}"
        )
    try:
        encoder = seqcompress.compress(small_vit(data.image_size, data.patch_size), arguments.plan)
        for strategy in SequenceScheduler(encoder, total_steps=1).schedule.strategies():
            for side in set(view_sizes(arguments.method, data)):
                num_tokens(encoder, strategy, side)  # raises where a patch would not fit into a view
    except (OSError, ValueError) as error:
        parser.error(f"argument --plan: {error}")
    try:
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: {error}")
    return arguments, data


def main() -> None:
    arguments, data = parsed()
    # A model this small gains little from a second thread, and waits for it at every step where cores are busy.
    torch.set_num_threads(1)
    print(
        f"{arguments.method} on {len(data.train_images)} images of {data.name}, {arguments.epochs} epochs, "
        f"twice: plain, then accelerated by the plan {arguments.plan!r}"
    )
    report = Report(
        title=f"{arguments.method} on {data.name}, {arguments.epochs} epochs, seed {arguments.seed}",
        plain=pretrain("plain", Strategy(), data, arguments),
        accelerated=pretrain("accelerated", arguments.plan, data, arguments),
        note=data.note,
        arguments={name: value for name, value in vars(arguments).items() if not isinstance(value, Path)},
    )
    print("", report.table(), "", sep="\n")
    report.plot(arguments.output / "accuracy_over_cost.png")
    report.to_json(arguments.output / "results.json")
    print(f"Picture and figures: {arguments.output}/accuracy_over_cost.png, {arguments.output}/results.json")


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    number.__name__ = "whole number"
    return number


if __name__ == "__main__":
    main()
