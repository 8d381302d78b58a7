"""Is a kernel, and the engine on top of them, right on this device: what bench/gpu_suite.py asserts before it measures.

The tests in tests/ say more; they need pytest and mostly run on the CPU. This needs neither, and runs the compiled
kernels.
"""

import contextlib
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, Case, Shape, draw
from bench.measure import forward_call, gradient_call

# What a result may be off, relative to its largest element, beyond twice what the plain version in the same dtype is.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@dataclass(frozen=True, slots=True)
class Check:
    """ok, and what was found."""

    name: str
    ok: bool
    detail: str


def check_case(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype, backend: str) -> Iterator[Check]:
    """Forward and backward against float64; twice the same bits; nothing left unwritten."""
    label = f"{case.name}, {shape.name}, {str(dtype).removeprefix('torch.')}"
    seed = random.randrange(1 << 30)
    with _poisoned():
        arguments = draw(case, shape, device, dtype, seed)
        if case.mutates:
            theirs = draw(case, shape, device, dtype, seed)
            case.ours(arguments, backend)(*arguments)
            case.reference(*theirs)
            same = all(torch.equal(arguments[i], theirs[i]) for i in case.mutates)
            yield Check(label, same, "as the reference" if same else f"another result than the reference (seed {seed})")
            return
        ours = _results(case, case.ours(arguments, backend), arguments)
        again = _results(case, case.ours(arguments, backend), arguments)
        same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        yield Check(f"{label}, two runs", same, "same bits" if same else f"other bits (seed {seed})")
        plain = _results(case, case.reference, arguments)
        if not all(x.is_floating_point() for x in ours):  # tokens: the reference's own, whose noise is defined in fp32
            equal = torch.equal(ours[0], plain[0])
            close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours[1:], plain[1:], strict=True))
            yield Check(label, equal and close, "as the reference" if equal and close else f"differs (seed {seed})")
            return
        exact = _results(case, case.reference, tuple(_double(a) for a in arguments))
        errors, bounds = [], []
        for a, p, e in zip(ours, plain, exact, strict=True):
            errors.append(_error(a, e))
            bounds.append(2 * _error(p, e) + TOLERANCE[dtype])
        ok = all(error <= bound for error, bound in zip(errors, bounds, strict=True))  # NaN is not
        found = ", ".join(f"{error:.1e} of {bound:.1e}" for error, bound in zip(errors, bounds, strict=True))
        yield Check(label, ok, f"relative errors {found}" + f" (seed {seed})" * (not ok))


def check_copies(device: torch.device) -> Iterator[Check]:
    """The copy-on-write that the engine takes, which is not Triton's where csrc/cuda was built."""
    from kernels.kv_cache import _CUDA_COPY, copy_blocks, copy_blocks_reference

    which = "csrc/cuda" if _CUDA_COPY and device.type == "cuda" else "by default"
    for dtype, dim in ((torch.bfloat16, 128), (torch.float32, 16), (torch.bfloat16, 6), (torch.float16, 3)):
        kv = torch.randn(3, 2, 40, 2, 16, dim, device=device).to(dtype)
        expected = kv.clone()
        order = torch.randperm(40, device=device)
        pairs = order[:15], order[15:30], torch.randint(17, (15,), device=device)
        copy_blocks(kv, *pairs)
        copy_blocks_reference(expected, *pairs)
        same = torch.equal(kv, expected)
        name = f"copy_blocks, {which}, {str(dtype).removeprefix('torch.')}, {dim} values a token"
        yield Check(name, same, "as the reference" if same else "another result than the reference")


def check_sharing(device: torch.device) -> Iterator[Check]:
    """Attention's bits depend neither on what is shared nor on the batch: shared, unshared, and every row alone."""
    from kernels.paged_attention import paged_attention, paged_plan

    case = next(case for case in CASES if case.name == "paged_attention")
    prefixes = (512,) if device.type == "cpu" else (512, 2048, 5000)
    for dtype in (torch.float32, torch.bfloat16):
        for prefix in prefixes:
            shape = Shape("sharing", 0, 0, 0, 5, prefix, 30, 0, 8, 2, 64, 0, 0, 0)
            q, k_cache, v_cache, tables, starts, lengths, scale = draw(case, shape, device, dtype, seed=prefix)

            def attend(rows: slice, share: bool) -> torch.Tensor:
                one = tables[rows].contiguous(), starts[: len(tables[rows]) + 1], lengths[rows]  # noqa: B023
                blocks, begin, length = (x.cpu() for x in one)
                plan = paged_plan(blocks, begin, length, q.shape[1], k_cache, share, backend="triton")  # noqa: B023
                return paged_attention(q[rows], k_cache, v_cache, *one, scale, plan, backend="triton")  # noqa: B023

            shared = attend(slice(None), True)
            alone = torch.cat([attend(slice(row, row + 1), True) for row in range(len(q))])
            same = torch.equal(shared, attend(slice(None), False)) and torch.equal(shared, alone)
            name = f"sharing changes no bit, {str(dtype).removeprefix('torch.')}, prefix {prefix}"
            yield Check(name, same, "shared, unshared and alone" if same else "other bits")


def check_engine(device: torch.device) -> Iterator[Check]:
    """Greedy tokens as transformers', in fp32 from one random checkpoint; a fork continues as a fresh run does."""
    import numpy as np
    from PIL import Image
    from transformers import Qwen3VLForConditionalGeneration

    from engine import LLM, SamplingParams
    from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START, write_vl_checkpoint

    torch.backends.cudnn.allow_tf32 = False  # the patch embedding of transformers is a convolution
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as directory:
        path = write_vl_checkpoint(Path(directory), tie=True, seed=7)
        llm = LLM(path, dtype=torch.float32, device=device, kv_cache_bytes=1 << 25, max_batch_tokens=64)
        reference: Any = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        reference = reference.eval().to(device)
        reference.generation_config.eos_token_id = None
        for number in (0, 1, 3):
            tokens, images = [rng.randrange(7, 260) for _ in range(30)], []
            for _ in range(number):
                pixels = np.random.default_rng(number).integers(0, 256, (24, 48, 3), dtype=np.uint8)
                images.append(llm.processor.image(Image.fromarray(pixels)))
                tokens += [VISION_START, *[IMAGE] * images[-1].num_tokens, VISION_END, 9, 10]
            ids = torch.tensor([tokens])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if images:
                inputs["pixel_values"] = torch.cat([image.pixel_values for image in images])
                inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
                inputs["mm_token_type_ids"] = (ids == IMAGE).int()
            expected = reference.generate(
                **{name: tensor.to(device) for name, tensor in inputs.items()},
                do_sample=False,
                max_new_tokens=48,
                min_new_tokens=48,
                suppress_tokens=list(llm.config.banned_token_ids),
                pad_token_id=0,
            )[0, len(tokens) :].tolist()
            prompt = {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}
            greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
            actual = llm.generate([prompt], greedy, use_tqdm=False)[0].outputs[0].token_ids
            agree = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b), len(expected))
            yield Check(f"engine, greedy, {number} images", agree == 48, f"{agree} of 48 tokens as transformers")
            yield from _check_forks(llm, prompt)


def _check_forks(llm: Any, prompt: dict[str, Any]) -> Iterator[Check]:
    from engine import SamplingParams

    params = SamplingParams(max_tokens=12, seed=5, ignore_eos=True)
    with llm.open(prompt) as root:
        llm.run([root], params)
        cuts = range(len(root) - 12, len(root) + 1, 3)
        same = True
        for at in cuts:
            (child,) = root.fork(at=at)
            fresh = llm.open(prompt | {"prompt_token_ids": list(root.token_ids[:at])})
            same &= llm.run([child], params)[0].token_ids == llm.run([fresh], params)[0].token_ids
            child.close()
            fresh.close()
    yield Check("engine, forks", same, f"forks at {len(cuts)} tokens continue as fresh runs" if same else "they differ")


def _results(case: Case, function: Any, arguments: tuple) -> list[torch.Tensor]:
    result: Any = forward_call(function, arguments)()
    outputs = list(result) if isinstance(result, tuple) else [result]
    if case.inputs:
        torch.manual_seed(1)  # the same upstream gradients for everyone
        outputs += gradient_call(function, arguments, case.inputs)()
    return outputs


def _double(argument: Any) -> Any:
    wide = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.double() if wide else argument


def _error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    if not exact.numel():
        return 0.0
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
