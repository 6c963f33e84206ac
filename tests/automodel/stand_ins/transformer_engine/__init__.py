"""A stand-in for TransformerEngine 2.20.2 on CPUs: the functions that automodel calls, with their signatures.

It computes what they compute, rounds to FP8 as their recipes do, and refuses what they refuse. `tests/gpu/test_te.py`
compares its signatures and its results with those of the real package.
"""
