"""A budget counts the views that really passed, in units of one uncompressed forward."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from seqcompress import Budget, Strategy, compress, relative_cost, restore, set_strategy
from seqcompress.encoders import find_encoder
from seqcompress.training.cost import encoder_flops


def test_forward_and_backward_is_three_units_a_view_and_forward_one(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy()).train(), torch.randn(5, 3, 32, 32)
    budget = Budget(vit)
    assert budget.units == 0.0
    vit(views)
    assert budget.units == 15.0
    with torch.no_grad():
        vit(views)
    assert budget.units == 20.0
    vit.eval()(views)
    assert budget.units == 20.0
    assert budget.millions == pytest.approx(20e-6)


def test_compressed_views_count_by_their_relative_cost(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy()).train(), torch.randn(4, 3, 32, 32)
    budget, expected = Budget(vit), 0.0
    for strategy in (Strategy(0.5), Strategy(0.75, 10), Strategy(0.5), Strategy(0.0, 16), Strategy()):
        set_strategy(vit, strategy)
        vit(views)
        expected += 3 * 4 * relative_cost(vit, strategy, 32)
        assert budget.units == pytest.approx(expected)


def test_a_step_of_moco_costs_what_counting_by_hand_gives(tiny_vit: Any) -> None:
    student, teacher, views = tiny_vit().train(), tiny_vit().train(), torch.randn(2, 3, 32, 32)
    compress(student, Strategy(0.5, 16), teacher=teacher)
    budget = Budget([student, teacher])
    for _ in range(2):
        student(views)
        with torch.no_grad():
            teacher(views)
    student_cost = relative_cost(student, Strategy(0.5, 16), 32)
    teacher_cost = relative_cost(teacher, Strategy(0.0, 16), 32)
    assert budget.units == pytest.approx(2 * 2 * (3 * student_cost + teacher_cost))
    assert budget.units < 0.35 * 16


def test_a_small_view_costs_less_than_a_unit(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), Strategy()).train()
    budget = Budget(vit)
    vit(torch.randn(2, 3, 16, 16))
    assert budget.units == pytest.approx(6 * relative_cost(vit, Strategy(0.0, 16), 32))


@pytest.mark.parametrize("reentrant", [True, False])
def test_reruns_under_gradient_checkpointing_do_not_count(reentrant: bool, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Strategy(0.5)).train()
    budget = Budget(vit)
    views = torch.randn(2, 3, 32, 32, requires_grad=True)
    checkpoint(vit, views, use_reentrant=reentrant).sum().backward()
    assert budget.units == pytest.approx(6 * relative_cost(vit, Strategy(0.5), 32))


def test_two_budgets_count_on_their_own(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy()).train(), torch.randn(1, 3, 32, 32)
    run = Budget(vit)
    vit(views)
    epoch = Budget(nn.ModuleDict({"backbone": vit}))
    vit(views)
    assert (run.units, epoch.units) == (6.0, 3.0)
    epoch.reset()
    vit(views)
    assert (run.units, epoch.units) == (9.0, 3.0)


def test_a_saved_budget_goes_on(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy()).train(), torch.randn(1, 3, 32, 32)
    budget = Budget(vit)
    vit(views)
    state = json.loads(json.dumps(budget.state_dict()))
    resumed = Budget(vit)
    resumed.load_state_dict(state)
    assert resumed.units == 3.0
    vit(views)
    assert (resumed.units, budget.units) == (6.0, 6.0)


def test_it_prints_in_millions(tiny_vit: Any) -> None:
    budget = Budget(compress(tiny_vit(), Strategy()))
    budget.load_state_dict({"units": 1_024_000_000})
    assert str(budget) == "1.02e+03 M"
    budget.load_state_dict({"units": 307_200})
    assert (str(budget), repr(budget)) == ("0.307 M", "Budget(units=307200)")


@pytest.mark.parametrize(
    "state",
    [None, [], 3.0, {}, {"units": None}, {"units": "3"}, {"units": True}, {"units": -1.0},
     {"units": float("nan")}, {"units": float("inf")}, {"units": 1e299}, {"units": 10**41}, {"millions": 1.0},
     {"units": 1.0, "flops_of_unit": 5}, {"units": 1.0, "flops_of_unit": [0]}, {"units": 1.0, "flops_of_unit": [1.5]}],
)  # fmt: skip
def test_a_bad_state_is_one_error_and_changes_nothing(state: Any, tiny_vit: Any) -> None:
    vit = compress(tiny_vit(), Strategy()).train()
    budget = Budget(vit)
    vit(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"'units'|'flops_of_unit'") as raised:
        budget.load_state_dict(state)
    wrong = state["flops_of_unit"] if isinstance(state, dict) and "flops_of_unit" in state else state
    assert repr(wrong) in str(raised.value)
    assert budget.units == 3.0


@pytest.mark.parametrize("many", [False, True])
def test_a_plain_model_cannot_be_counted(many: bool, tiny_vit: Any) -> None:
    vit = tiny_vit()
    with pytest.raises(ValueError, match="model_or_models must be compressed first"):
        Budget([vit, vit] if many else vit)


@pytest.mark.parametrize("models", ["vit", None, 3, [None], ["vit"]])
def test_what_is_no_model_is_named(models: Any) -> None:
    with pytest.raises(TypeError, match="model_or_models") as raised:
        Budget(models)
    assert repr(models) in str(raised.value)


def test_a_teacher_in_eval_mode_counts_while_its_student_trains_and_that_it_is_plain_is_said_once(
    tiny_vit: Any,
) -> None:
    student, teacher, views = tiny_vit().train(), tiny_vit().eval(), torch.randn(2, 3, 32, 32)
    expected = teacher(views)
    compress(student, Strategy(0.75, 16), teacher=teacher)
    budget = Budget([student, teacher])
    with pytest.warns(UserWarning, match="a teacher in eval mode is not compressed") as told:
        outputs = [teacher(views) for _ in range(2)]
    assert all(torch.equal(output, expected) for output in outputs)
    assert len(told) == 1
    assert budget.units == 4.0
    student.eval()  # validation, of both
    student(views)
    teacher(views)
    assert budget.units == 4.0


def test_what_was_spent_stays_spent_when_the_image_size_changes(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), Strategy()).train()
    budget = Budget(vit)
    vit(torch.randn(4, 3, 32, 32))
    assert budget.units == 12.0
    vit.set_input_size(64)
    assert budget.units == 12.0
    vit(torch.randn(4, 3, 64, 64))
    larger = encoder_flops(find_encoder(vit), 65) / encoder_flops(find_encoder(vit), 17)
    assert budget.units == pytest.approx(12.0 * (1 + larger))


def test_a_loaded_state_brings_its_unit_whatever_size_the_encoder_has_by_then(tiny_vit: Any) -> None:
    vit = compress(tiny_vit(dynamic_img_size=True), Strategy()).train()
    budget = Budget(vit)
    vit.set_input_size(64)
    saved = json.loads(json.dumps(budget.state_dict()))
    goes_on, another = Budget(vit), Budget(vit)
    goes_on.load_state_dict(saved)
    another.load_state_dict({"units": 0.0})  # says nothing of its unit
    vit(torch.randn(4, 3, 64, 64))
    larger = encoder_flops(find_encoder(vit), 65) / encoder_flops(find_encoder(vit), 17)
    assert goes_on.units == pytest.approx(12.0 * larger)
    assert another.units == pytest.approx(12.0)


def _teacher_in_eval_mode(tiny_vit: Any) -> tuple[Any, Any, Budget]:
    student, teacher = tiny_vit(), tiny_vit()
    compress(student, Strategy(0.75, 16), teacher=teacher)
    budget = Budget([student, teacher])
    return student.train(), teacher.eval(), budget


def test_a_teacher_that_is_exported_in_eval_mode_is_the_plain_model_and_counts_nothing(tiny_vit: Any) -> None:
    _, teacher, budget = _teacher_in_eval_mode(tiny_vit)
    views = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(teacher, (views,)).module()
    assert torch.equal(exported(views), tiny_vit().eval()(views))
    assert budget.units == 0.0
    teacher(views)
    assert budget.units == 2.0


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason="torch 2.6 cannot tell a compilation from an export, of which nothing is counted",
)
def test_a_compiled_teacher_in_eval_mode_counts_while_its_student_trains(tiny_vit: Any) -> None:
    student, teacher, budget = _teacher_in_eval_mode(tiny_vit)
    torch.compiler.reset()
    compiled, views = torch.compile(teacher, backend="eager"), torch.randn(2, 3, 32, 32)
    counted = []
    for trains in (True, False, True):
        student.train(trains)
        assert torch.equal(compiled(views), tiny_vit().eval()(views))
        counted.append(budget.units)
    assert counted == [2.0, 2.0, 4.0]


def test_encoders_that_were_compressed_anew_are_told_to_be_counted_no_more(tiny_vit: Any) -> None:
    vit, views = compress(tiny_vit(), Strategy()).train(), torch.randn(2, 3, 32, 32)
    budget = Budget(vit)
    vit(views)
    restore(vit)
    assert budget.units == 6.0  # what was spent is spent
    compress(vit, Strategy(0.5))(views)
    with pytest.warns(UserWarning, match="compressed anew since it was made") as told:
        assert (budget.units, budget.millions) == (6.0, 6e-6)
    assert len(told) == 1
