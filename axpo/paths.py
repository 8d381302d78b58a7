"""Where the embedded things are, and what is kept for other runs."""

import tempfile
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def model_directory(path: str) -> Path:
    """`model.path` of a recipe as a directory: 'mini' is the embedded checkpoint.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    directory = ASSETS / "mini" if path == "mini" else Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"model.path = {path!r}: no such directory; give 'mini' or a Hugging Face checkpoint")
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
