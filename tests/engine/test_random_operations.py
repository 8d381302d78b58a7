"""Random operations on real engines: no leak, no double free, no write to a shared block, no token other than alone."""

from pathlib import Path

from tests.engine.random_operations import walk


def test_random_operations(vl_checkpoint: Path) -> None:
    """The seed is fixed, so that each kind occurs. A million of others: `python -m tests.engine.random_operations`."""
    counts = walk(4_000, 606, vl_checkpoint)
    verbs = (
        "sleep",
        "sleep of weights",
        "update",
        "prefill",
        "abort",
        "drop",
        "tokens streamed",
        "tokens sampled in bursts",
    )
    for name in ("preemptions", "blocks_copied", "images_encoded", *verbs):
        assert counts[name] > 0, f"no {name} in {counts}"
    assert counts["tokens verified"] > 700
    assert counts["near ties"] <= 2
