"""How the engine's tokens attend to the paged KV: one file a backend."""

from engine.attention.paged import PagedAttention

__all__ = ["PagedAttention"]
