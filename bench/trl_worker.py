"""TRL's GRPOTrainer on the questions of bench/trl_step.py: a program of its own, in an environment of its own.

    python trl_worker.py JOB.json RESULT.json

Imports nothing of this repository but what an answer is, by its file.
"""

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch, transformers, trl, datasets = map(importlib.import_module, ("torch", "transformers", "trl", "datasets"))
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)

    processor = _processor(job["model"])
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(job["model"], dtype=torch.float32)
    config = model.config
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    answers = _module(job["answers"])

    def reward(completions: list, answer: list[str], **_: Any) -> list[float]:
        # The prompt opened <think>, and special tokens are dropped from the text that a reward function gets.
        texts = [completion[0]["content"] for completion in completions]
        given = [answers.final_answer(_text(text)) for text in texts]
        return [
            float(said is not None and answers.normalise(said) == answers.normalise(wanted))
            for said, wanted in zip(given, answer, strict=True)
        ]

    rows = datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": row["question"]}] for row in job["questions"]],
            "images": [[row["image"]] for row in job["questions"]],
            "answer": [row["answer"] for row in job["questions"]],
        }
    ).cast_column("images", datasets.Sequence(datasets.Image()))
    rollouts = job["questions_per_step"] * job["group_size"]
    accumulation = rollouts // job["batch"]
    arguments = trl.GRPOConfig(
        output_dir=job["directory"],
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        num_generations=job["group_size"],
        max_completion_length=job["max_new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        generation_kwargs={"suppress_tokens": banned},
        beta=job["kl_coef"],
        epsilon=0.2,
        epsilon_high=0.4,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    clock = _clock(transformers)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=rows,
        processing_class=processor,
        callbacks=[clock],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    result = {
        "seconds": [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)],
        "cpu": [after - before for before, after in zip(clock.cpu, clock.cpu[1:], strict=False)],
        "sampled": [entry["completions/mean_length"] for entry in logs],
        "reward": [entry["reward"] for entry in logs],
        "prompt": trainer._tokenize_prompts([_messages(job["questions"][0])])[0][0],
        "versions": {module.__name__: module.__version__ for module in (trl, transformers, torch)},
    }
    Path(result_file).write_text(json.dumps(result))


def _clock(transformers: Any) -> Any:
    class Clock(transformers.TrainerCallback):
        """The moment of the first step's begin and of every step's end, and the processors' seconds until then."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.cpu: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())
            self.cpu.append(time.process_time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(time.perf_counter())
            self.cpu.append(time.process_time())

    return Clock()


def _processor(path: str) -> Any:
    """transformers' processor without its video part, which needs torchvision."""
    transformers = importlib.import_module("transformers")
    base = importlib.import_module("transformers.models.qwen3_vl.processing_qwen3_vl").Qwen3VLProcessor
    images = importlib.import_module("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

    class ImagesOnly(base):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = transformers.AutoTokenizer.from_pretrained(path, padding_side="left")
    image_processor = images.Qwen2VLImageProcessorPil.from_pretrained(path)
    return ImagesOnly(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


def _messages(question: dict) -> list[dict]:
    image = importlib.import_module("PIL.Image").open(question["image"])
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question["question"]}]
    return [{"role": "user", "content": parts}]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location("answers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
