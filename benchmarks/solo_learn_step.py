"""Training steps of solo-learn: its own methods and ViT configs, its Trainer, and the flag that accelerates them.

The strategies take turns as the stages of a schedule, in random order within every repeat, so that everything runs as
it does in training. The base is the step of the same run while its schedule compresses nothing. Beside every turn, the
momentum update is timed once as solo-learn has it and once as the flag has it.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from measure import Ratio, conditions, markdown_table, now, percent, ratio
from models import IMAGE_SIZE
from torch.utils.data import DataLoader

from seqcompress import Strategy

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "moco-v3": ("mocov3_vit.yaml", {}),
    # solo-learn's recipe has a ResNet and LARS: a ViT, and the optimizer of its ViT recipes.
    "simclr": (
        "simclr.yaml",
        {
            "backbone": {"name": "vit_small"},
            "optimizer": {"name": "adamw", "lr": 3e-4, "classifier_lr": 3e-4, "weight_decay": 0.1, "kwargs": {}},
        },
    ),
    "dino": ("dino_vit.yaml", {}),
}
WARM_UP = 2  # turns of every strategy before the first that counts


def measure(
    method: str, strategies: Sequence[Strategy], options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Run a method's training for as many steps as the repeats need; returns what ``report`` takes of it.

    Raises:
        ModuleNotFoundError: solo-learn is not installed.
    """
    if find_spec("solo") is None:
        raise ModuleNotFoundError("--host solo-learn needs solo-learn, from its repository")
    from lightning.pytorch import Trainer, seed_everything
    from solo.args.pretrain import parse_cfg
    from solo.methods import METHODS
    from solo.utils.misc import make_contiguous

    # The host may run ahead of a GPU from one step to the next: a turn has several steps there.
    turns = Turns([Strategy(), *strategies], WARM_UP + options.repeats, 10 if device.type == "cuda" else 1)
    config = parse_cfg(_config(method, turns, options.batch_size))
    seed_everything(config.seed)
    module = METHODS[config.method](config)
    make_contiguous(module)
    module = module.to(memory_format=torch.channels_last)

    callback = turns.callback(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if options.amp else "32-true",
            max_steps=turns.total_steps,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[callback],
            default_root_dir=folder,
        )
        trainer.fit(module, _loader(options.batch_size, turns.total_steps, device))
    times = {name: seconds[WARM_UP:] for name, seconds in callback.seconds.items()}
    base = str(Strategy())
    records = []
    for strategy in strategies:
        record = {"strategy": str(strategy), "speedup": ratio(times[base], times[str(strategy)])._asdict()}
        records.append({**record, **_updates(times, str(strategy))})
    return {
        "config": f"scripts/pretrain/imagenet-100/{CONFIGS[method][0]}",
        "backbone": config.backbone.name,
        "base": _updates(times, base),
        "strategies": records,
    }


class Turns:
    """Which strategy is in force in which step: all of them in every repeat, in an order drawn anew every time."""

    def __init__(self, strategies: Sequence[Strategy], repeats: int, steps: int) -> None:
        order = random.Random(0)
        self.order = [strategy for _ in range(repeats) for strategy in order.sample(strategies, len(strategies))]
        self.steps = steps
        self.total_steps = len(self.order) * steps

    def stages(self) -> list[dict[str, Any]]:
        """These turns as the stages of a schedule in solo-learn's config."""
        return [
            {
                "progress": turn * self.steps / self.total_steps,
                "token_dropout": strategy.token_dropout,
                **({} if strategy.patch_size is None else {"patch_size": strategy.patch_size}),
            }
            for turn, strategy in enumerate(self.order)
        ]

    def callback(self, device: torch.device) -> Any:
        """Takes the time of every turn, and of momentum updates in between."""
        from lightning.pytorch.callbacks import Callback

        turns = self

        class TakeTime(Callback):
            def __init__(self) -> None:
                self.seconds: defaultdict[str, list[float]] = defaultdict(list)
                self._begun: float | None = None

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if trainer.global_step % turns.steps:
                    return
                self._end(trainer, pl_module)
                self._begun = now(device)

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                self._end(trainer, pl_module)

            def _end(self, trainer: Any, pl_module: Any) -> None:
                if self._begun is None:
                    return
                name = str(turns.order[trainer.global_step // turns.steps - 1])
                self.seconds[name].append((now(device) - self._begun) / turns.steps)
                updater = getattr(pl_module, "momentum_updater", None)
                if updater is None:
                    return
                for whose, one in (("solo-learn's", updater.replaced), ("ours", updater)):
                    begun = now(device)
                    for pair in pl_module.momentum_pairs:
                        one.update(*pair)
                    self.seconds[f"{name}: {whose}"].append(now(device) - begun)

        return TakeTime()


def report(options: argparse.Namespace, described: Mapping[str, str], methods: Mapping[str, dict[str, Any]]) -> str:
    """The tables as Markdown."""
    sections = "\n".join(_section(title, results) for title, results in methods.items())
    return f"""# Training step: solo-learn at {IMAGE_SIZE} px, {conditions(options)}

Written by `benchmarks/training_step.py --host solo-learn`. Ratios of times taken in one run, in which all strategies
took turns in random order: medians of {options.repeats} turns, in brackets 95 % intervals of the median.
{", ".join(f"{key} {value}" for key, value in described.items())}.

Whole steps under Lightning's Trainer, with the flag on: methods and configs are solo-learn's, views are ready.

- **speed-up**: over the steps of the same run in which its schedule compresses nothing.
- **momentum update**: solo-learn's own, and the one that the flag puts in its place, in percent of that step.

{sections}"""


def _section(title: str, results: Mapping[str, Any]) -> str:
    rows = [{"strategy": "base", "speed-up": "1", **_cells(results["base"])}]
    for record in results["strategies"]:
        speedup = (
            f"{record['speedup']['median']:.2f}x [{record['speedup']['low']:.2f}, {record['speedup']['high']:.2f}]"
        )
        rows.append({"strategy": record["strategy"], "speed-up": speedup, **_cells(record)})
    return f"""## {title}

`{results["config"]}`, {results["backbone"]}.

{markdown_table(rows)}
"""


def _updates(times: Mapping[str, list[float]], name: str) -> dict[str, Any]:
    """Momentum updates as shares of a step as the flag has it; nothing for a method without teacher."""
    if f"{name}: ours" not in times:
        return {}
    return {
        "momentum_update": ratio(times[f"{name}: ours"], times[name])._asdict(),
        "solo_learns_momentum_update": ratio(times[f"{name}: solo-learn's"], times[name])._asdict(),
    }


def _cells(record: Mapping[str, Any]) -> dict[str, str]:
    names = {"solo_learns_momentum_update": "momentum update, solo-learn's", "momentum_update": "momentum update, ours"}
    return {title: percent(Ratio(**record[key])) for key, title in names.items() if key in record}


def _config(method: str, turns: Turns, batch_size: int) -> Any:
    """solo-learn's own config, of which only what concerns data and hardware is replaced."""
    import solo
    from omegaconf import OmegaConf

    folder = Path(solo.__file__).parents[1] / "scripts" / "pretrain" / "imagenet-100"
    name, overrides = CONFIGS[method]
    config: Any = OmegaConf.load(folder / name)
    (augmentations,) = [entry["augmentations"] for entry in config.pop("defaults") if "augmentations" in entry]
    config.augmentations = OmegaConf.load(folder / "augmentations" / augmentations)
    section = {"enabled": True, "schedule": "stepwise", "stages": turns.stages()}
    changed = {
        "data": {"format": "image_folder", "num_workers": 0},
        "optimizer": {"batch_size": batch_size},
        "devices": "1",
        "seqcompress": section,
    }
    if "optimizer" in overrides:
        del config.optimizer.kwargs
    return OmegaConf.merge(config, overrides, changed)


def _loader(batch_size: int, steps: int, device: torch.device) -> DataLoader[Any]:
    """The same batch again and again, ready on the device: [indices, [view, view], targets]."""
    views = [torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device) for _ in range(2)]
    indices = torch.arange(batch_size, device=device)
    return DataLoader([[indices, views, indices % 100]] * steps, batch_size=None)  # type: ignore[arg-type]
