"""How the engine's tokens attend to the paged KV: one file a backend, behind one interface."""

from engine.attention.backend import Backend, StepAttention, Target
from engine.attention.select import BACKENDS, Choice, choose_backend

__all__ = ["BACKENDS", "Backend", "Choice", "StepAttention", "Target", "choose_backend"]
