"""The two compressors, tensors in and tensors out: token dropout and patch scaling. They know no model."""

import torch

from seqcompress.compressors.patch_scaling import grid_size, resample_patches, resize_pinv
from seqcompress.compressors.selection import Selection, embed_selection, positions_of, select
from seqcompress.compressors.token_dropout import SubsetStream, num_kept, random_subset
from seqcompress.versions import check_version

check_version("torch", torch.__version__)  # where torch is met first: everything that needs it comes through here

__all__ = [
    "Selection",
    "SubsetStream",
    "embed_selection",
    "grid_size",
    "num_kept",
    "positions_of",
    "random_subset",
    "resample_patches",
    "resize_pinv",
    "select",
]
