"""Search: a folder by BM25, the web's API over real HTTP (a server of our own), and pictures by their captions."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from axpo.tools.image_search import ImageSearch
from axpo.tools.search import Search

Answer = Callable[[dict[str, Any], int], tuple[int, bytes, dict[str, str]]]


class Service:
    """An HTTP server with the API's form; `answer(request, number)` decides what it says."""

    def __init__(self) -> None:
        service = self
        self.requests: list[dict[str, Any]] = []
        self.answer: Answer = results

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                service.requests.append({**body, "key": self.headers["authorization"], "path": self.path})
                status, content, headers = service.answer(body, len(service.requests))
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def results(request: dict[str, Any], number: int) -> tuple[int, bytes, dict[str, str]]:
    hits = [
        {"title": "A paper", "url": "https://huggingface.co/papers/1", "content": "leaked"},
        {"title": "A mirror", "url": "https://hf.huggingface.co/x", "content": "leaked too"},
        {"title": f"On {request['query']}", "url": "https://example.org/1", "content": "word " * 400},
    ]
    return 200, json.dumps({"results": hits}).encode(), {}


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


@pytest.fixture
def search(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Search]:
    monkeypatch.setenv("TAVILY_API_KEY", "secret")
    tool = Search("tavily", cache_dir=str(tmp_path / "cache"), base_url=service.url, timeout_s=2.0)
    yield tool
    tool.close()


def ask(tool: Search, query: str = "owls", **more: Any) -> tuple[bool, str]:
    result = tool.call({"query": query, **more}, [])
    return result.ok, result.text


def test_the_query_goes_out_as_the_api_wants_it_and_comes_back_short(search: Search, service: Service) -> None:
    ok, text = ask(search, max_results=3)
    assert ok and text.startswith("[1] On owls\nhttps://example.org/1\nword word") and text.endswith(" …")
    assert len(text) < 1100 and "leaked" not in text, "an excluded domain was shown"
    (request,) = service.requests
    assert (request["path"], request["key"]) == ("/search", "Bearer secret")
    assert request["exclude_domains"] == ["huggingface.co"] and request["max_results"] >= 3


def test_a_query_is_paid_once(search: Search, service: Service) -> None:
    assert ask(search) == ask(search) and len(service.requests) == 1
    ask(search, "bats")
    assert len(service.requests) == 2


def test_a_rate_limit_and_an_outage_are_waited_out(search: Search, service: Service) -> None:
    def answer(request: dict, number: int) -> tuple[int, bytes, dict[str, str]]:
        if number == 1:
            return 429, b"", {"retry-after": "0.2"}
        return (503, b"", {}) if number == 2 else results(request, number)

    service.answer = answer
    begun = time.monotonic()
    ok, text = ask(search)
    assert ok and "On owls" in text and len(service.requests) == 3 and time.monotonic() - begun >= 0.2


def test_an_outage_that_lasts_is_a_failed_call_and_then_a_quick_one(search: Search, service: Service) -> None:
    service.answer = lambda request, number: (429, b"", {"retry-after": "0"})
    ok, text = ask(search)
    assert not ok and "rate limit" in text and len(service.requests) == 4
    begun = time.monotonic()
    ok, text = ask(search, "bats")
    assert not ok and "not available" in text and len(service.requests) == 4 and time.monotonic() - begun < 0.5


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((401, b"{}", {}), "refuses the API key"),
        ((432, b"{}", {}), "refuses the query (432)"),
        ((200, b'{"answers": []}', {}), "unknown form"),
        ((200, b'{"results": [3]}', {}), "unknown form"),
    ],
)
def test_what_no_retry_mends_fails_at_once(search: Search, service: Service, answer: tuple, told: str) -> None:
    service.answer = lambda request, number: answer
    ok, text = ask(search)
    assert not ok and told in text and len(service.requests) == 1


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVILY_API_KEY", "secret")
    monkeypatch.setattr("axpo.tools.search.tavily.MAX_WAIT_S", 0.1)
    tool = Search("tavily", cache_dir=str(tmp_path), base_url="http://127.0.0.1:9", timeout_s=1.0)
    result = tool.call({"query": "owls"}, [])
    assert not result.ok and "cannot be reached" in result.text and not result.timed_out


def test_a_service_that_does_not_answer_is_a_timeout(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAVILY_API_KEY", "secret")
    monkeypatch.setattr("axpo.tools.search.tavily.MAX_WAIT_S", 0.1)
    woken = threading.Event()
    service.answer = lambda request, number: (200, str(woken.wait(30)).encode(), {})
    tool = Search("tavily", cache_dir=str(tmp_path), base_url=service.url, timeout_s=0.3)
    result = tool.call({"query": "owls"}, [])
    woken.set()
    assert not result.ok and result.timed_out and "ReadTimeout" in result.text


def test_the_limit_holds_for_all_threads_together(service: Service, tmp_path: Path) -> None:
    from axpo.tools.search.tavily import _RateLimit

    limit = _RateLimit(3)
    limit._times.extend([time.monotonic() - 59.7] * 3)  # three passes almost a minute ago
    begun = time.monotonic()
    threads = [threading.Thread(target=limit.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.2 < time.monotonic() - begun < 5


def test_a_missing_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TAVILY_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"TAVILY_API_KEY \(search.api_key_env\) is not set"):
        Search("tavily")


def test_a_folder_is_ranked_and_split(tmp_path: Path) -> None:
    (tmp_path / "france.md").write_text("# France\n\nThe capital of France is Paris.")
    (tmp_path / "sub").mkdir()
    rows = [
        {"title": "Peru", "url": "https://peru.example", "text": "Lima is the capital of Peru."},
        {"text": "A fox."},
    ]
    (tmp_path / "sub" / "more.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    long = "filler " * 500 + "the okapi lives here " + "filler " * 500
    (tmp_path / "long.txt").write_text(f"Animals\n{long}")
    tool = Search("local", path=str(tmp_path))
    ok, text = ask(tool, "capital of Peru")
    assert ok and text.startswith("[1] Peru\nhttps://peru.example\nLima is the capital") and "[2] France" in text
    ok, text = ask(tool, "okapi")
    assert ok and "the okapi lives here" in text and text.count("[") == 1
    assert ask(tool, "fox", max_results=1) == (True, "[1] \nfile:///sub/more.jsonl#2\nA fox.")
    assert ask(tool, "zebra") == (True, "No results.")


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "more.jsonl:1 is not JSON"), ('{"title": "x"}', 'more.jsonl:1 must be an object with a string "text"')],
)
def test_a_bad_document_is_named(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "more.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told):
        Search("local", path=str(tmp_path))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    for path, told in (("", "set search.path"), (str(tmp_path / "no"), "no such folder"), (str(tmp_path), "no .txt")):
        with pytest.raises(ValueError, match=told):
            Search("local", path=path)
    with pytest.raises(ValueError, match=r"image_search.path = ''"):
        ImageSearch("")


def test_pictures_come_by_their_captions(tmp_path: Path) -> None:
    for name, colour in (("red_fox.png", "red"), ("b.jpg", "blue"), ("c.png", "green")):
        Image.new("RGB", (3000, 20), colour).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("a blue whale\nin the sea")
    (tmp_path / "captions.json").write_text(json.dumps({"c.png": "a meadow"}))
    tool = ImageSearch(str(tmp_path), max_side=300)
    whale = tool.call({"query": "whale"}, [])
    assert whale.ok and whale.text == "[1] a blue whale in the sea" and [i.size for i in whale.images] == [(300, 2)]
    assert tool.call({"query": "fox"}, []).text == "[1] red fox"
    assert tool.call({"query": "meadow fox", "max_results": 2}, []).text.count("[") == 2
    nothing = tool.call({"query": "tractor"}, [])
    assert nothing.ok and nothing.images == [] and nothing.text == "No images found."
