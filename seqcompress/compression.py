"""The verbs: compress a model, look at or change its strategy, restore it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, cast, get_args

from torch import nn

from seqcompress.encoders import (
    SUPPORTED_VITS,
    BatchPolicy,
    CompressedPatchEmbed,
    Compression,
    Encoder,
    When,
    find_encoder,
    follow_masks,
    forget_masks,
    is_frozen,
    student_among,
)
from seqcompress.encoders.probe import difference
from seqcompress.encoders.sharding import is_wrapped
from seqcompress.json_files import is_file
from seqcompress.messages import described
from seqcompress.presets import DEFAULT, PRESETS, double_patch
from seqcompress.schedules import Constant, Schedule, reads_like_schedule
from seqcompress.strategy import Strategy

__all__ = ["compress", "get_strategy", "is_compressed", "restore", "set_strategy"]

Plan = Strategy | Schedule | str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)


def compress(
    model: Model,
    plan: Plan | None = None,
    *,
    teacher: nn.Module | None = None,
    when: When = "grad",
    token_dropout: float | None = None,
    patch_size: int | None = None,
    batch: BatchPolicy | None = None,
) -> Model:
    """Shorten a ViT's sequences during training, in place.

    Parameters keep their identity and ``state_dict()`` its keys and values; in eval mode the model is the
    plain one, bit for bit. A model that is compressed already is planned anew; a teacher that it was compressed with,
    and that is not given again, is plain from then on, and a warning says so.

    Args:
        model: the encoder: a ViT of timm, Hugging Face, torchvision, DINO or one's own, or what wraps one (DDP,
            ``torch.compile``, Lightly's ``MaskedVisionTransformerTIMM``).
        plan: a [Strategy][seqcompress.Strategy] or its text ("drop 0.5, patch 32"), in force at once; a
            [Schedule][seqcompress.schedules.Schedule] or its text ("0: drop 0.5, patch 32; 0.9: base"), the name of a
            preset ("default", "gentle", "strong", "online") or the path of a schedule file, in force while something
            drives it: a [SequenceScheduler][seqcompress.SequenceScheduler] (for "online", an
            [OnlineScheduler][seqcompress.OnlineScheduler]), the Lightning callback, or ``set_strategy`` by hand. Until
            then the model runs uncompressed, and says so. Without plan and keywords: "default".
        teacher: the momentum encoder, of the same image size, patch size and width. Patch scaling then goes to both
            encoders and token dropout to ``model`` only: asymmetric dropout and symmetric scaling, as in the paper.
            Where a host draws masks on the teacher's grid (Lightly's iBOT and DINOv2), the teacher follows the
            student's train or eval mode from then on.
        when: "grad" compresses only forwards in train mode that build a graph, "train" every forward in train
            mode. A ``teacher``, which builds none, is always treated as "train".
        token_dropout: short form of ``plan=Strategy(token_dropout, patch_size)``.
        patch_size: likewise.
        batch: "merge" lets Lightning and solo-learn run several accumulated batches in one forward while sequences are
            short, never with more tokens than one plain batch has. Each update still averages the same batches. In a
            loop of your own, see [SequenceScheduler.batch_factor][seqcompress.SequenceScheduler.batch_factor].

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: a model that is not supported (the message says what is), or an argument of a wrong type.
        ValueError: an argument out of range, or a plan that does not suit the model.
        FileNotFoundError: ``plan`` is the path of a schedule file that does not exist. In each case, nothing has
            been changed.

    Examples:
        >>> import timm, seqcompress
        >>> backbone = timm.create_model("vit_small_patch16_224", num_classes=0)
        >>> _ = seqcompress.compress(backbone, token_dropout=0.5, patch_size=32)
        >>> seqcompress.get_strategy(backbone)
        Strategy(token_dropout=0.5, patch_size=32)
    """
    if when not in get_args(When):
        raise ValueError(f"when must be 'grad' or 'train', got {described(when)}")
    if batch not in (None, *get_args(BatchPolicy)):
        raise ValueError(f"batch must be 'merge' or None, got {described(batch)}")
    found = find_pair(model, teacher)
    for name, encoder in found.items():
        wrapped = is_wrapped(model if name == "model" or teacher is None else teacher)
        if (wrapped or encoder.is_flattened) and not compressed_embeds(encoder.model):
            raise ValueError(
                f"{name} must be compressed before FullyShardedDataParallel flattens its weights, got one that it "
                "wraps already (fully_shard, instead of it, may come before or after)"
            )
        encoder.clear_cache()
    if token_dropout is not None or patch_size is not None:
        if plan is not None:
            raise ValueError(f"plan excludes token_dropout and patch_size, got plan={described(plan)} as well")
        plan = Strategy(0.0 if token_dropout is None else token_dropout, patch_size)
    check_roles(found)
    schedule = resolve_plan(plan, found.items())
    blank_per_view = {name: blank_per_view_of(encoder, name) for name, encoder in found.items()}

    models = [encoder.model for encoder in found.values()]
    views = next((embed.compression.views for embed in compressed_embeds(*models)), None)
    compression = Compression(schedule, views=views, batch=batch)
    for partner in with_partners(compressed_embeds(*models)):
        if partner.encoder.model not in models:
            if teacher is None and partner.is_live:
                warnings.warn(
                    f"seqcompress: the {'student' if partner.drops_tokens else 'teacher'} that model was compressed "
                    "with is plain from now on; to go on with both, compress(model, plan, teacher=teacher)",
                    stacklevel=2,
                )
            _detach(partner)
    for name, encoder in found.items():
        is_student = name == "model"
        when_of = when if is_student else "train"
        attached = compressed_embeds(encoder.model)
        embed = attached[0] if attached else encoder.attach(compression, drops_tokens=is_student, when=when_of)
        embed.compression, embed.drops_tokens, embed.when = compression, is_student, when_of
        embed.blank_per_view = blank_per_view[name]
        embed.is_copy = embed.was_trained = False
        encoder.note_shapes()
    for given in (model, teacher):
        if given is not None:
            follow_masks(given)
    compression.ask_views_for(compression.strategy)
    return model


def restore(model: Model) -> Model:
    """Undo [compress][seqcompress.compress] completely, for all encoders that were compressed together.

    A model that is not compressed is left as it is. ``model`` may contain the encoders at any depth. Loaders that
    made smaller views for it make full ones from now on.

    Raises:
        TypeError: ``model`` is not a module.
    """
    for embed in compressed_embeds(_module(model)):
        embed.compression.ask_views_for(Strategy())
        for partner in embed.partners():
            _detach(partner)
    return model


def is_compressed(model: nn.Module) -> bool:
    """Whether ``model`` is, or contains, an encoder that [compress][seqcompress.compress] has wrapped.

    Raises:
        TypeError: ``model`` is not a module.
    """
    return bool(compressed_embeds(_module(model)))


def get_strategy(model: nn.Module) -> Strategy:
    """The strategy in force. A teacher's has no token dropout.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it is not compressed, or contains encoders that were compressed separately.
    """
    embeds = embeds_of_one_compression(model)
    return student_among(embeds).strategy


def set_strategy(model: nn.Module, strategy: Strategy) -> None:
    """Change the strategy, for all encoders that were compressed together, until it is changed again.

    This counts as driving a schedule by hand. Where something else drives, such as a
    [SequenceScheduler][seqcompress.SequenceScheduler], it holds until that one's next step.

    Raises:
        TypeError: ``strategy`` is not a Strategy, or ``model`` not a module.
        ValueError: the model is not compressed, or the strategy does not suit it.
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(f"strategy must be a Strategy, got {described(strategy)}")
    embeds = embeds_of_one_compression(model)
    check_plan(embeds, Constant(strategy))
    compression = embeds[0].compression
    compression.set_by_hand(strategy)
    compression.ask_views_for(strategy)


def resolve_plan(plan: Plan | None, encoders: Iterable[tuple[str, Encoder]]) -> Schedule:
    """Whatever a user may pass as a plan, as a schedule for these encoders, "model" or "teacher" each.

    Raises:
        TypeError: it is nothing that a plan can be.
        ValueError: it is none, or does not suit an encoder; the message names the file, if it came from one.
        FileNotFoundError: there is no such file.
    """
    encoders = list(encoders)
    schedule = _schedule_of(plan, encoders[0][1])
    try:
        for name, encoder in encoders:
            check_plan_for(encoder, schedule, name)
    except ValueError as error:
        if plan is not None and _is_file(plan):
            raise ValueError(f"schedule file {os.fspath(plan)!r}: {error}") from None
        raise
    return schedule


def _is_file(plan: Plan) -> TypeGuard[str | os.PathLike[str]]:
    if isinstance(plan, str):
        is_other = plan in PRESETS or plan.lstrip().startswith("{") or _schedule_in(plan) is not None
        return not is_other and (plan.endswith(".json") or is_file(plan))
    return isinstance(plan, os.PathLike)


def _schedule_of(plan: Plan | None, encoder: Encoder) -> Schedule:
    if isinstance(plan, Schedule):
        return plan
    if isinstance(plan, Strategy):
        return Constant(plan)
    if plan is None:
        plan = DEFAULT
    if isinstance(plan, str) and plan in PRESETS:
        small, side = max(encoder.patch_size), min(encoder.image_size)
        return PRESETS[plan](double_patch(small, side))
    if isinstance(plan, str) and (schedule := _schedule_in(plan)) is not None:
        return schedule
    if isinstance(plan, str) and plan.lstrip().startswith("{"):
        raise ValueError("plan must be a schedule, not its text: pass Schedule.from_json(text)")
    if _is_file(plan):
        return Schedule.from_json(Path(plan))
    if isinstance(plan, str):
        raise ValueError(
            f"plan must be one of {', '.join(map(repr, PRESETS))}, a strategy such as 'drop 0.5, patch 32', a schedule "
            f"such as '0: drop 0.5, patch 32; 0.9: base' or a schedule file, got {described(plan)}"
        )
    raise TypeError(
        "plan must be a Strategy or a Schedule, or the text of one, a preset's name or a schedule file, got "
        f"{described(plan)}"
    )


def check_plan(embeds: Iterable[CompressedPatchEmbed], schedule: Schedule) -> None:
    """Raise ValueError unless the schedule suits every one of these encoders."""
    for name, encoder in named_encoders(embeds):
        check_plan_for(encoder, schedule, name)


def named_encoders(embeds: Iterable[CompressedPatchEmbed]) -> list[tuple[str, Encoder]]:
    """The encoders of compressed patch embeddings, each with what it is called in an error."""
    return [("model" if embed.drops_tokens else "teacher", embed.encoder) for embed in embeds]


def check_plan_for(encoder: Encoder, schedule: Schedule, name: str) -> None:
    """Raise ValueError, naming the argument and the stage, unless the schedule suits this encoder."""
    where = name
    try:
        encoder.check(())  # what no strategy changes
        for strategy in schedule.strategies():
            where = name if isinstance(schedule, Constant) else f"{name}: stage '{strategy}'"
            encoder.check([strategy.without_dropout() if name == "teacher" else strategy])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def compressed_embeds(*models: nn.Module) -> list[CompressedPatchEmbed]:
    """All compressed patch embeddings in these models, each once."""
    found = (module for model in models for module in model.modules() if isinstance(module, CompressedPatchEmbed))
    return list(dict.fromkeys(found))


def compressed_embeds_of(model_or_models: nn.Module | Sequence[nn.Module]) -> list[CompressedPatchEmbed]:
    """The same for one model or several, of which at least one must be compressed."""
    models = model_or_models if isinstance(model_or_models, (list, tuple)) else [model_or_models]
    if not models or not all(isinstance(model, nn.Module) for model in models):
        raise TypeError(f"model_or_models must be one or several torch.nn.Module, got {described(model_or_models)}")
    modules = cast(list[nn.Module], models)
    for model in modules:
        if not is_compressed(model):
            kind = type(model).__name__
            raise ValueError(f"model_or_models must be compressed first, with compress(model, ...), got a plain {kind}")
    return compressed_embeds(*modules)


def with_partners(embeds: Iterable[CompressedPatchEmbed]) -> list[CompressedPatchEmbed]:
    """These and those that were compressed together with them: a student's teacher, and the other way round.

    Partners come last: among them may be one whose place a copy has taken.
    """
    given = list(embeds)
    return list(dict.fromkeys([*given, *(partner for embed in given for partner in embed.partners())]))


def embeds_of_one_compression(model: nn.Module) -> list[CompressedPatchEmbed]:
    """All compressed patch embeddings in a model, which must be of one ``compress`` call.

    Raises:
        ValueError: there is none, or there are those of several.
    """
    embeds = compressed_embeds(_module(model))
    if not embeds:
        raise ValueError(
            f"model must be compressed first, with compress(model, ...), got a plain {type(model).__name__}"
        )
    if any(embed.compression is not embeds[0].compression for embed in embeds):
        raise ValueError(
            f"model must hold encoders of one compress() call, got {len(embeds)} that were compressed apart"
        )
    return embeds


def _detach(embed: CompressedPatchEmbed) -> None:
    forget_masks(embed)
    embed.encoder.detach()
    embed.release()


def _schedule_in(text: str) -> Schedule | None:
    """The schedule that a text such as "drop 0.5" or "0: drop 0.5; 0.9: base" means, or None for one of another kind.

    Raises:
        ValueError: it means one that is out of range.
    """
    if not reads_like_schedule(text) or is_file(text):
        return None
    try:
        return Schedule.parse(text)
    except ValueError as error:
        raise ValueError(f"plan: {error}") from None


def find_pair(model: nn.Module, teacher: nn.Module | None) -> dict[str, Encoder]:
    """The encoders of a model and, if there is one, of its teacher, by these names.

    Raises:
        TypeError: one is not supported.
        ValueError: they are the same model.
    """
    found = {"model": find_encoder(model)}
    if teacher is not None:
        found["teacher"] = find_encoder(teacher, "teacher")
        if found["teacher"].model is found["model"].model:
            raise ValueError("teacher must be another model than the student, got the same one")
    return found


def check_roles(found: Mapping[str, Encoder]) -> None:
    """Raise ValueError unless a pair is one: a student that trains, and a teacher built like it."""
    if "teacher" not in found:
        return
    student, teacher = found["model"], found["teacher"]
    if is_frozen(student.model) and not is_frozen(teacher.model):
        raise ValueError(
            "model must be the student, which is trained, and teacher its momentum encoder: of those given, all "
            "parameters of model are frozen and those of teacher are not: swap them"
        )
    for what, mine, others in (
        ("image size", student.image_size, teacher.image_size),
        ("patch size", student.patch_size, teacher.patch_size),
        ("width", student.width, teacher.width),
    ):
        if mine != others:
            raise ValueError(f"teacher must have the {what} of model, {_shown(mine)}, got {_shown(others)}")


def _shown(size: int | tuple[int, int]) -> str:
    return f"{size}" if isinstance(size, int) else f"{size[0]} x {size[1]} px"


def blank_per_view_of(encoder: Encoder, name: str) -> bool:
    """Whether the model needs a blank for each view, after a proof that its kept tokens are its own.

    Raises:
        TypeError: they are not.
    """
    attached = next(iter(compressed_embeds(encoder.model)), None)
    if attached is not None and encoder.is_flattened:  # by now it has no weights to run, and was proven before
        return attached.blank_per_view
    embed = attached or encoder.attach(Compression(Constant(Strategy())), drops_tokens=True, when="grad")
    before = embed.blank_per_view
    try:
        for embed.blank_per_view in (False, True):
            if (problem := difference(embed)) is None:
                return embed.blank_per_view
    finally:
        embed.blank_per_view = before
        if attached is None:
            _detach(embed)
    raise TypeError(
        f"{name} must be a supported ViT, got a {type(encoder.model).__name__} whose tokens would not be those of the "
        f"plain model: {problem}. {SUPPORTED_VITS}"
    )


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {described(model)}")
    return model
