"""The suite's vocabulary: known words are tokens, any other letter or digit is one, so that it can be copied.

A name or a number is cut alike in the question, in the call, in what the tool shows and in the answer; but a number
that is also a place of perception (125, 250, …) is one token, and another one behind a space.
"""

import re
from collections.abc import Iterator

from axpo.tasks import teacher, text_teacher
from axpo.tasks.facts import FILE
from axpo.tasks.mini_tokenizer import ZOOM_PHRASES
from axpo.tasks.suite import TOOLS
from axpo.tasks.teacher import COORDINATES
from axpo.tasks.tokenizer import Vocabulary, phrases
from axpo.tools import tool_class

_PHRASES = (
    *ZOOM_PHRASES,
    '{"code": "',
    "print(",
    "import math;",
    "math.gcd(",
    "sum(map(int,str(",
    "sum(all(n%d for d in range(2,n)) for n in range(2,",
    '{"query": "',
    '", "max_results": ',
    f"file:///{FILE}#",
    "Traceback (most recent call last):",
    "SyntaxError: ",
    "NameError: name ",
)
_ERRORS = (
    "Error: arguments is a required property",
    "File cell line in module",
    "invalid syntax is not defined was never closed unterminated string literal detected at",
)


def suite_vocabulary() -> Vocabulary:
    """A prompt is about 40 tokens."""
    schemas = [tool_class(name).function() for name in TOOLS]
    words = sorted({word for text in _sentences() for word in re.findall(r"[A-Za-z]+", text)})
    places = "|".join(str(number) for number in COORDINATES[1:])
    units = (
        rf" ?\b(?:{'|'.join(words)})\b"
        # Places in perception's thoughts and boxes, and what a tile shows, as the mini model has them.
        rf"| (?:{places})(?!\d)|(?<!\d)(?:{places})(?!\d)| 0(?=[ ,\]])| \d(?=[.\n]|$)"
        r"|\n+|[\s\S]"
    )
    return Vocabulary(units, 4096, _corpus(), phrases(schemas, *_PHRASES))


def _sentences() -> Iterator[str]:
    yield from teacher.sentences()
    yield from text_teacher.sentences()
    yield from _ERRORS
    yield "system\nuser\nassistant\n\n"


def _corpus() -> Iterator[str]:
    yield from _sentences()
    for number in COORDINATES:
        yield f"[{number}, {number}] {number} "
