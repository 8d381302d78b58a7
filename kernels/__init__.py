"""Operations of the engine and the trainer: each a plain-torch reference beside its compiled form."""

from kernels import _claim  # noqa: F401  before anything can import transformers
from kernels.decoder_layer import can_run_layers, decoder_layer
from kernels.kv_cache import copy_blocks, write_kv
from kernels.linear import linear
from kernels.linear_logprob_entropy import linear_logprob_entropy, linear_logprob_state, merge_shards
from kernels.paged_attention import PagedPlan, paged_attention, paged_plan
from kernels.rmsnorm import add_rmsnorm, rmsnorm
from kernels.rotary import rotary
from kernels.sampling import linear_sample, sample
from kernels.swiglu import swiglu
from kernels.tree_attention import tree_attention

__all__ = [
    "PagedPlan",
    "add_rmsnorm",
    "can_run_layers",
    "copy_blocks",
    "decoder_layer",
    "linear",
    "linear_logprob_entropy",
    "linear_logprob_state",
    "linear_sample",
    "merge_shards",
    "paged_attention",
    "paged_plan",
    "rmsnorm",
    "rotary",
    "sample",
    "swiglu",
    "tree_attention",
    "write_kv",
]
