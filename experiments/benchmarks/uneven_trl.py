"""Takes the steps of `uneven.py` by TRL's GRPOTrainer.

`uneven.py` starts this script in an environment with torch, transformers and trl.
"""

import argparse
import json
import tempfile
import time
from typing import Any

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="weights")
for option in ("prompts", "prompt", "cap", "vocab", "group", "warmup", "steps"):
    parser.add_argument(f"--{option}", type=int, required=True)
parser.add_argument("--batching", action="store_true", help="transformers' continuous batching")
o = parser.parse_args()

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

transformers.logging.set_verbosity_error()
disable_progress_bars()
torch.manual_seed(0)
words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, o.vocab)}
core = Tokenizer(models.WordLevel(words, unk_token="t2"))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", padding_side="left"
)
total = o.warmup + o.steps
ids = torch.randint(2, o.vocab, (total * o.prompts, o.prompt)).tolist()
data = Dataset.from_dict({"prompt": [" ".join(f"t{i}" for i in row) for row in ids]})
lengths: list[list[int]] = []
drawn: list[float] = []
updating: list[float] = []
ends: list[float] = []


def lower_half(completion_ids: list[list[int]], **_: Any) -> list[float]:
    drawn.append(time.perf_counter())
    lengths.append([len(c) for c in completion_ids])
    return [sum(t < o.vocab // 2 for t in c[:-1]) / max(len(c) - 1, 1) for c in completion_ids]


class Clock(transformers.TrainerCallback):
    def on_train_begin(self, *_: Any, **__: Any) -> None:
        ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        ends.append(time.perf_counter())


class Timed(trl.GRPOTrainer):
    def compute_loss(self, *args: Any, **options: Any) -> Any:
        updating.append(time.perf_counter())
        return super().compute_loss(*args, **options)


with tempfile.TemporaryDirectory() as folder:
    trainer = Timed(
        model=o.folder,
        reward_funcs=lower_half,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[Clock()],
        args=trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=o.prompts * o.group,
            num_generations=o.group,
            max_completion_length=o.cap,
            beta=0.05,
            loss_type="grpo",
            top_k=0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_steps=total,
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
            gradient_checkpointing=False,
            disable_dropout=True,
            shuffle_dataset=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_transformers_continuous_batching=o.batching,
        ),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
phases: dict[str, list[float]] = {"step": [], "gen": [], "score": [], "update": []}
for begun, got, learning, end in list(zip(ends, drawn, updating, ends[1:], strict=False))[o.warmup :]:
    for name, seconds in zip(phases, (end - begun, got - begun, learning - got, end - learning), strict=True):
        phases[name].append(seconds)
print(
    json.dumps(
        {
            "times": phases,
            "lengths": [n for step in lengths[o.warmup :] for n in step],
            "version": f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
        }
    )
)
