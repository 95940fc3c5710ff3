"""SparseGPT (Frantar & Alistarh, arXiv 2301.00774): the sweep of `obsdiff`, with every denoising step weighing alike.

The two differ in nothing but the default of --time-weights, so the gain of OBS-Diff's weighting is what lies between
them. In structured mode that makes it SlimGPT (Ling et al., arXiv 2412.18110) with the same ratio in every block.
"""

from obsdiff.methods.obsdiff import calibrates, prune_units, prune_weights, removes_units, streams

__all__ = ["calibrates", "name", "prune_units", "prune_weights", "removes_units", "streams", "time_weights"]

name: str = "sparsegpt"
time_weights: str = "uniform"
