"""Takes a run of `experiments/instruct.py` by TRL's GRPOTrainer: the same model, prompts, rewards and number of samples.

    python -m experiments.benchmarks.instruct_trl models/smollm2 runs/instruct --weights lora --seed 0

It needs torch, trl and peft in addition to this package. It reads the prompts that `experiments/instruct.py` has written to
runs/instruct, writes the folder runs/instruct/trl-lora-0 with answers.jsonl, metrics.jsonl (a line a step) and summary.json,
and a later `experiments/instruct.py` lists it with its own runs.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from experiments.instruct import ANSWER_LENGTH, InstructConfig
from rlaif_jax.feedback.verifiers.constraints import Constraints
from rlaif_jax.recipes.improve import fluency

PARTS = 4  # of a step's answers, for scoring and update

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a Hugging Face folder")
parser.add_argument("runs", type=Path, help="the folder of experiments/instruct.py")
parser.add_argument("--weights", choices=("lora", "full"), default="lora")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=InstructConfig.steps)
parser.add_argument("--threads", type=int, default=2)
o = parser.parse_args()

disable_progress_bars()
transformers.logging.set_verbosity_error()
torch.set_num_threads(o.threads)
torch.manual_seed(o.seed)
settings = InstructConfig()
out = o.runs / f"trl-{o.weights}-{o.seed}"
out.mkdir()
tokenizer: Any = transformers.AutoTokenizer.from_pretrained(o.model, padding_side="left")
began = time.perf_counter()
rows: list[dict[str, Any]] = []


def read(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a file of prompts; constraints as text, for which a table of arrays has room."""
    found = [json.loads(line) for line in (o.runs / f"{name}.jsonl").read_text().splitlines()]
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "text": row["prompt"],
            "constraints": json.dumps(row["constraints"]),
        }
        for row in found
    ]


def reward(completions: list[Any], constraints: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Returns 1 for an answer that keeps its constraint, else 0."""
    kept = [
        float(Constraints().verify({"constraints": given}, said[0]["content"]))  # type: ignore[arg-type]
        for given, said in zip(constraints, completions)
    ]
    rows.append({"score": sum(kept) / len(kept), "length": sum(map(len, completion_ids)) / len(kept)})
    return kept


class Clock(transformers.TrainerCallback):
    """Notes the time of each step."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Writes the step's line."""
        rows[-1]["time/elapsed_s"] = time.perf_counter() - began
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": len(rows), **rows[-1]}) + "\n")


@torch.no_grad()
def answer(model: Any, held_out: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (prompt tokens, answer tokens) of an answer to each prompt, drawn as in training."""
    found = []
    for first in range(0, len(held_out), 64):
        part = [row["prompt"] for row in held_out[first : first + 64]]
        asked = tokenizer.apply_chat_template(
            part, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        drawn = model.generate(
            **asked, do_sample=True, temperature=settings.temperature, top_k=0, top_p=1.0, max_new_tokens=ANSWER_LENGTH
        )
        width = asked["input_ids"].shape[1]
        for prompt, mask, answered in zip(asked["input_ids"], asked["attention_mask"], drawn[:, width:]):
            ends = (answered == tokenizer.eos_token_id).nonzero()
            found.append((prompt[mask.bool()], answered[: int(ends[0]) + 1] if len(ends) else answered))
    return found


@torch.no_grad()
def logprobs(model: Any, answers: list[tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    """Returns the log-prob of each answer."""
    found = []
    for prompt, said in answers:
        logits = model(torch.cat([prompt, said])[None]).logits[0, len(prompt) - 1 : -1] / settings.temperature
        found.append(float(logits.log_softmax(-1).gather(1, said[:, None]).sum()))
    return np.array(found)


def text(said: torch.Tensor) -> str:
    """Returns an answer as text, without its end."""
    return str(tokenizer.decode(said, skip_special_tokens=True))


held_out = read("held_out")
lora = o.weights == "lora"
trainer = GRPOTrainer(
    model=o.model,
    reward_funcs=reward,
    args=GRPOConfig(
        output_dir=str(out / "trl"),
        use_cpu=True,
        bf16=False,
        fp16=False,
        # In parts: all answers of a step at once need more than 18 GB.
        per_device_train_batch_size=settings.prompts_per_step * settings.answers_per_prompt // PARTS,
        gradient_accumulation_steps=PARTS,
        num_generations=settings.answers_per_prompt,
        num_iterations=1,
        max_completion_length=ANSWER_LENGTH,
        beta=settings.kl_coef,
        loss_type="grpo",
        temperature=settings.temperature,
        top_p=1.0,
        top_k=0,
        learning_rate=settings.lora_rate if lora else settings.full_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=o.steps,
        seed=o.seed,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    ),
    train_dataset=Dataset.from_list(read("training")),
    processing_class=tokenizer,
    callbacks=[Clock()],
    peft_config=LoraConfig(
        r=settings.adapter.rank,
        lora_alpha=int(settings.adapter.alpha),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    if lora
    else None,
)
original = transformers.AutoModelForCausalLM.from_pretrained(o.model, dtype="float32").eval()
before = answer(original, held_out)
began = time.perf_counter()
trainer.train()
wall = time.perf_counter() - began
trained = trainer.model.eval()
after = answer(trained, held_out)
with open(out / "answers.jsonl", "w") as file:
    for row, first, second in zip(held_out, before, after):
        answers = [text(first[1]), text(second[1])]
        file.write(json.dumps({"prompt": row["text"], "answers": answers, "generators": ["before", "after"]}) + "\n")
tokens = np.array([[len(said) for _, said in answers] for answers in (before, after)]).T
reference = np.stack([logprobs(original, before), logprobs(original, after)], 1)
numbers = {
    "kl": float((logprobs(trained, after) - reference[:, 1]).mean()),
    **fluency(reference, tokens),
    "length_before": float(tokens[:, 0].mean()),
    "length_after": float(tokens[:, 1].mean()),
    "wall_s": round(wall, 1),
}
(out / "summary.json").write_text(json.dumps({"metrics": numbers}, indent=2))
print(json.dumps(numbers))
