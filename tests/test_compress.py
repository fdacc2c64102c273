"""The verbs, and what must hold before, during and after: the model stays the one that the user built."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seqcompress import (
    Constant,
    Linear,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    is_compressed,
    restore,
    set_strategy,
)
from seqcompress.training.forecast import forecast

STRATEGY = Strategy(0.5, 16)


def _look(model: nn.Module) -> list[Any]:
    """All that surgery could leave behind: types, attributes, hooks, modes, in order."""
    return [
        (
            name,
            type(module),
            {
                key: list(value) if isinstance(value, dict) else type(value)
                for key, value in vars(module).items()
                if "hook" not in key or value
            },
            module.training,
        )
        for name, module in model.named_modules()
    ]


def _states_equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return list(states[0]) == list(states[1]) and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# compress, get_strategy, set_strategy, restore


def test_compress_returns_the_same_object(tiny_vit: Any) -> None:
    vit = tiny_vit()
    assert compress(vit, STRATEGY) is vit
    assert is_compressed(vit)
    assert restore(vit) is vit
    assert not is_compressed(vit)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"plan": STRATEGY}, STRATEGY),
        ({"token_dropout": 0.25}, Strategy(0.25)),
        ({"patch_size": 16}, Strategy(0.0, 16)),
        ({"token_dropout": 0.25, "patch_size": 16}, Strategy(0.25, 16)),
        ({"plan": Constant(STRATEGY)}, STRATEGY),
        ({"plan": Linear(Strategy(0.8), Strategy())}, Strategy(0.8)),
        ({"plan": Stepwise({0.5: Strategy(), 0.0: STRATEGY})}, STRATEGY),
        ({}, STRATEGY),
        ({"plan": "default"}, STRATEGY),
        ({"plan": "strong"}, STRATEGY),
        ({"plan": "gentle"}, Strategy(0.0, 16)),
    ],
)
def test_every_form_of_a_plan_begins_at_its_beginning_once_it_is_driven(
    arguments: dict[str, Any], expected: Strategy, tiny_vit: Any
) -> None:
    vit = compress(tiny_vit(), **arguments)
    scheduler = SequenceScheduler(vit, total_steps=100)
    assert get_strategy(vit) == scheduler.strategy == expected


@pytest.mark.parametrize("as_text", [True, False])
def test_a_plan_may_be_the_path_of_a_schedule_file(as_text: bool, tmp_path: Path, tiny_vit: Any) -> None:
    path = tmp_path / "plan.json"
    Linear(Strategy(0.75), Strategy()).to_json(path)
    vit = compress(tiny_vit(), str(path) if as_text else path)
    scheduler = SequenceScheduler(vit, total_steps=100)
    assert get_strategy(vit) == scheduler.strategy == Strategy(0.75)


def test_set_strategy_changes_the_next_forward(tiny_vit: Any, first_tokens: Any) -> None:
    vit, views = compress(tiny_vit(), STRATEGY).train(), torch.randn(2, 3, 32, 32)
    lengths = []
    for strategy in (Strategy(), Strategy(0.5), Strategy(0.0, 16), Strategy(0.5, 10)):
        set_strategy(vit, strategy)
        assert get_strategy(vit) == strategy
        lengths.append(first_tokens(vit, views).shape[1])
    assert lengths == [17, 9, 5, 5]


def test_the_base_strategy_changes_nothing(tiny_vit: Any) -> None:
    vit, views = tiny_vit().train(), torch.randn(2, 3, 32, 32)
    plain = vit(views)
    state = torch.get_rng_state()
    assert torch.equal(compress(vit, Strategy())(views), plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_verbs_find_the_encoder_in_a_larger_module(tiny_vit: Any) -> None:
    module = nn.ModuleDict({"backbone": compress(tiny_vit(), STRATEGY), "head": nn.Linear(32, 8)})
    assert is_compressed(module)
    assert get_strategy(module) == STRATEGY
    set_strategy(module, Strategy(0.25))
    assert get_strategy(module["backbone"]) == Strategy(0.25)
    assert not is_compressed(restore(module))


def test_restoring_a_plain_model_does_nothing(tiny_vit: Any) -> None:
    vit = tiny_vit()
    before = _look(vit)
    assert _look(restore(vit)) == before


# Invariants


@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 2, "dynamic_img_size": True}, {"pos_embed": "none"}], ids=str)
def test_state_dict_is_that_of_the_plain_model_before_during_and_after(settings: dict[str, Any], tiny_vit: Any) -> None:
    plain, vit = tiny_vit(**settings), tiny_vit(**settings)
    compress(vit, STRATEGY)
    assert _states_equal(vit, plain)
    vit.train()(torch.randn(2, 3, 32, 32))
    assert _states_equal(vit, plain)
    assert _states_equal(restore(vit), plain)


def test_a_checkpoint_saved_compressed_loads_into_a_plain_model_and_back(tiny_vit: Any, tmp_path: Path) -> None:
    vit, views = compress(tiny_vit(), STRATEGY).train(), torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.1)
    vit(views)[:, 0].sum().backward()
    optimizer.step()
    torch.save(vit.state_dict(), tmp_path / "vit.pt")
    plain = tiny_vit()
    plain.load_state_dict(torch.load(tmp_path / "vit.pt", weights_only=True), strict=True)
    assert torch.equal(plain.eval()(views), vit.eval()(views))
    other = compress(tiny_vit(), Strategy(0.25))
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other.eval()(views), plain(views))


@pytest.mark.parametrize("when", ["grad", "train"])
def test_eval_output_is_bit_identical(when: Any, tiny_vit: Any) -> None:
    plain, vit, views = tiny_vit().eval(), compress(tiny_vit(), STRATEGY, when=when).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(vit(views), plain(views))
    vit.train()(views)
    assert torch.equal(vit.eval()(views), plain(views))
    with torch.no_grad():
        assert torch.equal(vit(views), plain(views))


def test_parameters_and_buffers_keep_identity_and_order(tiny_vit: Any) -> None:
    vit = tiny_vit()
    before = [(name, id(value)) for name, value in vit.named_parameters()]
    for change in (lambda: compress(vit, STRATEGY), lambda: compress(vit, token_dropout=0.25), lambda: restore(vit)):
        change()
        assert [(name, id(value)) for name, value in vit.named_parameters()] == before


def test_an_optimizer_built_before_trains_the_compressed_model(tiny_vit: Any) -> None:
    vit = tiny_vit()
    optimizer = torch.optim.SGD(vit.parameters(), lr=0.1)
    compress(vit, STRATEGY).train()
    before = {name: value.detach().clone() for name, value in vit.named_parameters()}
    optimizer.zero_grad()
    vit(torch.randn(4, 3, 32, 32))[:, 0].sum().backward()
    optimizer.step()
    assert [name for name, value in vit.named_parameters() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize("forward", [False, True])
def test_restore_leaves_nothing_behind(forward: bool, tiny_vit: Any) -> None:
    vit = tiny_vit(reg_tokens=1).train()
    embed, before = vit.patch_embed, _look(vit)
    compress(vit, STRATEGY)
    assert _look(vit) != before
    if forward:
        vit(torch.randn(2, 3, 32, 32))
    restore(vit)
    assert vit.patch_embed is embed
    assert _look(vit) == before


def test_the_mode_is_kept_through_compress_and_restore(tiny_vit: Any) -> None:
    vit = compress(tiny_vit().eval(), STRATEGY)
    assert not vit.patch_embed.training
    vit.train()
    assert vit.patch_embed.training
    assert restore(vit.eval()).patch_embed.training is False


def test_hooks_of_others_stay_and_run(tiny_vit: Any) -> None:
    vit, seen = tiny_vit().train(), []
    vit.patch_embed.register_forward_hook(lambda module, args, output: seen.append("embed"))
    vit.pos_drop.register_forward_pre_hook(lambda module, args: seen.append("pos"))
    for model in (compress(vit, STRATEGY), restore(vit)):
        seen.clear()
        model(torch.randn(1, 3, 32, 32))
        assert seen == ["embed", "pos"]


def test_the_wrapped_embedding_is_read_and_written_through(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Strategy(0.5))
    embed = vit.patch_embed
    assert (embed.patch_size, embed.grid_size, embed.num_patches, embed.img_size) == ((8, 8), (4, 4), 16, (32, 32))
    embed.proj.requires_grad_(False)
    embed.strict_img_size = False
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = embed.nothing_of_that_name
    restore(vit)
    assert vit.patch_embed.strict_img_size is False
    assert not vit.patch_embed.proj.weight.requires_grad


def test_a_compressed_model_can_be_given_another_input_size(tiny_vit: Any, first_tokens: Any) -> None:
    vit = compress(tiny_vit(), Strategy(0.5)).train()
    vit.set_input_size(img_size=48, patch_size=4)
    assert first_tokens(vit, torch.randn(1, 3, 48, 48)).shape[1] == 1 + 72
    assert restore(vit).eval()(torch.randn(1, 3, 48, 48)).shape == (1, 32)
    assert vit.patch_embed.proj.weight.shape == (32, 3, 4, 4)


# Copies


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_a_copy_is_independent_and_works(duplicate: Any, tiny_vit: Any, first_tokens: Any) -> None:
    vit, views = compress(tiny_vit(), STRATEGY).train(), torch.randn(4, 3, 32, 32)
    vit(views)
    twin = duplicate(vit)
    assert get_strategy(twin) == STRATEGY
    assert not {id(value) for value in twin.parameters()} & {id(value) for value in vit.parameters()}
    assert twin.patch_embed.encoder.model is twin

    set_strategy(twin, Strategy(0.25))
    assert get_strategy(vit) == STRATEGY
    assert first_tokens(twin, views).shape[1] == 13
    assert first_tokens(vit, views).shape[1] == 3
    twin(views)[:, 0].sum().backward()
    assert twin.patch_embed.proj.weight.grad is not None
    assert vit.patch_embed.proj.weight.grad is None

    restore(vit)
    assert is_compressed(twin)
    assert first_tokens(twin, views).shape[1] == 13
    assert not is_compressed(restore(twin))
    assert torch.equal(twin.eval()(views), vit.eval()(views))


def test_changing_a_copys_weights_changes_the_copys_tokens_only(tiny_vit: Any, first_tokens: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy(0.0, 16)).train(), torch.randn(2, 3, 32, 32)
    twin, before = copy.deepcopy(vit), first_tokens(vit, views)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(first_tokens(vit, views), before)
    assert float(first_tokens(twin, views).abs().max()) == 0.0


def test_a_plain_copy_stays_plain(tiny_vit: Any, first_tokens: Any) -> None:
    vit = tiny_vit().train()
    teacher = copy.deepcopy(vit)
    compress(vit, STRATEGY)
    assert first_tokens(teacher, torch.randn(2, 3, 32, 32)).shape[1] == 17


def test_a_pair_copied_together_stays_a_pair_of_its_own(tiny_vit: Any) -> None:
    pair = nn.ModuleDict({"student": tiny_vit(), "teacher": tiny_vit()})
    compress(pair["student"], STRATEGY, teacher=pair["teacher"])
    twin = copy.deepcopy(pair)
    set_strategy(twin["student"], Strategy(0.25, 10))
    assert get_strategy(twin["teacher"]) == Strategy(0.0, 10)
    assert get_strategy(pair["teacher"]) == Strategy(0.0, 16)


# Compressing again


def _wrapped(vit: Any) -> tuple[int, int]:
    """How many compressed embeddings there are, one inside the other, and how many hooks."""
    depth, embed = 0, vit.patch_embed
    while "embed" in vars(embed):
        depth, embed = depth + 1, vars(embed)["embed"]
    return depth, sum(len(place._forward_pre_hooks) for place in (vit.pos_drop, vit.norm_pre))


def test_compressing_again_plans_anew_and_never_stacks(tiny_vit: Any, first_tokens: Any) -> None:
    vit, before = tiny_vit().train(), _look(tiny_vit().train())
    once = _wrapped(compress(vit, STRATEGY))
    for _ in range(3):
        compress(vit, token_dropout=0.75, when="train")
    assert _wrapped(vit) == once
    with torch.no_grad():
        assert first_tokens(vit, torch.randn(1, 3, 32, 32)).shape[1] == 5
    scheduler = SequenceScheduler(compress(vit, Linear(Strategy(0.5), Strategy())), total_steps=2)
    assert scheduler.schedule == Linear(Strategy(0.5), Strategy())
    assert _look(restore(vit)) == before


def test_a_student_compressed_anew_alone_leaves_its_teacher_plain(tiny_vit: Any) -> None:
    student, teacher = tiny_vit(), tiny_vit()
    before = _look(teacher)
    compress(student, STRATEGY, teacher=teacher)
    compress(student, STRATEGY)
    assert get_strategy(student) == STRATEGY
    assert _wrapped(student)[0] == 1
    assert _look(teacher) == before


def test_a_copy_of_a_compressed_student_becomes_its_teacher(tiny_vit: Any, first_tokens: Any) -> None:
    student = compress(tiny_vit(), STRATEGY).train()
    teacher = copy.deepcopy(student)
    compress(student, STRATEGY, teacher=teacher)
    assert (get_strategy(student), get_strategy(teacher)) == (STRATEGY, Strategy(0.0, 16))
    assert _wrapped(teacher)[0] == 1
    with torch.no_grad():
        assert first_tokens(teacher, torch.randn(1, 3, 32, 32)).shape[1] == 5


def test_roles_may_be_swapped(tiny_vit: Any) -> None:
    one, other = tiny_vit(), tiny_vit()
    compress(one, STRATEGY, teacher=other)
    compress(other, STRATEGY, teacher=one)
    assert (get_strategy(other), get_strategy(one)) == (STRATEGY, Strategy(0.0, 16))


# Student and teacher


def test_dropout_is_for_the_student_and_patch_scaling_for_both(tiny_vit: Any, first_tokens: Any) -> None:
    student, teacher, views = tiny_vit().train(), tiny_vit().train(), torch.randn(2, 3, 32, 32)
    compress(student, Strategy(0.5, 10), teacher=teacher)
    assert (get_strategy(student), get_strategy(teacher)) == (Strategy(0.5, 10), Strategy(0.0, 10))
    assert first_tokens(student, views).shape[1] == 5
    with torch.no_grad():
        assert first_tokens(teacher, views).shape[1] == 10
        assert first_tokens(student, views).shape[1] == 17


def test_a_teacher_scales_patches_with_and_without_grad(tiny_vit: Any, first_tokens: Any) -> None:
    student, teacher, views = tiny_vit(), tiny_vit().train(), torch.randn(2, 3, 32, 32)
    compress(student, STRATEGY, teacher=teacher)
    assert first_tokens(teacher, views).shape[1] == 5
    teacher.requires_grad_(False)
    assert first_tokens(teacher, views).shape[1] == 5
    assert first_tokens(teacher.eval(), views).shape[1] == 17


def test_a_pair_has_one_strategy(tiny_vit: Any) -> None:
    student, teacher = tiny_vit(), tiny_vit()
    compress(student, STRATEGY, teacher=teacher)
    set_strategy(student, Strategy(0.75, 10))
    assert get_strategy(teacher) == Strategy(0.0, 10)
    set_strategy(teacher, Strategy(0.25, 16))
    assert get_strategy(student) == Strategy(0.25, 16)
    assert get_strategy(nn.ModuleList([teacher, student])) == Strategy(0.25, 16)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_restoring_one_of_a_pair_restores_both(which: str, tiny_vit: Any) -> None:
    pair = {"student": tiny_vit(), "teacher": tiny_vit()}
    before = _look(tiny_vit())
    compress(pair["student"], STRATEGY, teacher=pair["teacher"])
    restore(pair[which])
    assert _look(pair["student"]) == _look(pair["teacher"]) == before


def test_teacher_and_student_may_differ_in_prefix_and_depth(tiny_vit: Any, first_tokens: Any) -> None:
    student, teacher = tiny_vit().train(), tiny_vit(depth=1, reg_tokens=2).train()
    compress(student, STRATEGY, teacher=teacher)
    views = torch.randn(2, 3, 32, 32)
    assert first_tokens(student, views).shape == (2, 3, 32)
    assert first_tokens(teacher, views).shape == (2, 7, 32)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"img_size": 64}, "image size of model, 32 x 32 px, got 64 x 64 px"),
        ({"patch_size": 16}, "patch size of model, 8 x 8 px, got 16 x 16 px"),
        ({"embed_dim": 64}, "width of model, 32, got 64"),
    ],
)
def test_a_teacher_of_another_size_is_refused_and_nothing_is_changed(
    other: dict[str, int], words: str, tiny_vit: Any
) -> None:
    student, teacher = tiny_vit(), tiny_vit(**other)
    with pytest.raises(ValueError, match=f"teacher must have the {words}"):
        compress(student, STRATEGY, teacher=teacher)
    assert not is_compressed(student)
    assert not is_compressed(teacher)


def test_a_frozen_student_beside_a_teacher_that_trains_is_refused_as_swapped(tiny_vit: Any) -> None:
    student, teacher = tiny_vit(), tiny_vit().requires_grad_(False)
    with pytest.raises(ValueError, match="frozen and those of teacher are not: swap them"):
        compress(teacher, STRATEGY, teacher=student)
    assert not is_compressed(nn.ModuleList([student, teacher]))
    compress(student, STRATEGY, teacher=teacher)
    assert get_strategy(teacher) == STRATEGY.without_dropout()


def test_a_teacher_that_is_a_copy_of_a_compressed_student_becomes_a_teacher(tiny_vit: Any, first_tokens: Any) -> None:
    student = compress(tiny_vit(), STRATEGY).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    with pytest.raises(ValueError, match="a frozen copy of a compressed student"):
        SequenceScheduler([student, teacher], total_steps=4)
    compress(student, STRATEGY, teacher=teacher)
    SequenceScheduler([student, teacher], total_steps=4)
    assert first_tokens(teacher, torch.randn(2, 3, 32, 32)).shape[1] == 5


@pytest.mark.parametrize(
    ("plan", "strategy"),
    [("drop 0.5, patch 16", Strategy(0.5, 16)), ("patch 16", Strategy(0.0, 16)), ("drop 0.25", Strategy(0.25)),
     ("base", Strategy())],
)  # fmt: skip
def test_the_text_of_a_strategy_is_a_plan_in_force_at_once(plan: str, strategy: Strategy, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), plan)
    assert get_strategy(vit) == strategy
    assert SequenceScheduler(compress(vit, "default"), plan, total_steps=4).schedule == Constant(strategy)
    for text, words in (("drop 1.5", "plan: .*token_dropout must be in"), ("drop half", "plan: text must read")):
        with pytest.raises(ValueError, match=words):
            compress(vit, text)


def test_a_teacher_that_is_not_given_again_is_plain_and_that_is_said(tiny_vit: Any) -> None:
    student, teacher = tiny_vit(), tiny_vit()
    compress(student, STRATEGY, teacher=teacher)
    with pytest.warns(UserWarning, match="the teacher that model was compressed with is plain from now on") as told:
        compress(student, STRATEGY)
    assert len(told) == 1
    assert not is_compressed(teacher)
    compress(student, STRATEGY, teacher=teacher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(student, STRATEGY, teacher=tiny_vit())  # another one was given
    compress(student, STRATEGY, teacher=teacher)
    with pytest.warns(UserWarning, match="the student that model was compressed with is plain from now on"):
        compress(teacher, STRATEGY)


def test_the_text_of_a_schedule_is_a_plan_wherever_one_is_taken(tiny_vit: Any, tmp_path: Path) -> None:
    schedule = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy(0.25)})
    vit = compress(tiny_vit(), str(schedule))
    scheduler = SequenceScheduler(vit, total_steps=4)
    assert scheduler.schedule == schedule
    assert get_strategy(vit) == Strategy(0.5, 16)
    ramp = "linear from drop 0.5 to base"
    del scheduler
    assert SequenceScheduler(vit, ramp, total_steps=4).schedule == Linear(Strategy(0.5), Strategy())
    with pytest.raises(ValueError, match=r"plan: text '0: drop 2' is not a schedule: .*token_dropout must be in"):
        compress(vit, "0: drop 2")
    with pytest.raises(ValueError, match="model: stage 'patch 4': patch_size must be at least the encoder's own, 8"):
        compress(vit, "0: patch 4; 0.5: base")


@pytest.mark.parametrize("size", [4, 7])
def test_patches_smaller_than_the_encoders_own_are_refused(size: int, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), token_dropout=0.25)
    message = f"patch_size must be at least the encoder's own, 8, got {size}"
    for change in (
        lambda: compress(vit, patch_size=size),
        lambda: set_strategy(vit, Strategy(0.5, size)),
        lambda: SequenceScheduler(vit, Linear(Strategy(), Strategy(0.0, size)), total_steps=4),
    ):
        with pytest.raises(ValueError, match=message):
            change()
    assert get_strategy(vit) == Strategy(0.25)


# Errors


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"plan": 0.5}, TypeError, "plan must be .*0.5"),
        ({"plan": ["default"]}, TypeError, r"plan must be .*\['default'\]"),
        ({"plan": "fast"}, ValueError, "plan must be one of 'default', 'gentle', 'strong'.*'fast'"),
        ({"plan": "nowhere.json"}, FileNotFoundError, "nowhere.json"),
        ({"plan": Path("nowhere.json")}, FileNotFoundError, "nowhere.json"),
        ({"token_dropout": 1.0}, ValueError, "token_dropout must be .*1.0"),
        ({"token_dropout": float("nan")}, ValueError, "token_dropout must be .*nan"),
        ({"token_dropout": "0.5"}, TypeError, "token_dropout must be .*'0.5'"),
        ({"patch_size": 0}, ValueError, "patch_size must be .*0"),
        ({"patch_size": 16.0}, TypeError, "patch_size must be .*16.0"),
        ({"patch_size": 33}, ValueError, "patch_size .*33"),
        ({"plan": Linear(Strategy(), Strategy(0.0, 48))}, ValueError, "patch_size .*48"),
        ({"plan": STRATEGY, "token_dropout": 0.5}, ValueError, "plan excludes token_dropout and patch_size"),
        ({"plan": STRATEGY, "patch_size": 8}, ValueError, "plan excludes token_dropout and patch_size"),
        ({"when": "always"}, ValueError, "when must be 'grad' or 'train', got 'always'"),
        ({"when": None}, ValueError, "when must be 'grad' or 'train', got None"),
        ({"when": ["grad"]}, ValueError, r"when must be 'grad' or 'train', got \['grad'\]"),
        ({"teacher": "backbone"}, TypeError, "teacher must be .*'backbone'"),
        ({"teacher": nn.Linear(2, 2)}, TypeError, "teacher must be .*Linear"),
    ],
)
@pytest.mark.parametrize("already", [False, True], ids=["plain", "compressed"])
def test_a_bad_argument_is_one_error_that_names_it_and_changes_nothing(
    arguments: dict[str, Any], kind: type[Exception], words: str, already: bool, tiny_vit: Any
) -> None:
    vit = tiny_vit()
    if already:
        compress(vit, Strategy(0.25, 10))
    before = _look(vit)
    with pytest.raises(kind, match=words):
        compress(vit, **arguments)
    assert _look(vit) == before
    if already:
        assert get_strategy(vit) == Strategy(0.25, 10)


def test_a_bad_schedule_file_is_one_error_that_names_the_field(tmp_path: Path, tiny_vit: Any) -> None:
    path, vit = tmp_path / "plan.json", tiny_vit()
    path.write_text(Constant(STRATEGY).to_json().replace("0.5", "1.5"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"plan\.json.*token_dropout.*1\.5"):
        compress(vit, path)
    assert not is_compressed(vit)


def test_a_schedule_file_that_does_not_suit_the_model_is_named_with_its_stage(tmp_path: Path, tiny_vit: Any) -> None:
    path, vit = tmp_path / "found.json", tiny_vit()
    schedule = Stepwise({0.0: Strategy(0.5, 16), 0.5: Strategy(0.25, 48), 0.9: Strategy()})
    schedule.to_json(path)
    problem = r"model: stage 'drop 0\.25, patch 48': patch_size must not be larger than a side of the view, got .*48"
    for plan in (path, str(path)):
        with pytest.raises(ValueError, match=rf"^schedule file '.*found\.json': {problem}"):
            compress(vit, plan)
        with pytest.raises(ValueError, match=rf"^schedule file '.*found\.json': {problem}"):
            forecast(plan, vit, teacher=tiny_vit())
    with pytest.raises(ValueError, match=f"^{problem}"):
        compress(vit, schedule)
    with pytest.raises(ValueError, match=r"^model: patch_size must not be larger than a side of the view, got .*48"):
        compress(vit, Strategy(0.25, 48))
    assert not is_compressed(vit)
    compress(vit, "default")
    with pytest.raises(ValueError, match=rf"^schedule file '.*found\.json': {problem}"):
        SequenceScheduler(vit, path, total_steps=10)


def test_what_is_wrong_with_a_model_is_laid_on_no_stage_of_a_plan(tiny_vit: Any) -> None:
    with pytest.raises(ValueError, match=r"^model: the model drops tokens by itself"):
        compress(tiny_vit(patch_drop_rate=0.5), "default")


def test_a_plan_that_does_not_suit_the_teacher_changes_neither(tiny_vit: Any) -> None:
    student, teacher = tiny_vit(img_size=64), tiny_vit(img_size=32)
    with pytest.raises(ValueError, match="teacher must have the image size"):
        compress(student, patch_size=64, teacher=teacher)
    assert not is_compressed(student)
    assert not is_compressed(teacher)


def test_a_model_cannot_be_its_own_teacher(tiny_vit: Any) -> None:
    vit = tiny_vit()
    with pytest.raises(ValueError, match="teacher must be another model"):
        compress(vit, STRATEGY, teacher=vit)
    assert not is_compressed(vit)


def test_set_and_get_strategy_name_what_is_wrong(tiny_vit: Any) -> None:
    vit = tiny_vit()
    for verb in (get_strategy, lambda model: set_strategy(model, STRATEGY)):
        with pytest.raises(ValueError, match="model must be compressed first"):
            verb(vit)
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 'vit'"):
            verb("vit")  # type: ignore[arg-type]
    compress(vit, STRATEGY)
    with pytest.raises(TypeError, match=r"strategy must be a Strategy, got 0\.5"):
        set_strategy(vit, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"patch_size .*64"):
        set_strategy(vit, Strategy(0.0, 64))
    assert get_strategy(vit) == STRATEGY


@pytest.mark.parametrize("verb", [restore, is_compressed])
def test_verbs_refuse_what_is_no_module(verb: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 'vit'"):
        verb("vit")


def test_encoders_compressed_apart_have_no_common_strategy(tiny_vit: Any) -> None:
    both = nn.ModuleList([compress(tiny_vit(), STRATEGY), compress(tiny_vit(), STRATEGY)])
    with pytest.raises(ValueError, match="2 that were compressed apart"):
        get_strategy(both)
    with pytest.raises(ValueError, match="2 that were compressed apart"):
        set_strategy(both, Strategy())
    assert not is_compressed(restore(both))
