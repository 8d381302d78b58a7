"""Checkpoints: resume is bit for bit, damage is named, what was there before survives."""

import random
import resource
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from axpo import checkpoint
from axpo.checkpoint import Checkpointer, export_policy, latest, load_checkpoint, save_checkpoint
from axpo.checkpoint_record import CheckpointError, Progress, Record
from axpo.learner import Learner
from engine.models import ModelConfig, Qwen3VL
from engine.weights import load_weights
from tests.axpo.factory import write_checkpoint
from tests.axpo.learner_worker import batches, build_learner


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("policy") / "untied", tie=False)


@pytest.fixture(scope="module")
def saved(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint; tests that damage it copy it first."""
    learner = build_learner(policy)
    learner.step(batches(0))
    return save_checkpoint(tmp_path_factory.mktemp("saved"), learner, Progress(1, 5), keep=1)


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.full_tensor().clone() for name, p in learner.model.named_parameters()}  # pyright: ignore[reportAttributeAccessIssue]


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(1).item()  # noqa: NPY002


def test_resume_is_bit_for_bit(policy: Path, tmp_path: Path):
    learner = build_learner(policy)
    learner.step(batches(0))
    directory = save_checkpoint(tmp_path, learner, Progress(1, 5), keep=2)
    expected = [learner.step(batches(1)), learner.step(batches(2)), draws()]
    final = weights(learner)
    resumed = build_learner(policy)
    address = [p.to_local().data_ptr() for p in resumed.model.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    assert load_checkpoint(directory, resumed) == Progress(1, 5)
    assert [resumed.step(batches(1)), resumed.step(batches(2)), draws()] == expected
    assert all(torch.equal(final[name], weight) for name, weight in weights(resumed).items())
    assert [p.to_local().data_ptr() for p in resumed.model.parameters()] == address, "an engine may share this storage"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_newest_are_kept_and_leftovers_do_not_count(policy: Path, tmp_path: Path):
    learner = build_learner(policy)
    assert latest(tmp_path / "nothing") is None
    learner.step(batches(0))
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, learner, Progress(step, step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000010"]
    (tmp_path / ".tmp-step_000011").mkdir()
    (tmp_path / ".old-step_000002").mkdir()
    (tmp_path / "step_000012").mkdir()
    (tmp_path / "step_000003-copy").mkdir()
    assert latest(tmp_path) == tmp_path / "step_000010"
    save_checkpoint(tmp_path, learner, Progress(11, 11), keep=2)
    kept = ["step_000003-copy", "step_000010", "step_000011"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept, "what is not whole goes with the old ones"


def test_training_goes_on_while_a_checkpoint_is_written(policy: Path, tmp_path: Path, monkeypatch):
    """The write is held until another update is made; what it holds is the state of before."""
    learner = build_learner(policy)
    learner.step(batches(0))
    before = weights(learner)
    go_on = threading.Event()
    prepare = checkpoint._prepare
    monkeypatch.setattr(checkpoint, "_prepare", lambda path: (go_on.wait(60), prepare(path)))
    checkpoints = Checkpointer(tmp_path, keep=1)
    path = checkpoints.save(learner, Progress(1, 5))
    expected = [learner.step(batches(1)), draws()]
    assert not path.exists()
    go_on.set()
    checkpoints.wait()
    resumed = build_learner(policy)
    assert load_checkpoint(path, resumed) == Progress(1, 5)
    assert all(torch.equal(before[name], weight) for name, weight in weights(resumed).items())
    assert [resumed.step(batches(1)), draws()] == expected


@pytest.mark.parametrize(("asynchronous", "largest"), [(True, 20_000), (False, 10)])
def test_a_save_that_fails_leaves_the_last_checkpoint(
    policy: Path, saved: Path, tmp_path: Path, asynchronous: bool, largest: int
):
    """The file system refuses to let files grow, as a full one does: the shard, or only the state.json behind it."""
    directory = tmp_path / saved.name
    copy(saved, directory)
    learner = build_learner(policy)
    learner.step(batches(0))

    checkpoints = Checkpointer(tmp_path, keep=1, asynchronous=asynchronous)
    message = r"step_000002 could not be written: rank 0.*File too large.*MiB are free.*--run\.resume"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(learner, Progress(2, 10))
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not checkpoints.failed, "it is told once"
    assert [path.name for path in tmp_path.iterdir()] == [saved.name], "and takes no room"
    assert latest(tmp_path) == directory
    assert load_checkpoint(directory, learner).step == 1


def test_a_checkpoint_of_another_architecture_is_refused(saved: Path, tmp_path: Path):
    other = build_learner(write_checkpoint(tmp_path / "tied", tie=True))
    before = weights(other)
    message = (
        r"step_000001: checkpoint of another architecture: lm_head\.weight is \(48, 32\) in it and not there in the"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved, other)
    assert all(torch.equal(before[name], weight) for name, weight in weights(other).items())


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "{name}: missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-7]), r"{name}: truncated \(\d+ bytes of \d+\)"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), r"{name}: corrupt"),
        (lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]), "{name}: corrupt"),
    ],
)
def test_damage_is_named(policy: Path, saved: Path, tmp_path: Path, damage, message: str):
    learner = build_learner(policy)
    before = weights(learner)
    names = [file.name for file in saved.iterdir() if file.name != "state.json"]
    assert {".metadata", "rng_rank0.pt"} < set(names)
    for name in names:
        broken = tmp_path / name.replace(".", "_")
        copy(saved, broken)
        damage(broken / name)
        with pytest.raises(ValueError, match=message.format(name=name)):
            load_checkpoint(broken, learner)
    assert all(torch.equal(before[name], weight) for name, weight in weights(learner).items())


def test_the_state_file(policy: Path, saved: Path, tmp_path: Path):
    learner = build_learner(policy)
    copy(saved, tmp_path / "a")
    for wrong in ("{", "[]", "{}", '{"config_hash": ""}'):
        (tmp_path / "a" / "state.json").write_text(wrong)
        with pytest.raises(CheckpointError, match=r"state\.json: corrupt"):
            load_checkpoint(tmp_path / "a", learner)
    with pytest.raises(CheckpointError, match=r"state\.json: missing"):
        load_checkpoint(tmp_path / "b", learner)
    record = Record.read(saved)
    assert record.progress == Progress(1, 5) and record.world_size == 1 and record.updates == 1
    assert (
        Record(**{name: getattr(record, name) for name in Record.__slots__}).to_json()
        == (saved / "state.json").read_text()
    )


def test_export_reads_back(policy: Path, tmp_path: Path):
    learner = build_learner(policy)
    learner.step(batches(0))
    export_policy(learner, policy, tmp_path / "out")
    export_policy(learner, policy, tmp_path / "out")
    model = Qwen3VL(ModelConfig.from_pretrained(tmp_path / "out"))
    load_weights(model, tmp_path / "out")
    for name, weight in weights(learner).items():
        assert torch.equal(model.get_parameter(name), weight)
    export_policy(learner, policy, tmp_path / "half", dtype=torch.bfloat16)
    assert (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * (
        tmp_path / "out/model.safetensors"
    ).stat().st_size
