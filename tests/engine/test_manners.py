"""The engine as a guest in other people's processes: quick to import, no global state, errors that say what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import LLM, OutOfBlocks, SamplingParams
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START

ROOT = Path(__file__).resolve().parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)

# What axpo needs and the engine must not, and what is slow to import and needed only for text and images.
ALONE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("axpo", "pydantic", "jsonschema", "rich", "tensorboard", "tomli_w", "jinja2"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import time
start = time.process_time()
import engine
assert time.process_time() - start < 5, "seconds of CPU to import torch and the engine"
assert "transformers" not in sys.modules
llm = engine.LLM(%r, kv_cache_bytes=1 << 22)
out = llm.generate([[20, 30, 40]], engine.SamplingParams(max_tokens=4, detokenize=False), use_tqdm=False)
assert len(out[0].outputs[0].token_ids) > 0
assert "transformers" not in sys.modules, "token ids need no tokenizer"
"""


def test_the_engine_alone_needs_nothing_of_axpo(text_checkpoint: Path) -> None:
    code = ALONE % str(text_checkpoint)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torchs_defaults_and_seeds_are_left_alone(vl_checkpoint: Path) -> None:
    before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads())
    torch.manual_seed(11)
    state = torch.get_rng_state()
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, dtype=torch.bfloat16)
    llm.generate([[20, 30, 40]], SamplingParams(n=2, max_tokens=6, ignore_eos=True), use_tqdm=False)
    llm.sleep(level=2)
    llm.wake_up()
    llm.reload_weights()
    assert torch.equal(torch.get_rng_state(), state)
    after = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads())
    assert after == before
    assert torch.nn.Linear(2, 2).weight.dtype == torch.float32  # and what is made afterwards is ordinary
    torch.nn.Linear(2, 2)(torch.ones(2)).sum().backward()


def test_two_engines_in_a_process_do_not_meet(vl_checkpoint: Path, text_checkpoint: Path) -> None:
    paths = (vl_checkpoint, text_checkpoint)
    prompts = [[20 + i, 30, 40 + i] for i in range(4)]
    expected = [LLM(path, kv_cache_bytes=1 << 22).generate(prompts, GREEDY, use_tqdm=False) for path in paths]
    llms = [LLM(path, kv_cache_bytes=1 << 22) for path in paths]
    sequences = [[llm.open(prompt) for prompt in prompts] for llm in llms]
    for llm, mine in zip(llms, sequences, strict=True):
        for sequence in mine:
            llm.submit(sequence, GREEDY)
    while any(llm.scheduler.has_work for llm in llms):  # turn by turn
        for llm in llms:
            llm.step()
    llms[0].sleep(level=2)
    for outputs, mine in zip(expected, sequences, strict=True):
        tokens = [list(sequence.token_ids[3:]) for sequence in mine]
        assert tokens == [output.outputs[0].token_ids for output in outputs]
    assert llms[1].generate(prompts, GREEDY, use_tqdm=False)[0].outputs == expected[1][0].outputs


def test_errors_say_what_to_do(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    with pytest.raises(ValueError, match=r"1025 tokens are more than the model's context of 1024; shorten"):
        llm.open([9] * 1025)
    pads = [VISION_START, *[IMAGE] * 3, VISION_END]
    with pytest.raises(ValueError, match="3 image placeholders for 0 images; write one an image"):
        llm.open(pads)
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.open([])
    with pytest.raises(ValueError, match="token id 320 is outside the vocabulary of 320"):
        llm.open([320])
    sequence = llm.open([9] * 1000)
    with pytest.raises(ValueError, match="1030 tokens are more than the model's context"):
        sequence.extend([9] * 30)
    sequence.close()
    sequence.close()
    for use in (lambda: llm.run([sequence], GREEDY), lambda: sequence.fork(), lambda: sequence.extend([9])):
        with pytest.raises(RuntimeError, match="the sequence is closed; open or fork a new one"):
            use()
    assert llm.stats()["blocks_used"] == 0


def test_a_pool_that_one_sequence_exhausts_is_an_error_and_stays_usable(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=LLM(vl_checkpoint, kv_cache_bytes=1 << 22).kv.bytes_per_block * 4)
    with pytest.raises(OutOfBlocks, match=r"of 80 tokens does not fit the KV cache of 4 blocks of 16 tokens; raise"):
        llm.generate([[9] * 80], GREEDY, use_tqdm=False)
    assert not llm.scheduler.has_work and llm.stats()["blocks_used"] == 0
    assert len(llm.generate([[9] * 40], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


def test_too_many_image_tokens(vl_checkpoint: Path) -> None:
    from PIL import Image

    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    images = [Image.new("RGB", (64, 64))] * 18  # 64 tokens each, in a context of 1024
    with pytest.raises(ValueError, match=r"1152 tokens, 1152 of them of images, are more than .* smaller images"):
        llm.open({"prompt_token_ids": [IMAGE] * 18, "multi_modal_data": {"image": images}})
    assert not llm.sequences
