"""solo-learn: one config flag, its own unmodified training script.

Lightning loads the callback from an entry point, into every Trainer. At set-up it reads what stands under
``seqcompress:`` in the method's config and compresses its encoders; without that key, it does none of this.
Importing this module imports neither torch, timm nor Lightning.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from seqcompress.adapters.lightning import SequenceCompression
from seqcompress.messages import described

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    from seqcompress.compression import Plan
    from seqcompress.encoders import BatchPolicy
    from seqcompress.schedules import Schedule

__all__ = ["METHODS", "ForeachMomentumUpdater", "Settings", "SoloLearn", "accelerate", "read_settings"]

METHODS = (
    "all4one",
    "barlow_twins",
    "byol",
    "deepclusterv2",
    "dino",
    "mocov2plus",
    "mocov3",
    "nnbyol",
    "nnclr",
    "nnsiam",
    "ressl",
    "simclr",
    "simsiam",
    "supcon",
    "swav",
    "vibcreg",
    "vicreg",
    "wmse",
)
"""Values of solo-learn's ``method`` that can be accelerated: each was run."""

BACKBONES = ("vit_tiny", "vit_small", "vit_base", "vit_large")
"""Values of solo-learn's ``backbone.name`` that can be."""

TeacherShare = Literal["patch_size", "both", "none"]

_SHORT = ("token_dropout", "patch_size")
_SCHEDULE = ("schedule", "start", "end", "stages")
_KINDS = ("linear", "cosine", "stepwise")
_KEYS = ("enabled", "plan", *_SHORT, *_SCHEDULE, "teacher", "scale_views", "batch")


@dataclass(frozen=True)
class Settings:
    """What a config asks for.

    Attributes:
        plan: as in [compress][seqcompress.compress]; ``None`` for the preset "default".
        teacher: what the momentum encoder gets of it: its "patch_size", "both" patch size and token dropout, or
            "none". ``None`` if the config does not say, which means "patch_size".
        scale_views: whether the training loader makes smaller views where the plan has larger patches.
        batch: "merge" to run accumulated batches together while sequences are short, else ``None``.
    """

    plan: Plan | None = None
    teacher: TeacherShare | None = None
    scale_views: bool = False
    batch: BatchPolicy | None = None


class SoloLearn(SequenceCompression):
    """Compresses the encoders of a solo-learn method at set-up, if its config says so, and speeds up their averaging.

    All else, the schedule, the log and what goes into checkpoints, is
    [SequenceCompression][seqcompress.adapters.lightning.SequenceCompression]'s, as for any LightningModule.
    """

    def __init__(self) -> None:
        super().__init__()
        self._applied: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Compress what is about to be trained, or raise what is wrong with the config."""
        if stage == "fit":
            self._apply(trainer, pl_module)
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take out what ``setup`` put in."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._restore(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take it out then, too: there will be no ``teardown``."""
        super().on_exception(trainer, pl_module, exception)
        if trainer.state.fn == "fit":
            self._restore(pl_module)

    def _apply(self, trainer: Any, pl_module: Any) -> None:
        self._applied = {}
        settings = _settings_of(pl_module)
        if settings is None:
            return
        loader = _training_loader(trainer) if settings.scale_views else None
        schedule = accelerate(pl_module, settings)
        share = (settings.teacher or "patch_size") if _teacher_of(pl_module) is not None else None
        self._applied = {"plan": schedule.to_json(), "teacher": share}
        if loader is not None:
            self._scale_views(loader, pl_module)
        if _is_solo_learns(getattr(pl_module, "momentum_updater", None)):
            pl_module.momentum_updater = ForeachMomentumUpdater(pl_module.momentum_updater)

    def _restore(self, pl_module: Any) -> None:
        if self._applied:
            from seqcompress.compression import restore

            restore(pl_module)
        updater = getattr(pl_module, "momentum_updater", None)
        if isinstance(updater, ForeachMomentumUpdater):
            pl_module.momentum_updater = updater.replaced

    def _scale_views(self, loader: DataLoader[Any], pl_module: Any) -> None:
        from seqcompress.views import scale_views

        try:
            scale_views(loader, pl_module)
        except (TypeError, ValueError) as error:
            self._restore(pl_module)
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"seqcompress.scale_views: {error}") from error

    def _tell(self, line: str) -> None:
        if not self._applied:
            super()._tell(line)
        elif self._is_rank_zero:  # solo-learn's configs switch logging off
            print(f"seqcompress: {line}")

    def _folder(self, trainer: Any) -> str:
        """solo-learn's own folder of the run, if it writes checkpoints."""
        folder = super()._folder(trainer)
        for callback in trainer.callbacks:
            kind = type(callback)
            if (kind.__module__, kind.__qualname__) == ("solo.utils.checkpointer", "Checkpointer"):
                folder = str(callback.path)
        return folder

    def state_dict(self) -> dict[str, Any]:
        """That of any run; and plan and teacher's share, to be compared when the run goes on."""
        return {**super().state_dict(), **self._applied}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Say so if the run goes on otherwise than it began: auto-resume does not look at these keys."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        saved = checkpoint.get("callbacks", {}).get(getattr(self, "state_key", None), {})
        before = {name: saved[name] for name in ("plan", "teacher") if name in saved}
        if trainer.state.fn != "fit" or before == self._applied or not trainer.is_global_zero:
            return
        how = ("with another plan" if self._applied else "with seqcompress") if before else "without seqcompress"
        # A warning, not a log line: solo-learn's configs switch logging off.
        warnings.warn(
            f"seqcompress: the checkpoint was trained {how}. If auto-resume found it by mistake, rename this run.",
            stacklevel=2,
        )


def _passed_on(name: str) -> Any:
    def read(updater: ForeachMomentumUpdater) -> Any:
        return getattr(updater.replaced, name)

    def write(updater: ForeachMomentumUpdater, value: Any) -> None:
        setattr(updater.replaced, name, value)

    return property(read, write)


class ForeachMomentumUpdater:
    """Stands in for solo-learn's ``MomentumUpdater``: the same averages, in place and all parameters at once.

    solo-learn's makes two temporary tensors and new storage for every parameter at every step. Results differ by
    rounding only. Where a parameter and its average differ in dtype or device, or are not of floating point, the whole
    network is left to solo-learn's.

    Args:
        replaced: solo-learn's own, which keeps tau and its schedule.
    """

    base_tau = _passed_on("base_tau")
    cur_tau = _passed_on("cur_tau")
    final_tau = _passed_on("final_tau")

    def __init__(self, replaced: Any) -> None:
        self.replaced = replaced

    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        """Move the parameters of the momentum network towards the online network's, by ``1 - cur_tau``."""
        from torch.optim.swa_utils import get_ema_multi_avg_fn

        # Looked up anew at every step, which takes about a millisecond: a list that is kept would miss new parameters.
        pairs = list(zip(online_net.parameters(), momentum_net.parameters(), strict=False))  # as solo-learn does
        if not pairs:
            return
        if not all(_alike(online, average) for online, average in pairs):
            self.replaced.update(online_net, momentum_net)
            return
        parameters, averages = zip(*pairs, strict=True)
        get_ema_multi_avg_fn(self.cur_tau)(averages, parameters, None)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        """As solo-learn does."""
        self.replaced.update_tau(cur_step, max_steps)


def read_settings(section: object) -> Settings | None:
    """What stands under ``seqcompress:`` in a config.

    Args:
        section: a mapping; of OmegaConf's or a plain one.

    Returns:
        The settings, or ``None`` if they are switched off.

    Raises:
        TypeError: a value has the wrong type; the message names the key.
        ValueError: a key is unknown, out of range, or excludes another.
    """
    if not isinstance(section, Mapping):
        hint = ""
        if isinstance(section, str):
            hint = (
                ": Hydra found no config of that name, and finds none at all after an editable install (pip install -e)"
            )
        raise TypeError(
            f"seqcompress must hold keys, seqcompress.enabled=true for instance, got {described(section)}{hint}"
        )
    given = _plain(section)
    for key in given:
        if key not in _KEYS:
            key = str(key) if len(str(key)) <= 100 else described(key)
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f" (did you mean seqcompress.{close[0]}?)" if close else ""
            raise ValueError(f"seqcompress.{key} is not known{hint}; known: {', '.join(_KEYS)}")
    if "enabled" not in given:
        raise ValueError(f"seqcompress.enabled is missing: add ++seqcompress.enabled=true, got {described(given)}")
    if not isinstance(given["enabled"], bool):
        raise TypeError(f"seqcompress.enabled must be true or false, got {described(given['enabled'])}")
    if not given["enabled"]:
        return None
    teacher = given.get("teacher")
    if "teacher" in given and teacher not in get_args(TeacherShare):
        kind = ValueError if isinstance(teacher, str) else TypeError
        raise kind(f"seqcompress.teacher must be one of {', '.join(get_args(TeacherShare))}, got {described(teacher)}")
    scale_views = given.get("scale_views", False)
    if not isinstance(scale_views, bool):
        raise TypeError(f"seqcompress.scale_views must be true or false, got {described(scale_views)}")
    batch = given.get("batch")
    if batch not in (None, "merge"):
        kind = ValueError if isinstance(batch, str) else TypeError
        raise kind(f"seqcompress.batch must be merge or left out, got {described(batch)}")
    return Settings(_plan(given), teacher, scale_views, batch)


def accelerate(method: Any, settings: Settings) -> Schedule:
    """Compress the encoders of a solo-learn method, in place.

    Args:
        method: a ``solo.methods.BaseMethod``: ``backbone``, perhaps ``momentum_backbone``, and ``cfg``.
        settings: what to do.

    Returns:
        The schedule that is to be followed.

    Raises:
        TypeError: the method, its backbone or solo-learn itself is not supported; the message says what is.
        ValueError: the plan does not suit the encoders. In each case, nothing has been changed.
    """
    from seqcompress.compression import compress, compressed_embeds, is_compressed, restore
    from seqcompress.encoders import is_encoder

    missing = [name for name in ("backbone", "num_large_crops") if not hasattr(method, name)]
    name = method.cfg.get("method")
    if missing or name is None:
        raise TypeError(
            "seqcompress.enabled is for methods of solo-learn 1.0.6, from its repository (the package index has only "
            f"1.0.2, which is too old), got {type(method).__name__} without {' and '.join(missing) or 'cfg.method'}"
        )
    if name not in METHODS:
        raise ValueError(
            f"seqcompress.enabled cannot be combined with method={name!r}; supported methods: {', '.join(METHODS)}"
        )
    student: nn.Module = method.backbone
    teacher = _teacher_of(method)
    for encoder in (student, teacher):
        if encoder is not None and not is_encoder(encoder):
            raise TypeError(
                f"seqcompress.enabled needs a ViT: set backbone.name to {', '.join(BACKBONES[:-1])} or "
                f"{BACKBONES[-1]}, got a {type(encoder).__name__}"
            )
    if teacher is None and settings.teacher is not None:
        raise ValueError(f"seqcompress.teacher must be left out for method={name!r}, which has no momentum encoder")
    if settings.scale_views and settings.teacher not in (None, "patch_size"):
        raise ValueError(
            f"seqcompress.scale_views=true needs seqcompress.teacher=patch_size, got {described(settings.teacher)}: "
            "the momentum encoder gets the same small views, and has to know of them"
        )
    if is_compressed(method):
        raise ValueError(
            f"seqcompress.enabled must be left out for a {type(method).__name__} that is compressed already"
        )
    try:
        scaled = teacher if settings.teacher in (None, "patch_size") else None
        compress(student, settings.plan, teacher=scaled, batch=settings.batch)
        schedule = compressed_embeds(student)[0].compression.plan
        if teacher is not None and settings.teacher == "both":
            compress(teacher, schedule, when="train")
    except (TypeError, ValueError, FileNotFoundError) as error:
        restore(student)
        raise type(error)(f"seqcompress: {error}") from None
    return schedule


def _teacher_of(method: Any) -> nn.Module | None:
    return getattr(method, "momentum_backbone", None)


def _is_solo_learns(updater: object) -> bool:
    kind = type(updater)
    return (kind.__module__, kind.__qualname__) == ("solo.utils.momentum", "MomentumUpdater")


def _alike(online: Tensor, average: Tensor) -> bool:
    return average.is_floating_point() and (online.dtype, online.device) == (average.dtype, average.device)


def _training_loader(trainer: Any) -> DataLoader[Any]:
    """The loader that ``trainer.fit`` was given; its iterator is not made yet."""
    from torch.utils.data import DataLoader

    # Lightning has no public name for it that is filled before training starts.
    source = getattr(getattr(trainer, "fit_loop", None), "_data_source", None)
    loader = getattr(source, "instance", None)
    if not isinstance(loader, DataLoader):
        raise ValueError(
            "seqcompress.scale_views needs a torch DataLoader for training, given to trainer.fit as such, found "
            f"{'nothing' if loader is None else f'a {type(loader).__name__}'}; DALI cannot be told to scale views"
        )
    return loader


def _settings_of(pl_module: Any) -> Settings | None:
    cfg = getattr(pl_module, "cfg", None)
    return read_settings(cfg["seqcompress"]) if isinstance(cfg, Mapping) and "seqcompress" in cfg else None


def _plan(given: Mapping[str, Any]) -> Plan | None:
    from seqcompress.schedules import Schedule
    from seqcompress.strategy import Strategy

    forms = [[key for key in keys if key in given] for keys in (("plan",), _SHORT, _SCHEDULE)]
    used = [", ".join(keys) for keys in forms if keys]
    if len(used) > 1:
        raise ValueError(f"seqcompress takes one plan, got several: {' and '.join(used)}")
    if "plan" in given:
        if not isinstance(given["plan"], str):
            raise TypeError(
                "seqcompress.plan must be a preset's name, a strategy such as 'drop 0.5', a schedule such as "
                f"'0: drop 0.5; 0.9: base' or a schedule file, got {described(given['plan'])}"
            )
        return str(given["plan"])
    try:
        if forms[1]:
            return Strategy.from_dict({name: given[name] for name in forms[1]})
        if not used:
            return None
        kind = given.get("schedule")
        if kind not in _KINDS:
            raise ValueError(f"schedule must be one of {', '.join(_KINDS)}, got {described(kind)}")
        fields = {name: given[name] for name in forms[2] if name != "schedule"}
        if kind != "stepwise":
            fields.setdefault("end", {})
        return Schedule.from_json(json.dumps({"seqcompress_schedule": 1, "kind": kind, **fields}))
    except (TypeError, ValueError) as error:
        raise type(error)(f"seqcompress.{error}") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    return value
