"""A folder of documents as a search engine: BM25 over passages."""

import json
from collections.abc import Iterator
from pathlib import Path

import bm25s

from axpo.paths import documents_directory
from axpo.tools.search import Hit, SearchError

_PASSAGE = 200  # words; a longer document is several passages
_SUFFIXES = (".txt", ".md", ".jsonl")


class LocalDocuments:
    """Ranks the passages of a folder's documents.

    A .txt or .md file is one document, titled by its first line; a line of a .jsonl file is one: {"text": …}, with
    "title" and "url" if it has them. Folders inside it are read too.

    Raises:
        ValueError: there is no folder or no document, or a line is not such an object; the message names it.
    """

    def __init__(self, path: str | Path):
        folder = documents_directory(str(path))
        self._passages = [passage for hit in _documents(folder) for passage in _split(hit)]
        if not self._passages:
            raise ValueError(f"search.path = {str(path)!r}: no {', '.join(_SUFFIXES)} document with text in it")
        self._index = bm25s.BM25()
        texts = [f"{passage.title} {passage.text}" for passage in self._passages]
        self._index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def search(self, query: str, count: int) -> list[Hit]:
        """The best passages that share a word with the query, one a document."""
        tokens = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)
        try:
            found, scores = self._index.retrieve(tokens, k=min(4 * count, len(self._passages)), show_progress=False)
        except ValueError as error:
            raise SearchError(str(error)) from error
        hits: dict[str, Hit] = {}
        for index, score in zip(found[0], scores[0], strict=True):
            if score > 0:
                hits.setdefault(self._passages[index].url, self._passages[index])
        return list(hits.values())[:count]

    def close(self) -> None:
        """Nothing is held."""


def _documents(folder: Path) -> Iterator[Hit]:
    for file in sorted(file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file.is_file()):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"search.path: {file} cannot be read as UTF-8 text: {error}") from error
        url = f"file:///{file.relative_to(folder).as_posix()}"
        if file.suffix != ".jsonl":
            title = next((line.lstrip("# ").strip() for line in text.splitlines() if line.strip()), "")
            yield Hit(title, url, text)
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _document(line, f"{file}:{number}", f"{url}#{number}")


def _document(line: str, where: str, url: str) -> Hit:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"search.path: {where} is not JSON: {error}") from error
    if not (isinstance(record, dict) and isinstance(record.get("text"), str)):
        raise ValueError(f'search.path: {where} must be an object with a string "text"')
    return Hit(str(record.get("title", "")), str(record.get("url", url)), record["text"])


def _split(hit: Hit) -> list[Hit]:
    words = hit.text.split()
    return [Hit(hit.title, hit.url, " ".join(words[i : i + _PASSAGE])) for i in range(0, len(words), _PASSAGE)]
