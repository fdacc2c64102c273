"""The two compressors, and the wrapper that puts both around a ViT's patch embedding."""

from seqcompress.compressors.patch_embed import CompressedPatchEmbed
from seqcompress.compressors.patch_scaling import grid_size, resample_patches, resize_pinv
from seqcompress.compressors.token_dropout import SubsetStream, num_kept, random_subset

__all__ = [
    "CompressedPatchEmbed",
    "SubsetStream",
    "grid_size",
    "num_kept",
    "random_subset",
    "resample_patches",
    "resize_pinv",
]
