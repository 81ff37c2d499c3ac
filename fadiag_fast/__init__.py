"""fadiag_fast: find out whether a network's hidden states and gradients can be trusted."""

from .ops import direction_cosines, layer_statistics
from .reference import LayerStatistics

__version__ = "0.1.0"

__all__ = ["LayerStatistics", "direction_cosines", "layer_statistics"]
