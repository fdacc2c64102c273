"""How the compressors take their place in a ViT. Each kind of ViT is one module of this folder, and registers itself.

To add one, add a module with a subclass of [Encoder][seqcompress.encoders.encoder.Encoder] decorated with ``register``;
every module here is imported. What merely wraps a ViT registers with ``register_wrapper``.
"""

import importlib
import pkgutil

from seqcompress.encoders.compression import BatchPolicy, Compression
from seqcompress.encoders.encoder import Encoder, is_frozen
from seqcompress.encoders.masks import follow_masks, forget_masks
from seqcompress.encoders.patch_embed import CompressedPatchEmbed, Forward, When, student_among
from seqcompress.encoders.registry import SUPPORTED_VITS, find_encoder, is_encoder, register, register_wrapper

__all__ = [
    "SUPPORTED_VITS",
    "BatchPolicy",
    "CompressedPatchEmbed",
    "Compression",
    "Encoder",
    "Forward",
    "When",
    "find_encoder",
    "follow_masks",
    "forget_masks",
    "is_encoder",
    "is_frozen",
    "register",
    "register_wrapper",
    "student_among",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
