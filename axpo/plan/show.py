"""A plan as tables for people and as one flat JSON object for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from axpo.metrics import table
from axpo.plan import Plan

GIB, GB = 2**30, 1e9


def to_json(plan: Plan, measured: dict[str, float] | None) -> dict[str, Any]:
    """Bytes and seconds; parameters by part, memory by kind and phase, step by phase."""
    count, used, time, where = plan.parameters, plan.memory, plan.timing, plan.layout
    return {
        "device": plan.device.name,
        "ranks": where.ranks,
        "nodes": where.nodes,
        "replicas": where.replicas,
        "fits": plan.fits,
        "warnings": plan.warnings,
        "changes": dict(plan.changes),
        "parameters": {
            "embedding": count.embedding,
            "layers": count.layer * count.layers + count.norm,
            "vision": count.vision,
            "head": count.head,
            "total": count.total,
        },
        "memory_bytes": {item.kind: item.bytes for item in used.items},
        "memory_on_host": [item.kind for item in used.items if item.host],
        "memory_peak_bytes": {"rollout": used.peak("rollout"), "train": used.peak("train")},
        "memory_available_bytes": used.available,
        "host_bytes": used.host,
        "kv_tokens": plan.kv_tokens,
        "sequences": plan.sequences,
        "concurrency": time.concurrency,
        "communication_bytes": asdict(time.traffic),
        "step_s": {
            "rollout": time.rollout,
            "resample": time.resample,
            "train": time.train,
            "weights": time.weights,
            "step": time.step,
        },
        "measured_step_s": measured,
        "decode_bound": time.bound,
        "micro_batches": time.micro_batches,
        "train_mfu": plan.mfu,
        "workload": asdict(plan.load),
    }


def show(plan: Plan, recipe: str, measured: dict[str, float] | None) -> None:
    console = Console()
    where, count, used, time, load = plan.layout, plan.parameters, plan.memory, plan.timing, plan.load
    spread = f", {where.nodes} nodes" if where.nodes > 1 else ""
    copies = f", {where.replicas} replicas" if where.replicas > 1 else ""
    console.print(f"[bold]{recipe}[/bold] on {where.ranks} × {plan.device.name}{spread}{copies}\n")
    parts = {
        "embedding": count.embedding,
        f"{count.layers} layers": count.layer * count.layers + count.norm,
        "vision tower": count.vision,
        "LM head" if count.head else "LM head (the embedding)": count.head,
        "all": count.total,
    }
    console.print(table("Parameters", ["part", "millions"], [[n, f"{v / 1e6:,.1f}"] for n, v in parts.items()]))
    rows = [
        [
            item.kind + (" (host)" if item.host else ""),
            *(_gib(item.bytes) if phase in item.phases else "" for phase in ("rollout", "train")),
        ]
        for item in used.items
        if item.bytes
    ]
    rows.append(["needed", _gib(used.peak("rollout")), _gib(used.peak("train"))])
    rows.append(["left", *(_gib(used.available - used.peak(phase)) for phase in ("rollout", "train"))])
    console.print(table("Memory of a rank, GiB", ["kind", "rollout", "train"], rows))
    if where.has_engine:
        console.print(
            f"KV cache: {plan.kv_tokens:,} tokens, {plan.sequences:,} sequences of {load.sampled + load.observed:,.0f} "
            f"tokens behind shared prompts of {load.prompt:,.0f}; {time.concurrency:,} decode at once, bound by "
            f"{time.bound}\n"
        )
    sent = time.traffic
    rows = [
        ["all-gather in training", f"{sent.gather / GB:,.2f}"],
        ["reduce-scatter of gradients", f"{sent.reduce / GB:,.2f}"],
        ["weights to the engine", f"{sent.weights / GB:,.2f}"],
    ]
    across = where.nodes > 1 and where.shards > where.ranks_per_node
    title = f"Received by a rank in a step, GB ({'across nodes' if across else 'inside a node'})"
    console.print(table(title, ["", "GB"], rows))
    phases = {"rollout": time.rollout, "resample": time.resample, "train": time.train, "weights": time.weights}
    rows = [
        [name, f"{value:,.2f}", f"{value / time.step:.0%}", *([f"{measured[name]:,.2f}"] if measured else [])]
        for name, value in [*phases.items(), ("step", time.step)]
    ]
    console.print(table("Seconds of a step", ["phase", "s", "share", *(["measured"] if measured else [])], rows))
    console.print(
        f"{time.micro_batches} micro-batches a rank, MFU {plan.mfu:.0%}, {time.exposed_communication:.2f} s of "
        f"communication not hidden; {load.sampled_in_all / (time.rollout + time.resample or 1):,.0f} sampled tokens/s"
        if where.has_engine
        else f"{time.micro_batches} micro-batches a rank, MFU {plan.mfu:.0%}"
    )
    if measured:
        console.print(f"measured: {measured['cpu']:,.2f} s of processors a step")
    for warning in plan.warnings:
        console.print(f"[bold red]warning:[/bold red] {warning}")


def _gib(value: float) -> str:
    return f"{value / GIB:,.2f}" if value >= 0.005 * GIB else f"{value / GIB:,.4f}"
