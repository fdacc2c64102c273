"""One rank of ``test_distributed_training``, started by torchrun: trains in many ways, and writes down what it saw.

Run as ``torchrun --nproc-per-node 2 training_worker.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from seqcompress import (
    Budget,
    OnlineScheduler,
    SequenceScheduler,
    Stepwise,
    Strategy,
    compress,
    get_strategy,
    gradient_error,
    relative_cost,
)

STEPS = 8
HAS_FSDP2 = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 has it on GPUs alone
STAGES = Stepwise({0.0: Strategy(0.5, 16), 0.25: Strategy(0.5), 0.5: Strategy(0.25), 0.75: Strategy()})
DROPPING = Stepwise({0.0: Strategy(0.5), 0.5: Strategy(0.25), 0.75: Strategy()})


class WithUnused(nn.Module):
    """A model of which a part gets no gradient."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit, self.unused = vit, nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, views: Tensor) -> Tensor:
        features: Tensor = self.vit(views)
        return features


def make_vit() -> VisionTransformer:
    torch.manual_seed(1)
    vit = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, reg_tokens=2
    ).double()  # a convolution and a product round otherwise
    with torch.no_grad():
        vit.pos_embed.normal_()
    return vit


def views_of(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)


def loss_of(features: Tensor) -> Tensor:
    """One that layer norm does not make constant."""
    return (features * torch.linspace(-1, 1, features.shape[-1], dtype=features.dtype)).square().sum()


def whole_weights(model: nn.Module, vit: nn.Module) -> list[Tensor]:
    gathering = (
        FullyShardedDataParallel.summon_full_params(model)
        if isinstance(model, FullyShardedDataParallel)
        else nullcontext()
    )
    with gathering:
        named = sorted(vit.named_parameters(), key=lambda item: item[0].replace("_fsdp_wrapped_module.", ""))
        weights = [value.full_tensor() if hasattr(value, "full_tensor") else value for _, value in named]
        return [weight.detach().clone() for weight in weights]


def trained(model: nn.Module, vit: nn.Module, plan: Any = STAGES, *, by_hand: bool = False) -> dict[str, Any]:
    """Eight steps, and what is known after them."""
    rank, strategies = dist.get_rank(), []
    torch.manual_seed(7)
    scheduler, budget = SequenceScheduler(model, plan, total_steps=STEPS), Budget(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(STEPS):
        strategies.append(str(get_strategy(model)))
        optimizer.zero_grad()
        loss_of(model.train()(views_of(rank, step))).backward()
        for parameter in model.parameters() if by_hand else ():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        optimizer.step()
        scheduler.step()
        budget_share = scheduler.budget_share(step)
    costs = [budget.units, budget_share, relative_cost(vit, Strategy(0.5, 16), 32)]
    return {"weights": whole_weights(model, vit), "strategies": strategies, "costs": costs}


def ways() -> dict[str, Callable[[Any], nn.Module]]:
    """How a compressed ViT, or one that will be compressed, is distributed."""
    mesh = init_device_mesh("cpu", (2,))

    def sharded(vit: Any, unit: str) -> nn.Module:
        if unit:
            fully_shard(vit.patch_embed.proj if unit == "projection" else vit.patch_embed, mesh=mesh)
        for block in vit.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(vit, mesh=mesh)

    def flattened(vit: Any, original: bool) -> nn.Module:
        return FullyShardedDataParallel(
            vit,
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=original,
            device_id=torch.device("cpu"),
        )

    ways = {
        "DDP": DistributedDataParallel,
        "DDP, static graph, gradients in buckets": lambda vit: DistributedDataParallel(
            vit, static_graph=True, gradient_as_bucket_view=True
        ),
        "DDP, unused parameters": lambda vit: DistributedDataParallel(WithUnused(vit), find_unused_parameters=True),
        "FSDP1, original parameters": lambda vit: flattened(vit, True),
        "FSDP1, flat parameters": lambda vit: flattened(vit, False),
        "FSDP2": lambda vit: sharded(vit, ""),
        "FSDP2, embedding apart": lambda vit: sharded(vit, "embedding"),
        "FSDP2, projection apart": lambda vit: sharded(vit, "projection"),
    }
    return {way: distribute for way, distribute in ways.items() if HAS_FSDP2 or not way.startswith("FSDP2")}


def subsets_of_two_ranks() -> dict[str, Any]:
    """DDP with token dropout alone, and one process on the samples and the patches of both ranks."""
    rank, kept = dist.get_rank(), []
    vit = compress(make_vit(), DROPPING)

    def look(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            patches = vit.patch_embed.embed(views_of(rank, len(kept)))
            every = vit._pos_embed(patches)[:, 3:]
        distance = torch.cdist(args[0][:, 3:].detach(), every, compute_mode="donot_use_mm_for_euclid_dist")
        kept.append(distance.argmin(dim=2))

    handle = vit.blocks[0].register_forward_pre_hook(look)
    mine = trained(DistributedDataParallel(vit), vit, DROPPING)
    handle.remove()
    of_both: list[Any] = [None, None]
    dist.all_gather_object(of_both, kept)
    alone = make_vit().train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.01)
    for step in range(STEPS):
        losses = []
        for other in range(2):
            tokens = alone._pos_embed(alone.patch_embed(views_of(other, step)))  # (B, 3 + N, D)
            chosen = of_both[other][step].unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            tokens = torch.cat([tokens[:, :3], tokens[:, 3:].gather(1, chosen)], dim=1)
            losses.append(loss_of(alone.forward_head(alone.norm(alone.blocks(tokens)))))
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        optimizer.step()
    return {
        "difference": difference(mine["weights"], whole_weights(alone, alone)),
        "subsets": [step.sort(dim=1).values.tolist() for step in kept],
    }


def lost_count() -> list[list[Any]]:
    """A rank whose own count is wrong."""
    vit = compress(make_vit(), STAGES)
    scheduler = SequenceScheduler(vit, total_steps=STEPS)
    if dist.get_rank() == 1:
        scheduler.step(3)
    seen = []
    for _ in range(STEPS):
        scheduler.step()
        seen.append([scheduler.last_step, str(get_strategy(vit))])
    return seen


def one_batch_less() -> dict[str, Any]:
    """DDP's join: rank 1 has a batch less than rank 0, which goes on alone, and steps by number."""
    rank, strategies = dist.get_rank(), []
    vit = compress(make_vit(), STAGES)
    model = DistributedDataParallel(vit).train()
    scheduler = SequenceScheduler(model, total_steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with model.join():
        for step in range(STEPS - rank):
            strategies.append(str(get_strategy(model)))
            optimizer.zero_grad()
            loss_of(model(views_of(rank, step))).backward()
            optimizer.step()
            scheduler.step(step + 1)
    return {"strategies": strategies, "weights": [float(weight.sum()) for weight in whole_weights(model, vit)]}


def measured(distribute: Callable[[Any], nn.Module]) -> list[list[float]]:
    """A gradient error of both ranks' batches."""
    model = distribute(compress(make_vit(), Strategy())).train()
    batches = [views_of(dist.get_rank(), step) for step in range(3)]
    report = gradient_error(
        model, lambda views: loss_of(model(views)), batches, [Strategy(0.5), Strategy(0.25, 16)], cost="flops"
    )
    return [[entry.bias2, entry.variance, entry.cost] for entry in report.entries]


def found_online(distribute: Callable[[Any], nn.Module]) -> dict[str, Any]:
    """What an online schedule has decided, and the weights that came of it."""
    vit = compress(make_vit(), Strategy())
    model = distribute(vit).train()

    def loss(views: Tensor) -> Tensor:
        return loss_of(model(views))

    torch.manual_seed(7)
    scheduler = OnlineScheduler(model, loss, [Strategy(0.5)], total_steps=40, compute_share=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    while not scheduler.decisions and scheduler.last_step < 20:
        views = views_of(dist.get_rank(), scheduler.last_step)
        optimizer.zero_grad()
        loss(views).backward()
        optimizer.step()
        scheduler.step(views)
    return {
        "step": scheduler.last_step,
        "errors": [entry.ca_mse for made in scheduler.decisions for entry in made.report.entries],
        "weights": [float(weight.sum()) for weight in whole_weights(model, vit)],
    }


def error_of(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    seen: dict[str, Any] = {"differences": {}, "strategies": {}, "costs": {}, "told": {}}
    vit = compress(make_vit(), STAGES)
    expected = trained(vit, vit, by_hand=True)
    seen["moved"] = difference(expected["weights"], whole_weights(vit, make_vit()))
    every = ways()
    orders = {
        f"{way}, {order}": (distribute, order)
        for way, distribute in every.items()
        for order in ("compressed first", "distributed first")
        if order == "compressed first" or not way.startswith(("FSDP1", "DDP, "))
    }
    for way, (distribute, order) in orders.items():
        vit = make_vit()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if order == "compressed first":
                found = trained(distribute(compress(vit, STAGES)), vit)
            else:
                found = trained(compress(distribute(vit), STAGES), vit)
        seen["differences"][way] = difference(found["weights"], expected["weights"])
        seen["strategies"][way] = found["strategies"]
        seen["costs"][way] = found["costs"]
        seen["told"][way] = [str(warning.message) for warning in caught]
    seen["expected costs"] = expected["costs"]
    seen["one process"] = subsets_of_two_ranks()
    seen["lost count"] = lost_count()
    seen["one batch less"] = one_batch_less()
    seen["gradient errors"] = {way: measured(every[way]) for way in ("DDP", "FSDP2") if way in every}
    seen["found online"] = {way: found_online(every[way]) for way in ("DDP", "FSDP2") if way in every}
    flatten = every["FSDP1, original parameters"]
    seen["refused"] = {
        "measured": error_of(lambda: measured(flatten)),
        "measured online": error_of(lambda: found_online(flatten)),
        "compressed late": error_of(lambda: compress(flatten(make_vit()), STAGES)),
    }
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
