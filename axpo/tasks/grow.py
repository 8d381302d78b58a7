"""First weights of the suite's model: the mini model's, which sees and aims, under another vocabulary."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EMBEDDINGS = "model.language_model.embed_tokens.weight"
WEIGHTS = "model.safetensors"
_SEED = 20_260_702


def grow(source: Path, out: Path) -> int:
    """Adds weights to the directory `out`, of the same layers as `source`; returns how many tokens both know.

    A token of both vocabularies keeps its embedding; that of a new one is drawn from N(0, 1), as for fresh weights.

    Raises:
        ValueError: the two differ in more than their vocabulary.
    """
    shapes = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    for shape in shapes:
        for part in (shape["text_config"], shape):
            for field in [name for name in part if name.endswith("_id") or name in ("vocab_size", "dtype")]:
                del part[field]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{out}: its layers are not those of {source}; fresh weights are drawn by sft.from_scratch")
    known, wanted = (_vocabulary(folder) for folder in (source, out))
    weights = load_file(source / WEIGHTS)
    old = weights[EMBEDDINGS]
    new = torch.randn((len(wanted), old.shape[1]), generator=torch.Generator().manual_seed(_SEED))
    shared = sorted(wanted.keys() & known.keys())
    new[[wanted[token] for token in shared]] = old[[known[token] for token in shared]]
    save_file(weights | {EMBEDDINGS: new}, out / WEIGHTS, metadata={"format": "pt"})
    return len(shared)


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token to id, added tokens included."""
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return saved["model"]["vocab"] | {token["content"]: token["id"] for token in saved["added_tokens"]}
