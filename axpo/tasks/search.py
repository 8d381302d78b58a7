"""The embedded search task: which code has a language, a subdivision, a nation, a currency?

Most codes must be looked up (`tavily-search` over `axpo.tasks.facts`); some are the first letters of the name.
"""

import hashlib
from functools import cache
from typing import Any

from axpo.tasks import Question, Split
from axpo.tasks.facts import CURRENCY, KINDS, LANGUAGE, NATION, SUBDIVISION, Fact, askable
from axpo.tasks.splits import GeneratedTask, is_heldout

_SHARES = {LANGUAGE: 0.5, SUBDIVISION: 0.3, NATION: 0.1, CURRENCY: 0.1}
FORMS = ("What is the {attribute} of the {kind} {name}?", "Tell me the {attribute} of the {kind} {name}.")


class SearchTask(GeneratedTask):
    """Questions from (split, index) alone; what held-out ones ask about, no training question does.

    easy_share: the share of questions whose answer is the beginning of the name; none of currencies.
    `meta` of a question: `family`, `kind`, `name`, `attribute` and `easy`.
    """

    name = "search"
    key = 20_260_630

    def __init__(self, train_size: int = 20_000, heldout_size: int = 1_024, easy_share: float = 0.35):
        super().__init__(train_size, heldout_size, easy_share=easy_share)
        self._easy_share = easy_share

    def question(self, split: Split, index: int) -> Question:
        rng = self.random(split, index)
        kind = KINDS[rng.choice(len(KINDS), p=[_SHARES[kind] for kind in KINDS])]
        easy = rng.random() < self._easy_share and kind != CURRENCY
        pool = _pool(split, kind, easy)
        fact, attribute = pool[rng.integers(len(pool))]
        text = FORMS[rng.integers(len(FORMS))].format(attribute=attribute, kind=kind, name=fact.name)
        meta: dict[str, Any] = {"family": "search", "kind": kind, "name": fact.name, "attribute": attribute}
        return Question(
            id=f"{self.name}/{split}/{index}",
            messages=[{"role": "user", "content": text}],
            images=[],
            answer=fact.codes[attribute],
            meta=meta | {"easy": easy},
        )

    def content_hash(self, split: Split) -> str:
        """Of the facts and the parameters that the questions are drawn from."""
        parts = (self.name, split, self.key, self.size(split), self._easy_share, FORMS, _SHARES, askable())
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def is_easy(fact: Fact, attribute: str) -> bool:
    """Whether the code is the beginning of the name."""
    code = fact.codes[attribute]
    return fact.name.casefold().startswith(code.casefold())


@cache
def _pool(split: Split, kind: str, easy: bool) -> list[tuple[Fact, str]]:
    """What a split asks: (fact, attribute)."""
    return [
        (fact, attribute)
        for fact in askable()
        if fact.kind == kind and is_heldout(f"{kind} {fact.name}") == (split == "heldout")
        for attribute in fact.codes
        if is_easy(fact, attribute) == easy
    ]
