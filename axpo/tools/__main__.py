"""One tool call as a trajectory would make it: `python -m axpo.tools call NAME 'JSON' [--image FILE …]`.

Prints {ok, text, images, error, seconds} as JSON; pictures that come back are written to --out and named in `images`.
`python -m axpo.tools list` shows what there is. Settings are a recipe's fields: --python.sandbox none.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from axpo.cli import exit_with, resolve
from axpo.config import Config


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="axpo.tools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="the tools and their schemas, one JSON object a line")
    call = verbs.add_parser("call", help="run one call")
    call.add_argument("name", help="a tool's name, or package.module:Class")
    call.add_argument("arguments", help="the call's arguments, a JSON object")
    call.add_argument("--image", type=Path, action="extend", nargs="+", default=[], help="the conversation's images")
    call.add_argument("--out", type=Path, help="folder for pictures that come back; made if it is missing")
    args, fields = parser.parse_known_args()
    if args.verb == "list":
        list_tools()
        return
    try:
        answer = run_call(args.name, args.arguments, args.image, args.out, fields)
    except (ValueError, OSError) as error:
        exit_with("axpo.tools", error)
    print(json.dumps(answer, ensure_ascii=False))
    sys.exit(0 if answer["ok"] else 1)


def list_tools() -> None:
    from axpo.tools import TOOLS, tool_class

    for name in TOOLS:
        tool = tool_class(name)
        print(json.dumps({"name": name, "description": tool.description, "parameters": tool.parameters}))


def run_call(name: str, arguments: str, images: list[Path], out: Path | None, fields: list[str]) -> dict[str, Any]:
    """The printed object.

    Raises:
        ValueError, OSError: an argument of the command is wrong. What the call's own arguments get wrong is its answer.
    """
    from axpo.images import load_image
    from axpo.tools import get_tools, tool_options

    try:
        call = json.loads(arguments)
    except ValueError as error:
        raise ValueError(f"the arguments of {name} are not JSON: {error}") from error
    if not isinstance(call, dict):
        raise ValueError(f"the arguments of {name} are {type(call).__name__}; give a JSON object")
    config = resolve(Config, fields, recipe="mini")
    pictures = [load_image(path) for path in images]
    (tool,) = get_tools([name], tool_options(config)).values()
    session = tool.session()
    begun = time.perf_counter()
    result = session.call(call, pictures)
    seconds = time.perf_counter() - begun
    session.close()
    tool.close()
    names = []
    for number, picture in enumerate(result.images):
        folder = out or Path.cwd()
        folder.mkdir(parents=True, exist_ok=True)
        names.append(str(folder / f"{tool.name}_{number}.png"))
        picture.save(names[-1])
    return {"ok": result.ok, "text": result.text, "images": names, "error": result.error, "seconds": round(seconds, 4)}


if __name__ == "__main__":
    main()
