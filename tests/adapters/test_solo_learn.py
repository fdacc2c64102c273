"""solo-learn's config flag: on a module of the same shape, and on solo-learn itself where it is installed."""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.resources
import importlib.util
import math
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.models.resnet import BasicBlock, ResNet

from seqcompress import Strategy, compress, get_strategy, is_compressed, num_tokens, relative_cost
from seqcompress.adapters.solo_learn import METHODS, ForeachMomentumUpdater, Settings, accelerate, read_settings
from seqcompress.gradients import online
from seqcompress.schedules import Constant, Cosine, Linear, Online, Schedule, Stepwise

HELPER = Path(__file__).with_name("solo_learn_module.py")
_spec = importlib.util.spec_from_file_location(HELPER.stem, HELPER)
assert _spec is not None
assert _spec.loader is not None
contract = importlib.util.module_from_spec(_spec)
sys.modules[HELPER.stem] = contract  # where dataclass-like types look up their own names
_spec.loader.exec_module(contract)

ON = {"enabled": True}
OFF = {"enabled": False}
# The default plan over 20 steps, for 32 px and patches of 8 px: patches of 16 px with and without dropout, then of 8.
DEFAULT = [3] * 19 + [17]
DEFAULT_TEACHER = [5] * 19 + [17]
IN_FOUR_STAGES = {
    "schedule": "stepwise",
    "stages": [
        {"progress": 0.0, "token_dropout": 0.5, "patch_size": 16},
        {"progress": 0.5, "patch_size": 16},
        {"progress": 0.75, "token_dropout": 0.5},
        {"progress": 0.95},
    ],
}

Build = Callable[..., Any]

solo_is_missing = importlib.util.find_spec("solo") is None
needs_solo = pytest.mark.skipif(
    solo_is_missing, reason="solo-learn is not on the path: its source cannot be had from the package index"
)


@pytest.fixture
def make_method(pl: Any) -> Build:
    """Builds the contract's LightningModule from what stands under ``seqcompress``."""

    def build(section: Any = contract.ABSENT, *, momentum: bool = True, backbone: Any = None, **config: Any) -> Any:
        torch.manual_seed(3)
        config = contract.make_config(section, **{"method": "mocov3" if momentum else "simclr", **config})
        return contract.method_class(pl)(config, momentum=momentum, backbone=backbone)

    return build


def tokens(method: Any, encoder: str = "backbone", stage: str = "train") -> list[int]:
    return [seen.tokens for seen in method.seen if (seen.encoder, seen.stage) == (encoder, stage)]


def twice(lengths: list[int]) -> list[int]:
    """One entry for each of the two large crops."""
    return [length for length in lengths for _ in range(2)]


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def columns(folder: str | Path) -> dict[str, list[float]]:
    """The columns of a CSVLogger, without the rows that are empty there."""
    with (Path(folder) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def in_a_process(*arguments: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=check, timeout=300)


# What is compressed, and when


def test_the_flag_alone_gives_the_default_plan_with_dropout_for_the_student_only(
    make_method: Build, make_trainer: Build
) -> None:
    method = make_method(ON)
    make_trainer(max_epochs=5).fit(method, contract.loader(), contract.validation_loader())
    assert tokens(method) == twice(DEFAULT)
    assert tokens(method, "momentum_backbone") == twice(DEFAULT_TEACHER)


def test_validation_sees_every_token_of_both_encoders(make_method: Build, make_trainer: Build) -> None:
    method = make_method(ON)
    make_trainer(max_epochs=2).fit(method, contract.loader(), contract.validation_loader())
    for encoder in ("backbone", "momentum_backbone"):
        assert tokens(method, encoder, "sanity_check") == [17]
        assert tokens(method, encoder, "validate") == [17, 17]


def test_small_crops_are_shortened_in_proportion(make_method: Build, make_trainer: Build) -> None:
    method = make_method(ON, small_crops=2)
    make_trainer(max_epochs=5).fit(method, contract.loader(small_crops=2))
    small = [2] * 19 + [5]  # of 1 patch of 16 px, then of 4 of 8 px
    steps = zip(DEFAULT, small, strict=True)
    assert tokens(method) == [length for large, few in steps for length in (large, large, few, few)]
    assert tokens(method, "momentum_backbone") == twice(DEFAULT_TEACHER)


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [("patch_size", DEFAULT_TEACHER), ("both", DEFAULT), ("none", [17] * 20)],
    ids=["patch_size", "both", "none"],
)
def test_teacher_says_what_the_momentum_encoder_gets(
    make_method: Build, make_trainer: Build, teacher: str, expected: list[int]
) -> None:
    method = make_method({**ON, "teacher": teacher})
    make_trainer(max_epochs=5).fit(method, contract.loader(), contract.validation_loader())
    assert tokens(method) == twice(DEFAULT)
    assert tokens(method, "momentum_backbone") == twice(expected)
    assert tokens(method, "momentum_backbone", "validate") == [17] * 5


def test_a_method_without_momentum_encoder_is_accelerated_alone(make_method: Build, make_trainer: Build) -> None:
    method = make_method(ON, momentum=False)
    make_trainer(max_epochs=5).fit(method, contract.loader())
    assert tokens(method) == twice(DEFAULT)


def of_20_steps(schedule: Schedule) -> list[int]:
    return [num_tokens(contract.make_vit(), schedule.at_step(step, 20), 32) for step in range(20)]


STRONG = Strategy(0.75, 16)
STAGES = [{"progress": 0.0, "patch_size": 16}, {"progress": 0.3, "token_dropout": 0.25}]
START = {"token_dropout": 0.75, "patch_size": 16}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"schedule": "linear", "start": START}, of_20_steps(Linear(STRONG, Strategy()))),
        (
            {"schedule": "linear", "start": START, "end": {"token_dropout": 0.25}},
            of_20_steps(Linear(STRONG, Strategy(0.25))),
        ),
        ({"schedule": "cosine", "start": START}, of_20_steps(Cosine(STRONG, Strategy()))),
        ({"schedule": "stepwise", "stages": STAGES}, [5] * 6 + [13] * 14),
        ({"plan": "default"}, DEFAULT),
        ({"plan": "gentle"}, [5] * 5 + [9] * 10 + [17] * 5),
        ({"plan": "strong"}, [3] * 20),
        ({"token_dropout": 0.75}, [5] * 20),
        ({"patch_size": 16}, [5] * 20),
        ({"token_dropout": 0.5, "patch_size": 16}, [3] * 20),
        ({"token_dropout": 0}, [17] * 20),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_config_can_name_any_plan(
    make_method: Build, make_trainer: Build, keys: dict[str, Any], expected: list[int]
) -> None:
    method = make_method({**ON, **keys}, momentum=False)
    make_trainer(max_epochs=5).fit(method, contract.loader())
    assert tokens(method) == twice(expected)


def test_plan_can_be_a_schedule_file(make_method: Build, make_trainer: Build, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(Stepwise({0.0: Strategy(0.75), 0.5: Strategy(0.0, 16)}).to_json())
    method = make_method({**ON, "plan": str(path)})
    make_trainer(max_epochs=2).fit(method, contract.loader())
    assert tokens(method) == twice([5] * 8)
    assert tokens(method, "momentum_backbone") == twice([17] * 4 + [5] * 4)


def test_accumulated_batches_share_the_strategy_of_their_step(make_method: Build, make_trainer: Build) -> None:
    method = make_method({**ON, **IN_FOUR_STAGES})
    make_trainer(max_epochs=5, accumulate_grad_batches=2).fit(method, contract.loader())
    assert tokens(method) == twice(twice([3] * 5 + [5] * 3 + [9] + [17]))
    assert tokens(method, "momentum_backbone") == twice(twice([5] * 8 + [17] * 2))


@pytest.mark.parametrize("section", [{"batch": "merge"}, {}], ids=["merge", "absent"])
def test_accumulated_batches_are_run_together_where_that_is_asked_for(
    make_method: Build, make_trainer: Build, section: Any
) -> None:
    method = make_method({**ON, **IN_FOUR_STAGES, **section})
    trainer = make_trainer(max_epochs=5, accumulate_grad_batches=4)
    trainer.fit(method, contract.loader())
    assert trainer.global_step == 5
    short = [3] * 2 + [5] * 2 if "batch" in section else [3] * 8 + [5] * 4  # four at once, or two, or one
    assert tokens(method) == twice(short + [9] * 4 + [17] * 4)


def test_mixed_precision_trains_at_the_same_lengths(make_method: Build, make_trainer: Build) -> None:
    method = make_method(ON)
    make_trainer(max_epochs=5, precision="bf16-mixed").fit(method, contract.loader())
    assert tokens(method) == twice(DEFAULT)
    assert all(map(math.isfinite, method.losses))


# The momentum update


def test_while_training_averages_are_made_in_place_and_solo_learns_updater_is_back_afterwards(
    make_method: Build, make_trainer: Build
) -> None:
    method = make_method(ON, final_tau=1.0)
    updater = method.momentum_updater
    storage = [parameter.data_ptr() for parameter in method.momentum_backbone.parameters()]
    make_trainer(max_epochs=1).fit(method, contract.loader())
    assert method.updaters == {"ForeachMomentumUpdater"}
    assert [parameter.data_ptr() for parameter in method.momentum_backbone.parameters()] == storage
    assert method.momentum_updater is updater
    assert updater.cur_tau == 1.0  # where its schedule ends


def test_training_averages_the_same_weights_as_with_solo_learns_updater(
    make_method: Build, make_trainer: Build
) -> None:
    class Other(contract.MomentumUpdater):  # type: ignore[name-defined, misc]
        """Somebody's own."""

    ours, theirs = make_method(ON), make_method(ON)
    theirs.momentum_updater = Other(0.9, 0.9)
    for method in (ours, theirs):
        torch.manual_seed(0)
        make_trainer(max_epochs=2).fit(method, contract.loader())
    assert theirs.updaters == {"Other"}  # left where it is
    assert ours.updaters == {"ForeachMomentumUpdater"}
    for name, average in theirs.momentum_backbone.state_dict().items():
        torch.testing.assert_close(ours.momentum_backbone.state_dict()[name], average, rtol=1e-5, atol=1e-6)


def test_an_interrupted_run_has_solo_learns_updater_back_with_its_tau(make_method: Build, make_trainer: Build) -> None:
    method = make_method(ON, final_tau=1.0)
    updater, whole = method.momentum_updater, method.on_train_batch_end

    def stop(outputs: Any, batch: Any, batch_idx: int) -> None:
        whole(outputs, batch, batch_idx)
        if batch_idx == 1:
            raise RuntimeError("stop")

    method.on_train_batch_end = stop
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(max_epochs=1).fit(method, contract.loader())
    assert method.momentum_updater is updater
    assert updater.cur_tau == pytest.approx(0.95)  # half of the way from 0.9 to 1


@pytest.mark.parametrize("section", [contract.ABSENT, OFF], ids=["absent", "off"])
def test_without_the_flag_solo_learns_updater_is_used(make_method: Build, make_trainer: Build, section: Any) -> None:
    method = make_method(section)
    make_trainer(max_epochs=1).fit(method, contract.loader())
    assert method.updaters == {"MomentumUpdater"}


@pytest.fixture(params=["contract", pytest.param("solo-learn", marks=needs_solo)])
def updater_class(request: pytest.FixtureRequest) -> Any:
    """The updater of the contract, and solo-learn's own."""
    theirs = request.param == "solo-learn"
    return importlib.import_module("solo.utils.momentum").MomentumUpdater if theirs else contract.MomentumUpdater


class Parameters(nn.Module):
    """Nothing but parameters; ``None`` stands for the first one once more."""

    def __init__(self, *tensors: Tensor | None) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            shared = self.get_parameter("0") if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(str(index), shared)


def average_ten_times(updater: Any, online: nn.Module, average: nn.Module) -> None:
    """Ten steps between which the online network moves by a tenth, and tau as in training."""
    generator = torch.Generator().manual_seed(6)
    for step in range(10):
        with torch.no_grad():
            for parameter in online.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
        updater.update(online, average)
        updater.update_tau(step + 1, 10)


FLOATS = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize("dtypes", [*[(dtype, dtype) for dtype in FLOATS], FLOATS[:2]], ids=str)
def test_ten_averages_are_those_of_solo_learn_to_a_few_units_in_the_last_place(
    updater_class: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    one, other = dtypes
    online = Parameters(
        torch.randn(7, 5).to(one),
        torch.randn(()).to(other),
        torch.randn(0, 3).to(one),
        None,
        torch.randn(3, 4).T.to(one),
    )
    average = copy.deepcopy(online)
    ends = []
    for kind in (updater_class, lambda *tau: ForeachMomentumUpdater(updater_class(*tau))):
        pair = copy.deepcopy((online, average))
        average_ten_times(kind(0.9, 1.0), *pair)
        ends.append(pair[1])
    for theirs, ours, start in zip(*(end.parameters() for end in ends), average.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert start.numel() == 0 or not torch.equal(ours, start)
        largest = torch.maximum(theirs.abs(), start.abs()).clamp(min=1.0)
        assert bool(((ours - theirs).abs() <= 8 * torch.finfo(ours.dtype).eps * largest).all())


def test_an_average_keeps_its_storage_and_is_one_operation_for_all_parameters(updater_class: Any) -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    online, average = contract.make_vit(), contract.make_vit()
    storage = [parameter.data_ptr() for parameter in average.parameters()]
    with Recorder():
        ForeachMomentumUpdater(updater_class(0.9, 1.0)).update(online, average)
    assert called == ["aten._foreach_lerp_.Scalar"]
    assert [parameter.data_ptr() for parameter in average.parameters()] == storage


@pytest.mark.parametrize(
    ("online", "average"),
    [
        (torch.tensor([5, 9]), torch.tensor([5, 7])),
        (torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0], dtype=torch.bfloat16)),
    ],
    ids=["whole numbers", "another dtype"],
)
def test_what_torch_cannot_average_in_place_is_left_to_solo_learn(
    updater_class: Any, online: Tensor, average: Tensor
) -> None:
    ends = []
    for updater in (updater_class(0.9, 1.0), ForeachMomentumUpdater(updater_class(0.9, 1.0))):
        momentum_net = Parameters(average.clone(), torch.zeros(2))
        updater.update(Parameters(online, torch.ones(2)), momentum_net)
        ends.append([parameter.data for parameter in momentum_net.parameters()])
    for theirs, ours in zip(*ends, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(ends[1][0].double(), 0.9 * average.double() + 0.1 * online.double(), rtol=0, atol=0.01)


def test_networks_without_parameters_have_no_average(updater_class: Any) -> None:
    ForeachMomentumUpdater(updater_class(0.9, 1.0)).update(nn.Identity(), nn.Identity())


def test_tau_is_solo_learns_and_can_be_read_and_set(updater_class: Any) -> None:
    theirs = updater_class(0.9, 1.0)
    ours = ForeachMomentumUpdater(theirs)
    ours.update_tau(1, 2)
    assert (ours.base_tau, ours.cur_tau, ours.final_tau) == (0.9, pytest.approx(0.95), 1.0)
    ours.cur_tau = 0.5
    assert theirs.cur_tau == 0.5
    online, average = Parameters(torch.tensor([1.0])), Parameters(torch.tensor([0.0]))
    ours.update(online, average)
    assert average.get_parameter("0").item() == 0.5


# Smaller views


def test_with_scale_views_the_loader_makes_smaller_crops_and_encoders_see_as_many_tokens(
    make_method: Build, make_trainer: Build
) -> None:
    method, loader = make_method({**ON, "scale_views": True}), contract.picture_loader()
    make_trainer(max_epochs=5).fit(method, loader, contract.validation_loader())
    assert tokens(method) == twice(DEFAULT)
    assert tokens(method, "momentum_backbone") == twice(DEFAULT_TEACHER)
    assert method.view_sizes[:18] == [16] * 18  # 32 px cut into patches of 16, in the pixels of patches of 8
    assert method.view_sizes[19:] == [32]
    assert next(iter(loader))[1][0].shape == (4, 3, 32, 32)  # as before, once training is over


@pytest.mark.parametrize("section", [{**ON, "scale_views": False}, ON], ids=["false", "absent"])
def test_without_scale_views_crops_keep_their_size(make_method: Build, make_trainer: Build, section: Any) -> None:
    method = make_method(section)
    make_trainer(max_epochs=5).fit(method, contract.picture_loader())
    assert method.view_sizes == [32] * 20


def test_scale_views_works_without_a_momentum_encoder(make_method: Build, make_trainer: Build) -> None:
    method = make_method({**ON, "scale_views": True, "patch_size": 16}, momentum=False)
    make_trainer(max_epochs=1).fit(method, contract.picture_loader())
    assert tokens(method) == twice([5] * 4)
    assert method.view_sizes == [16] * 4


@pytest.mark.parametrize(
    ("loaders", "found"), [(lambda: [contract.picture_loader()], "a list"), (lambda: None, "a Method")]
)
def test_scale_views_is_refused_where_the_loader_is_not_torchs_own(
    make_method: Build, make_trainer: Build, loaders: Any, found: str
) -> None:
    method = make_method({**ON, "scale_views": True})
    method.train_dataloader = contract.picture_loader
    updater = method.momentum_updater
    with pytest.raises(ValueError, match=rf"seqcompress.scale_views needs a torch DataLoader .* found {found}; DALI"):
        make_trainer().fit(method, loaders())
    assert not is_compressed(method)
    assert method.momentum_updater is updater


def test_an_error_of_the_data_set_leaves_a_plain_module(make_method: Build, make_trainer: Build) -> None:
    method, loader = make_method({**ON, "scale_views": True}), contract.picture_loader()
    updater, loader.dataset.transform = method.momentum_updater, None
    with pytest.raises(ValueError, match=r"scale_views: loader must have a data set that holds a known crop"):
        make_trainer().fit(method, loader)
    assert not is_compressed(method)
    assert method.momentum_updater is updater


# Without the flag, and afterwards


def without_our_entry_points(monkeypatch: pytest.MonkeyPatch, pl: Any) -> None:
    connector = importlib.import_module(f"{pl.__name__}.trainer.connectors.callback_connector")
    registry = sys.modules[connector._load_external_callbacks.__module__]
    monkeypatch.setattr(registry, "entry_points", lambda **_: [])


@pytest.mark.parametrize(
    "section", [contract.ABSENT, OFF, {**OFF, "plan": "strong", "teacher": "both"}], ids=["absent", "off", "off, plan"]
)
@pytest.mark.parametrize("momentum", [True, False], ids=["pair", "alone"])
def test_without_the_flag_nothing_differs_from_a_run_without_seqcompress(
    pl: Any,
    make_method: Build,
    make_trainer: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    section: Any,
    momentum: bool,
) -> None:
    ends = []
    for installed in (True, False):
        if not installed:
            without_our_entry_points(monkeypatch, pl)
        method = make_method(section, momentum=momentum)
        trainer = make_trainer(
            logger=pl.loggers.CSVLogger(tmp_path, version=f"installed={installed}"), log_every_n_steps=1
        )
        ours = [name for name in (type(callback).__name__ for callback in trainer.callbacks) if "Compression" in name]
        assert ours == (["SequenceCompressionCallback"] if installed else [])
        trainer.fit(method, contract.loader(), contract.validation_loader())
        path = tmp_path / "end.ckpt"
        trainer.save_checkpoint(path)
        ends.append((method, torch.get_rng_state(), torch.load(path, weights_only=False)))
    (method, state, saved), (other, other_state, other_saved) = ends
    assert_same_weights(method.state_dict(), other.state_dict())
    assert method.losses == other.losses
    assert torch.equal(state, other_state)
    assert saved["callbacks"] == other_saved["callbacks"] == {}
    for number, momenta in saved["optimizer_states"][0]["state"].items():
        assert torch.equal(
            momenta["momentum_buffer"], other_saved["optimizer_states"][0]["state"][number]["momentum_buffer"]
        )
    logged, other_logged = (
        columns(tmp_path / "lightning_logs" / f"installed={installed}") for installed in (True, False)
    )
    assert logged == other_logged
    assert not [name for name in logged if "seq" in name]
    assert method.compressed_in == {("training", False), ("fit", False)}
    assert set(tokens(method)) == {17}


def test_training_leaves_a_plain_module(make_method: Build, make_trainer: Build) -> None:
    method, plain = make_method(ON), make_method()
    make_trainer(max_epochs=1).fit(method, contract.loader())
    assert method.compressed_in == {("training", True)}
    assert not is_compressed(method)
    assert list(method.state_dict()) == list(plain.state_dict())
    for name, module in method.named_modules():
        hooks = 1 if name.endswith("backbone.blocks.0") else 0  # the one that notes tokens
        assert len(module._forward_pre_hooks) == hooks
    assert type(method.backbone.patch_embed) is type(method.momentum_backbone.patch_embed) is PatchEmbed
    lengths: list[int] = []
    method.backbone.blocks[1].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    nn.Module.__call__(method.backbone.train().blocks[1], torch.zeros(1, 17, 32))
    assert lengths == [17]


def test_a_checkpoint_has_the_keys_of_a_plain_one_and_loads_into_it(
    pl: Any, make_method: Build, make_trainer: Build, tmp_path: Path
) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saving]).fit(make_method(ON), contract.loader())
    plain = make_method()
    saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(plain.state_dict())
    plain.load_state_dict(saved, strict=True)


def test_an_interrupted_run_leaves_a_plain_module_too(make_method: Build, make_trainer: Build) -> None:
    method = make_method(ON)

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    method.on_train_batch_end = stop
    with pytest.raises(RuntimeError, match="stop"):
        make_trainer(max_epochs=1).fit(method, contract.loader())
    assert method.compressed_in == {("training", True)}
    assert not is_compressed(method)


def test_validating_alone_compresses_nothing(make_method: Build, make_trainer: Build) -> None:
    method = make_method(ON)
    make_trainer().validate(method, contract.validation_loader(), verbose=False)
    assert method.compressed_in == {("validate", False)}
    assert tokens(method, stage="validate") == [17]


@pytest.mark.parametrize(
    "cfg",
    ["seqcompress", argparse.Namespace(seqcompress=ON), {"method": "mocov3"}, OmegaConf.create([1]), None],
    ids=["string", "namespace", "no key", "list", "none"],
)
def test_a_module_with_another_kind_of_config_is_left_alone(make_method: Build, make_trainer: Build, cfg: Any) -> None:
    method = make_method()
    method.cfg = cfg
    make_trainer(max_epochs=1).fit(method, contract.loader())
    assert method.compressed_in == {("training", False)}


# What it tells


def test_what_each_step_ran_at_goes_to_the_logger(
    pl: Any, make_method: Build, make_trainer: Build, tmp_path: Path
) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    method = make_method({**ON, **IN_FOUR_STAGES})
    make_trainer(max_epochs=5, logger=logger, log_every_n_steps=1).fit(method, contract.loader())
    logged = columns(logger.log_dir)
    assert logged["seqcompress/tokens"] == [3] * 10 + [5] * 5 + [9] * 4 + [17]
    assert logged["seqcompress/token_dropout"] == [0.5] * 10 + [0.0] * 5 + [0.5] * 4 + [0.0]
    assert logged["seqcompress/patch_size"] == [16] * 15 + [8] * 5
    plan = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy(0.0, 16), 0.75: Strategy(0.5), 0.95: Strategy()})
    views, vit, spent = 8, contract.make_vit(), 0.0
    for step in range(20):
        strategy = plan(step / 20)
        student, teacher = (relative_cost(vit, each, 32) for each in (strategy, strategy.without_dropout()))
        spent += views * (3 * student + teacher)
        assert logged["seqcompress/budget"][step] * 1e6 == pytest.approx(spent, rel=1e-5)


def test_the_progress_bar_shows_the_strategy(make_method: Build, make_trainer: Build) -> None:
    trainer = make_trainer(max_epochs=1, enable_progress_bar=True)
    trainer.fit(make_method({**ON, "token_dropout": 0.5}), contract.loader())
    shown = trainer.progress_bar_metrics
    assert {name: shown[name] for name in ("seq_drop", "seq_patch", "seq_tokens")} == {
        "seq_drop": 0.5,
        "seq_patch": 8.0,
        "seq_tokens": 9.0,
    }
    assert shown["seq_budget"] > 0


def test_set_up_says_in_one_line_what_was_understood(
    make_method: Build, make_trainer: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(max_epochs=1).fit(make_method(ON), contract.loader())
    lines = [line for line in capsys.readouterr().out.splitlines() if "seqcompress" in line]
    assert len(lines) == 1
    assert re.fullmatch(
        r"seqcompress: backbone: trains at drop 0\.5, patch 16 \(3 tokens a view\) now, base \(17 tokens a view\) in "
        r"the end, about \d+% of the plain run's budget; its teacher gets the patch size",
        lines[0],
    )


# Resuming


RELAXING = {**ON, "schedule": "linear", "start": {"token_dropout": 0.75}}


@pytest.mark.parametrize(
    ("section", "momentum", "stop"),
    [(RELAXING, True, 8), (ON, True, 12), (RELAXING, False, 7)],
    ids=["linear", "default", "within an epoch"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(
    pl: Any, make_method: Build, make_trainer: Build, tmp_path: Path, section: Any, momentum: bool, stop: int
) -> None:
    # A momentum encoder moves after the callbacks of its batch: there, checkpoints of whole epochs are complete.
    when = {"every_n_epochs": 1, "save_on_train_epoch_end": True} if momentum else {"every_n_train_steps": 1}
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    data = contract.loader(constant=True)
    whole = make_method(section, momentum=momentum)
    subsets = contract.note_subsets(whole.backbone)
    make_trainer(max_epochs=5, enable_checkpointing=True, callbacks=[saving]).fit(whole, data)

    resumed = make_method(section, momentum=momentum)
    other_subsets = contract.note_subsets(resumed.backbone)
    torch.manual_seed(5678)  # another process begins with another random state
    make_trainer(max_epochs=5).fit(resumed, data, ckpt_path=str(tmp_path / f"step={stop}.ckpt"))

    assert resumed.strategies == whole.strategies[stop:]
    assert tokens(resumed) == tokens(whole)[2 * stop :]
    assert tokens(resumed, "momentum_backbone") == tokens(whole, "momentum_backbone")[2 * stop :]
    assert len(other_subsets) == 2 * (20 - stop)
    assert all(torch.equal(one, other) for one, other in zip(other_subsets, subsets[2 * stop :], strict=True))
    assert resumed.losses == whole.losses[stop:]
    assert_same_weights(resumed.state_dict(), whole.state_dict())


HALF = {**ON, "token_dropout": 0.5}


@pytest.mark.parametrize(
    ("before", "now", "warning"),
    [
        (contract.ABSENT, ON, "was trained without seqcompress"),
        (OFF, ON, "was trained without seqcompress"),
        (ON, contract.ABSENT, "was trained with seqcompress"),
        (ON, OFF, "was trained with seqcompress"),
        (ON, HALF, "was trained with another plan"),
        (ON, {**ON, "teacher": "both"}, "was trained with another plan"),
        (ON, ON, None),
        (ON, {**ON, "plan": "default"}, None),
        (ON, {**ON, "teacher": "patch_size"}, None),
        (OFF, contract.ABSENT, None),
    ],
)
def test_going_on_otherwise_than_a_run_began_is_warned_of(
    make_method: Build,
    make_trainer: Build,
    pl: Any,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
    before: Any,
    now: Any,
    warning: str | None,
) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    first = make_trainer(max_epochs=1, enable_checkpointing=True, callbacks=[saving])
    first.fit(make_method(before), contract.loader())
    method = make_method(now)
    make_trainer().validate(method, contract.validation_loader(), ckpt_path=str(tmp_path / "end.ckpt"), verbose=False)
    assert not said(recwarn)  # validating is not going on
    make_trainer(max_epochs=2).fit(method, contract.loader(), ckpt_path=str(tmp_path / "end.ckpt"))
    assert len(said(recwarn)) == (warning is not None)
    assert warning is None or warning in said(recwarn)[0]
    assert len(method.losses) == 4  # it goes on all the same


def test_a_checkpoint_saved_after_training_goes_on_without_a_warning(
    make_method: Build, make_trainer: Build, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    first, method = make_trainer(max_epochs=1), make_method(ON)
    first.fit(method, contract.loader())
    first.save_checkpoint(tmp_path / "end.ckpt")
    make_trainer(max_epochs=2).fit(method, contract.loader(), ckpt_path=str(tmp_path / "end.ckpt"))
    assert not said(recwarn)


def said(recwarn: pytest.WarningsRecorder) -> list[str]:
    """What this project warned of."""
    return [str(warned.message) for warned in recwarn if str(warned.message).startswith("seqcompress")]


# Errors


def keys(**given: Any) -> dict[str, Any]:
    return {**ON, **given}


FIRST = {"progress": 0.0, "token_dropout": 0.5}
BAD_SECTIONS: list[tuple[Any, type[Exception], str]] = [
    ("strong", TypeError, "seqcompress must hold keys.*got 'strong': Hydra found no config of that name"),
    (True, TypeError, "seqcompress must hold keys, seqcompress.enabled=true for instance, got True$"),
    (None, TypeError, "seqcompress must hold keys.*got None$"),
    ([1], TypeError, r"seqcompress must hold keys.*got \[1\]$"),
    ({}, ValueError, "seqcompress.enabled is missing: add "),
    ({"token_dropout": 0.5}, ValueError, "seqcompress.enabled is missing: .*got {'token_dropout': 0.5}"),
    ({"enabled": "yes"}, TypeError, "seqcompress.enabled must be true or false, got 'yes'"),
    ({"enabled": 1}, TypeError, "seqcompress.enabled must be true or false, got 1"),
    ({"enabled": None}, TypeError, "seqcompress.enabled must be true or false, got None"),
    ({"enable": True}, ValueError, r"enable is not known \(did you mean seqcompress.enabled\?\); known: enabled, plan"),
    (keys(token_drop=0.5), ValueError, r"token_drop is not known \(did you mean seqcompress.token_dropout\?\)"),
    ({**OFF, "tokens": 3, "zzz": 1}, ValueError, "seqcompress.tokens is not known"),
    (keys(zzz=1), ValueError, "seqcompress.zzz is not known; known: enabled, plan, token_dropout, patch_size"),
    (keys(teacher="student"), ValueError, "seqcompress.teacher must be one of patch_size, both, none, got 'student'"),
    (keys(plan="default", token_dropout=0.5), ValueError, "one plan, got several: plan and token_dropout$"),
    (keys(plan="default", schedule="linear"), ValueError, "one plan, got several: plan and schedule$"),
    (keys(patch_size=16, start={}), ValueError, "one plan, got several: patch_size and start$"),
    (
        keys(plan=3),
        TypeError,
        "seqcompress.plan must be a preset's name, a strategy such as 'drop 0.5', a schedule such as "
        "'0: drop 0.5; 0.9: base' or a schedule file, got 3",
    ),
    (keys(plan="stronger"), ValueError, "seqcompress: plan must be one of 'default', 'gentle', 'strong'"),
    (keys(plan="missing.json"), FileNotFoundError, "seqcompress: schedule file 'missing.json' does not exist"),
    (keys(token_dropout="half"), TypeError, r"seqcompress.token_dropout must be a number in \[0, 1\), got 'half'"),
    (keys(token_dropout=1.0), ValueError, r"seqcompress.token_dropout must be in \[0, 1\), got 1.0"),
    (keys(token_dropout=None), TypeError, "seqcompress.token_dropout must be a number"),
    (keys(patch_size=16.5), TypeError, "seqcompress.patch_size must be a whole number of pixels or None, got 16.5"),
    (keys(patch_size=0), ValueError, "seqcompress.patch_size must be at least 1 pixel, got 0"),
    (keys(patch_size=33), ValueError, "seqcompress: model: patch_size must not be larger than a side of the view"),
    (keys(schedule="sine", start={}), ValueError, "schedule must be one of linear, cosine, stepwise, got 'sine'"),
    (keys(start={}), ValueError, "seqcompress.schedule must be one of linear, cosine, stepwise, got None"),
    (keys(schedule={"start": {}}), ValueError, "seqcompress.schedule must be one of linear, cosine, stepwise, got {"),
    (keys(batch="grow"), ValueError, "seqcompress.batch must be merge or left out, got 'grow'"),
    (keys(batch=2), TypeError, "seqcompress.batch must be merge or left out, got 2"),
    (keys(scale_views="yes"), TypeError, "seqcompress.scale_views must be true or false, got 'yes'"),
    (keys(scale_views=1), TypeError, "seqcompress.scale_views must be true or false, got 1"),
    (keys(scale_views=True), ValueError, "seqcompress.scale_views: loader must .* holds? a known crop"),
    (
        keys(scale_views=True, teacher="none"),
        ValueError,
        "seqcompress.scale_views=true needs seqcompress.teacher=patch_size, got 'none'",
    ),
    (
        keys(scale_views=True, teacher="both"),
        ValueError,
        "seqcompress.scale_views=true needs seqcompress.teacher=patch_size, got 'both'",
    ),
    (keys(teacher=True), TypeError, "seqcompress.teacher must be one of patch_size, both, none, got True"),
    (keys(schedule="linear"), ValueError, "seqcompress.schedule: field 'start': is missing"),
    (keys(schedule="linear", start=0.5), ValueError, "seqcompress.schedule: field 'start': a strategy must be an obj"),
    (keys(schedule="linear", start={"drop": 1}), ValueError, "field 'start': unknown field 'drop'"),
    (keys(schedule="cosine", start={}, stages=[FIRST]), ValueError, "field 'stages': is unknown"),
    (keys(schedule="stepwise"), ValueError, "field 'stages': is missing"),
    (keys(schedule="stepwise", stages=[]), ValueError, "field 'stages': must be a list of stages"),
    (keys(schedule="stepwise", stages=[{"progress": 0.5}]), ValueError, "stages must begin at progress 0, got"),
    (keys(schedule="stepwise", stages=[FIRST, FIRST]), ValueError, r"'stages\[1\].progress': 0.0 is there twice"),
    (keys(schedule="stepwise", stages=[{**FIRST, "size": 3}]), ValueError, r"'stages\[0\]': unknown field 'size'"),
]


def assert_refused(method: Any, trainer: Any, kind: type[Exception], message: str) -> None:
    """The run stops at set-up, and nothing has changed."""
    before, modules = weights_of(method), [type(module) for module in method.modules()]
    updater = getattr(method, "momentum_updater", None)
    with pytest.raises(kind, match=message) as caught:
        trainer.fit(method, contract.loader(), contract.validation_loader())
    assert type(caught.value) is kind
    assert str(caught.value).startswith("seqcompress")
    assert "\n" not in str(caught.value)
    assert not is_compressed(method)
    assert [type(module) for module in method.modules()] == modules
    assert_same_weights(method.state_dict(), before)
    assert getattr(method, "momentum_updater", None) is updater
    assert method.seen == []


def test_a_momentum_encoder_of_another_kind_leaves_the_student_plain(make_method: Build, make_trainer: Build) -> None:
    method = make_method({**ON, "teacher": "both"})
    method.momentum_backbone = ResNet(BasicBlock, [1, 1, 1, 1]).requires_grad_(False)
    assert_refused(method, make_trainer(), TypeError, "needs a ViT: .* got a ResNet$")


def test_a_momentum_encoder_that_cannot_take_the_plan_leaves_the_student_plain(
    make_method: Build, make_trainer: Build
) -> None:
    method = make_method({**ON, "teacher": "both"})
    method.momentum_backbone = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, patch_drop_rate=0.1
    )
    assert_refused(method, make_trainer(), ValueError, "seqcompress: model: the model drops tokens by itself")


def test_encoders_that_were_compressed_by_hand_are_not_compressed_again(make_method: Build) -> None:
    method = make_method(ON)
    compress(method.backbone, token_dropout=0.25)
    with pytest.raises(ValueError, match="must be left out for a Method that is compressed already"):
        accelerate(method, Settings())
    assert get_strategy(method.backbone) == Strategy(0.25)


@pytest.mark.parametrize(("section", "kind", "message"), BAD_SECTIONS, ids=[bad[2][:40] for bad in BAD_SECTIONS])
def test_a_section_that_cannot_be_understood_stops_the_run_and_says_what_to_change(
    make_method: Build, make_trainer: Build, section: Any, kind: type[Exception], message: str
) -> None:
    assert_refused(make_method(section), make_trainer(), kind, message)


@pytest.mark.parametrize("method", ["mae", "linear", "mymethod"])
def test_a_method_that_is_not_supported_is_refused_with_those_that_are(
    make_method: Build, make_trainer: Build, method: str
) -> None:
    listed = f"cannot be combined with method='{method}'; supported methods: {', '.join(METHODS)}$"
    assert_refused(make_method(ON, method=method), make_trainer(), ValueError, listed)


def test_a_resnet_is_refused_with_the_backbones_that_are_supported(make_method: Build, make_trainer: Build) -> None:
    resnet = ResNet(BasicBlock, [1, 1, 1, 1])
    message = "needs a ViT: set backbone.name to vit_tiny, vit_small, vit_base or vit_large, got a ResNet$"
    assert_refused(make_method(ON, backbone=resnet), make_trainer(), TypeError, message)


@pytest.mark.parametrize("missing", ["num_large_crops", "cfg.method"])
def test_a_module_that_is_not_a_method_of_solo_learn_is_told_which_is_meant(
    make_method: Build, make_trainer: Build, missing: str
) -> None:
    method = make_method(ON)
    if missing == "cfg.method":
        del method.cfg["method"]
    else:
        del method.num_large_crops
    message = rf"for methods of solo-learn 1\.0\.6, .* too old\), got Method without {missing}$"
    assert_refused(method, make_trainer(), TypeError, message)


def test_teacher_is_refused_where_there_is_none(make_method: Build, make_trainer: Build) -> None:
    method = make_method({**ON, "teacher": "none"}, momentum=False)
    message = "seqcompress.teacher must be left out for method='simclr', which has no momentum encoder"
    assert_refused(method, make_trainer(), ValueError, message)


# Around


@pytest.mark.parametrize("module", ["solo_learn", "lightning_callbacks"])
def test_importing_the_adapter_imports_no_framework(module: str, tmp_path: Path) -> None:
    script = f"""
import sys
import seqcompress.adapters.{module}
heavy = {{"torch", "timm", "lightning", "pytorch_lightning", "lightly", "omegaconf", "hydra", "solo"}}
print(sorted(heavy & {{name.partition(".")[0] for name in sys.modules}}))
"""
    assert in_a_process("-c", script, cwd=tmp_path).stdout == "[]\n"


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.soak)])
def test_ranks_share_strategies_and_weights_and_drop_different_tokens(package: str, tmp_path: Path) -> None:
    in_a_process(HELPER, package, tmp_path, cwd=tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    relaxing = Linear(Strategy(0.75), Strategy())
    assert first["strategies"] == second["strategies"] == [str(relaxing.at_step(step, 8)) for step in range(8)]
    lengths = [5, 7, 8, 9, 11, 13, 14, 17]
    assert first["tokens"] == second["tokens"] == twice(lengths)
    assert first["teacher_tokens"] == second["teacher_tokens"] == [17] * 16
    assert len(first["subsets"]) == 16
    subsets = list(zip(first["subsets"], second["subsets"], strict=True))[:14]  # at the end, every token stays
    assert all(one != other for one, other in subsets)
    assert_same_weights(first["weights"], second["weights"])
    assert not first["compressed"]


# Configs for Hydra

CONFIGS = {"mocov3_vit": 1, "dino_vit": 1, "simclr_vit": 0}  # with a momentum encoder or without


def config_text(name: str) -> str:
    folder = importlib.resources.files("hydra_plugins.seqcompress") / "seqcompress"
    return (folder / f"{name}.yaml").read_text()


def test_these_are_the_configs_that_come_with_the_package() -> None:
    folder = importlib.resources.files("hydra_plugins.seqcompress") / "seqcompress"
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.yaml" for name in CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_comes_with_the_package_goes_from_an_eighth_of_the_tokens_to_all(name: str) -> None:
    text = config_text(name)
    settings = read_settings(yaml.safe_load(text))
    assert settings is not None
    plan = settings.plan
    assert isinstance(plan, Stepwise)
    is_tiny = name.startswith("dino")
    width, heads = (192, 3) if is_tiny else (384, 6)
    vit = VisionTransformer(
        img_size=224, patch_size=16, embed_dim=width, num_heads=heads, depth=12, num_classes=0, global_pool="token"
    )
    compress(vit, plan)
    assert [num_tokens(vit, plan(progress), 224) for progress in (0.0, 1.0)] == [25, 197]
    assert plan(1.0) == Strategy()

    begins = [begin for begin, _ in plan.stages] + [1.0]
    spent = 0.0
    for (begin, strategy), end in zip(plan.stages, begins[1:], strict=True):
        student, teacher = (relative_cost(vit, each, 224) for each in (strategy, strategy.without_dropout()))
        spent += (end - begin) * (3 * student + CONFIGS[name] * teacher)
    (claimed,) = re.findall(r"spend 1/([\d.]+) of", text)
    assert f"{(3 + CONFIGS[name]) / spent:.1f}" == claimed


def hydra_sees_the_plugin() -> bool:
    plugins = importlib.import_module("hydra_plugins")
    return any(
        found.name == "hydra_plugins.seqcompress" for found in pkgutil.walk_packages(plugins.__path__, "hydra_plugins.")
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_hydra_composes_the_configs_of_the_package(name: str, tmp_path: Path) -> None:
    if not hydra_sees_the_plugin():
        pytest.skip("Hydra finds no plugin in an editable install, whose namespaces cannot be listed")
    hydra = importlib.import_module("hydra")
    (tmp_path / "train.yaml").write_text("method: mocov3\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.2"):
        config = hydra.compose("train", overrides=[f"+seqcompress={name}"])
    assert OmegaConf.to_container(config) == {"method": "mocov3", "seqcompress": yaml.safe_load(config_text(name))}


# Online plans


SOON = Online(Constant(Strategy()), 1.0, None)  # the base and one neighbour: a decision in ten steps


def test_an_online_plan_is_measured_followed_and_kept_in_the_runs_folder(
    make_method: Build,
    make_trainer: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 0.0)  # always moves
    SOON.to_json(tmp_path / "soon.json")
    method = make_method({**ON, "plan": str(tmp_path / "soon.json")})
    trainer = make_trainer(max_epochs=5)
    trainer.fit(method, contract.loader(), contract.validation_loader())
    found = Schedule.from_json(tmp_path / "seqcompress_schedule.json")
    assert found.at_step(0, 20) == Strategy()
    assert len(found.strategies()) > 1
    vit = method.backbone
    assert tokens(method) == twice([num_tokens(vit, found.at_step(step, 20), 32) for step in range(20)])
    assert f"is a plan for the next: {tmp_path / 'seqcompress_schedule.json'}" in capsys.readouterr().out
    assert not is_compressed(method)


def test_a_teacher_that_gets_both_is_compressed_apart_and_follows_the_preset(
    make_method: Build, make_trainer: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    method = make_method({**ON, "plan": "online", "teacher": "both"})
    make_trainer(max_epochs=5).fit(method, contract.loader(), contract.validation_loader())
    assert tokens(method) == tokens(method, "momentum_backbone") == twice(DEFAULT)
    assert "cannot be measured, and goes on with its preset" in capsys.readouterr().out


# solo-learn itself

# Its methods' own configs, but for what makes them small.
SMALL = {
    "deepclusterv2": {"num_prototypes": [4, 4]},
    "dino": {"num_prototypes": 16},
    "swav": {"num_prototypes": 16, "queue_size": 16},
    "wmse": {"whitening_size": 8, "proj_output_dim": 4},
}
SHORT = {"token_dropout": 0.5, "patch_size": 8}
NARROW = ("proj_hidden_dim", "pred_hidden_dim", "proj_output_dim", "queue_size")


def scripts() -> Path:
    return Path(importlib.import_module("solo").__file__).parents[1]  # type: ignore[arg-type]


def real_config(name: str, section: Any, max_epochs: int = 1) -> Any:
    file = "barlow" if name == "barlow_twins" else name
    published = OmegaConf.load(scripts() / "scripts" / "pretrain" / "cifar" / f"{file}.yaml")
    arguments = {key: 64 if key in NARROW else value for key, value in published.method_kwargs.items()}
    config = {
        "name": "real",
        "method": name,
        "method_kwargs": {**arguments, **SMALL.get(name, {})},
        "backbone": {"name": "vit_tiny", "kwargs": {"img_size": 16, "patch_size": 4}},
        "data": {"dataset": "custom", "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0},
        "optimizer": {"name": "adamw", "batch_size": 16, "lr": 1e-4, "classifier_lr": 1e-4, "weight_decay": 0.0},
        "scheduler": {"name": "warmup_cosine", "warmup_epochs": 0},
        "max_epochs": max_epochs,
        "momentum": OmegaConf.select(published, "momentum", default={}),
    }
    if section is not contract.ABSENT:
        config["seqcompress"] = section
    return OmegaConf.create(config)


def fit_real(name: str, section: Any, trainer: Any) -> tuple[Any, list[Any]]:
    """Two training steps and one of validation; what each encoder saw."""
    torch.manual_seed(0)
    module = importlib.import_module("solo.methods").METHODS[name](real_config(name, section, trainer.max_epochs))
    seen: list[Any] = []
    for encoder in ("backbone", "momentum_backbone"):
        if hasattr(module, encoder):

            def note(block: nn.Module, args: tuple[Tensor, ...], encoder: str = encoder) -> None:
                seen.append(contract.Seen(str(trainer.state.stage.value), encoder, args[0].shape[1]))

            getattr(module, encoder).blocks[0].register_forward_pre_hook(note)
    views = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    training = [(index, [view, view.flip(-1)], index % 10) for index, view in enumerate(views)]
    validating = [(view, index % 10) for index, view in enumerate(views[:16])]
    trainer.fit(module, DataLoader(training, batch_size=16), DataLoader(validating, batch_size=16))  # type: ignore[arg-type]
    return module, seen


@needs_solo
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pl", ["lightning.pytorch"], indirect=True)
def test_every_supported_method_of_solo_learn_trains_compressed_and_validates_plain(
    name: str, pl: Any, make_trainer: Build
) -> None:
    plan = {"schedule": "stepwise", "stages": [{"progress": 0.0, **SHORT}, {"progress": 0.5}]}
    module, seen = fit_real(name, keys(**plan), make_trainer(max_epochs=1, num_sanity_val_steps=0))
    training = [one.tokens for one in seen if (one.stage, one.encoder) == ("train", "backbone")]
    assert training == [3, 3, 17, 17]
    assert {one.tokens for one in seen if one.stage == "validate"} == {17}
    if hasattr(module, "momentum_backbone"):
        teacher = [one.tokens for one in seen if (one.stage, one.encoder) == ("train", "momentum_backbone")]
        assert teacher == [5] * (len(teacher) // 2) + [17] * (len(teacher) // 2)
        assert len(teacher) in (2, 4)  # ReSSL's sees one crop
    assert not is_compressed(module)


@needs_solo
@pytest.mark.parametrize("name", ["mocov3", "simclr", "dino"])
@pytest.mark.parametrize("pl", ["lightning.pytorch"], indirect=True)
def test_solo_learns_own_methods_are_measured_and_do_not_notice(
    name: str,
    pl: Any,
    make_trainer: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(online, "_CONFIDENCE", 2.0)  # never moves
    SOON.to_json(tmp_path / "soon.json")
    ends = []
    for keys_of_plan in ({"plan": str(tmp_path / "soon.json")}, {"token_dropout": 0}):
        module, _ = fit_real(name, keys(**keys_of_plan), make_trainer(max_epochs=6, num_sanity_val_steps=0))
        ends.append(module.state_dict())
    told = capsys.readouterr().out
    assert "cannot be measured" not in told
    assert "stay at base" in told
    assert_same_weights(*ends)


@needs_solo
@pytest.mark.parametrize("pl", ["lightning.pytorch"], indirect=True)
def test_without_the_flag_solo_learn_trains_as_without_seqcompress(
    pl: Any, make_trainer: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for section, installed in ((contract.ABSENT, True), (OFF, True), (contract.ABSENT, False)):
        if not installed:
            without_our_entry_points(monkeypatch, pl)
        ends.append(fit_real("mocov3", section, make_trainer(max_epochs=1))[0].state_dict())
    assert_same_weights(ends[0], ends[2])
    assert_same_weights(ends[1], ends[2])


@needs_solo
@pytest.mark.parametrize("name", ["mocov3", "dino"])
@pytest.mark.parametrize("pl", ["lightning.pytorch"], indirect=True)
def test_solo_learns_own_methods_average_as_before_with_the_updater_that_stands_in(
    name: str, pl: Any, make_trainer: Build
) -> None:
    used = set()

    class Note(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            used.add(type(pl_module.momentum_updater).__name__)

    module = fit_real(name, keys(token_dropout=0), make_trainer(max_epochs=1, callbacks=[Note()]))[0]
    plain = fit_real(name, contract.ABSENT, make_trainer(max_epochs=1))[0]
    assert used == {"ForeachMomentumUpdater"}
    assert type(module.momentum_updater) is type(plain.momentum_updater)
    assert module.momentum_updater.cur_tau == plain.momentum_updater.cur_tau
    for one, other in zip(module.momentum_pairs, plain.momentum_pairs, strict=True):
        for average, expected in zip(one[1].parameters(), other[1].parameters(), strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of two classes, with four pictures of 40 px."""
    image = importlib.import_module("PIL.Image")
    folder = tmp_path_factory.mktemp("pictures")
    for label in range(2):
        (folder / str(label)).mkdir()
        for index in range(4):
            image.new("RGB", (40, 40), (60 * index, 120 * label, 90)).save(folder / str(label) / f"{index}.png")
    return folder


def pretrain(folder: Path, pictures: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """solo-learn's own script with its own config, on a CPU and small."""
    return in_a_process(
        scripts() / "main_pretrain.py",
        *("--config-path", str(scripts() / "scripts" / "pretrain" / "cifar"), "--config-name", "mocov3"),
        *("wandb.enabled=false", "data.dataset=custom", f"data.train_path={pictures}", "data.val_path=null"),
        *("data.num_workers=0", "optimizer.batch_size=4", "++scheduler.warmup_epochs=0", "max_epochs=2"),
        *("devices='1'", "accelerator=cpu", "strategy=auto", "precision=32", "sync_batchnorm=false"),
        *("method_kwargs.proj_hidden_dim=64", "method_kwargs.pred_hidden_dim=64", "++log_every_n_steps=1"),
        *("checkpoint.enabled=false", "auto_resume.enabled=false", f"++default_root_dir={folder}"),
        *overrides,
        cwd=folder,
        check=False,
    )


VIT = ("backbone.name=vit_tiny", "++backbone.kwargs.img_size=32", "++backbone.kwargs.patch_size=8")


def logged_by(run: subprocess.CompletedProcess[str], folder: Path) -> dict[str, list[float]]:
    assert run.returncode == 0, run.stderr[-3000:]
    files = list(folder.glob("lightning_logs/*/metrics.csv"))
    if not files:
        pytest.skip("Lightning logs to TensorBoard where that is installed, and solo-learn's script lets it choose")
    return columns(files[0].parent)


@needs_solo
def test_solo_learns_own_script_is_accelerated_by_the_flag(pictures: Path, tmp_path: Path) -> None:
    run = pretrain(tmp_path, pictures, *VIT, "++seqcompress.enabled=true")
    logged = logged_by(run, tmp_path)
    assert logged["seqcompress/tokens"] == [3, 3, 3, 17]
    assert len(logged["train_contrastive_loss_step"]) == 4
    outlook = "backbone: trains at drop 0.5, patch 16 (3 tokens a view) now, base (17 tokens a view) in the end"
    assert " ".join(run.stdout.split()).count(outlook) == 1  # whatever the width of the terminal


@needs_solo
def test_solo_learns_own_script_takes_an_online_plan(pictures: Path, tmp_path: Path) -> None:
    SOON.to_json(tmp_path / "soon.json")
    kept = ("checkpoint.enabled=true", f"++checkpoint.dir={tmp_path / 'trained'}", "max_epochs=7")
    run = pretrain(
        tmp_path, pictures, *VIT, "++seqcompress.enabled=true", f"++seqcompress.plan={tmp_path}/soon.json", *kept
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "the run decided" in run.stdout
    (file,) = tmp_path.glob("trained/mocov3/*/seqcompress_schedule.json")
    assert Schedule.from_json(file)(0.0) == Strategy()


@needs_solo
def test_solo_learns_own_script_merges_accumulated_batches(pictures: Path, tmp_path: Path) -> None:
    merging = ("++seqcompress.enabled=true", "++seqcompress.batch=merge", "++accumulate_grad_batches=2")
    run = pretrain(tmp_path, pictures, *VIT, *merging, "max_epochs=4")
    logged = logged_by(run, tmp_path)
    assert logged["seqcompress/tokens"] == [3, 3, 3, 17]
    assert logged["seqcompress/batch_factor"] == [2, 2, 2, 1]
    assert all(map(math.isfinite, logged["train_contrastive_loss_step"]))


@needs_solo
def test_solo_learns_own_script_makes_smaller_crops_with_scale_views(pictures: Path, tmp_path: Path) -> None:
    run = pretrain(tmp_path, pictures, *VIT, "++seqcompress.enabled=true", "++seqcompress.scale_views=true")
    logged = logged_by(run, tmp_path)
    assert logged["seqcompress/tokens"] == [3, 3, 3, 17]
    assert all(map(math.isfinite, logged["train_contrastive_loss_step"]))


@needs_solo
def test_solo_learns_own_script_is_what_it_was_without_the_flag(pictures: Path, tmp_path: Path) -> None:
    run = pretrain(tmp_path, pictures, *VIT)
    logged = logged_by(run, tmp_path)
    assert len(logged["train_contrastive_loss_step"]) == 4
    assert not [name for name in logged if "seq" in name]
    assert "seqcompress" not in run.stdout + run.stderr


@needs_solo
def test_solo_learns_own_script_stops_at_a_resnet_with_one_error(pictures: Path, tmp_path: Path) -> None:
    run = pretrain(tmp_path, pictures, "++seqcompress.enabled=true")
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if "Error: " in line]
    message = "set backbone.name to vit_tiny, vit_small, vit_base or vit_large, got a ResNet"
    assert errors == [f"TypeError: seqcompress.enabled needs a ViT: {message}"]
