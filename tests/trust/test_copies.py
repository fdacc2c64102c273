"""Any sequence of what can be done to a compressed model, against a plain one to which as much of it is done.

The plain model is the reference, bit for bit: for weights, for evaluation, and for training without compression. What
a compressed training step gives is compared with that of a copy of the plain model which is compressed for this one
step only, so that nothing of what was done before may show.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import cloudpickle
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from seqcompress import Linear, Strategy, compress, get_strategy, is_compressed, restore, set_strategy

STRATEGIES = st.sampled_from(
    [Strategy(), Strategy(0.5), Strategy(0.9), Strategy(0.0, 8), Strategy(0.5, 8), Strategy(0.0, 6)]
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
LIVE = 3  # models at a time


class _Twins:
    """A model that is compressed now and then, the plain one, and what the first is expected to be under."""

    def __init__(self, model: nn.Module, plain: nn.Module) -> None:
        self.model, self.plain, self.wrapped = model, plain, False
        self.strategy: Strategy | None = None  # of a model that is compressed, whatever drives it

    @property
    def vit(self) -> nn.Module:
        return next(module for module in self.model.modules() if isinstance(module, VisionTransformer))

    def copied(self, duplicate: Any) -> _Twins:
        """An independent pair; a plan that was driven by hand is so in the copy."""
        twin = _Twins(duplicate(self.model), copy.deepcopy(self.plain))
        twin.wrapped, twin.strategy = self.wrapped, self.strategy
        return twin


def _vit() -> VisionTransformer:
    torch.manual_seed(1)
    vit = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=0, init_values=0.1
    )
    with torch.no_grad():
        vit.cls_token.normal_()
    return vit.train()


class Copies(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.twins: list[_Twins] = []

    @initialize()
    def begin(self) -> None:
        self.twins = [_Twins(_vit(), _vit())]

    def _pick(self, number: int) -> _Twins:
        return self.twins[number % len(self.twins)]

    def _add(self, twins: _Twins) -> None:
        self.twins = [*self.twins, twins][-LIVE:]

    number = st.integers(0, LIVE - 1)

    @rule(number=number, strategy=STRATEGIES)
    def compress(self, number: int, strategy: Strategy) -> None:
        twins = self._pick(number)
        assert compress(twins.vit, strategy) is twins.vit
        twins.strategy = strategy

    @rule(number=number, strategy=STRATEGIES)
    def plan_a_schedule_that_is_driven_by_hand(self, number: int, strategy: Strategy) -> None:
        twins = self._pick(number)
        compress(twins.vit, Linear(Strategy(0.9), Strategy()))
        set_strategy(twins.vit, strategy)
        twins.strategy = strategy

    @rule(number=number)
    def restore(self, number: int) -> None:
        twins = self._pick(number)
        restore(twins.model)
        twins.strategy = None

    @rule(number=number, strategy=STRATEGIES)
    def set_strategy(self, number: int, strategy: Strategy) -> None:
        twins = self._pick(number)
        if twins.strategy is None:
            with pytest.raises(ValueError, match="compressed first"):
                set_strategy(twins.model, strategy)
        else:
            set_strategy(twins.model, strategy)
            twins.strategy = strategy

    @rule(number=number, how=st.sampled_from(["deepcopy", "pickle", "cloudpickle"]))
    def copy(self, number: int, how: str) -> None:
        ways: dict[str, Any] = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda model: pickle.loads(pickle.dumps(model)),
            "cloudpickle": lambda model: cloudpickle.loads(cloudpickle.dumps(model)),
        }
        self._add(self._pick(number).copied(ways[how]))

    @rule(number=number, dtype=DTYPES)
    def convert(self, number: int, dtype: torch.dtype) -> None:
        twins = self._pick(number)
        twins.model.to(dtype)
        twins.plain.to(dtype)

    @rule(number=number, mode=st.booleans())
    def train_or_eval(self, number: int, mode: bool) -> None:
        twins = self._pick(number)
        twins.model.train(mode)
        twins.plain.train(mode)

    @rule(number=number)
    def wrap_or_unwrap(self, number: int) -> None:
        twins = self._pick(number)
        if twins.wrapped:
            twins.model = twins.vit
        else:
            twins.model = nn.Sequential(twins.model, nn.LayerNorm(16)).train(twins.model.training)
        twins.wrapped = not twins.wrapped

    @rule(to=number, source=number)
    def load(self, to: int, source: int) -> None:
        state = self._pick(source).vit.state_dict()
        self._pick(to).vit.load_state_dict(copy.deepcopy(state))
        self._pick(to).plain.load_state_dict(self._pick(source).plain.state_dict())

    @rule(number=number, seed=st.integers(0, 5))
    def step(self, number: int, seed: int) -> None:
        """Forward, backward and update; the plain one as if it had been compressed for this step only."""
        twins = self._pick(number)
        views = self._views(twins, seed)
        plain = copy.deepcopy(twins.plain)
        if twins.strategy is not None:
            compress(plain, twins.strategy)
        features = []
        for model in (twins.vit, plain):
            model.zero_grad()
            torch.manual_seed(seed)
            output = model(views)
            output.square().sum().backward()
            features.append(output)
        assert torch.equal(*features)
        names = dict(twins.plain.named_parameters())
        with torch.no_grad():
            for (name, mine), other in zip(twins.vit.named_parameters(), plain.parameters(), strict=True):
                assert mine.grad is not None
                assert other.grad is not None
                assert torch.equal(mine.grad, other.grad), name
                mine -= 0.01 * mine.grad
                names[name] -= 0.01 * other.grad
        twins.model.zero_grad()

    @rule(number=number, seed=st.integers(0, 5))
    def forward_in_eval_mode(self, number: int, seed: int) -> None:
        twins = self._pick(number)
        views, mode = self._views(twins, seed), twins.model.training
        with torch.no_grad():
            assert torch.equal(twins.vit.eval()(views), twins.plain.eval()(views))
        twins.model.train(mode)
        twins.plain.train(mode)

    @precondition(lambda self: len(self.twins) > 1)
    @rule(number=number)
    def forget(self, number: int) -> None:
        del self.twins[number % len(self.twins)]

    @staticmethod
    def _views(twins: _Twins, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, 3, 16, 16, generator=generator).to(next(twins.plain.parameters()).dtype)

    @invariant()
    def every_model_has_the_plain_models_state_and_its_own_strategy(self) -> None:
        for twins in self.twins:
            mine, plain = twins.vit.state_dict(), twins.plain.state_dict()
            assert list(mine) == list(plain)
            assert all(torch.equal(value, plain[name]) for name, value in mine.items())
            assert [name for name, _ in twins.vit.named_modules()] == [name for name, _ in twins.plain.named_modules()]
            assert twins.vit.training == twins.plain.training
            assert is_compressed(twins.model) == (twins.strategy is not None)
            if twins.strategy is not None:
                assert get_strategy(twins.model) == twins.strategy
            hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in twins.vit.modules())
            assert (hooks > 0) == (twins.strategy is not None)


@pytest.mark.parametrize(
    ("examples", "steps"),
    [(15, 25), pytest.param(600, 60, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])],
)
def test_whatever_is_done_in_whatever_order_a_model_stays_the_plain_one_bit_for_bit(examples: int, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(
            Copies, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
        )


def test_an_encoder_from_a_file_keeps_its_hooks_in_a_process_that_has_made_fewer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    saved = pickle.dumps(compress(vit, Strategy(0.5)))
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as a process begins
    loaded = pickle.loads(saved).train()
    lengths: list[int] = []
    for module in loaded.modules():
        module.register_forward_pre_hook(lambda *_: None)
    loaded.blocks[0].register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    loaded(torch.randn(2, 3, 32, 32))
    assert lengths == [9]
