"""Tools that the policy may call. `get_tools(["image_zoom_in"])` makes them; `Tool` is what a new one derives from."""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from PIL import Image

from axpo.tools.schema import surely_valid

if TYPE_CHECKING:
    from axpo.config import Config


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gave: `text` and `images` are shown to the model; `error` is None exactly when `ok`.

    timed_out: it failed because its time was up. seconds: how long it took, None of a call that reached no tool.
    """

    ok: bool
    text: str = ""
    images: list[Image.Image] = field(default_factory=list)
    error: str | None = None
    timed_out: bool = False
    seconds: float | None = None

    @classmethod
    def failure(cls, error: str, *, timed_out: bool = False) -> "ToolResult":
        """A failed call; the model reads the same sentence as the log."""
        return cls(ok=False, text=f"Error: {error}", error=error, timed_out=timed_out)


class Tool(ABC):
    """One function that the model may call. Subclasses set the class variables and write `run`.

    A tool without state serves every trajectory. One with state (an interpreter) returns a fresh object from `session`,
    which the agent loop calls once a trajectory, and gives up its resources in `close`.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    parameters: ClassVar[dict[str, Any]]  # JSON schema of the arguments
    inline: ClassVar[bool] = False
    """Far quicker than a decode step: called on the engine's thread, so that batches do not depend on thread timing."""

    @classmethod
    def function(cls) -> dict[str, Any]:
        """The OpenAI function dict that the chat template renders."""
        function = {"name": cls.name, "description": cls.description, "parameters": cls.parameters}
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        return self.function()

    def session(self) -> "Tool":
        return self

    def close(self) -> None:  # noqa: B027 - a tool without state has nothing to give up
        """Gives up what `session` acquired."""

    def call(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        """Checks the arguments against the schema, then runs.

        `images` are all images of the conversation so far, earlier crops included. What the model got wrong comes back
        as a failed result; an exception is a fault of the tool itself.
        """
        if (problem := self._argument_problem(arguments)) is not None:
            return ToolResult.failure(problem)
        return self.run(arguments, images)

    @abstractmethod
    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        """Does the work; `arguments` are valid by the schema."""

    @cached_property
    def _validator(self) -> Draft202012Validator:
        Draft202012Validator.check_schema(self.parameters)
        return Draft202012Validator(self.parameters)

    def _argument_problem(self, arguments: Mapping[str, Any]) -> str | None:
        if surely_valid(self.parameters, arguments):
            return None
        error = best_match(self._validator.iter_errors(dict(arguments)))
        if error is None:
            return None
        where = ".".join(str(part) for part in error.absolute_path) or "arguments"
        value = json.dumps(error.instance, default=str)
        shown = value if len(value) <= 80 else value[:77] + "..."
        if error.validator in ("required", "additionalProperties"):
            return f"{where}: {error.message}"
        return f"{where} is {shown}: {_RULES.get(str(error.validator), error.message)}".replace(
            "{}", json.dumps(error.validator_value)
        )


# The rule that was broken, in words; {} is what the schema asks for.
_RULES = {
    "type": "it must be of type {}",
    "minItems": "it needs at least {} items",
    "maxItems": "it takes at most {} items",
    "minimum": "it must be at least {}",
    "maximum": "it must be at most {}",
}


def get_tools(names: Iterable[str], options: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Tool]:
    """Makes tools by name, in the order given; `options[name]` are keyword arguments of that tool's constructor.

    A name of ours, or "package.module:Class" for a tool of your own, which derives from `Tool`.

    Raises:
        ValueError: no such tool, two of one name, or a tool that cannot work on this machine.
    """
    tools: dict[str, Tool] = {}
    for name in names:
        tool = tool_class(name)(**(options or {}).get(name, {}))
        if tool.name in tools:
            raise ValueError(f"rollout.tools: two tools are called {tool.name!r}")
        tools[tool.name] = tool
    return tools


def tool_class(name: str) -> type[Tool]:
    """The class behind a name or an import path; ValueError when there is none."""
    path = TOOLS.get(name, name)
    module, _, attribute = path.partition(":")
    if not attribute:
        known = ", ".join(sorted(TOOLS))
        raise ValueError(f"rollout.tools: no tool {name!r}; there is: {known}; your own: 'package.module:Class'")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"rollout.tools: {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Tool)):
        raise ValueError(f"rollout.tools: {name!r} is not a class that derives from axpo.tools.Tool")
    return found


def tool_options(config: "Config") -> dict[str, dict[str, Any]]:
    """What a run's configuration says of its tools, as `get_tools` takes it."""
    return {
        "python": config.python.model_dump(),
        "tavily-search": config.search.model_dump(),
        "image_search": config.image_search.model_dump(),
    }


TOOLS = {
    "image_zoom_in": "axpo.tools.image_zoom_in:ImageZoomIn",
    "image_search": "axpo.tools.image_search:ImageSearch",
    "python": "axpo.tools.python:Python",
    "tavily-search": "axpo.tools.search:Search",
}
"""Where a tool's class is, by its name; imported when it is wanted."""
