"""Real facts that no small model can know: ISO codes of languages, subdivisions, countries and currencies (pycountry).

`facts_directory` writes them once as documents for the local search; nothing of the data is in this repository.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from axpo.paths import cache_directory

FILE = "facts.jsonl"
# "nation", since every subdivision's document speaks of a country.
LANGUAGE, SUBDIVISION, NATION, CURRENCY = KINDS = ("language", "subdivision", "nation", "currency")
_ASKABLE = re.compile(r"[A-Z][a-z]+(?:[ -][A-Z][a-z]+)*")
_LONGEST = 18  # letters of a name that is asked for


@dataclass(frozen=True, slots=True)
class Fact:
    """An entry of an ISO standard; `codes` by what they are called ("three-letter code")."""

    kind: str
    name: str
    codes: dict[str, str]

    @property
    def document(self) -> dict[str, str]:
        """As the local search reads it."""
        said = "; ".join(f"{attribute} ({code})" for attribute, code in self.codes.items())
        return {"title": f"The {self.kind} {self.name}", "text": f"It has the {said}."}


@cache
def facts() -> tuple[Fact, ...]:
    """Every entry, about 13,000, in the order of the standards."""
    return tuple(_facts())


@cache
def askable() -> tuple[Fact, ...]:
    """Those whose name is plain, short and the only one of its kind."""
    names = Counter((fact.kind, fact.name.casefold()) for fact in facts())
    return tuple(
        fact
        for fact in facts()
        if len(fact.name) <= _LONGEST and _ASKABLE.fullmatch(fact.name) and names[fact.kind, fact.name.casefold()] == 1
    )


@cache
def facts_directory() -> Path:
    """The folder with all documents, in the user's cache; it is written when it is not there yet.

    Its name is its content's hash, and it appears whole or not at all, whoever else writes it meanwhile.
    """
    text = "".join(json.dumps(fact.document) + "\n" for fact in facts())
    folder = cache_directory("", "facts") / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not folder.is_dir():
        made = Path(tempfile.mkdtemp(prefix=".facts-", dir=folder.parent))
        (made / FILE).write_text(text, encoding="utf-8")
        try:
            made.rename(folder)
        except OSError:
            shutil.rmtree(made)
            if not folder.is_dir():  # else another process was quicker
                raise
    return folder


def _facts() -> Iterator[Fact]:
    import pycountry

    for entry in pycountry.languages:
        yield Fact(LANGUAGE, entry.name, {"three-letter code": entry.alpha_3})
    for entry in pycountry.subdivisions:
        yield Fact(SUBDIVISION, entry.name, {"country code": entry.country_code})
    for entry in pycountry.countries:
        codes = {"two-letter code": entry.alpha_2, "three-letter code": entry.alpha_3, "numeric code": entry.numeric}
        yield Fact(NATION, entry.name, codes)
    for entry in pycountry.currencies:
        yield Fact(CURRENCY, entry.name, {"three-letter code": entry.alpha_3, "numeric code": entry.numeric})
