"""Probe every step of a training run from inside its own forward and backward passes."""
