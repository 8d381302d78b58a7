"""`tavily-search`: the web through Tavily's API, or a folder of documents on this machine."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol
from urllib.parse import urlsplit

from PIL import Image

from axpo.tools import Tool, ToolResult

_MAX_RESULTS = 20


@dataclass(frozen=True, slots=True)
class Hit:
    title: str
    url: str
    text: str


class SearchError(Exception):
    """The provider cannot answer; the message is for the model and the metrics."""

    timed_out = False


class Provider(Protocol):
    def search(self, query: str, count: int) -> list[Hit]:
        """The best `count` hits, best first; raises SearchError."""
        ...

    def close(self) -> None: ...


class Search(Tool):
    """The paper's search tool.

    Args:
        provider: "local" ranks the documents of `path` by BM25; "tavily" asks the web, with the key in `api_key_env`.
        path: folder of .txt, .md and .jsonl documents (see axpo.tools.search.local).
        exclude_domains: no hit of these or of their subdomains is shown.
        cache_dir: answers of the web are kept here, so that a query is paid once.
        queries_per_minute: at most so many go to the web, from all trajectories of this process.
        max_chars: of one hit's text.

    Raises:
        ValueError: the provider cannot work: no folder, no document, no key.
    """

    name: ClassVar[str] = "tavily-search"
    description: ClassVar[str] = (
        "Searches the web. Returns the most relevant results with title, address and an extract of each."
    )
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "minLength": 1, "description": "What to search for."},
            "max_results": {
                "type": "integer",
                "minimum": 1,
                "maximum": _MAX_RESULTS,
                "default": 5,
                "description": "How many results to return.",
            },
        },
        "required": ["query"],
    }

    def __init__(
        self,
        provider: Literal["local", "tavily"] = "local",
        path: str = "",
        api_key_env: str = "TAVILY_API_KEY",
        exclude_domains: Sequence[str] = ("huggingface.co",),
        cache_dir: str = "",
        queries_per_minute: int = 60,
        timeout_s: float = 20.0,
        max_chars: int = 1000,
        base_url: str = "https://api.tavily.com",
    ):
        self._excluded = tuple(domain.lower().lstrip(".") for domain in exclude_domains)
        self._max_chars = max_chars
        self._provider: Provider
        if provider == "local":
            from axpo.tools.search.local import LocalDocuments

            self._provider = LocalDocuments(path)
        else:
            from axpo.tools.search.tavily import Tavily

            if not (key := os.environ.get(api_key_env, "")):
                raise ValueError(
                    f"search.provider = 'tavily': the environment variable {api_key_env} (search.api_key_env) is not "
                    "set; set it to your API key, or search.provider to 'local'"
                )
            self._provider = Tavily(
                key,
                base_url=base_url,
                exclude_domains=self._excluded,
                cache_dir=cache_dir,
                queries_per_minute=queries_per_minute,
                timeout_s=timeout_s,
            )

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        count = arguments.get("max_results", 5)
        try:
            hits = self._provider.search(arguments["query"], count + len(self._excluded))
        except SearchError as error:
            return ToolResult.failure(f"the search failed: {error}", timed_out=error.timed_out)
        shown = [hit for hit in hits if not self._is_excluded(hit.url)][:count]
        if not shown:
            return ToolResult(True, "No results.")
        return ToolResult(True, "\n\n".join(self._show(number, hit) for number, hit in enumerate(shown, 1)))

    def close(self) -> None:
        self._provider.close()

    def _is_excluded(self, url: str) -> bool:
        host = (urlsplit(url).hostname or "").lower()
        return any(host == domain or host.endswith(f".{domain}") for domain in self._excluded)

    def _show(self, number: int, hit: Hit) -> str:
        text = " ".join(hit.text.split())
        text = text if len(text) <= self._max_chars else text[: self._max_chars].rsplit(" ", 1)[0] + " …"
        return f"[{number}] {hit.title}\n{hit.url}\n{text}"
