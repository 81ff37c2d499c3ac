"""fadiag_fast: find out whether a network's hidden states and gradients can be trusted."""

__version__ = "0.1.0"
