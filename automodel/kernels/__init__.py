"""Compute kernels behind the layers: torch references first, faster ones chosen by `automodel.backends`."""
