"""One call for a module that trains encoders: find student and teacher in it, compress them as a pair.

A teacher is recognised by what only teachers have: parameters that are all frozen, or a name that says so. Where that
is not enough, nothing is guessed.
"""

from __future__ import annotations

import re
from typing import TypeVar, cast

from torch import nn

from seqcompress.compression import Plan, compress
from seqcompress.encoders import SUPPORTED_VITS, BatchPolicy, find_encoder, follow_masks, is_encoder, is_frozen
from seqcompress.messages import described

__all__ = ["accelerate", "names_a_teacher"]

Module = TypeVar("Module", bound=nn.Module)
Reference = str | nn.Module

_TEACHER_WORDS = {"teacher", "momentum", "ema", "target", "key", "k", "m"}
_STUDENT_WORDS = {"student", "online", "query", "q"}


def accelerate(
    module: Module,
    plan: Plan | None = None,
    *,
    student: Reference | None = None,
    teacher: Reference | None = None,
    batch: BatchPolicy | None = None,
) -> Module:
    """Accelerate a training module in place: asymmetric token dropout, symmetric patch scaling.

    Under Lightning the schedule then advances by itself. In a loop of your own, add
    ``SequenceScheduler(module, total_steps=...)`` and call its ``step()`` after every optimizer step.

    Args:
        module: a LightningModule or any ``nn.Module`` that holds the encoders (MoCo, SimCLR, DINO, BYOL, ...).
        plan: as in [compress][seqcompress.compress]; ``None`` for the preset "default".
        student: the encoder that gets gradients, as a module or as the name of an attribute, dotted or not.
        teacher: likewise the momentum encoder.
        batch: as in [compress][seqcompress.compress]: "merge" runs accumulated batches together while they are short.

    A role that is not named goes to the encoder that is left. Of two encoders, the teacher is the one whose
    parameters are all frozen or whose name says so (``teacher_backbone``, ``backbone_momentum``, or plain
    ``backbone`` beside a ``student_backbone``). A module with one encoder, as in SimCLR, has no teacher.

    Returns:
        ``module``, the same object.

    Raises:
        TypeError: an encoder is not supported, or an argument has the wrong type.
        ValueError: no encoder was found, none that is trained, or it is not clear which is which.
        FileNotFoundError: ``plan`` is the path of a schedule file that does not exist. In each case, nothing has been
            changed.

    Examples:
        >>> import copy, timm, torch
        >>> from seqcompress import Strategy, get_strategy
        >>> module = torch.nn.Module()
        >>> module.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0)
        >>> module.backbone_momentum = copy.deepcopy(module.backbone)
        >>> _ = accelerate(module, Strategy(token_dropout=0.5, patch_size=32))
        >>> str(get_strategy(module.backbone)), str(get_strategy(module.backbone_momentum))
        ('drop 0.5, patch 32', 'patch 32')
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {described(module)}")
    encoders = _encoders(module)
    roles = {
        role: _referenced(module, reference, role, encoders)
        for role, reference in (("student", student), ("teacher", teacher))
        if reference is not None
    }
    taken = [find_encoder(encoder).model for encoder in roles.values()]
    others = {name: encoder for name, encoder in encoders.items() if encoder not in taken}
    roles.update(_recognised(others, roles, module))
    frozen = {role for role, encoder in roles.items() if is_frozen(find_encoder(encoder).model)}
    if "teacher" in roles and frozen == {"student"}:
        raise ValueError(
            "student must be the encoder that is trained, and teacher its momentum encoder, got a student whose "
            "parameters are all frozen and a teacher whose are not: swap them"
        )
    compress(roles["student"], plan, teacher=roles.get("teacher"), batch=batch)
    follow_masks(module)
    return module


def _encoders(module: nn.Module) -> dict[str, nn.Module]:
    """The ViTs in a module, each once, by the name of what holds or wraps them first."""
    names: dict[nn.Module, str] = {}
    for name, child in module.named_modules():
        if is_encoder(child):
            names.setdefault(find_encoder(child).model, name)
    return {name: encoder for encoder, name in names.items()}


def _recognised(others: dict[str, nn.Module], roles: dict[str, nn.Module], module: nn.Module) -> dict[str, nn.Module]:
    """The roles that are still open, given to the encoders that are still without one."""
    names = ", ".join(repr(name) for name in others)
    if "student" not in roles and not others:
        besides = " besides its teacher" if roles else ""
        raise ValueError(
            f"module must hold a supported ViT{besides}, found none in {type(module).__name__}"
            f"{_what_it_holds(module)}; if it is made later (configure_model), call accelerate there. {SUPPORTED_VITS}"
        )
    if len(roles) == 2 or not others:
        return {}
    if len(others) == 1:
        ((name, encoder),) = others.items()
        if "student" not in roles and is_frozen(encoder) and names_a_teacher(name):
            raise ValueError(
                f"module must hold an encoder that is trained, found only {name!r}, which is frozen: call accelerate "
                "once all encoders have been made"
            )
        return {"teacher" if "student" in roles else "student": encoder}
    if len(others) == 2 and not roles:
        teachers = [name for name in others if is_frozen(others[name]) or names_a_teacher(name)]
        students = [name for name in others if _words(name) & _STUDENT_WORDS]
        if len(students) == 1 and not teachers:
            teachers = [name for name in others if name not in students]
        if len(teachers) == 1 and teachers != students:
            teacher = others.pop(teachers[0])
            return {"student": next(iter(others.values())), "teacher": teacher}
    raise ValueError(
        f"student and teacher must be named for this module: found {names}, and cannot tell which is which: "
        "accelerate(module, plan, student=..., teacher=...), or compress(encoder, plan) each, if all are trained"
    )


def _what_it_holds(module: nn.Module) -> str:
    """What was found instead: the larger parts, by name and class."""
    children = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
    shown = [f".{name} ({type(child).__name__})" for name, child in children[:4]]
    return f", which holds {', '.join(shown)}{', ...' if len(children) > 4 else ''}" if shown else ""


def names_a_teacher(name: str) -> bool:
    """Whether an attribute's name, dotted or not, says that a momentum encoder is what it has."""
    return bool(_words(name) & _TEACHER_WORDS)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.lower()))


def _referenced(module: nn.Module, reference: Reference, role: str, encoders: dict[str, nn.Module]) -> nn.Module:
    encoder: object = reference
    if isinstance(reference, str):
        try:
            encoder = module.get_submodule(reference)
        except AttributeError:
            names = ", ".join(repr(name) for name in encoders) or "none"
            raise ValueError(
                f"{role} must name a module of {type(module).__name__}, got {reference!r}; encoders found: {names}"
            ) from None
    find_encoder(encoder, role)
    return cast(nn.Module, encoder)
