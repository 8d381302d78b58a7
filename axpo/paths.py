"""Where the embedded things are."""

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
