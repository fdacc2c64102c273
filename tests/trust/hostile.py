"""Everything that is read, fed with anything: coverage-guided where atheris is installed, or from a property test.

usage: hostile.py SECONDS   runs until the time is over; it ends with another code than 0, and the input, at the first
undocumented exception, at a file that is opened, a module that is imported or code that is run because of an input, or
at more than 4 GiB of memory. Files of its own are written to the working folder.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import resource
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):
    import atheris

_instrumented = (
    atheris.instrument_imports(include=["seqcompress"])
    if "atheris" in sys.modules and __name__ == "__main__"
    else contextlib.nullcontext()
)
with _instrumented:
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from seqcompress import (
        Budget,
        Constant,
        Cosine,
        GradientErrorReport,
        Linear,
        OnlineScheduler,
        PolynomialDecayLR,
        Schedule,
        SequenceScheduler,
        Stepwise,
        Strategy,
        compress,
        get_strategy,
        gradient_error,
        restore,
    )
    from seqcompress.adapters.lightning import SequenceCompression
    from seqcompress.adapters.solo_learn import read_settings
    from seqcompress.gradients import command

MEMORY = 4 * 2**30
NEVER = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "shutil.", "os.remove", "os.rename", "os.mkdir",
         "pickle.find_class", "socket.", "ctypes.dlopen")  # fmt: skip
NAMED = ("open", "import")  # torch imports a module now and then; an input may name none


class Reached(BaseException):
    """An input reached outside. No exception that anything would catch."""


class _Watch(threading.local):
    text: str | None = None


_watch = _Watch()


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    text = _watch.text
    if text is not None and (
        event.startswith(NEVER) or (event in NAMED and len(str(arguments[0])) > 2 and str(arguments[0]) in text)
    ):
        _watch.text = None
        raise Reached(f"{event} {arguments!r}"[:300])


sys.addaudithook(_audit)


@contextlib.contextmanager
def _watched(text: str) -> Iterator[None]:
    before, _watch.text = set(sys.modules), text
    try:
        yield
    finally:
        _watch.text = None
        named = [name for name in set(sys.modules) - before if name in text]
        if named:
            raise Reached(f"imported {named[0]}")


def _vit() -> Any:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=0).train()


VIEWS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VIT = compress(_vit(), Linear(Strategy(0.5), Strategy()))
SCHEDULER, BUDGET = SequenceScheduler(VIT, total_steps=100), Budget(VIT)
ONLINE_VIT = compress(_vit(), Strategy(0.5))
ONLINE = OnlineScheduler(ONLINE_VIT, lambda views: ONLINE_VIT(views).square().mean(), total_steps=1000, compute_share=1)
while not ONLINE.decisions:
    ONLINE_VIT(VIEWS).square().mean().backward()
    ONLINE.step(VIEWS)
RATE = PolynomialDecayLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 10)
CALLBACK = SequenceCompression()


def _warn_or_raise(text: str) -> str:
    """Text of an object, and not a path."""
    return text if text.lstrip().startswith("{") else "{" + text


def _value(text: str) -> Any:
    """Whatever JSON can say, numbers of any size included."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _schedule(text: str) -> None:
    schedule = Schedule.from_json(_warn_or_raise(text))
    assert Schedule.from_json(schedule.to_json()) == schedule
    for step in (0, 5, 9):
        schedule.at_step(step, 10)


def _report(text: str) -> None:
    report = GradientErrorReport.from_json(_warn_or_raise(text))
    assert repr(GradientErrorReport.from_json(report.to_json())) == repr(report)
    assert len(str(report)) > 10
    report.best()


def _strategy(text: str) -> None:
    strategy = Strategy.parse(text)
    assert Strategy.parse(str(strategy)) == strategy


def _scheduler(text: str) -> None:
    before = SCHEDULER.state_dict(), get_strategy(VIT)
    try:
        SCHEDULER.load_state_dict(_merged(SCHEDULER.state_dict(), _value(text)))
    except ValueError:
        assert (SCHEDULER.state_dict(), get_strategy(VIT)) == before
        raise
    SCHEDULER.step()
    assert 0 <= SCHEDULER.progress <= 1
    VIT(VIEWS)
    SCHEDULER.load_state_dict(before[0])


def _online(text: str) -> None:
    before = ONLINE.state_dict()
    try:
        ONLINE.load_state_dict(_merged(before, _value(text)))
    except ValueError:
        after = ONLINE.state_dict()
        assert torch.equal(before.pop("sketches"), after.pop("sketches"))
        assert after == before
        raise
    ONLINE.step(VIEWS)
    ONLINE.load_state_dict(before)


def _merged(state: dict[str, Any], given: Any) -> Any:
    """A state of which some fields are others, and those that are made null are gone."""
    if not isinstance(given, dict):
        return given
    return {name: value for name, value in {**state, **given}.items() if value is not None}


def _budget(text: str) -> None:
    BUDGET.load_state_dict(_value(text))
    assert 0 <= BUDGET.units < float("inf")


def _rate(text: str) -> None:
    before = RATE.state_dict()
    RATE.load_state_dict(_merged(before, _value(text)))
    RATE.optimizer.step()
    RATE.step()
    RATE.load_state_dict(before)


def _callback(text: str) -> None:
    CALLBACK.load_state_dict(_value(text))


def _settings(text: str) -> None:
    value = _value(text)
    settings = read_settings({"enabled": True, **value} if isinstance(value, dict) else value)
    if settings is not None and not isinstance(settings.plan, str):
        _planned(settings.plan)


def _planned(plan: Any) -> None:
    vit = restore(PLANNED)
    try:
        compress(vit, plan)
        vit(VIEWS)
    finally:
        restore(vit)


PLANNED = _vit()


def _arguments(text: str) -> None:
    argv = ["m:f", "--checkpoints", __file__, "--output", "nowhere", *text.split()]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            parsed = command._parser("command").parse_args(argv)
            command._checked_stages(parsed.checkpoints)
        except command._UsageError:
            pass
        except argparse.ArgumentError:
            pass


READERS: dict[str, tuple[Callable[[str], None], tuple[type[BaseException], ...]]] = {
    "schedule": (_schedule, (ValueError,)),
    "report": (_report, (ValueError,)),
    "strategy": (_strategy, (ValueError,)),
    "scheduler": (_scheduler, (ValueError,)),
    "online": (_online, (ValueError,)),
    "budget": (_budget, (ValueError,)),
    "rate": (_rate, (ValueError,)),
    "callback": (_callback, (ValueError,)),
    "settings": (_settings, (ValueError, TypeError)),
    "arguments": (_arguments, (SystemExit,)),
}


def _seeds() -> list[tuple[str, str]]:
    """One good input at least for everything that is read."""
    vit = _vit()
    report = gradient_error(vit, lambda views: vit(views).square().mean(), [VIEWS, -VIEWS, VIEWS + 1], [Strategy(0.5)])
    schedules = [
        Constant(Strategy(0.5, 8)),
        Linear(Strategy(0.5), Strategy()),
        Cosine(Strategy(0.5, 8), Strategy()),
        Stepwise({0.0: Strategy(0.5, 8), 0.5: Strategy()}),
    ]
    online = {name: value for name, value in ONLINE.state_dict().items() if name != "sketches"}
    return [
        *(("schedule", schedule.to_json()) for schedule in schedules),
        ("report", report.to_json()),
        *(("strategy", text) for text in ("base", "drop 0.5", "patch 32", "drop 0.5, patch 32")),
        ("scheduler", json.dumps(SCHEDULER.state_dict())),
        ("scheduler", f'{{"last_step": {10**40}, "schedule": "/etc/passwd"}}'),
        ("online", json.dumps(online)),
        ("online", '{"trained": 1e299, "measured": 0.5, "ladder": "[\\"base\\"]"}'),
        ("budget", json.dumps(BUDGET.state_dict())),
        ("rate", json.dumps(RATE.state_dict())),
        ("callback", '{"seed": 1, "units": 1e9, "progress": 0.5, "batches": null}'),
        ("settings", '{"enabled": true, "token_dropout": 0.5, "patch_size": 8, "teacher": "both"}'),
        (
            "settings",
            '{"schedule": "stepwise", "stages": [{"progress": 0, "token_dropout": 0.5}], "scale_views": true}',
        ),
        ("settings", '{"plan": "default", "schedule": "linear", "start": {"token_dropout": 0.5}, "end": {}}'),
        ("arguments", "--token-dropout 0 0.5 --patch-size 8 --batches 4 --cost flops --sketch 9 --seed 3 --overwrite"),
        ("arguments", f"--no-monotone --checkpoints 0.5={__file__} 1={__file__}"),
    ]


def feed(kind: str, text: str) -> bool:
    """Have a text read as what it may be; whether it was accepted. Anything but the documented errors is raised."""
    read, documented = READERS[kind]
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), _watched(text):
            warnings.simplefilter("ignore")
            read(text)
    except documented:
        return False
    finally:
        logging.disable(logging.NOTSET)
    return True


SEEDS = _seeds()
for _kind, _text in SEEDS:  # what is imported at first use is
    feed(_kind, _text)


NASTY = [
    *(None, True, -1, 0, 0.5, 1, 2**63, 2**64, 10**40, 10**400, 1e299, -1e299, 1e-320, float("nan"), float("inf")),
    *("", "base", "drop 0.5", "/etc/passwd", "os.system", "\x00", "\ud800", "[" * 2000, "{" * 2000),
    *([], {}, [[]], {"": 0}),
]


def mutated(text: str, dice: random.Random) -> str:
    """A JSON text of which one value is another, gone, there twice or under another name; any other as it is."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    places = list(_places(content))
    if not places:
        return json.dumps(dice.choice(NASTY))
    holder, key = dice.choice(places)
    inner = holder[key]
    if isinstance(inner, str) and inner.startswith(("{", "[")) and dice.random() < 0.8:  # a state in a state
        holder[key] = mutated(inner, dice)
    elif dice.random() < 0.7 or isinstance(holder, list):
        holder[key] = dice.choice([*NASTY, inner, [inner], dice.choice(places)[0]])
    else:
        value = holder.pop(key)
        if dice.random() < 0.5:
            holder[dice.choice(places)[1] if dice.random() < 0.5 else key + "x"] = value
    try:
        return json.dumps(content)
    except (ValueError, TypeError, RecursionError):  # it holds itself, or has numbers as names
        return text


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    inside = (
        list(content.items())
        if isinstance(content, dict)
        else list(enumerate(content))
        if isinstance(content, list)
        else []
    )
    for key, value in inside:
        yield content, key
        yield from _places(value)


class _Counts:
    """What was done, written down now and then: libFuzzer ends the process by itself."""

    def __init__(self) -> None:
        self.inputs = self.accepted = 0

    def feed(self, kind: str, text: str) -> None:
        self.accepted += feed(kind, text)
        self.inputs += 1
        if self.inputs % 200 == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            counts = {"inputs": self.inputs, "accepted": self.accepted, "peak_mib": peak}
            Path("counts.json").write_text(json.dumps(counts))


def _fuzz_by_coverage(seconds: int, counts: _Counts) -> None:
    kinds, corpus = list(READERS), Path("corpus")
    corpus.mkdir(exist_ok=True)
    for number, (kind, text) in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(bytes([kinds.index(kind)]) + text.encode())
    words = {word for _, text in SEEDS for word in text.replace('"', " ").replace("\\", " ").split() if word.isalpha()}
    Path("words").write_text(
        "".join(f'"{word}"\n' for word in [*sorted(words), "1e299", "NaN", "-Infinity", "9" * 401])
    )

    def one(data: bytes) -> None:
        if data:
            counts.feed(kinds[data[0] % len(kinds)], data[1:].decode("utf-8", "replace"))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if data and dice.random() < 0.6:
            return (data[:1] + mutated(data[1:].decode("utf-8", "replace"), dice).encode("utf-8", "replace"))[:most]
        return bytes(atheris.Mutate(data, most))

    options = ["-dict=words", f"-max_total_time={seconds}", "-max_len=16384", f"-rss_limit_mb={MEMORY // 2**20}",
               "-timeout=60", "-verbosity=0"]  # fmt: skip
    atheris.Setup([sys.argv[0], "corpus", *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def _fuzz_blindly(seconds: int, counts: _Counts) -> None:
    dice, end = random.Random(0), time.monotonic() + seconds
    while time.monotonic() < end:
        kind, text = dice.choice(SEEDS)
        for _ in range(dice.randint(1, 4)):
            text = mutated(text, dice)
        counts.feed(kind, text)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY:
            sys.exit(f"more than {MEMORY} bytes after {kind} {text!r}")


if __name__ == "__main__":
    fuzz = _fuzz_by_coverage if "atheris" in sys.modules else _fuzz_blindly
    print(fuzz.__name__, flush=True)
    fuzz(int(sys.argv[1]), _Counts())
