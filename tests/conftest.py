"""Small models and the ways in which the tests look into them."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

torch.set_num_threads(1)  # of the two processes of a small machine, each has a core
os.environ["OMP_NUM_THREADS"] = "1"  # and so has whatever a test starts
settings.register_profile("suite", max_examples=50, deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.soak)])
def pl(request: pytest.FixtureRequest) -> Any:
    """One Lightning package, and the other in the soak; ``adapters/test_lightning.py`` always takes both."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., VisionTransformer]:
    """Builds a ViT of 16 patches, 8 px each, with one class token; keywords as for timm's class."""
    return _tiny_vit


@pytest.fixture(scope="session")
def first_tokens() -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs a model on views and returns the tokens that reached the first block of the ViT in it."""
    return _first_tokens


@pytest.fixture(scope="session")
def patches_among() -> Callable[[Tensor, Tensor], Tensor]:
    """Finds tokens (B, K, D) among all tokens (B, N, D): their indices, (B, K). Fails if one is not there."""
    return _patches_among


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs commands side by side, one a rank, to their end, and returns what each has printed.

    Fails with what they wrote to stderr if one of them fails or takes too long. None outlives the call, nor does
    what it started.
    """

    def run(*commands: Sequence[object], timeout: float = 240, **settings: Any) -> list[str]:
        return _run_ranks(commands, tmp_path_factory.mktemp("ranks"), timeout, settings)

    return run


@pytest.fixture(scope="session")
def gradients() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies of a model's gradients by parameter name."""
    return _gradients


def _tiny_vit(**overrides: Any) -> VisionTransformer:
    settings: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vit = VisionTransformer(**{**settings, "num_classes": 0, "class_token": True, **overrides})
        with torch.no_grad():
            for name, parameter in vit.named_parameters():
                if name in ("pos_embed", "cls_token", "reg_token", "patch_embed.proj.bias"):
                    parameter.normal_()  # timm begins with almost nothing: differences would not show
    return vit


def _first_tokens(model: nn.Module, views: Tensor) -> Tensor:
    vit = next(module for module in model.modules() if isinstance(module, VisionTransformer))
    seen: list[Tensor] = []
    handle = vit.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    try:
        model(views)
    finally:
        handle.remove()
    (tokens,) = seen
    return tokens


def _patches_among(some: Tensor, every: Tensor) -> Tensor:
    nearest = torch.cdist(some.double(), every.double(), compute_mode="donot_use_mm_for_euclid_dist").min(dim=2)
    assert nearest.values.max() < 1e-4
    return nearest.indices


def _run_ranks(
    commands: Sequence[Sequence[object]], folder: Path, timeout: float, settings: dict[str, Any]
) -> list[str]:
    outputs = [folder / f"{rank}.out" for rank in range(len(commands))]
    errors = [folder / f"{rank}.err" for rank in range(len(commands))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, output, error in zip(commands, outputs, errors, strict=True):
            # Files, since a pipe that nobody reads fills up, and an own session, to end what a rank has started too.
            with output.open("wb") as stdout, error.open("wb") as stderr:
                words = list(map(str, command))
                processes.append(
                    subprocess.Popen(words, stdout=stdout, stderr=stderr, start_new_session=True, **settings)
                )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                deadline = min(deadline, time.monotonic() + 5)  # the others wait for it, or are about to say why
            time.sleep(0.02)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError, PermissionError):  # it has ended, and perhaps nobody took note
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if any(codes) or None in codes:
        told = "\n".join(f"--- rank {rank}:\n{error.read_text()}" for rank, error in enumerate(errors))
        pytest.fail(f"exit codes {codes}, None being for a process that was still running\n{told}", pytrace=False)
    return [output.read_text() for output in outputs]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
