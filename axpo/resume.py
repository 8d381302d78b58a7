"""What makes a run the same run: the settings and the data that a checkpoint was made with; imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

# What may differ on a resume, because it changes nothing that is computed. run.steps may only grow.
_FREE = ("run.name", "run.dir", "run.resume", "run.steps", "run.time_limit", "run.timeout_s")
_FREE_EVALUATE = ("eval.benchmarks", "eval.limit", "eval.repeats", "eval.k", "eval.out", "data.check_rows")
_FREE_MEMORY = ("rollout.kv_cache_bytes", "rollout.max_batch_tokens")
_FREE_SECTIONS = ("checkpoint", "log", "debug")
_WHY = {
    "model": "the checkpoint's weights and optimizer belong to that model",
    "data": "the checkpoint's cursor counts that data's questions",
    "run": "the order of the data and every sampled token follow from it",
    "eval": "evaluations before and after the change could not be compared",
}
_WHY_ELSE = "the steps behind the checkpoint would no longer continue the steps before it"


@dataclass(frozen=True, slots=True)
class Identity:
    """The settings that decide what is computed, by their dotted names, and the fingerprint of the training data."""

    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: BaseModel, data: Mapping[str, Any]) -> "Identity":
        return cls(fixed_settings(config.model_dump(mode="json")), dict(data))

    @property
    def config_hash(self) -> str:
        """SHA-256 of the settings: equal for two checkpoints that may continue each other."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def differences(self, before: "Identity") -> list[str]:
        """What keeps this run from continuing `before`: field, both values, reason; empty when nothing does."""
        problems = []
        if self.config_hash != before.config_hash:
            for name in sorted(self.settings.keys() | before.settings.keys()):
                then, now = before.settings.get(name), self.settings.get(name)
                if then != now:
                    problems.append(f"{name}: {then!r} before, {now!r} now; {_WHY.get(name.split('.')[0], _WHY_ELSE)}")
        if self.data != before.data:
            then, now = (_describe(data) for data in (before.data, self.data))
            problems.append(f"the training data: {then} before, {now} now; {_WHY['data']}")
        return problems


def fixed_settings(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{'section.field': value} of a dumped configuration or a parsed config.toml, without what a resume may change."""
    flat = {f"{s}.{name}": value for s, fields in sections.items() for name, value in fields.items()}
    free = _FREE + _FREE_EVALUATE + _FREE_MEMORY
    return {name: v for name, v in flat.items() if name not in free and name.split(".")[0] not in _FREE_SECTIONS}


def _describe(data: Mapping[str, Any]) -> str:
    if not data:
        return "not recorded"
    return f"task {data['task']}, {data['questions']} questions, content {data['sha256'][:12]}…"


def hash_files(paths: list[Path], *parts: str) -> str:
    """SHA-256 of texts and of the names and bytes of files, in this order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    for path in paths:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
