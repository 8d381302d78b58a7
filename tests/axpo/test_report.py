"""The report: one file that says what the run did, whatever the model wrote and whatever is missing."""

import html
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from axpo.advantage import assign_credit
from axpo.config import Config, to_toml
from axpo.diagnostics import rank_metrics, resample_metrics, rollout_metrics
from axpo.report import ReportError, write_report
from axpo.report.axis import number, percent, smoothed, thin
from axpo.report.charts import Line, line_chart
from axpo.report.evaluation import evaluation_rows
from axpo.resample import find_candidates, rank_correlation
from axpo.tasks import get_task
from axpo.trajectory import OBSERVATION, PROMPT, SAMPLED, ToolCall, Trajectory

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(2)>\ud800\x00" onload="x'
CALL_END = "\n</tool_call><|im_end|>"
RESPONSE = "\n<|im_start|>user\n<tool_response>\n{}\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n"
SEEN = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
ANSWER = "It shows {0}.\n</think>\n\n<answer>\\boxed{{{0}}}</answer><|im_end|>"


def rollout(
    rng: random.Random, step: int, group: int, index: int, tool: bool, right: bool, box: list[int], thought: str = ""
) -> Trajectory:
    """A rollout of mini/train/<group>; its tokens are arbitrary, its text and records as the agent loop writes them."""
    question = get_task("mini").question("train", group)
    thought = thought or f"Thinking of step {step}."
    given = question.answer if right else "wrong"
    text = f"{thought}\n"
    calls = []
    roles = [PROMPT] * 5 + [SAMPLED] * 6
    if tool:
        arguments = {"label": "tile", "bbox_2d": box}
        calls = [ToolCall("image_zoom_in", arguments, True, None, 0, 9, 15)]
        text += f'</think>\n\n<tool_call>\n{{"name": "image_zoom_in", "arguments": {json.dumps(arguments)}}}' + CALL_END
        text += RESPONSE.format(SEEN)
        roles += [SAMPLED] * 5 + [OBSERVATION] * 4
    text += ANSWER.format(given)
    roles += [SAMPLED] * 5
    drawn = [-rng.expovariate(2.0) if role == SAMPLED else None for role in roles]
    return Trajectory(
        step=step,
        question_id=question.id,
        group=group,
        id=f"{step}/{question.id}/{index}",
        parent=None,
        fork_token=None,
        prompt_len=5,
        tokens=list(range(len(roles))),
        roles=roles,
        loss_mask=[0] * len(roles),
        logprobs=drawn,
        entropies=[None if value is None else -value * rng.uniform(0.9, 1.1) for value in drawn],
        advantages=[0.0] * len(roles),
        reward=float(right),
        status="answered",
        tool_calls=calls,
        confidence=0.5 if tool else None,
        text=text,
    )


def resample(rng: random.Random, source: Trajectory, index: int, right: bool, box: list[int]) -> Trajectory:
    child = rollout(rng, source.step, source.group, 0, True, right, box, source.text.partition("\n</think>")[0])
    child.id, child.parent, child.fork_token = f"{source.id}/r{index}", source.id, 10
    child.tokens[:10] = source.tokens[:10]
    return child


def write_run(path: Path, steps: int = 4, seed: int = 0, algo: str = "axpo", thought: str = "") -> list[dict]:
    """Two questions a step: one whose only attempt with a tool fails and is resampled, one without a failure.

    Odd steps restore it (1 of 4 resamples right), even steps do not. Returns the metrics written.
    """
    rng = random.Random(seed)
    (path / "trajectories").mkdir(parents=True)
    (path / "evaluation").mkdir()
    config = Config.model_validate({"run": {"name": path.name, "steps": steps, "seed": 7}, "algo": {"name": algo}})
    (path / "config.toml").write_text(to_toml(config))
    logged = []
    for step in range(1, steps + 1):
        groups = [
            [rollout(rng, step, step, i, i == 0, i > 4, [100, 200, 400 + i, 600], thought) for i in range(8)],
            [rollout(rng, step, 50 + step, i, i < 2, True, [500, 500, 900, 900]) for i in range(8)],
        ]
        children = {}
        if algo == "axpo":
            source = groups[0][0]
            rights = [step % 2 == 1 and k == 2 for k in range(4)]
            children[source.id] = [resample(rng, source, k, r, [111 + k, 222, 555, 777]) for k, r in enumerate(rights)]
        assign_credit(groups, children)
        metrics = rollout_metrics(groups)
        if children:
            metrics |= resample_metrics(groups, children, 16) | rank_metrics(find_candidates(groups))
        metrics |= {"policy/kl": 0.001 * step, "policy/grad_norm": 0.5, "mismatch/logprob_diff_max": 4.25e-6}
        metrics |= {"perf/rollout_s": 3.0, "perf/train_s": 4.0, "perf/step_s": 8.0, "pack/shared_saving": 0.625}
        logged.append({"step": step, **metrics})
        lines = [t.to_json() for group in groups for t in group] + [t.to_json() for ks in children.values() for t in ks]
        (path / "trajectories" / f"step_{step:06d}.jsonl").write_text(
            "\n".join(lines).replace("\ud800", "\\ud800") + "\n"
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
    for step, share in ((0, 0.25), (steps, 0.75)):
        write_evaluation(path, step, share)
    return logged


def write_evaluation(path: Path, step: int, share: float) -> None:
    rights = [[int((i * 4 + k) % 4 < 4 * share) for k in range(4)] for i in range(32)]
    questions = [
        {"id": f"q{i}", "rewards": r, "used_tool": [True, False, i % 2 == 0, False]} for i, r in enumerate(rights)
    ]
    used = np.array([q["used_tool"] for q in questions])
    summary = {
        "pass@1": share,
        "pass@1_low": share - 0.0321,
        "pass@1_high": share + 0.0321,
        "questions": 32,
        "samples": 4,
    }
    summary |= {"pass@4": 1.0, "pass@4_low": 1.0, "pass@4_high": 1.0, "tool/rate": float(used.mean())}
    summary |= {"tool/accuracy": float(np.array(rights)[used].mean()), "no_tool/accuracy": None}
    record = {"step": step, "summary": summary, "questions": questions}
    (path / "evaluation" / f"step_{step:06d}.json").write_text(json.dumps(record))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def words(page: str) -> str:
    """What a reader sees, without the style sheet."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


class Elements(HTMLParser):
    """Every element with its attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_self_contained(page: str) -> None:
    for tag, attributes in Elements(page).found:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), f"<{tag} {name}={value!r}>"
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert (value or "").startswith("data:image/"), f"<{tag} {name}={value!r}>"
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL))
    assert "url(" not in styles and "@import" not in styles


def test_numbers_captions_and_trees(tmp_path):
    run = tmp_path / "digits-axpo"
    write_run(run)
    path = write_report(run, 4)
    assert path == run / "report.html"
    page = read(path)
    seen = words(page)
    assert_self_contained(page)
    assert path.stat().st_size < 1_000_000
    assert "AXPO · 4 steps · model mini · 64 questions × 8 rollouts a step · seed 7" in seen
    # Before and after, with intervals of the summary and paired change.
    assert "25.0 % 21.8 – 28.2 % 75.0 % 71.8 – 78.2 % +50.0" in seen
    assert "Pass@4" in seen and "Right with a tool" in seen and "Right without" not in seen  # its accuracy is null
    for title in (
        "Reward",
        "All-wrong subgroups",
        "Restored by resampling",
        "Distinct calls",
        "Confidence against entropy",
    ):
        assert title in seen
    assert (
        "Tool-using rollouts of a question" in seen and "Seconds a step" in seen and "Distance from the start" in seen
    )
    assert "rollout 38 % training 50 % everything else 12 %" in seen  # 3, 4 and 1 of 8 seconds
    assert "4.2e-6" in seen  # the largest mismatch
    assert "50 % of 4 all-wrong subgroups" in seen  # restored in 2 of 4 steps
    assert page.count('<article class="tree">') == 4
    assert page.count('outcome restored">') == 2 and page.count('outcome not-restored">') == 2


def test_credit_on_the_branches(tmp_path):
    run = tmp_path / "run"
    write_run(run, steps=2)
    page = read(write_report(run, 2))
    restored, lost = (words(part) for part in page.split('<article class="tree">')[1:])
    # Rewards of the group: 3 of 8 right besides the source; PAPER.md's table gives its prefix 0.935 or −0.725.
    assert "1, prefix restored: a resample is right · confidence of its call 0.5 A +0.94" in restored
    assert "1, prefix not restored · confidence of its call 0.5 A −0.72" in lost
    assert "1, as it first went on ✗ wrong not trained" in restored and "fork at the opening tag" in restored
    assert "1c, resample ✓ right A +1.50" in restored and "1a, resample ✗ wrong A −0.50" in restored
    assert "1d, resample ✗ wrong A 0" in lost
    question = get_task("mini").question("train", 1)
    assert question.messages[0]["content"][1]["text"] in restored and f"Right answer {question.answer} ·" in restored
    assert 'image_zoom_in label "tile" bbox_2d [113, 222, 555, 777]' in restored
    assert "3 of 8 rollouts right" in restored and "6, without a tool ✓ right" in restored


def test_boxes_lie_where_the_calls_looked(tmp_path):
    run = tmp_path / "run"
    write_run(run, steps=1)
    page = read(write_report(run, 1))
    scene = re.search(r'<svg class="scene".*?</svg>', page, flags=re.DOTALL)
    assert scene is not None
    right = re.findall(r'class="box right b1 b1c"><rect class="halo" ([^/]+)/>', scene[0])
    assert right == ['x="113.0" y="222.0" width="442.0" height="555.0"']
    assert scene[0].count('class="box wrong masked b1"') == 1 and scene[0].count('class="box wrong') == 4
    crops = re.findall(r'alt="the crop, (\d+) × (\d+) pixels"', page)
    assert crops[0] == ("38", "51"), crops  # (400 − 100, 600 − 200) thousandths of 128 pixels
    assert "What the policy sees without zooming in: 32 × 32 pixels." in words(page)


def test_large_reports_leave_trees_out(tmp_path, monkeypatch):
    write_run(tmp_path / "run", steps=6)
    whole = read(write_report(tmp_path / "run", 6))
    monkeypatch.setattr("axpo.report._LARGEST", len(whole) - 1)
    page = read(write_report(tmp_path / "run", 6))
    assert 0 < page.count('<article class="tree">') < whole.count('<article class="tree">') == 6
    assert len(page) < len(whole) and "Step 1 " in words(page) and "Step 6 " in words(page)


def test_hostile_text_stays_text(tmp_path):
    run = tmp_path / "run"
    write_run(run, thought=HOSTILE)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('path = "mini"', "path = '</pre><script>alert(3)</script>'"))
    page = read(write_report(run, 4))
    assert_self_contained(page)
    assert "<script>alert(1)</script>" in words(page), "the text itself is to be seen"
    assert "&lt;script&gt;alert(3)" in page


def test_grpo_and_missing_metrics(tmp_path):
    run = tmp_path / "plain"
    logged = write_run(run, algo="grpo")
    del logged[1]["tool/accuracy"]
    logged[2] = {"step": 3, "reward/mean": None}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in logged))
    page = read(write_report(run, 3))
    seen = words(page).partition("Configuration")[0]
    assert "GRPO · 4 steps" in seen and "Restored" not in seen and "prefix" not in seen and "Distinct calls" not in seen
    assert page.count('<article class="tree">') == 3 and "not resampled" not in seen
    assert "Right with and without a tool" in seen


def test_cut_short(tmp_path):
    run = tmp_path / "run"
    write_run(run)
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-40])
    trajectories = run / "trajectories" / "step_000003.jsonl"
    trajectories.write_text(trajectories.read_text()[:-4000])
    (run / "evaluation" / "step_000004.json").write_text('{"step": 4, "summ')
    (run / "config.toml").unlink()
    seen = words(read(write_report(run, 4)))
    assert "Line 4 of metrics.jsonl is cut short and was left out." in seen
    assert "evaluation/step_000004.json cannot be read" in seen
    assert "config.toml is missing" in seen
    assert "3 steps" in seen and "25.0 %" in seen


def test_only_metrics(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    page = read(write_report(run, 8))
    assert "There are no trajectory files" in words(page) and "Reward" in words(page)
    assert_self_contained(page)


def test_questions_of_your_own(tmp_path):
    """Task jsonl: pictures come from its file; when they have gone, the tree is drawn without."""
    run = tmp_path / "run"
    write_run(run, steps=1)
    question = get_task("mini").question("train", 1)
    question.images[0].save(tmp_path / "scene.png")
    row = {"id": question.id, "question": "Which <b>digit</b>?", "images": ["scene.png"], "answer": "12"}
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "other"}) + "\n" + json.dumps(row) + "\n")
    config = Config.model_validate(
        {"data": {"task": "jsonl", "path": str(tmp_path / "own.jsonl")}, "eval": {"questions": 0}}
    )
    (run / "config.toml").write_text(to_toml(config))
    page = read(write_report(run, 1))
    assert "Which <b>digit</b>? Right answer 12" in words(page) and '<svg class="scene"' in page
    (tmp_path / "scene.png").unlink()
    page = read(write_report(run, 1))
    assert "its pictures are not there" in words(page) and '<svg class="scene"' not in page
    assert '<article class="tree">' in page


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "reward/me'])
def test_nothing_to_report(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ReportError, match=r"nothing to report yet.*metrics\.jsonl"):
        write_report(tmp_path, 8)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ReportError, match="absent: no such directory"):
        write_report(tmp_path / "absent", 8)


def test_command(tmp_path):
    run = tmp_path / "run"
    write_run(run, steps=1)
    command = [sys.executable, "-m", "axpo.report"]
    done = subprocess.run([*command, str(run), "--trees", "0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html"), done.stderr
    assert '<article class="tree">' not in read(run / "report.html")
    failed = subprocess.run([*command, str(tmp_path / "absent")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2 and "absent: no such directory" in failed.stderr and "Traceback" not in failed.stderr


def test_same_run_same_report(tmp_path):
    write_run(tmp_path / "run")
    assert read(write_report(tmp_path / "run", 4)) == read(write_report(tmp_path / "run", 4))


def test_correlation_in_the_caption(tmp_path):
    run = tmp_path / "run"
    write_run(run, steps=6, seed=random.randrange(10**6))
    files = sorted((run / "trajectories").glob("*.jsonl"))
    groups: dict[tuple[int, int], list[Trajectory]] = {}
    for file in files:
        for line in file.read_text().splitlines():
            trajectory = Trajectory.from_json(line)
            if trajectory.parent is None:
                groups.setdefault((trajectory.step, trajectory.group), []).append(trajectory)
    expected = rank_correlation(find_candidates(list(groups.values())))
    assert expected is not None
    text = f"Pearson {expected[0]:.3f}, Spearman {expected[1]:.3f}"
    assert text in words(read(write_report(run, 2))), text


def test_bootstrap_interval_covers_the_mean():
    """Against the normal interval of a difference of independent per-question means."""
    seed = random.randrange(10**6)
    rng = np.random.default_rng(seed)
    evaluations = []
    for step, chance in ((0, 0.4), (9, 0.5)):
        rewards = (rng.random((400, 4)) < chance).astype(int)
        rows = [{"id": i, "rewards": r.tolist(), "used_tool": [True] * 4} for i, r in enumerate(rewards)]
        summary = {"pass@1": float(rewards.mean()), "samples": 4}
        evaluations.append({"step": step, "summary": summary, "questions": rows})
    row = evaluation_rows(evaluations)[0]
    first, last = (np.array([q["rewards"] for q in e["questions"]]).mean(axis=1) for e in evaluations)
    error = (last - first).std(ddof=1) / 20
    assert row.change is not None and row.change.low is not None and row.change.high is not None
    assert row.change.value == pytest.approx((last - first).mean()), seed
    assert row.change.low == pytest.approx(row.change.value - 1.96 * error, abs=0.3 * error), seed
    assert row.change.high == pytest.approx(row.change.value + 1.96 * error, abs=0.3 * error), seed


def test_long_curves_are_thinned_and_gaps_stay():
    points = [(float(i), None if 2000 <= i < 3000 else float(i)) for i in range(5000)]
    short = thin(points)
    assert len(short) == 240 and short[120][1] is None and short[0][1] == pytest.approx(10.0, abs=1)
    assert any(y is None for _, y in smoothed(short))
    chart = line_chart([Line("a<b", 1, points)])
    assert len(chart) < 60_000 and "a&lt;b" in chart and "nan" not in chart


def test_numbers():
    assert [percent(v) for v in (0.0, 0.256, 0.031, 0.0003, 1.0)] == ["0 %", "26 %", "3.1 %", "0.03 %", "100 %"]
    assert [number(v) for v in (0, 4.25e-6, 0.12345, 12.0, 3456.7)] == ["0", "4.2e-6", "0.123", "12", "3,457"]
