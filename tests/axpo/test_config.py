"""Configuration and command line: precedence, round trips, and one clear line for every mistake."""

import random
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_origin

import pytest
from pydantic import ValidationError

from axpo.cli import ConfigError, leaf_fields, load_config, read_recipe, recipe_names, resolve
from axpo.config import Config, PipelineConfig, SftConfig, to_toml
from axpo.pipeline import stages


def config(*argv: str) -> Config:
    return resolve(Config, argv, recipe="mini")


def mistake(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        config(*argv)
    return str(error.value)


def test_paper_defaults():
    c = Config()
    assert (c.algo.name, c.algo.group_size, c.algo.resamples_per_prefix, c.algo.budget_ratio) == ("axpo", 8, 4, 0.25)
    assert (c.algo.rank, c.algo.question_order, c.algo.prefix_reward) == ("confidence", "rank", "original")
    assert (c.loss.clip_low, c.loss.clip_high, c.loss.kl_coef, c.loss.aggregation) == (0.2, 0.4, 1e-3, "token")
    assert (c.rollout.temperature, c.rollout.top_p, c.rollout.top_k, c.rollout.max_turns) == (1.0, 1.0, 0, 3)
    assert (c.rollout.questions_per_step, c.optim.lr, c.optim.grad_clip, c.optim.schedule) == (
        64,
        1e-6,
        1.0,
        "constant",
    )
    assert (c.eval.temperature, c.eval.top_p, c.eval.top_k, c.eval.max_turns, c.eval.samples) == (0.7, 0.8, 20, 5, 4)


def test_every_field_is_described():
    for schema in (Config, SftConfig):
        for name, info in leaf_fields(schema):
            assert info.description, name
            assert info.annotation in (int, float, str, bool) or get_origin(info.annotation) is not None, name


def test_options_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[run]\nsteps = 7\nname = "mine"\n[algo]\nrank = "random"\n')
    c = config(str(recipe), "--run.steps", "9")
    assert (c.run.steps, c.run.name, c.algo.rank, c.algo.group_size) == (9, "mine", "random", 8)
    assert config(str(recipe), "--run.steps=9", "--run.steps", "11").run.steps == 11


def test_recipes_compose_in_their_order(tmp_path: Path):
    (tmp_path / "base.toml").write_text('[run]\nname = "base"\nsteps = 3\n[algo]\ngroup_size = 4\nrank = "random"\n')
    mine = tmp_path / "mine.toml"
    mine.write_text('recipes = ["mini", "base.toml"]\n[algo]\nrank = "entropy"\n')
    c = config(str(mine))
    assert (c.run.name, c.run.steps, c.algo.group_size, c.algo.rank) == ("base", 3, 4, "entropy")
    assert c.rollout == config("mini").rollout, "a path is relative to the file, a name is an embedded recipe"
    assert config(str(mine), "random-rank").algo.rank == "random"
    assert config("random-rank", str(mine)).algo.rank == "entropy"
    assert config("mini", str(tmp_path / "base.toml"), "--algo.rank", "confidence").algo.rank == "confidence"


def test_several_recipes_name_the_run_unless_something_else_does(tmp_path: Path):
    assert config("mini", "cispo").run.name == "mini-cispo"
    assert config("mini", "cispo", "--run.name", "x").run.name == "x"
    assert config("cispo", "mini").run.name == "mini-axpo", "the last one has a name of its own"
    assert config("mini-grpo").run.name == "mini-grpo"
    (tmp_path / "a b.toml").write_text("[run]\nsteps = 3\n")
    assert "recipes mini " in mistake("mini", str(tmp_path / "a b.toml")) and "run.name = 'mini-a b'" in mistake(
        "mini", str(tmp_path / "a b.toml")
    )


def test_a_resolved_configuration_stands_alone(tmp_path: Path):
    c = config("mini", "arpo", "--run.seed", "3")
    (tmp_path / "config.toml").write_text(to_toml(c))
    assert "recipes" not in tomllib.loads((tmp_path / "config.toml").read_text())
    assert config(str(tmp_path / "config.toml")) == c


def test_mistakes_among_several_recipes_name_the_file_that_made_them(tmp_path: Path):
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text("[algo]\ngroup_size = 1\nrnak = 2\n")
    other.write_text('recipes = ["one.toml"]\n[loss]\nclip_low = 2\n[algo]\ntrigger = "no_tool"\n')
    lines = mistake("mini", str(other)).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"recipe {one}", f"recipe {one}", f"recipe {other}"]
    one.write_text('[algo]\nfork_at = "call"\n')
    other.write_text('recipes = ["one.toml"]\n[algo]\ntrigger = "no_tool"\n')
    assert mistake("mini", str(other)).startswith(f"recipe {one}: algo.fork_at = 'call': algo.trigger 'no_tool'")
    one.write_text('recipes = ["other.toml"]\n')
    assert "lead back to" in mistake(str(other))
    other.write_text('recipes = "mini"\n')
    assert f"recipe {other}: recipes = 'mini': must be a list" in mistake(str(other))
    other.write_text('recipes = ["mnii"]\n')
    assert "recipe 'mnii': no such file or recipe; did you mean mini?" in mistake(str(other))
    one.write_text("run = 3\n")
    assert "run = 3: must be a table" in mistake(str(one), "mini-grpo") + mistake("mini-grpo", str(one))


def test_no_reinforcement_learning_is_no_step_and_fine_tuning_has_one():
    assert config("mini", "no-rl").run.steps == 0
    with pytest.raises(ConfigError, match=r"run\.steps = 0: fine-tuning takes 1 or more"):
        resolve(SftConfig, ["mini-sft", "--run.steps", "0"], recipe="mini-sft")


def test_values_from_the_command_line():
    c = config("--run.resume", "mini", "--rollout.tools", "a, b", "--optim.betas", "[0.5, 0.25]", "--optim.lr", "3e-5")
    assert (c.run.resume, c.rollout.tools, c.optim.betas, c.optim.lr) == (True, ["a", "b"], (0.5, 0.25), 3e-5)
    assert config("--run.resume", "--log.console", "false").run.resume
    assert not config("--run.resume", "false").run.resume
    assert config("--rollout.tools", "[]").rollout.tools == []


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--algo.grop_size", "4"], ["algo.grop_size", "unknown field", "did you mean algo.group_size?"]),
        (["--group_size", "4"], ["--group_size", "did you mean algo.group_size?"]),
        (["--algo.group-size", "4"], ["did you mean algo.group_size?"]),
        (["-x"], ["-x", "unknown field"]),
        (["--algo.group_size", "1"], ["algo.group_size", "'1'", "greater than or equal to 2"]),
        (["--algo.resamples_per_prefix", "1"], ["algo.resamples_per_prefix", "'1'", "greater than or equal to 2"]),
        (["--algo.budget_ratio", "-0.25"], ["algo.budget_ratio", "'-0.25'", "greater than or equal to 0"]),
        (["--loss.clip_low", "-1e-3"], ["loss.clip_low", "'-1e-3'", "greater than 0"]),
        (["--algo.name", "axop"], ["algo.name", "'axop'", "'grpo' or 'axpo'", "did you mean axpo?"]),
        (["--run.steps", "3.5"], ["run.steps", "'3.5'", "integer"]),
        (["--run.steps"], ["run.steps", "needs a value"]),
        (["--optim.lr", "nan"], ["optim.lr", "'nan'", "finite"]),
        (["--optim.betas", "0.9"], ["optim.betas", "2 values"]),
        (["--optim.betas", "0.9,1.5"], ["optim.betas", "'1.5'", "less than 1"]),
        (["--rollout.tools", "[1"], ["rollout.tools", "'[1'", "list"]),
        (["--log.console", "maybe"], ["log.console", "'maybe'", "boolean"]),
        (["--run.name", "../other"], ["run.name", "'../other'", "letters, digits, . _ and -"]),
        (["--run.time_limit", "1h"], ["run.time_limit", "'1h'", "minutes, or H:MM:SS"]),
        (["--rollout.top_p", "0.9"], ["rollout.top_p = 0.9", "biases", "1.0"]),
        (["--rollout.top_k", "5"], ["rollout.top_k = 5", "biases", "0"]),
        (
            ["--rollout.max_new_tokens=99", "--rollout.max_tokens=99"],
            ["rollout.max_new_tokens = 99", "max_tokens = 99"],
        ),
        (["--data.task", "jsonl"], ["data.path", "needs a file"]),
        (["--data.path", "rows.jsonl"], ["data.path = 'rows.jsonl'", "data.task"]),
        (["--data.task", "jsonl", "--data.path", "x"], ["data.heldout_path", "eval.questions"]),
        (["--loss.objective", "ppo"], ["loss.objective", "'ppo'", "'clip', 'gspo' or 'cispo'"]),
        (["--loss.objective", "gspo"], ["loss.aggregation = 'token'", "'gspo'", "set it to 'sequence'"]),
        (["--loss.clip_low", "1.5"], ["loss.clip_low", "'1.5'", "less than or equal to 1"]),
        (["--loss.aggregation", "mean"], ["loss.aggregation", "'mean'", "'constant'"]),
        (["--loss.kl_estimator", "k4"], ["loss.kl_estimator", "'k4'", "'k3'"]),
        (["--loss.entropy_coef", "11"], ["loss.entropy_coef", "'11'", "less than or equal to 10"]),
        (["--loss.tis", "on"], ["loss.tis", "'on'", "'token_truncate'"]),
        (["--loss.tis_cap", "1"], ["loss.tis_cap", "'1'", "greater than 1"]),
        (["--algo.advantage_scale", "std"], ["algo.advantage_scale", "'std'", "'batch'"]),
        (["--algo.overlong_buffer", "97"], ["algo.overlong_buffer = 97", "rollout.max_new_tokens = 96"]),
        (["--algo.overlong_buffer", "-1"], ["algo.overlong_buffer", "'-1'", "greater than or equal to 0"]),
        (["--algo.overlong_penalty", "0"], ["algo.overlong_penalty", "'0'", "greater than 0"]),
        (["--algo.drop_equal_groups", "all"], ["algo.drop_equal_groups", "'all'", "boolean"]),
        (["--train.updates_per_batch", "0"], ["train.updates_per_batch", "'0'", "greater than or equal to 1"]),
        (["--train.minibatches", "2"], ["train.updates_per_batch = 1", "train.minibatches = 2", "set it to 2"]),
        (
            ["--train.minibatches", "3", "--train.updates_per_batch", "3"],
            ["train.minibatches = 3", "rollout.questions_per_step = 64"],
        ),
        (["mni"], ["recipe 'mni'", "did you mean mini?", "mini-grpo"]),
        (["none/such.toml"], ["recipe 'none/such.toml'", "no such file"]),
        ([f"{__file__}/x.toml"], ["test_config.py/x.toml'", "cannot be read: Not a directory"]),
        ([str(Path(__file__).parent)], ["tests/axpo'", "cannot be read: Is a directory"]),
        (["m" * 300], ["recipe 'mmm", "cannot be read: File name too long"]),
        (["mini", "grop"], ["recipe 'grop'", "did you mean grpo?"]),
        (["mini", "--algo.trigger", "no_tool"], ["algo.fork_at = 'call'", "'no_tool'", "'answer' or 'prompt'"]),
        (["--algo.rank", "entropy_rise"], ["--algo.rank = 'entropy_rise'", "algo.fork_at is 'call'", "'observation'"]),
        (["arpo", "--algo.merge_continuations=false"], ["algo.prefix_reward = 'mean'", "algo.merge_continuations"]),
        (["--algo.mask_recovered_suffix=false"], ["algo.mask_recovered_suffix", "algo.mask_failed_suffix to false"]),
        (["--algo.entropy_window", "0"], ["algo.entropy_window", "'0'", "greater than or equal to 1"]),
        (["mini-sft"], ["recipe mini-sft", "sft: unknown field"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(argv: list[str], parts: list[str]):
    message = mistake(*argv)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_mistakes_in_a_recipe_name_the_recipe_and_all_come_at_once(tmp_path: Path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("steps = 3\n[algo]\ngroupsize = 4\n[rollouts]\ntop_k = 0\n[loss]\nclip_low = 2\n")
    lines = mistake(str(recipe)).splitlines()
    assert len(lines) == 4 and all(str(recipe) in line for line in lines), lines
    for part in ("run.steps?", "algo.group_size?", "did you mean rollout?", "loss.clip_low = 2"):
        assert sum(part in line for line in lines) == 1, (part, lines)
    recipe.write_text("run = 3\n")
    assert "run = 3: must be a table" in mistake(str(recipe), "--run.steps", "2")
    recipe.write_text("[run\n")
    assert "not valid TOML" in mistake(str(recipe))


def test_toml_reads_back_as_the_same_configuration(tmp_path: Path):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    argv = [
        f"--run.seed={rng.randrange(2**32)}",
        f"--optim.lr={rng.uniform(1e-9, 1e-2)}",
        f"--algo.rank={rng.choice(['entropy', 'random'])}",
        f"--optim.betas={rng.random()},{rng.random()}",
        f"--algo.std_eps={rng.random()}",
    ]
    c = config("--run.resume", *argv)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(c))
    assert not tomllib.loads(path.read_text())["run"]["resume"]
    assert config(str(path), "--run.resume") == c, f"seed {seed}: {argv}"


def test_embedded_recipes_are_valid():
    assert {"mini", "mini-grpo", "mini-sft"} <= set(recipe_names())
    for name in recipe_names():
        sections = read_recipe(name)
        if "pipeline" in sections:
            assert stages(resolve(PipelineConfig, [name], recipe=name).pipeline)
        else:
            schema = SftConfig if "sft" in sections else Config
            assert resolve(schema, [name], recipe=name).run.name
    mini, grpo = config("mini"), config("mini-grpo")
    assert grpo.algo.name == "grpo" and grpo.algo.resampling_ratio == 0 < mini.algo.resampling_ratio
    differing = {s for s in Config.model_fields if getattr(mini, s) != getattr(grpo, s)}
    assert differing == {"run", "algo"}, "the baseline must differ in nothing but its name and the algorithm"


def test_fine_tuning_makes_one_update_a_step():
    with pytest.raises(ConfigError, match=r"train\.updates_per_batch = 2: axpo\.sft makes one update"):
        resolve(SftConfig, ["--train.updates_per_batch", "2"], recipe="mini-sft")


def test_published_objectives_are_a_few_fields():
    """The table of docs/objectives.md."""
    for argv in (
        ["--algo.advantage_scale=none", "--loss.aggregation=constant"],
        ["--loss.clip_high=0.28", "--loss.kl_coef=0", "--algo.drop_equal_groups", "--algo.overlong_buffer=24"],
        ["--loss.objective=gspo", "--loss.aggregation=sequence", "--loss.clip_low=3e-4", "--loss.clip_high=4e-4"],
        ["--loss.objective=cispo", "--loss.clip_low=1", "--loss.kl_coef=0"],
        ["--algo.advantage_scale=batch"],
    ):
        assert config(*argv) != config(), argv
    default = Config()
    assert (default.loss.objective, default.loss.tis, default.loss.kl_estimator) == ("clip", "off", "k3")
    assert (default.train.updates_per_batch, default.train.minibatches) == (1, 1)
    assert (default.algo.advantage_scale, default.algo.drop_equal_groups, default.algo.overlong_buffer) == (
        "group",
        False,
        0,
    )


def test_a_kept_configuration_replays_nothing_by_itself():
    kept = to_toml(config("--debug.replay", "runs/x/debug/step_000001"))
    assert tomllib.loads(kept)["debug"]["replay"] == ""


def test_configuration_cannot_be_changed_later():
    with pytest.raises(ValidationError, match="frozen"):
        Config().run.steps = 3  # type: ignore[misc]


def test_exit_code_and_printed_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(SystemExit) as stop:
        load_config(Config, ["--algo.grop_size", "3"], prog="axpo.train", recipe="mini")
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.startswith("axpo.train: error: --algo.grop_size: unknown field") and printed.err.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        load_config(Config, ["--algo.grop_size", "3"], prog="axpo.train", recipe="mini")
    assert not capsys.readouterr().err, "only rank 0 reports"


def test_help_lists_every_field_with_its_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        load_config(Config, ["--help"], prog="axpo.train", recipe="mini")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, _ in leaf_fields(Config):
        assert f"--{name} " in text, name
    assert "rollouts N of a question (default: 8)" in text
    assert text.count("(default: ") == len(list(leaf_fields(Config))) + 1, "the fields and the recipe"


def test_nothing_heavy_is_imported_to_check_a_configuration():
    code = (
        "import sys, axpo.cli, axpo.config, axpo.rundir\n"
        "axpo.cli.resolve(axpo.config.Config, [], recipe='mini')\n"
        "print([m for m in ('torch', 'transformers', 'engine', 'kernels') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("size", ["2b", "4b", "8b"])
def test_recipes_of_the_paper(size: str):
    sft = resolve(SftConfig, [f"qwen3-vl-{size}-sft"], recipe="mini-sft")
    axpo, grpo = config(f"qwen3-vl-{size}"), config(f"qwen3-vl-{size}-grpo")
    assert sft.model.path == f"Qwen/Qwen3-VL-{size.upper()}-Thinking" and sft.run.name == f"qwen3-vl-{size}-sft"
    assert axpo.model.path == f"runs/{sft.run.name}/policy", "reinforcement learning goes on from the fine-tuned policy"
    assert {c.model.dtype for c in (sft, axpo)} == {"bfloat16"}
    assert (axpo.algo, axpo.loss, axpo.optim) == (Config().algo, Config().loss, Config().optim), "the paper's defaults"
    assert (axpo.rollout.temperature, axpo.rollout.max_turns, axpo.rollout.questions_per_step) == (1.0, 3, 64)
    assert axpo.eval.model_dump(exclude={"every"}) == Config().eval.model_dump(exclude={"every"})
    assert sft.run.steps * sft.sft.batch_size == pytest.approx(64_274, abs=sft.sft.batch_size)
    differing = {s for s in Config.model_fields if getattr(axpo, s) != getattr(grpo, s)}
    assert differing == {"run", "algo"} and grpo.algo.name == "grpo"
