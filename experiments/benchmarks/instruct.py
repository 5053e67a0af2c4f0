"""Times GRPO steps of a real instruct model: rollout, host reward, scoring, update.

    python -m experiments.benchmarks.instruct FOLDER seed_tasks.jsonl
    python -m experiments.benchmarks.instruct FOLDER seed_tasks.jsonl --dtype bfloat16 --json
    python -m experiments.benchmarks.instruct FOLDER seed_tasks.jsonl --lora-rank 0 16    # all weights, an adapter, in turns

FOLDER is a Hugging Face folder with a chat template, such as SmolLM2-135M-Instruct's; the tasks are those of Self-Instruct
(Wang et al. 2023). A step asks 8 prompts of at most 96 tokens with their template, draws 8 answers of at most 48 tokens to
each, and makes one update with a KL of .02 to the start in the loss; answers are packed (`packed_rows` 4). Reward: 1 for an
answer of one sentence of at most 20 words.

Run it on an idle machine.
"""

import time

from rlaif_jax.memory import keep_freed_memory

keep_freed_memory()  # as all scripts do

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from rlaif_jax.algorithms.advantages import GroupNormalised  # noqa: E402
from rlaif_jax.algorithms.optimizer import OptimizerConfig  # noqa: E402
from rlaif_jax.algorithms.ppo import PPOConfig  # noqa: E402
from rlaif_jax.data.prompts import prompt_batches  # noqa: E402
from rlaif_jax.data.tokenizers import HuggingFaceTokenizer, load_tokenizer  # noqa: E402
from rlaif_jax.feedback.sources import FunctionSource  # noqa: E402
from rlaif_jax.models.hf.files import load_model  # noqa: E402
from rlaif_jax.models.lora import LoRAConfig  # noqa: E402
from rlaif_jax.models.sampling import SamplingConfig  # noqa: E402
from rlaif_jax.parallel import JitRunner  # noqa: E402
from rlaif_jax.policies.text import TextPolicy  # noqa: E402
from rlaif_jax.programs import programs  # noqa: E402
from rlaif_jax.steps import step_data  # noqa: E402
from rlaif_jax.types import Frozen  # noqa: E402

PROMPTS, ANSWERS, PROMPT_LENGTH, ANSWER_LENGTH = 8, 8, 96, 48


def questions(path: Path, tokenizer: HuggingFaceTokenizer) -> list[dict[str, str]]:
    """Returns the tasks of a file that fit, each asked for one short sentence, in the tokenizer's chat template."""
    found = []
    for line in path.read_text().splitlines():
        task = json.loads(line)
        given = task["instances"][0]["input"]
        question = task["instruction"] + ("\n" + given if given else "") + " Answer in one short sentence."
        text = tokenizer.chat_text([{"role": "user", "content": question}])
        if len(tokenizer.encode(text)) <= PROMPT_LENGTH:
            found.append({"prompt": text})
    return found


def one_sentence(record: Any, answer: str) -> float:
    """Returns 1 for one sentence of at most 20 words, else 0."""
    return float(answer.endswith(".") and answer.count(".") == 1 and len(answer.split()) <= 20)


class Steps:
    """GRPO steps of one model, all of whose weights learn or an adapter.

    Args:
        folder: the model.
        tasks: a file of tasks.
        dtype: of the matrix products.
        packed_rows: see `PPOConfig`.
        lora_rank: of the adapter; 0: all weights learn.
    """

    def __init__(self, folder: Path, tasks: Path, dtype: Any, *, packed_rows: int, lora_rank: int) -> None:
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, HuggingFaceTokenizer), "only these have chat templates"
        model, params = load_model(folder, compute_dtype=dtype)
        lora = LoRAConfig(rank=lora_rank) if lora_rank else None
        config = PPOConfig(
            advantage=GroupNormalised(),
            answers_per_prompt=ANSWERS,
            kl_in="loss",
            kl_coef=0.02,
            num_epochs=1,
            num_minibatches=1,
            packed_rows=packed_rows,
            policy_optimizer=OptimizerConfig(learning_rate=1e-4 if lora else 5e-6, schedule="constant", eps=1e-8),
        )
        sampling = SamplingConfig(max_new_tokens=ANSWER_LENGTH)
        self.policy = TextPolicy(model, sampling, tokenizer.stop_ids, tokenizer.pad_id, lora)
        self.tokenizer, self.dtype, self.lora_rank = tokenizer, dtype, lora_rank
        algorithm = config.build(self.policy, None, steps=1)
        runner, pure = JitRunner(), programs(algorithm, self.policy)
        self.sample, self.prepare, self.update = (
            runner.map(pure.sample),
            runner.map(pure.prepare),
            runner.step(pure.step),
        )
        learns = params if lora is None else lora.init(jax.random.key(0), params)
        self.state = runner.init(algorithm.init, {"policy": learns}, np.uint32(0))
        frozen = Frozen(reference=params) if lora is None else Frozen(reference={}, base=params)
        self.frozen = runner.place(frozen)
        self.stream = prompt_batches(
            questions(tasks, tokenizer), tokenizer, batch_size=PROMPTS, seed=0, prompt_length=PROMPT_LENGTH
        )
        self.taken: list[dict[str, float]] = []

    def step(self) -> None:
        """Takes a step and notes what was measured.

        Raises:
            AssertionError: a loss was not finite, or sampler and trainer do not agree.
        """
        begun = time.perf_counter()
        batch = next(self.stream)
        replicated, data = (self.state.without_optimizer(), self.frozen), step_data(batch)
        rollout = jax.block_until_ready(self.sample(replicated, data.prompts))
        rolled = time.perf_counter()
        records = [record for record in batch.records for _ in range(ANSWERS)]
        judged = FunctionSource(one_sentence)(records, self.policy.texts(rollout, self.tokenizer), rollout)
        learned, _, _ = jax.block_until_ready(self.prepare(replicated, (data, rollout, judged)))
        scored = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.update(self.state, Frozen(base=self.frozen.base), learned))
        done = time.perf_counter()
        assert float(metrics["nonfinite"]) == 0, "a loss is not finite"
        gap = float(metrics["first/sampler_gap"])
        assert gap < self.policy.tolerance, f"sampler and trainer differ by {gap} nats a token"
        self.taken.append(
            {
                "step_s_median": done - begun,
                "gen_s_median": rolled - begun,
                "score_s_median": scored - rolled,
                "update_s_median": done - scored,
                "tokens": float(np.sum(rollout.response_mask)),
                "reward": float(np.mean(judged.values)),
                "gap": gap,
            }
        )

    def result(self, warmup: int) -> dict[str, Any]:
        """Returns what was measured after the first `warmup` steps (the keys of `--json`)."""
        timed, taken = self.taken[warmup:], self.taken
        medians = [name for name in timed[0] if name.endswith("median")]
        return {
            "system": "rlaif_jax-grpo-instruct",
            "dtype": self.dtype,
            "lora_rank": self.lora_rank,
            **{name: round(statistics.median(x[name] for x in timed), 2) for name in medians},
            "first_step_s": round(taken[0]["step_s_median"], 1),
            "mean_length": round(statistics.mean(x["tokens"] for x in timed) / PROMPTS / ANSWERS, 1),
            "rewards": [round(x["reward"], 3) for x in taken],
            "sampler_gap": max(x["gap"] for x in taken),
            "learned_gib": round(sum(x.nbytes for x in jax.tree.leaves(self.state)) / 2**30, 3),
            "frozen_gib": round(sum(x.nbytes for x in jax.tree.leaves(self.frozen)) / 2**30, 3),
            "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            "steps": len(timed),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model")
    parser.add_argument("tasks", type=Path, help="Self-Instruct's seed_tasks.jsonl")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--packed-rows", type=int, default=4)
    parser.add_argument(
        "--lora-rank",
        type=int,
        nargs="+",
        default=[0],
        help="of an adapter that learns (default 0: all weights do); several ranks take turns in one process",
    )
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps (default 1)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps (default 4)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    o = parser.parse_args(arguments)
    runs = [Steps(o.folder, o.tasks, o.dtype, packed_rows=o.packed_rows, lora_rank=rank) for rank in o.lora_rank]
    for _ in range(o.warmup + o.steps):
        for run in runs:
            run.step()
    for run in runs:
        result = run.result(o.warmup)
        print(json.dumps(result) if o.json else "\n".join(f"{name:>16}  {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
