"""The fork benchmark: what it reports of a tiny model and of mini, and that every system says the same."""

import json
import random

import pytest
import torch
from safetensors import safe_open

from bench import fork_report, fork_throughput, fork_vllm
from bench.fork_models import MINI, TextShape, random_prefix, write_random
from bench.fork_workload import BLOCK, Branches, Floors, Workload
from engine import LLM
from engine.models import ModelConfig

TINY = TextShape(hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=331, tied=True)
FIELDS = {"system", "prefix", "forks", "new_tokens", "fork_to_first_token_s", "tokens_per_s"}
FIELDS |= {"bytes_copied_per_fork", "kv_bytes"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_random(path, TINY, head_dim=32)
    return path


def report(tmp_path, *options):
    file = tmp_path / "report.json"
    status = fork_throughput.main([*options, "--device", "cpu", "--json", str(file)])
    return status, json.loads(file.read_text())


def test_every_system_says_the_same_and_only_tails_are_copied(tiny, tmp_path, capsys):
    prefix, forks, new_tokens = random.randint(20, 70), random.randint(2, 4), random.randint(6, 14)
    sizes = f"--prefix {prefix} --forks {forks} --new-tokens {new_tokens} --grid 24x1,3".split()
    peers = ["--peers", "unshared,re-prefill,generate,continuous"]
    status, data = report(tmp_path, "--model", str(tiny), "--dtype", "float32", *sizes, *peers)
    printed = capsys.readouterr().out
    rows = {row["system"]: row for row in data["rows"]}
    assert status == 0, printed
    assert list(rows) == [
        "axpo",
        "axpo, attention unshared",
        "axpo, re-prefill",
        "transformers generate",
        "transformers continuous batching",
    ]
    for row in rows.values():
        assert set(row) >= FIELDS and not row["error"], row
        assert (row["prefix"], row["forks"], row["new_tokens"]) == (prefix, forks, new_tokens)
        assert row["equal_tokens"] == row["inside_equal_tokens"] == 1, (sizes, row)
        assert row["complete"] and row["inside_complete"] and row["cpu_s"] > 0
        for mark in ("", "inside_"):
            first, rate = row[f"{mark}fork_to_first_token_s"], row[f"{mark}tokens_per_s"]
            tokens = forks * (new_tokens // 2 if mark else new_tokens)
            # The rate is of all tokens since the fork, so it has the time of the first ones in it.
            assert row[f"{mark}decode_tokens_per_s"] > 0 and tokens / rate > first > 0
            assert row[f"{mark}kv_bytes"] > 0 and row[f"{mark}first_token_share"] > 0
    token_bytes = 2 * TINY.layers * TINY.kv_heads * 32 * 4
    inside_at = Workload(random_prefix(tiny, prefix), forks, new_tokens).inside_at
    assert inside_at % BLOCK and prefix < inside_at <= prefix + new_tokens // 2
    for system in ("axpo", "axpo, attention unshared"):
        row = rows[system]
        # The tiny model is packed, and such blocks are copied whole.
        assert row["bytes_copied_per_fork"] == (prefix % BLOCK > 0) * BLOCK * token_bytes
        assert row["inside_bytes_copied_per_fork"] == BLOCK * token_bytes
        assert row["inside_copied_share"] == inside_at % BLOCK / BLOCK
        assert row["recomputed_per_fork"] == 0 and 0 < row["fork_us"] < 10_000
        shared, whole = prefix // BLOCK, -(-(prefix + new_tokens - 1) // BLOCK)
        # The parent still holds its partial block; the last sampled token has no KV yet.
        held = shared + forks * (whole - shared) + (prefix % BLOCK > 0)
        assert row["kv_bytes"] == held * BLOCK * token_bytes
        assert row["kv_share"] == (prefix + forks * (new_tokens - 1)) / (held * BLOCK)
        assert (
            row["inside_kv_share"] == (inside_at + forks * (new_tokens // 2)) * token_bytes / row["inside_kv_bytes"] < 1
        )
    generate = rows["transformers generate"]
    assert generate["kv_share"] == (prefix + forks * (new_tokens - 1)) / (forks * (prefix + new_tokens - 1))
    assert generate["copied_share"] is None
    assert rows["axpo, re-prefill"]["recomputed_per_fork"] == prefix
    assert data["floors"]["copy_bytes_per_s"] > 0 and data["machine"]["threads"] == torch.get_num_threads()
    assert data["versions"]["torch"] == torch.__version__
    assert {(row["prefix"], row["forks"]) for row in data["grid"]} == {(24, 1), (24, 3)}
    for text in ("Forks at the prefix's end", "Forks inside", "Where sharing", *rows):
        assert text in printed


def test_mini_sees_an_image_and_its_context_is_kept(tmp_path, capsys):
    sizes = ["--prefix", "5000", "--forks", "2", "--new-tokens", "8"]
    status, data = report(tmp_path, *sizes, "--peers", "generate,continuous")
    err = capsys.readouterr().err
    assert status == 0
    ours, generate, continuous = data["rows"]
    assert ours["prefix"] == 1024 - 8 - 1 and data["notes"] and data["notes"][0] in err
    assert ours["inside_equal_tokens"] == generate["inside_equal_tokens"] == 1
    assert continuous["error"] == "takes no images" and continuous["tokens_per_s"] is None
    prefix = random_prefix(MINI, 90)
    assert len(prefix) == 90 and len(prefix.images) == 1
    assert prefix.token_ids.count(ModelConfig.from_pretrained(MINI).image_token_id) == prefix.images[0].num_tokens


def test_what_is_missing_is_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fork_vllm, "ENVIRONMENT", tmp_path / "nowhere")
    options = ["--prefix", "17", "--forks", "2", "--new-tokens", "4", "--peers", "vllm"]
    status, data = report(tmp_path, "--model", str(tiny), *options)
    assert status == 0
    assert [row["system"] for row in data["rows"]] == ["axpo", "vllm, eager", "vllm, compiled"]
    assert all("--setup-peers" in row["error"] for row in data["rows"][1:])
    assert capsys.readouterr().out.count("--setup-peers") >= 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--peers sglang", "generate"),
        ("--new-tokens 3", "at least 4"),
        ("--grid 4096", "128,2048x1,16"),
        ("--grid 16,0x1", "--grid 16,0x1: write prefixes x forks, each at least 1"),
        ("--temperature -1", "--temperature and --seed are at least 0"),
        ("--temperature nan", "--temperature and --seed are at least 0"),
        ("--seed -1", "--temperature and --seed are at least 0"),
        ("--limit-s 0", "--limit-s is above 0"),
        ("--device meta", "--device meta: there is cpu"),
        ("--plot here.svg", "ends in .png"),
    ],
)
def test_a_bad_argument_is_one_message(options, said, capsys):
    with pytest.raises(SystemExit) as error:
        fork_throughput.arguments(options.split())
    assert error.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--json {folder}", "cannot be written"),
        ("--json /proc/nothing/report.json", "/proc/nothing"),
        ("--json {folder}/a.json --plot {folder}/taken.png", "taken.png: cannot be written"),
        ("--json {folder}/a.json --new-tokens 2000", "--new-tokens 2000: the context of mini has room for 1022"),
        ("--json {folder}/a.json --prefix 5", "--prefix 5: the image alone takes"),
        ("--json {folder}/a.json --prefix 50 --grid 40,5x1", "--prefix 5: the image alone takes"),
        ("--json {folder}/a.json --model nowhere", "--model nowhere: neither"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(options, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken.png").mkdir()
    monkeypatch.setattr(Floors, "measure", lambda *_: pytest.fail("it measures"))
    assert fork_throughput.main(options.format(folder=tmp_path).split()) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_written_checkpoint_is_whole_and_the_same_again(tiny, tmp_path):
    again = tmp_path / "again"
    write_random(again, TINY, head_dim=32)
    assert (again / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    with safe_open(again / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.1.mlp.down_proj.weight")
        assert weight.dtype == torch.bfloat16 and weight.shape == (64, 96)
        assert abs(weight.float().std() * 96**0.5 - 1) < 0.1
        assert (file.get_tensor("model.norm.weight") == 1).all()
    LLM(again, kv_cache_bytes=1 << 20)  # every tensor there, none too many


def test_rates_are_of_the_whole_workload_and_of_decoding():
    branches = Branches(first_token_s=2.0, decode_s=3.0, decode_tokens=12, outputs=[[1] * 7, [2] * 7])
    assert branches.tokens_per_s == 14 / 5 and branches.decode_tokens_per_s == 4


def test_floors_and_shares():
    floors = Floors(1e9, 1e12, 10**9, 10**8, 1000, 100, 2)
    assert floors.step(1, 0, 0) == pytest.approx(2.2)  # reads 1.1e9 bf16 weights
    assert floors.step(10_000, 0, 0) == pytest.approx(22)  # and then multiplies longer than it reads
    assert floors.step(4, 10**6, 10**6) - floors.step(4, 10**6, 0) == pytest.approx(4.0)  # own KV counts once a branch
    assert floors.copy(5e8) == 1.0
    assert fork_report.equal_share([[1, 2], [3]], [[1, 5], [3, 4]]) == pytest.approx(2 / 3)
    row = {"prefix": 64, "forks": 4, "fork_to_first_token_s": 0.1, "decode_tokens_per_s": 50.0, "system": "a"}
    others = [
        {**row, "system": "b", "decode_tokens_per_s": 100.0},
        {**row, "system": "c", "fork_to_first_token_s": 2.0},
    ]
    text = fork_report.render_grid([row, *others], "a", "b", "c")
    assert "loses" in text and "0.50x" in text and "20.00x" in text
