"""What must work wherever the wheel is installed. Run with that environment's Python, away from the checkout."""

import importlib.metadata
import importlib.util
import sys
from types import ModuleType

import timm
import torch

import seqcompress
from seqcompress.command import main

torch.manual_seed(0)
print("seqcompress", seqcompress.__version__, "torch", torch.__version__, "timm", timm.__version__, sys.version)
assert importlib.metadata.version("seqcompress") == seqcompress.__version__


def vit() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, embed_dim=48, depth=2)


model, views = vit().train(), torch.randn(2, 3, 64, 64)
plain = {name: value.clone() for name, value in model.state_dict().items()}
seqcompress.compress(model, "default")
scheduler, budget = seqcompress.SequenceScheduler(model, total_steps=4), seqcompress.Budget(model)
for _ in range(4):
    model(views).square().mean().backward()
    scheduler.step()
assert budget.units < 0.8 * 4 * 2 * 3, budget
seqcompress.restore(model)
assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
assert main(["plan", "vit_tiny_patch16_224", "--steps", "100"]) == 0


def lengths_under(pl: ModuleType) -> list[int]:
    """The student's tokens, step by step, in four epochs of one batch."""
    lengths: list[int] = []
    loader = torch.utils.data.DataLoader(list(views), batch_size=2)

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = vit()

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            lengths.append(seqcompress.num_tokens(self.backbone, seqcompress.get_strategy(self.backbone), 64))
            return self.backbone(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=4, **quiet).fit(seqcompress.accelerate(Module(), "default"), loader)
    return lengths


for package in ("lightning.pytorch", "pytorch_lightning"):
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        print(f"without {package}")
        continue
    pl = importlib.import_module(package)
    lengths = lengths_under(pl)
    assert lengths == sorted(lengths), lengths
    assert (lengths[0], lengths[-1]) == (3, 17), lengths
    print(f"{package} {pl.__version__}: {lengths} tokens")
print("works")
