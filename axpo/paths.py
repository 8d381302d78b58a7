"""Where the embedded things are, and what is kept for other runs."""

import tempfile
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


MODELS = ("mini", "suite/base", "suite/teacher")
"""Names of the embedded checkpoints."""


def model_directory(path: str) -> Path:
    """`model.path` of a recipe as a directory; the names of `MODELS` are those in the package.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    directory = ASSETS / path if path in MODELS else Path(path).expanduser()
    if not directory.is_dir():
        names = ", ".join(map(repr, MODELS))
        raise FileNotFoundError(
            f"model.path = {path!r}: no such directory; give {names} or the directory of a Hugging Face checkpoint, "
            "which `hf download` fetches"
        )
    return directory


def documents_directory(path: str) -> Path:
    """`search.path` of a recipe as a directory: 'facts' are the documents of the embedded suite.

    Raises:
        ValueError: it is empty, or there is no such directory.
    """
    if path == "facts":
        from axpo.tasks.facts import facts_directory

        return facts_directory()
    if not path:
        raise ValueError(
            "search.path = '': search.provider 'local' needs a folder of documents; set search.path, 'facts' for those "
            "of the embedded suite"
        )
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise ValueError(f"search.path = {path!r}: no such folder")
    return directory


def cache_directory(path: str, name: str) -> Path:
    """A folder to keep answers of a service in: `path`, or where it is empty the user's cache folder of that name.

    A temporary one where that cannot be made: a cache is no reason to stop.
    """
    directory = Path(path).expanduser() if path else Path.home() / ".cache" / "axpo" / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix=f"axpo-{name}-"))
    return directory
