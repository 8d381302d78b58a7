"""The suite's families: questions from (split, index) alone, held-out things never asked in training, right answers."""

import math
import secrets
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from axpo.paths import documents_directory
from axpo.tasks import SPLITS, Question, Split, facts, get_task
from axpo.tasks.reasoning import ReasoningTask
from axpo.tasks.scenes import digit_pool
from axpo.tasks.search import SearchTask
from axpo.tools.search import Search

SEED = secrets.randbits(32)
FAMILIES = ("perception", "reasoning", "search")


def sample(name: str, split: Split, number: int) -> list[Question]:
    task = get_task(name)
    return [task.question(split, int(i)) for i in np.random.default_rng(SEED).integers(task.size(split), size=number)]


@pytest.mark.parametrize("name", [*FAMILIES, "suite"])
def test_a_question_depends_on_split_and_index_alone(name: str):
    first, second = get_task(name), get_task(name)
    for index in (30, 1, 17, 2):
        second.question("heldout", index)  # what is asked before does not matter
        a, b = (task.question("train", index) for task in (first, second))
        assert (a.id, a.text, a.answer, a.meta) == (b.id, b.text, b.answer, b.meta)
        assert [image.tobytes() for image in a.images] == [image.tobytes() for image in b.images]
    assert first.content_hash("train") == second.content_hash("train") != first.content_hash("heldout")
    with pytest.raises(IndexError, match=rf"{name}/heldout has questions 0 to {first.size('heldout') - 1}, not"):
        first.question("heldout", first.size("heldout"))
    with pytest.raises(ValueError, match="unknown split 'test'"):
        first.size("test")  # type: ignore[arg-type]


def test_the_suite_asks_its_families_in_turn_by_their_own_names():
    suite = get_task("suite")
    for split in SPLITS:
        assert suite.size(split) == 3 * get_task("search").size(split)
        for index in np.random.default_rng(SEED).integers(suite.size(split), size=12):
            question = suite.question(split, int(index))
            family = FAMILIES[index % 3]
            same = get_task(family).question(split, int(index) // 3)
            assert question.meta["family"] == family and (question.id, question.text) == (same.id, same.text)
    assert suite.kinds() == {"exact"}


def asked(question: Question) -> set:
    """What must not be in both splits."""
    match question.meta["family"]:
        case "perception":
            return {tile["source"] for tile in question.meta["tiles"]}
        case "reasoning":
            return {question.meta["expression"]}
        case _:
            return {(question.meta["kind"], question.meta["name"])}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_held_out_is_never_asked_in_training(name: str):
    number = 100 if name == "perception" else 3000
    things = {split: set().union(*map(asked, sample(name, split, number))) for split in SPLITS}
    assert not things["train"] & things["heldout"], f"seed {SEED}"
    assert min(map(len, things.values())) > 50
    if name == "perception":
        assert things["heldout"] <= set(digit_pool(True).tolist())


@pytest.mark.parametrize("name", ["reasoning", "search"])
def test_easy_questions_come_in_the_share_asked_for(name: str):
    task = {"reasoning": ReasoningTask, "search": SearchTask}[name]
    for share in (0.0, 0.4):
        made = task(train_size=1000, easy_share=share)
        questions = [made.question("train", index) for index in range(1000)]
        questions = [question for question in questions if question.meta.get("kind") != "currency"]
        assert abs(np.mean([question.meta["easy"] for question in questions]) - share) < 0.08
    with pytest.raises(ValueError, match=r"easy_share is 1\.5"):
        task(easy_share=1.5)
    with pytest.raises(ValueError, match="heldout_size is 0"):
        task(heldout_size=0)


def test_the_value_of_a_problems_expression_is_its_answer():
    questions = sample("reasoning", "train", 800) + sample("reasoning", "heldout", 200)
    for question in questions:
        value = eval(question.meta["expression"], {"math": math})
        assert str(value) == question.answer, question.text
        assert bool(question.meta["imports"]) == ("math." in question.meta["expression"])
    forms = Counter(question.text.translate(str.maketrans("", "", "0123456789")) for question in questions)
    assert len(forms) > 15, "sums of every form, in figures and in words"


def test_codes_are_those_of_the_standards():
    known = {(fact.kind, fact.name): fact.codes for fact in facts.facts()}
    assert known["language", "Finnish"] == {"three-letter code": "fin"}
    assert known["nation", "Finland"] == {"two-letter code": "FI", "three-letter code": "FIN", "numeric code": "246"}
    assert known["subdivision", "Delaware"] == {"country code": "US"}
    assert known["currency", "Euro"] == {"three-letter code": "EUR", "numeric code": "978"}
    for question in sample("search", "train", 300):
        assert question.answer == known[question.meta["kind"], question.meta["name"]][question.meta["attribute"]]
        assert question.meta["easy"] == question.meta["name"].lower().startswith(question.answer.lower())


def test_names_that_are_asked_for_are_plain_and_the_only_ones_of_their_kind():
    names = Counter((fact.kind, fact.name) for fact in facts.facts())
    assert len(facts.askable()) > 8000
    for fact in facts.askable():
        assert names[fact.kind, fact.name] == 1 and fact.name.isascii() and len(fact.name) <= 18


def test_a_search_for_the_name_finds_the_answer_first():
    search = Search(path="facts")
    found = []
    for question in sample("search", "heldout", 150):
        kind, name, attribute = (question.meta[key] for key in ("kind", "name", "attribute"))
        shown = search.call({"query": f"{kind} {name}", "max_results": 2}, []).text
        first = shown.partition("[2]")[0]
        found.append(f"The {kind} {name}\n" in first and f"{attribute} ({question.answer})" in first)
        vague = search.call({"query": f"{kind} {attribute}", "max_results": 2}, []).text
        assert f"({question.answer})" not in vague or f"{kind} {name}\n" not in vague
    assert np.mean(found) > 0.9, f"seed {SEED}"


def test_the_facts_are_written_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    build = facts.facts_directory.__wrapped__  # each call as in a process of its own
    with ThreadPoolExecutor(4) as pool:
        (folder,) = {future.result() for future in [pool.submit(build) for _ in range(4)]}
    assert folder.parent == tmp_path / ".cache" / "axpo" / "facts"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing half made is left"
    file = folder / facts.FILE
    assert len(file.read_text().splitlines()) == len(facts.facts()) > 13_000
    written = file.stat().st_mtime_ns
    assert build() == folder and file.stat().st_mtime_ns == written
    monkeypatch.setattr(facts, "facts", lambda: facts.askable()[:3])
    other = build()
    assert other != folder and len((other / facts.FILE).read_text().splitlines()) == 3, "other facts lie elsewhere"


def test_search_path_names_the_embedded_facts_or_a_folder(tmp_path: Path):
    assert documents_directory("facts") == facts.facts_directory()
    assert documents_directory(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"search\.path = 'fakts': no such folder"):
        documents_directory("fakts")
    with pytest.raises(ValueError, match="'facts' for those"):
        documents_directory("")
