"""The engine as a guest in other people's processes: quick to import, no global state, errors that say what to do."""

import base64
import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, OutOfBlocks, RequestOutput, SamplingParams
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
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    images = [Image.new("RGB", (64, 64))] * 18  # 64 tokens each, in a context of 1024
    with pytest.raises(ValueError, match=r"1152 tokens, 1152 of them of images, are more than .* smaller images"):
        llm.open({"prompt_token_ids": [IMAGE] * 18, "multi_modal_data": {"image": images}})
    assert not llm.sequences


def texts(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_prompts_in_every_form_that_vllm_takes(text_checkpoint: Path) -> None:
    llm = LLM(text_checkpoint, kv_cache_bytes=1 << 22)
    ids = llm.processor.encode_text("hi")
    one = texts(llm.generate([ids], GREEDY, use_tqdm=False))
    assert len(one[0]) == 6
    for prompt in (
        "hi",
        ["hi"],
        ("hi",),
        ids,
        tuple(ids),
        np.array(ids),
        torch.tensor(ids),
        [np.int64(token) for token in ids],
        np.array([ids]),
        [torch.tensor(ids)],
        {"prompt": "hi"},
        {"prompt_token_ids": ids},
        {"prompt": None, "prompt_token_ids": np.array(ids), "multi_modal_data": None},
        {"prompt": "hi", "multi_modal_data": {"image": None}},
    ):
        assert texts(llm.generate(prompt, GREEDY, use_tqdm=False)) == one, repr(prompt)
    assert llm.generate([], GREEDY) == [] and llm.generate((), [GREEDY][:0]) == []
    mixed = llm.generate(["hi", ids, {"prompt": "hi"}], GREEDY, use_tqdm=False)
    assert texts(mixed) == one * 3
    assert [output.prompt for output in mixed] == ["hi", None, "hi"]
    assert [output.request_id for output in mixed] == ["0", "1", "2"] and all(output.finished for output in mixed)
    assert mixed[0].prompt_token_ids == ids
    assert llm.get_tokenizer().encode("hi", add_special_tokens=False) == ids


TEMPLATE = """{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}\
{% for part in m.content %}{% if part.type == 'image' %}<|image_pad|>{% else %}{{ part.text }}{% endif %}{% endfor %}\
{% endif %};{% endfor %}{{ tools | length if tools else '' }}{% if not think %}~{% endif %}\
{% if add_generation_prompt %}A:{% endif %}"""


def test_chats_as_openai_writes_them(vl_checkpoint: Path, tmp_path: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    image = Image.new("RGB", (32, 24), "red")
    image.save(tmp_path / "red.png")
    data = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}

    def chat(*parts: object, **options: Any) -> RequestOutput:
        messages: Any = [{"role": "user", "content": [*parts, {"type": "text", "text": "hi"}]}]
        messages += options.pop("more", [])
        return llm.chat(messages, GREEDY, use_tqdm=False, chat_template=TEMPLATE, **options)[0]

    forms = (
        {"type": "image", "image": image},
        {"type": "image", "image": str(tmp_path / "red.png")},
        {"type": "image_pil", "image_pil": image},
        {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/red.png"}},
        {"type": "image_url", "image_url": f"data:image/png;base64,{data}"},
    )
    said = [chat(form) for form in forms]
    assert {output.prompt for output in said} == {"user:<|image_pad|>hi;~A:"}
    assert all(output.outputs[0].token_ids == said[0].outputs[0].token_ids for output in said)
    assert said[0].prompt_token_ids.count(IMAGE) == llm.processor.image(image).num_tokens
    assert chat(add_generation_prompt=False).prompt == "user:hi;~"
    assert chat(tools=[tool], chat_template_kwargs={"think": True}).prompt == "user:hi;1A:"
    begun = [{"role": "assistant", "content": "so"}]
    continued = chat(more=begun, add_generation_prompt=False, continue_final_message=True)
    assert continued.prompt == "user:hi;assistant:so"
    called = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert "assistant:" in str(chat(more=called).prompt)
    both = llm.chat([[{"role": "user", "content": text}] for text in "ab"], GREEDY, False, chat_template=TEMPLATE)
    assert [output.prompt for output in both] == ["user:a;~A:", "user:b;~A:"]
    assert not llm.sequences


def test_engines_of_several_dtypes_in_threads_of_their_own(text_checkpoint: Path) -> None:
    llms = [
        LLM(text_checkpoint, dtype=dtype, attention=attention, kv_cache_bytes=1 << 22)
        for dtype, attention in (("float32", "ours"), ("bfloat16", "ours"), (torch.float16, "sdpa"))
    ]
    assert [llm.kv.data.dtype for llm in llms] == [torch.float32, torch.bfloat16, torch.float16]
    prompts = [[20 + i, 30, 40 + i] for i in range(4)]
    expected = [texts(llm.generate(prompts, GREEDY, use_tqdm=False)) for llm in llms]

    def run(llm: LLM) -> list[list[list[int]]]:
        return [texts(llm.generate(prompts, GREEDY, use_tqdm=False)) for _ in range(4)]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, llms)) == [[want] * 4 for want in expected]


def test_an_engine_that_is_dropped_gives_its_memory_back(text_checkpoint: Path) -> None:
    """At once, without the garbage collector: nothing of it refers back to it."""
    llm = LLM(text_checkpoint, kv_cache_bytes=1 << 22)
    llm.generate("hi", SamplingParams(n=2, max_tokens=4), use_tqdm=False)
    engine, arena = weakref.ref(llm), weakref.ref(llm.kv._arena)
    gc.disable()
    try:
        del llm
        assert engine() is None and arena() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be a whole number, at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be"),
        ({"max_num_seqs": -1}, "max_num_seqs=-1 must be"),
        ({"num_scheduler_steps": 0}, "num_scheduler_steps=0 must be"),
        ({"max_batch_tokens": 1.5}, "max_batch_tokens=1.5 must be"),
        ({"dtype": "auto"}, "dtype='auto': give one of float32, bfloat16, float16, float64"),
        ({"dtype": torch.int8}, "dtype=torch.int8: give one of"),
        ({"load_format": "safetensors"}, "load_format='safetensors': give one of auto, dummy"),
        ({"attention": "x"}, "attention='x' is not one of"),
    ],
)
def test_options_that_cannot_be(option: dict[str, Any], message: str, text_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(text_checkpoint, kv_cache_bytes=1 << 22, **option)


def test_a_name_of_vllms_is_refused_and_not_ignored(text_checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'model'"):
        LLM(model=text_checkpoint)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'prompt_logprobs'"):
        SamplingParams(prompt_logprobs=1)  # type: ignore[call-arg]
