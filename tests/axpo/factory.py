"""Random rollouts, resamples and a tiny Qwen3-VL for the tests of the algorithm and the trainer."""

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from axpo.advantage import assign_credit, shaped_reward
from axpo.cli import resolve
from axpo.config import Algo, Config
from axpo.resample import Rule, find_candidates
from axpo.trajectory import OBSERVATION, PROMPT, SAMPLED, ToolCall, Trajectory
from engine.images import ImageInput
from engine.models import ModelConfig, Qwen3VL
from engine.positions import ImageSpan, place_image, positions

VISION_START, VISION_END, IMAGE, OPEN, CLOSE, END, THINK_END, FIRST_TEXT, VOCAB = 1, 2, 3, 4, 5, 6, 7, 8, 48
MERGE, PATCH_DIM = 2, 3 * 2 * 4 * 4


def text(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(FIRST_TEXT, VOCAB) for _ in range(rng.randint(low, high))]


def image(rng: random.Random) -> ImageInput:
    height, width = MERGE * rng.randint(1, 3), MERGE * rng.randint(1, 3)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(size=(height * width, PATCH_DIM))
    pixels = torch.from_numpy(noise.astype(np.float32))
    return ImageInput(pixels, (1, height, width), height * width // MERGE**2, rng.randbytes(16))


def image_tokens(picture: ImageInput) -> list[int]:
    return [VISION_START, *[IMAGE] * picture.num_tokens, VISION_END]


def mrope(tokens: list[int], images: list[ImageInput]) -> np.ndarray:
    spans: list[ImageSpan] = []
    index = 0
    for picture in images:
        index = tokens.index(IMAGE, index)
        spans.append(place_image(spans, index, picture.grid_thw, MERGE))
        index = spans[-1].stop
    return positions(spans, 0, len(tokens))


class _Draft:
    """Tokens with their roles and images, as the agent loop would append them."""

    def __init__(self, rng: random.Random, source: Trajectory | None = None, keep: int = 0):
        self.rng = rng
        self.tokens = source.tokens[:keep] if source else []
        self.roles = source.roles[:keep] if source else []
        pads = self.tokens.count(IMAGE)
        self.images: list[ImageInput] = []
        for picture in source.images if source else []:
            if sum(p.num_tokens for p in self.images) < pads:
                self.images.append(picture)
        self.calls = [call for call in source.tool_calls if call.end <= keep] if source else []

    def add(self, tokens: list[int], role: int) -> "_Draft":
        self.tokens = [*self.tokens, *tokens]
        self.roles = [*self.roles, *[role] * len(tokens)]
        return self

    def add_image(self, picture: ImageInput, role: int) -> "_Draft":
        self.images.append(picture)
        return self.add(image_tokens(picture), role)

    def call(self, tag_is_there: bool = False) -> "_Draft":
        start = len(self.tokens) - tag_is_there
        self.add([*([] if tag_is_there else [OPEN]), *text(self.rng, 1, 6), CLOSE], SAMPLED)
        self.calls.append(ToolCall("image_zoom_in", {"label": "x"}, True, None, 0, start, len(self.tokens)))
        self.add([END], SAMPLED).add(text(self.rng, 1, 3), OBSERVATION)
        self.add_image(image(self.rng), OBSERVATION).add(text(self.rng, 1, 3), OBSERVATION)
        return self

    def finish(self, template: dict, reward: float, source: Trajectory | None = None, fork: int = 0) -> Trajectory:
        self.add([*text(self.rng, 1, 5), END], SAMPLED)
        sampled = [role == SAMPLED for role in self.roles]
        logprobs = [-self.rng.expovariate(1.0) if s else None for s in sampled]
        entropies = [self.rng.expovariate(1.0) if s else None for s in sampled]
        if source:
            logprobs[:fork], entropies[:fork] = source.logprobs[:fork], source.entropies[:fork]
        return Trajectory(
            **template,
            tokens=self.tokens,
            roles=self.roles,
            loss_mask=[0] * len(self.tokens),
            logprobs=logprobs,
            entropies=entropies,
            advantages=[0.0] * len(self.tokens),
            reward=reward,
            status="answered",
            tool_calls=self.calls,
            confidence=None,
            text="…",
            images=self.images,
            positions=mrope(self.tokens, self.images),
        )


def random_group(
    rng: random.Random, group: int = 0, size: int = 4, tool_rate: float = 0.5, success_rate: float = 0.3
) -> list[Trajectory]:
    """N rollouts of one question, whose prompt shows one or two images."""
    prompt = _Draft(rng).add(text(rng, 2, 4), PROMPT)
    for _ in range(rng.randint(1, 2)):
        prompt.add_image(image(rng), PROMPT)
    prompt.add(text(rng, 2, 5), PROMPT)
    rollouts = []
    for index in range(size):
        draft = _Draft(rng).add(prompt.tokens, PROMPT)
        draft.images = list(prompt.images)
        draft.add([*text(rng, 2, 6), THINK_END], SAMPLED)
        if rng.random() < tool_rate:
            draft.call()
            if rng.random() < 0.5:
                draft.add(text(rng, 1, 3), SAMPLED).call()
        template = {
            "step": 1,
            "question_id": f"q{group}",
            "group": group,
            "id": f"{group}.{index}",
            "parent": None,
            "fork_token": None,
            "prompt_len": len(prompt.tokens),
        }
        rollouts.append(draft.finish(template, float(rng.random() < success_rate)))
    return rollouts


def random_resamples(
    rng: random.Random, source: Trajectory, count: int = 4, success_rate: float = 0.4, fork: int | None = None
) -> list[Trajectory]:
    """K continuations from `fork` on, by default one past the opening tag of the source's first call."""
    call = source.first_call
    if fork is None:
        assert call is not None
        fork = call.start + 1
    in_call = call is not None and fork == call.start + 1
    out = []
    for index in range(count):
        template = {
            "step": source.step,
            "question_id": source.question_id,
            "group": source.group,
            "id": f"{source.id}/{index}",
            "parent": source.id,
            "fork_token": fork,
            "prompt_len": source.prompt_len,
        }
        draft = _Draft(rng, source, fork)
        if fork == source.prompt_len:
            draft.add([*text(rng, 2, 6), THINK_END], SAMPLED)
        if in_call or rng.random() < 0.5:
            draft.call(tag_is_there=in_call)
        out.append(draft.finish(template, float(rng.random() < success_rate), source, fork))
    return out


RESAMPLING = ("mini", "no-prefix-fix", "no-tool-target", "arpo", "no-prefix-credit", "merged-group", "random-rank")
"""The recipes that resample: AXPO, then what compares with it."""


def algo_of(recipe: str, group_size: int = 4, resamples: int = 3) -> Algo:
    """The algorithm of an ablation's recipe over recipe mini, with small groups."""
    options = [f"--algo.group_size={group_size}", f"--algo.resamples_per_prefix={resamples}"]
    return resolve(Config, ["mini", recipe, *options], recipe="mini").algo


def random_step(seed: int, algo: Algo, groups: int = 3) -> tuple[list[list[Trajectory]], dict[str, list[Trajectory]]]:
    """Groups and resamples of some of the candidates that the algorithm would take; no credit yet."""
    rng = random.Random(seed)
    made = [random_group(rng, group, algo.group_size, success_rate=rng.choice([0.0, 0.3])) for group in range(groups)]
    rule = Rule(algo.trigger, algo.fork_at, THINK_END, algo.entropy_window)
    resamples = {}
    for c in find_candidates(made, rule):
        if rng.random() < 0.6:
            source = made[c.group][c.rollout]
            resamples[c.source] = random_resamples(rng, source, algo.resamples_per_prefix, fork=c.fork_token)
    return made, resamples


def credit(groups: list[list[Trajectory]], resamples: dict[str, list[Trajectory]], algo: Algo) -> None:
    """As axpo.train gives it."""
    shape = partial(
        shaped_reward,
        max_new_tokens=1000,
        buffer=algo.overlong_buffer,
        penalty=algo.overlong_penalty,
        tool_reward=algo.tool_reward,
    )
    assign_credit(
        groups,
        resamples,
        eps=algo.std_eps,
        shape=shape,
        prefix_reward=algo.prefix_reward,
        mask_failed_suffix=algo.mask_failed_suffix,
        mask_recovered_suffix=algo.mask_recovered_suffix,
        merge=algo.merge_continuations,
        drop_equal=algo.drop_equal_groups,
    )


def alone(trajectory: Trajectory) -> Trajectory:
    """The same trajectory as an independent sequence: what packing must not change."""
    return replace(trajectory, parent=None, fork_token=None, loss_mask=list(trajectory.loss_mask))


def write_checkpoint(path: Path, seed: int = 0, tie: bool = True, vision: bool = True) -> Path:
    """A random Qwen3-VL of two layers that reads the vocabulary above; a Qwen3 without vision."""
    path.mkdir(parents=True)
    text_config = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = {
        "model_type": "qwen3_vl",
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_id": IMAGE,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "tie_word_embeddings": tie,
    }
    if not vision:
        config = {"model_type": "qwen3", "tie_word_embeddings": tie, **text_config}
    (path / "config.json").write_text(json.dumps(config))
    model = Qwen3VL(ModelConfig.from_pretrained(path))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in model.state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        state[name] = 1 + 0.1 * noise if "norm" in name else noise / parameter.shape[-1] ** 0.5
    save_file(state, path / "model.safetensors")
    return path


def text_only(group: list[Trajectory]) -> list[Trajectory]:
    """The same rollouts with text where their images were."""
    out = []
    for trajectory in group:
        tokens = [FIRST_TEXT if token == IMAGE else token for token in trajectory.tokens]
        out.append(replace(trajectory, tokens=tokens, images=[], positions=mrope(tokens, [])))
    return out
