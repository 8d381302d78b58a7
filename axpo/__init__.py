"""Agent Explorative Policy Optimization: the algorithm, the agent loop, the trainer and the commands."""

import axpo._claim  # noqa: F401 — first: `kernels` must mean ours before anything imports it

__version__ = "0.1.0"
