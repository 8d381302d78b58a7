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

from engine.models import ModelConfig, Qwen3VL

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = ("F64", "F32", "F16", "BF16")
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
    """Compares names, shapes and dtypes with a checkpoint directory, reading headers (and a head that should be tied).

    Raises as `load_weights`.
    """
    missing = set(parameters)
    unexpected = []
    for name, stored in stored_tensors(path):
        found, dtype = list(stored.get_shape()), stored.get_dtype()
        del stored  # and with it its mapping, before the next one
        if name not in parameters:
            if not name.endswith("rotary_emb.inv_freq"):  # older exports have it; config.json says it
                unexpected.append(name)
            continue
        wanted = list(parameters[name].shape)
        if found != wanted:
            raise ValueError(f"{path}: {name} has shape {found}, the config asks for {wanted}")
        if dtype not in STORED:
            raise ValueError(
                f"{path}: {name} is stored as {dtype}; the engine reads {', '.join(STORED)}: take a checkpoint that is "
                "not quantized"
            )
        missing.discard(name)
    if HEAD not in parameters and HEAD in unexpected:
        unexpected.remove(HEAD)
        _check_tied(path)
    if missing or unexpected:
        advice = ""
        if missing == {HEAD}:
            advice = "; if the head is the embedding, config.json must say tie_word_embeddings = true"
        raise ValueError(
            f"{path}: weights do not fit the config: {len(missing)} missing{_some(missing)}, "
            f"{len(unexpected)} unexpected{_some(unexpected)}{advice}"
        )


def _check_tied(path: str | Path) -> None:
    """A stored head must be the embedding where config.json says so: nobody can know which of two is meant."""
    files = {canonical_name(name): (file, name) for file, name in _names(path)}
    if EMBEDDING in files and not torch.equal(_read(*files[HEAD]), _read(*files[EMBEDDING])):
        raise ValueError(
            f"{path}: {HEAD} is stored and is not the embedding, but config.json says tie_word_embeddings = true; say "
            "false to use the stored head, or remove it from the weights"
        )


@torch.no_grad()
def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> set[str]:
    """Copies tensors by Hugging Face's names into `model`, in place; returns the names of its parameters that it wrote.

    A head that is tied may be among them, as in transformers' state dicts: then it must be the embedding.

    Raises:
        ValueError: a name or a shape that the model does not have, or no floating-point values.
    """
    parameters = dict(model.named_parameters())
    pairs: Any = tensors.items() if isinstance(tensors, Mapping) else tensors
    written = set()
    head: Tensor | None = None
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor) or tensor.is_meta or not tensor.is_floating_point():
            kind = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"weights: {name} is {kind}; give torch tensors of floating-point values")
        if name == HEAD and HEAD not in parameters:
            head = tensor
            continue
        parameter = parameters.get(canonical_name(name))
        if parameter is None or parameter.shape != tensor.shape:
            found = "is unknown" if parameter is None else f"must have shape {list(parameter.shape)}"
            raise ValueError(f"weights: {name}, of shape {list(tensor.shape)}, {found}")
        parameter.copy_(tensor)
        written.add(canonical_name(name))
    if head is not None and not torch.equal(head.to(parameters[EMBEDDING]), parameters[EMBEDDING]):
        raise ValueError(f"weights: {HEAD} is not the embedding, to which config.json ties it; leave it out")
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
    """Compares every shard with config.json, reading headers only: what is wrong is said before anything is loaded.

    Raises:
        FileNotFoundError, ValueError: as `load_weights` and `ModelConfig.from_pretrained`.
    """
    with torch.device("meta"):
        model = Qwen3VL(ModelConfig.from_pretrained(path))
    check_names(dict(model.named_parameters()), path)


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
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r}); fetch it again") from error
        files = [path / name for name in names]
    else:
        files = [path / SINGLE]
    for file in files:
        if not file.is_file():
            wanted = f"named in {INDEX} but missing" if index.is_file() else "missing"
            other = next(iter(sorted(path.glob("*.bin"))), None)
            advice = f"; {other.name} is another format: save it as safetensors by transformers" if other else ""
            raise FileNotFoundError(f"{file}: {wanted}; the checkpoint directory is incomplete{advice}")
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
    return f" ({head}{', …' if len(names) > 3 else ''})" if names else ""
