"""Agent Explorative Policy Optimization: the algorithm, the agent loop, the trainer and the commands."""

import os

import axpo._claim  # noqa: F401 — first: `kernels` must mean ours before anything imports it

# A step is hundreds of short parallel regions. Threads that spin long at the end of each are no faster where cores are
# free, and where they are not, ten times slower: the spinning ones keep the working ones off the core. libgomp reads
# this when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
