"""Question trees for the report: the chosen groups with their pictures, read back from the trajectory files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from axpo.data import INSTRUCTION, Rows
from axpo.paths import model_directory
from axpo.report.branches import Branch, Source, plain_branch, source_branch
from axpo.report.choice import Group
from axpo.report.data import Run, read_trajectories
from axpo.report.pictures import SCENE_SIDE, Box, Picture, Rect, embed, overview, scene
from axpo.tasks import Question, get_task
from axpo.tools import Tool, get_tools
from axpo.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture of the question with the calls' boxes, and the size at which the model sees it, if that is smaller."""

    drawn: Markup
    seen: Picture | None


@dataclass(frozen=True, slots=True)
class Tree:
    """A question with its rollouts; sources first, then tool-using ones, then the others."""

    step: int
    question_id: str
    outcome: str
    question: str
    answer: str
    scenes: list[Scene]
    sources: list[Source]
    others: list[Branch]
    has_target: bool

    @property
    def right(self) -> int:
        """Rollouts of the question, resamples aside, that were right."""
        return sum(b.right for b in self.others) + sum(s.original.right for s in self.sources)

    @property
    def size(self) -> int:
        return len(self.others) + len(self.sources)


def build_trees(run: Run, groups: Sequence[Group]) -> list[Tree]:
    """One tree a group. A question that cannot be found again is drawn without pictures, and the run's notes say so."""
    tools = _tools(run)
    limits = _seen_size(run)
    trees = []
    for group in groups:
        try:
            question = find_question(run, group.question_id)
        except (OSError, ValueError, LookupError, TypeError) as error:
            question = None
            run.notes.append(f"Question {group.question_id}: its pictures are not there ({error}).")
        if tree := _tree(group, question, tools, limits):
            trees.append(tree)
    return trees


def find_question(run: Run, question_id: str) -> Question:
    """The question of the task in config.toml with this id; ValueError or LookupError when there is none."""
    name = run.setting("data.task", "mini")
    if name != "jsonl":
        family, split, index = question_id.split("/")
        task = get_task(family)  # a question of the suite has the name of its family
        if split not in ("train", "heldout"):
            raise ValueError(f"no split {split!r}")
        return task.question(split, int(index))
    return Rows(run.setting("data.path", "")).find(question_id).question()


def _tools(run: Run) -> dict[str, Tool]:
    """The run's tools whose pictures can be made again by calling them; the others ran once, in the run."""
    return get_tools(name for name in run.setting("rollout.tools", ["image_zoom_in"]) if name == "image_zoom_in")


def _seen_size(run: Run) -> tuple[int, int] | None:
    """(most pixels of an image, pixels of a token's side) of the run's image processor, None when it is not there."""
    try:
        folder = run.path / "policy"
        folder = folder if folder.is_dir() else model_directory(run.setting("model.path", "mini"))
        values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        most = values.get("max_pixels") or values["size"]["longest_edge"]
        return int(most), int(values["patch_size"]) * int(values["merge_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tree(
    group: Group, question: Question | None, tools: dict[str, Tool], limits: tuple[int, int] | None
) -> Tree | None:
    rollouts: list[Trajectory] = []
    resamples: dict[str, list[Trajectory]] = {}
    for trajectory in read_trajectories(group.file, containing=json.dumps(group.question_id, ensure_ascii=False)):
        if (trajectory.question_id, trajectory.group) == (group.question_id, group.number):
            if trajectory.parent is None:
                rollouts.append(trajectory)
            else:
                resamples.setdefault(trajectory.parent, []).append(trajectory)
    if not rollouts:
        return None
    images = question.images if question else []
    sources: list[Source] = []
    others: list[Branch] = []
    for number, rollout in enumerate(rollouts, start=1):
        if rollout.id in resamples:
            sources.append(source_branch(rollout, number, resamples[rollout.id], images, tools))
        else:
            others.append(plain_branch(rollout, number, images, tools))
    others.sort(key=lambda branch: not branch.used_tool)
    boxes = [box for s in sources for b in [s.original, *s.resamples] for box in b.boxes]
    boxes += [box for branch in others for box in branch.boxes]
    target = _target(question)
    return Tree(
        step=group.step,
        question_id=group.question_id,
        outcome=group.outcome,
        question=_text(question),
        answer=question.answer if question else "",
        scenes=_scenes(question, boxes, target, limits),
        sources=sources,
        others=others,
        has_target=target is not None,
    )


def _scenes(
    question: Question | None, boxes: Sequence[Box], target: Rect | None, limits: tuple[int, int] | None
) -> list[Scene]:
    scenes = []
    for index, image in enumerate(question.images if question else []):
        drawn = scene(embed(image, SCENE_SIDE), [b for b in boxes if b.image == index], None if index else target)
        scenes.append(Scene(drawn, overview(image, *limits) if limits else None))
    return scenes


def _target(question: Question | None) -> Rect | None:
    """What the question is about on its first image, when the task tells (mini does)."""
    try:
        assert question is not None
        left, top, right, bottom = question.meta["tiles"][question.meta["target"]]["box"]
        width, height = question.images[0].size
    except (AssertionError, KeyError, IndexError, TypeError, ValueError):
        return None
    return left / width, top / height, right / width, bottom / height


def _text(question: Question | None) -> str:
    content = question.messages[-1]["content"] if question else ""
    if not isinstance(content, str):
        content = "\n".join(part["text"] for part in content if part.get("type") == "text")
    return content.replace(INSTRUCTION, "").strip()
