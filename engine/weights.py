"""Hugging Face safetensors in and out."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copies a checkpoint directory into `model`, in place, one tensor at a time, cast to the parameters' dtype.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
        ValueError: a shard is truncated or not safetensors, or keys or shapes do not fit the model.
    """
    parameters = dict(model.named_parameters())
    check_names(parameters, path)
    for name, tensor in read_tensors(path):
        if name in parameters:
            parameters[name].copy_(tensor)
        del tensor  # and with it its mapping, before the next one


def check_names(parameters: Mapping[str, Tensor], path: str | Path) -> None:
    """Compares names and shapes with a checkpoint directory, reading headers only. Raises as `load_weights`."""
    missing = set(parameters)
    unexpected = []
    for name, stored in stored_tensors(path):
        found = list(stored.get_shape())
        del stored  # and with it its mapping, before the next one
        if name not in parameters:
            unexpected.append(name)
            continue
        wanted = list(parameters[name].shape)
        if found != wanted:
            raise ValueError(f"{path}: {name} has shape {found}, the config asks for {wanted}")
        missing.discard(name)
    unexpected = [name for name in unexpected if name != HEAD]  # of a tied model: it is the embedding
    if missing or unexpected:
        raise ValueError(
            f"{path}: weights do not fit the config: {len(missing)} missing {_some(missing)}, "
            f"{len(unexpected)} unexpected {_some(unexpected)}"
        )


@torch.no_grad()
def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copies tensors by Hugging Face's names into `model`, in place; returns the names of its parameters that it wrote.

    A tied model has no head of its own, and the one of a state dict is passed over: it is the embedding.

    Raises:
        ValueError: a name or a shape that the model does not have.
    """
    parameters = dict(model.named_parameters())
    pairs: Any = tensors.items() if isinstance(tensors, Mapping) else tensors
    written = set()
    for name, tensor in pairs:
        if name == HEAD not in parameters and tensor.shape == parameters[EMBEDDING].shape:
            continue
        parameter = parameters.get(canonical_name(name))
        if parameter is None or parameter.shape != tensor.shape:
            found = "is unknown" if parameter is None else f"must have shape {list(parameter.shape)}"
            raise ValueError(f"weights: {name}, of shape {list(tensor.shape)}, {found}")
        parameter.copy_(tensor)
        written.add(canonical_name(name))
    return written


def read_tensors(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yields (parameter name of `Qwen3VL`, tensor) over all shards; files are memory-mapped, each tensor read once.

    Pages that were read count as this process's memory until their mapping ends, so each tensor has a mapping of its
    own, which ends with it: loading takes the memory of the model and of the largest tensor, not of a second model.
    """
    for file, name in _names(path):
        yield canonical_name(name), _read(file, name)


def _names(path: str | Path) -> Iterator[tuple[Path, str]]:
    for file in shards(path):
        with _open(file) as reader:
            names = list(reader.keys())
        for name in names:
            yield file, name


def _read(file: Path, name: str) -> Tensor:
    with _open(file) as reader:
        return reader.get_tensor(name)


def stored_tensors(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yields (parameter name, slice) over all shards: `slice[a:b]` reads those rows, and only them, from the file.

    A slice is good until the next one is asked for, and has a mapping of its own, as in `read_tensors`.
    """
    for file, name in _names(path):
        with _open(file) as reader:
            yield canonical_name(name), reader.get_slice(name)


def check_weights(path: str | Path) -> None:
    """Opens every shard, reading headers only: what is missing or truncated is said before anything is loaded.

    Raises:
        FileNotFoundError, ValueError: as `load_weights`.
    """
    for file in shards(path):
        with _open(file):
            pass


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:  # an empty file cannot be mapped
        raise ValueError(f"{file}: truncated or not a safetensors file ({error}); fetch the shard again") from error


def shards(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint directory, all of which exist."""
    path = Path(path)
    index = path / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r})") from error
        files = [path / name for name in names]
    else:
        files = [path / SINGLE]
    for file in files:
        if not file.is_file():
            wanted = f"named in {INDEX} but missing" if index.is_file() else "missing"
            raise FileNotFoundError(f"{file}: {wanted}; the checkpoint directory is incomplete")
    return files


def canonical_name(name: str) -> str:
    """Maps the names of text-only Qwen3 and of older Qwen3-VL exports onto ours."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.language_model.", "model.visual.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def save_pretrained(state_dict: Mapping[str, Tensor], source: str | Path, out: str | Path) -> None:
    """Writes a Hugging Face directory: the weights, and `source`'s config, tokenizer, template and processor files.

    A text-only Qwen3 gets back its own parameter names. `out` appears whole or not at all.
    """
    source, out = Path(source), Path(out)
    text_only = json.loads((source / "config.json").read_text())["model_type"] == "qwen3"
    rename = (lambda name: name.replace("model.language_model.", "model.", 1)) if text_only else (lambda name: name)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and file.name != INDEX:
            shutil.copy2(file, temporary / file.name)
    tensors = {rename(name): tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    save_file(tensors, temporary / SINGLE, metadata={"format": "pt"})
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


def _some(names: list[str] | set[str]) -> str:
    head = ", ".join(sorted(names)[:3])
    return f"({head}{', …' if len(names) > 3 else ''})" if names else ""
