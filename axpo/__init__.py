"""Agent Explorative Policy Optimization: the algorithm, the agent loop, the trainer and the commands."""

__version__ = "0.1.0"
