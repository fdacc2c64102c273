"""Views that follow the strategy: where patches are scaled, a loader's workers make smaller crops at once.

A 112 px view cut into patches of 16 px has the token grid of a 224 px view cut into patches of 32 px, and is made in
about half the time. ``scaled_views`` is what encoders know of it, ``transforms`` what is done to a pipeline, ``loader``
puts the two together.
"""

from seqcompress.views.loader import scale_views
from seqcompress.views.scaled_views import ScaledViews, scaled_size

__all__ = ["ScaledViews", "scale_views", "scaled_size"]
