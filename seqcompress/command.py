"""The command line: what a plan costs, what each strategy costs, and the gradient error of one's own training."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from seqcompress.json_files import is_file
from seqcompress.locations import LocationError, loaded, location
from seqcompress.messages import described

__all__ = ["main"]

_MODEL = (
    "a model's name in timm, such as vit_small_patch16_224, or a function of your own that returns the encoder: "
    "package.module:function or path/to/file.py:function"
)


def main(argv: Sequence[str] | None = None, *, prog: str = "seqcompress") -> int:
    """Run one of the commands.

    Args:
        argv: the arguments; those of the process if None.
        prog: the command's name in its help.

    Returns:
        0, or 1 if a picture cannot be written, after a message; of ``gradients``, what
        ``seqcompress.gradients.command.main`` returns.

    Raises:
        SystemExit: with 2 for arguments that are wrong, after a message; with 0 after ``--help``.
    """
    parser, commands = _parser(prog)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "gradients":
        from seqcompress.gradients.command import main as gradients

        return gradients(rest, prog=f"{prog} gradients")
    command = commands[arguments.command]
    if rest:
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _plan(arguments) if arguments.command == "plan" else _cost(arguments)
    except _UsageError as error:
        command.error(" ".join(str(error).split()))
    except OSError as error:
        command.exit(1, f"{command.prog}: error: argument --output: {error}\n")


class _UsageError(Exception):
    """Something that the user must change about the command."""


def _parser(prog: str) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog=prog, description="Cheaper self-supervised pretraining of Vision Transformers, looked at before it runs."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    plan = commands.add_parser(
        "plan",
        help="tokens, cost and expected saving of a plan",
        description="Say what a plan does to a model over a run: tokens of a view, cost of a step, what it saves.",
        usage="%(prog)s MODEL [PLAN] [options]",  # before Python 3.12, PLAN cannot follow an option
    )
    plan.add_argument("model", metavar="MODEL", help=_MODEL)
    plan.add_argument(
        "plan",
        metavar="PLAN",
        nargs="?",
        default="default",
        help="a preset (default, gentle, strong, online), a strategy ('drop 0.5, patch 32'), a schedule ('0: drop 0.5, "
        "patch 32; 0.9: base') or a schedule file (default: %(default)s)",
    )
    plan.add_argument(
        "--steps", metavar="N", type=_whole_number, default=1000, help="steps of the run (default: %(default)s)"
    )
    plan.add_argument(
        "--teacher",
        action="store_true",
        help="a momentum encoder runs beside the model (MoCo, BYOL, DINO): patches are scaled for both",
    )
    cost = commands.add_parser(
        "cost",
        help="tokens and cost of every strategy of a grid",
        description="Say what each strategy costs: FLOPs of the encoder's forward, relative to the plain one.",
    )
    cost.add_argument("model", metavar="MODEL", help=_MODEL)
    cost.add_argument(
        "--token-dropout",
        metavar="R",
        nargs="+",
        type=float,
        default=[0.0, 0.25, 0.5, 0.75, 0.9],
        help="token dropouts of the grid (default: 0 0.25 0.5 0.75 0.9)",
    )
    cost.add_argument(
        "--patch-size",
        metavar="P",
        nargs="+",
        type=_whole_number,
        help="patch sizes of the grid, in pixels (default: the model's own and those above it that divide the view)",
    )
    for command in (plan, cost):
        command.add_argument(
            "--image-size", metavar="PX", type=_whole_number, help="side of the views, for a model of timm's"
        )
        command.add_argument("--output", metavar="FILE", type=Path, help="draw it, too: a picture, such as plan.png")
    commands.add_parser(
        "gradients",
        add_help=False,  # it has its own
        help="gradient error at stages of your training, and the schedule that follows",
    )
    return parser, {"plan": plan, "cost": cost}


def _plan(arguments: argparse.Namespace) -> int:
    from seqcompress.training.forecast import forecast

    draw = _pictures(arguments)
    model = _model(arguments)
    try:
        run = forecast(arguments.plan, model, teacher=model if arguments.teacher else None, total_steps=arguments.steps)
    except FileNotFoundError as error:
        raise _UsageError(f"argument PLAN: {error}") from None
    except (TypeError, ValueError) as error:
        raise _UsageError(f"argument PLAN for this MODEL: {error}") from None
    print(run)
    if draw is not None:
        draw.save(draw.draw_forecast(run, steps_are_known=True), arguments.output)
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    from seqcompress.training.forecast import cost_map

    draw = _pictures(arguments)
    model = _model(arguments)
    try:
        grid = cost_map(model, arguments.token_dropout, arguments.patch_size)
    except (TypeError, ValueError) as error:
        raise _UsageError(f"this grid for this MODEL: {error}") from None
    print(grid)
    if draw is not None:
        draw.save(draw.draw_costs(grid), arguments.output)
    return 0


def _pictures(arguments: argparse.Namespace) -> Any:
    """What draws, if a picture is asked for; asked before anything else is done."""
    path: Path | None = arguments.output
    if path is None:
        return None
    if not path.parent.is_dir():
        raise _UsageError(f"argument --output: there is no folder {path.parent}")
    try:
        pictures = importlib.import_module("seqcompress.training.pictures")
    except ImportError as error:
        raise _UsageError(f"argument --output: {error}") from None
    known = sorted(pictures.Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise _UsageError(f"argument --output: must end in one of .{', .'.join(known)}, got {path.name!r}")
    return pictures


def _model(arguments: argparse.Namespace) -> Any:
    """The encoder, checked to be one that can be compressed."""
    import torch

    from seqcompress.encoders import find_encoder

    name: str = arguments.model
    if ":" in name:
        if arguments.image_size is not None:
            raise _UsageError("argument --image-size: is for a model of timm's; let your function build the encoder so")
        model = _function(name)()
        if not isinstance(model, torch.nn.Module):
            raise _UsageError(f"argument MODEL: {name} must return a torch.nn.Module, got {described(model)}")
    else:
        model = _timm_model(name, arguments.image_size)
    try:
        find_encoder(model)
    except (TypeError, ValueError) as error:
        raise _UsageError(f"argument MODEL: {error}") from None
    return model


def _function(name: str) -> Callable[..., Any]:
    try:
        return loaded(*location(name))
    except (argparse.ArgumentTypeError, LocationError) as error:
        raise _UsageError(f"argument MODEL: {error}") from None


def _timm_model(name: str, image_size: int | None) -> Any:
    import timm
    import torch

    if not timm.is_model(name):
        if is_file(name):
            raise _UsageError(f"argument MODEL: must be {_MODEL}; got the file {name}")
        models = timm.list_models()
        family = [model for model in models if model.startswith(name.partition("_")[0] + "_")]
        near = difflib.get_close_matches(name, family or models, n=3)
        raise _UsageError(
            f"argument MODEL: timm has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "")
        )
    settings: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        with torch.device("meta"):  # shapes are all that costs depend on
            return timm.create_model(name, num_classes=0, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        size = "its own size" if image_size is None else f"views of {image_size} px"
        raise _UsageError(f"argument MODEL: timm cannot build {name} for {size}: {error}") from None


def _whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


_whole_number.__name__ = "whole number"  # as argparse calls it
