"""Services that fail in every way a socket allows: the call or the answer is counted as failed, and the run goes on."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from axpo.branch import Limits
from axpo.config import JudgeOptions
from axpo.conversation import Conversation
from axpo.diagnostics import rollout_metrics
from axpo.grading import Grader, Rubric
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.tools.search import Search
from engine import LLM
from tests.axpo.test_observations import fresh, observed, settle, turn

LIMITS = Limits(max_turns=3, max_new_tokens=400, max_tokens=900)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def says(body: bytes, status: bytes = b"200 OK") -> Callable[[socket.socket], None]:
    head = b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    return lambda sock: sock.sendall(head + body)


def hangs(sock: socket.socket) -> None:
    sock.settimeout(5)
    with suppress(OSError):
        while sock.recv(4096):
            pass


def drips(head: bytes) -> Callable[[socket.socket], None]:
    """Each byte in time, the whole never."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(head)
        for _ in range(200):
            sock.sendall(b" ")
            time.sleep(0.05)

    return serve


FAULTS: dict[str, Callable[[socket.socket], None]] = {
    "hangs": hangs,
    "hangs in the middle": lambda sock: (sock.sendall(HEAD + b"content-length: 100\r\n\r\n{"), hangs(sock))[0],
    "drips its answer": drips(HEAD + b"content-length: 100000\r\n\r\n"),
    "drips its head": drips(HEAD + b"x-long: "),
    "hangs up": lambda sock: None,
    "is no HTTP": lambda sock: sock.sendall(b"\x16\x03\x01 hello \xff\xfe\r\n\r\n"),
    "ends early": lambda sock: sock.sendall(HEAD + b"content-length: 100\r\n\r\n{"),
    "is a web page": says(b"<html>Gateway</html>"),
    "is empty": says(b""),
    "is null": says(b"null"),
    "is nested": says(b"[" * 200_000),
    "is binary": says(bytes(range(256))),
    "is down": says(b"down", b"503 Service Unavailable"),
    "limits": says(b"{}", b"429 Too Many Requests"),
    "redirects": says(b"", b"302 Found\r\nlocation: http://127.0.0.1:9/"),
    "has nothing": says(b'{"choices": [], "results": [null]}'),
}


class Server:
    """Reads a request and then does what `fault` says, a thread a connection."""

    def __init__(self, fault: Callable[[socket.socket], None]):
        self.fault, self.asked = fault, 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            client.recv(1 << 16)
            self.asked += 1
            self.fault(client)


@pytest.fixture(params=list(FAULTS))
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("axpo.tools.search.tavily.MAX_WAIT_S", 0.05)
    monkeypatch.setattr("axpo.grading.judge.MAX_WAIT_S", 0.05)
    monkeypatch.setenv("TAVILY_API_KEY", "secret")
    server = Server(FAULTS[request.param])
    yield server
    server.socket.close()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(model_directory("mini"), dtype=torch.float32, kv_cache_bytes=1 << 26)


def test_a_search_that_fails_costs_its_call(llm: LLM, server: Server, tmp_path: Path) -> None:
    search = Search("tavily", cache_dir=str(tmp_path), base_url=server.url, timeout_s=0.3)
    agent = Agent(llm, Conversation(llm.processor, {"tavily-search": search}), seed=0)
    branch = fresh(agent)
    call = '<tool_call>\n{"name": "tavily-search", "arguments": {"query": "owls"}}\n</tool_call>'
    settle(agent, turn(agent, branch, f"So.\n</think>\n\n{call}", LIMITS), LIMITS)
    assert "Error: the search failed: the service" in observed(agent, branch) and branch.status is None
    agent.llm.abort(branch.sequence)
    branch.status = "length"
    assert rollout_metrics([[agent.trajectory(branch, 1)]])["tool/failed_rate"] == 1.0
    branch.sequence.close()
    search.close()


def test_a_judge_that_fails_leaves_the_answer_ungraded(llm: LLM, server: Server, tmp_path: Path) -> None:
    options = JudgeOptions(base_url=server.url, model="m", cache_dir=str(tmp_path), timeout_s=0.3)
    agent = Agent(llm, Conversation(llm.processor, {}), seed=0, grader=Grader(options))
    branch = fresh(agent)
    branch.question = replace(branch.question, answer="an owl", rubric=Rubric(("an owl",), "judge"))
    answer = "So.\n</think>\n\n<answer>\\boxed{a bird}</answer>"
    settle(agent, turn(agent, branch, answer, LIMITS), LIMITS)
    assert branch.status == "answered" and branch.reward == 0.0 and not branch.grading
    assert (branch.grade_error or "").startswith("the judge") and server.asked <= 3
    assert rollout_metrics([[agent.trajectory(branch, 1)]])["reward/ungraded_rate"] == 1.0
    branch.sequence.close()
    agent.grader.close()
