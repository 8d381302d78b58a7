"""What of the engine only a GPU can show: CUDA graphs, memory that returns to its place, other attention packages."""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.checks import Check


def check_machinery(device: torch.device) -> Iterator[Check]:
    """On a random checkpoint, in bf16 on a GPU; on the CPU the same steps run without capture."""
    from engine import LLM
    from tests.engine.checkpoints import write_vl_checkpoint

    with tempfile.TemporaryDirectory() as directory:
        path = write_vl_checkpoint(Path(directory), tie=True, seed=7)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        options: dict[str, Any] = {"dtype": dtype, "device": device, "kv_cache_bytes": 1 << 26}
        eager = LLM(path, enforce_eager=True, **options)
        graphs = LLM(path, **options)
        if device.type != "cuda":
            graphs.runner.use_graphs(graphs.scheduler.max_num_seqs, capture=False)
        yield from _check_graphs(graphs, eager)
        yield from _check_sleep(graphs, eager)
        del eager, graphs
        yield from _check_backends(path, options | {"block_size": 256})


def _tree(llm: Any, seed: int) -> list[tuple[list[int], list[float]]]:
    """Forks of forks, of batch sizes that are not those of graphs; tokens and log-probs of all."""
    from engine import SamplingParams

    rng = random.Random(seed)
    llm.reset_prefix_cache()  # what is found there was not computed in a batch of the same size
    out = []
    with llm.open([rng.randrange(7, 260) for _ in range(600)]) as root:
        llm.prefill([root])
        nodes = root.fork(3)
        for width in (1, 2, 3):
            params = [
                SamplingParams(max_tokens=rng.randint(5, 20), seed=rng.randrange(99), top_p=0.9, ignore_eos=True)
                for _ in nodes
            ]
            out += [(output.token_ids, output.logprobs) for output in llm.run(nodes, params)]
            children = [child for node in nodes for child in node.fork(width, at=len(node) - 2)]
            for node in nodes:
                node.close()
            nodes = children
        for node in nodes:
            node.close()
    return out


def _differ(actual: list, expected: list, exact: bool) -> str:
    """ "" or what differs. Not `exact`: products of other shapes may round differently, and then tokens part ways."""
    for run, ((tokens, logprobs), (others, theirs)) in enumerate(zip(actual, expected, strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), len(tokens))
        error = max((abs(a - b) for a, b in zip(logprobs[:same], theirs[:same], strict=True)), default=0.0)
        if (tokens, logprobs) != (others, theirs) if exact else same < min(3, len(tokens)) or error > 0.1:
            return f"run {run}: {same} of {len(tokens)} tokens alike, log-probs up to {error:.1e} off"
    return ""


def _check_graphs(graphs: Any, eager: Any) -> Iterator[Check]:
    for seed in (1, 2):
        first, again = _tree(graphs, seed), _tree(graphs, seed)
        wrong = _differ(again, first, exact=True) or _differ(first, _tree(eager, seed), exact=False)
        yield Check(f"engine, graphs, tree {seed}", not wrong, wrong or "as without graphs; twice the same bits")
        graphs.attention.share_prefixes = False  # of the plans to come; the graphs are the same
        wrong = _differ(_tree(graphs, seed), first, exact=True)
        graphs.attention.share_prefixes = True
        yield Check(f"engine, unshared, tree {seed}", not wrong, wrong or "the same bits as shared")
    sizes = graphs.runner.graphs.captured
    capture = graphs.runner.graphs.capture
    yield Check("engine, graphs captured", bool(sizes) == capture, f"batch sizes {sizes}")
    noise = {
        name: p + 0.05 * torch.randn_like(p) * p.std() for name, p in graphs.model.named_parameters() if p.dim() > 1
    }
    for llm in (graphs, eager):
        llm.update_weights(noise)
    wrong = _differ(_tree(graphs, 3), _tree(eager, 3), exact=False)
    wrong = wrong or ("" if set(sizes) <= set(graphs.runner.graphs.captured) else "graphs were captured again")
    yield Check("engine, graphs after new weights", not wrong, wrong or "as without graphs, which are the same")


def _check_sleep(graphs: Any, eager: Any) -> Iterator[Check]:
    device = graphs.device
    state = {name: p.cpu().clone() for name, p in graphs.model.named_parameters()}
    before = [p.data_ptr() for p in graphs.model.parameters()] + [graphs.kv.data.data_ptr()]
    expected = _tree(graphs, 4)
    held = graphs.stats()["kv_bytes"] + graphs.stats()["weight_bytes"]
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    graphs.sleep(level=2)
    given = torch.cuda.mem_get_info(device)[0] - free if device.type == "cuda" else held
    graphs.wake_up()
    graphs.update_weights(state)
    after = [p.data_ptr() for p in graphs.model.parameters()] + [graphs.kv.data.data_ptr()]
    wrong = _differ(_tree(graphs, 4), expected, exact=True)
    ok = not wrong and before == after and given >= 0.9 * held
    found = f"{given / 1e6:.0f} of {held / 1e6:.0f} MB given back, addresses {'kept' if before == after else 'moved'}"
    yield Check("engine, sleep level 2 and wake", ok, wrong or found)


def _check_backends(path: Path, options: dict[str, Any]) -> Iterator[Check]:
    from engine import LLM
    from engine.attention import BACKENDS

    reference = LLM(path, attention="sdpa", **options)
    expected = _tree(reference, 5)
    for name, backend in BACKENDS.items():
        reason = backend.why_not(reference.attention.target)
        if reason is not None:
            yield Check(f"engine, attention {name}", True, f"not checked: {reason}")
        elif name != "sdpa":
            wrong = _differ(_tree(LLM(path, attention=name, **options), 5), expected, exact=False)
            yield Check(f"engine, attention {name}", not wrong, wrong or "as sdpa")
