"""Folders of results that an interrupted program goes on with: they keep the settings that results depend on."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from axpo.cli import read_recipe
from axpo.config import Config, to_toml
from axpo.distributed import barrier, rank


class OutFolderError(ValueError):
    """The folder cannot be written to, or holds results of other settings."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Of a file of results: OutFolderError where the file system refuses it, a full one for example."""
    try:
        yield
    except OSError as error:
        raise OutFolderError(
            f"{path} could not be written: {error.strerror}; make room there, or give another folder. The same "
            "command goes on with what is whole"
        ) from None


def open_folder(path: Path, config: Config, sections: Mapping[str, Collection[str]], field: str) -> None:
    """Makes the folder with its config.toml, or finds it with the same settings. All ranks call it.

    sections: those that results depend on, each with its fields that may differ. field: where `path` is from.

    Raises:
        OutFolderError: it holds results of other settings, the message names the first; or it cannot be made.
    """
    file = path / "config.toml"
    kept = read_recipe(str(file)) if file.exists() else {}
    now = config.model_dump(mode="json")
    for section in sections if kept else ():
        for name, value in now[section].items():
            before = kept.get(section, {}).get(name)
            if name not in sections[section] and before != value:
                raise OutFolderError(
                    f"{section}.{name} = {value!r}: {path} holds results of {before!r}; "
                    f"set it to that, or {field} to another folder"
                )
    barrier()
    if rank() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            file.write_text(to_toml(config), encoding="utf-8")
        except OSError as error:
            raise OutFolderError(f"{field} = {str(path)!r}: cannot be written to: {error.strerror}") from None
    barrier()
