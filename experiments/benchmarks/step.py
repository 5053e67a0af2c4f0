"""Times one step of PPO or GRPO through the product's own code: rollout, host reward, scoring, update.

    python -m experiments.benchmarks.step --algorithm ppo --work S
    python -m experiments.benchmarks.step --algorithm grpo --work M --json

The work is fixed so that other systems can be timed on the same work: a random Llama-shaped policy in float32
with untied embeddings, prompts of random ids, and answers that all run to the length limit. The reward is the
share of an answer's ids in the lower half of the vocabulary.

    work  layers x width x heads  SwiGLU  vocabulary  sequences a step  prompt + answer  untimed + timed steps
    S     4 x 256 x 8             1024    4096        64                32 + 64          2 + 6
    M     12 x 768 x 12           2048    32000       8                 64 + 64          1 + 3
    V     2 x 128 x 4             256     152000      32                16 + 32          1 + 3

PPO has one answer per prompt, a separate value model of the same size, 2 epochs x 2 minibatches, and KL
(0.05) to a reference model in the reward. GRPO has 8 answers per prompt, KL (0.05) in the loss, and one
update over the batch. Both use AdamW at 1e-6. Each run checks that each answer has its full length and that
each weight tensor changed.

`*_roofline` is the share that a phase reached of the speed that the ceilings of this machine allow
(`ceilings.py`, measured after the steps). Scoring and update are bounded by their matrix products; a rollout
also by reading the weights once per step, and the keys and values of all earlier tokens.

Run it on an idle machine; `compare.py` compares it with other systems.
"""

import time

from rlaif_jax.memory import keep_freed_memory

START = time.time()  # the first step's time counts from here: imports and compilation included
keep_freed_memory()  # as all scripts do

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from experiments.benchmarks.ceilings import Ceilings, measure  # noqa: E402
from experiments.benchmarks.costs import RolloutCost, rollout_cost, trained_flops  # noqa: E402
from experiments.benchmarks.works import WORKS, Work  # noqa: E402
from rlaif_jax.algorithms.advantages import GAE, GroupNormalised  # noqa: E402
from rlaif_jax.algorithms.optimizer import OptimizerConfig  # noqa: E402
from rlaif_jax.algorithms.ppo import PPO, PPOConfig  # noqa: E402
from rlaif_jax.data.prompts import PromptBatch  # noqa: E402
from rlaif_jax.feedback.sources import FunctionSource  # noqa: E402
from rlaif_jax.models.causal_lm import CausalLM  # noqa: E402
from rlaif_jax.models.decoder_config import DecoderConfig  # noqa: E402
from rlaif_jax.models.heads import ScalarModel  # noqa: E402
from rlaif_jax.models.sampling import SamplingConfig  # noqa: E402
from rlaif_jax.parallel import make_runner  # noqa: E402
from rlaif_jax.policies.text import TextPolicy  # noqa: E402
from rlaif_jax.programs import CompilationClock, programs  # noqa: E402
from rlaif_jax.steps import step_data  # noqa: E402
from rlaif_jax.train import TrainConfig  # noqa: E402
from rlaif_jax.types import Frozen, Params, Rollout, TrainState  # noqa: E402

GROUP = 8  # answers a prompt in GRPO
KL_COEF = 0.05


@dataclasses.dataclass(frozen=True)
class Words:
    """A tokenizer whose word i is `t<i>`. Without a stop token each answer runs to its length limit."""

    vocab_size: int
    pad_id: int = 0
    bos_id: None = None
    eos_id: int | None = None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Returns the tokens that end an answer."""
        return () if self.eos_id is None else (self.eos_id,)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the words of `ids`, separated by spaces."""
        del skip_special  # there are none
        return " ".join(f"t{i}" for i in ids)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a work: the loop's, the algorithm's, and how answers are drawn."""

    train: TrainConfig
    ppo: PPOConfig
    sampling: SamplingConfig

    def build(self, model: CausalLM, critic: ScalarModel | None, tokenizer: Any) -> PPO:
        """Returns the algorithm on a text policy of `model`."""
        policy = TextPolicy(model, self.sampling, tokenizer.stop_ids, tokenizer.pad_id)
        return self.ppo.build(policy, critic, steps=self.train.steps)


def settings(work: Work, algorithm: str, behaviour: str) -> Settings:
    """Returns the settings of a work for `ppo` or `grpo`."""
    # Without warm-up or decay, and with the usual epsilon, as the systems compared with have it.
    optimizer = OptimizerConfig(learning_rate=1e-6, schedule="constant", eps=1e-8)
    common: dict[str, Any] = {
        "kl_coef": KL_COEF,
        "behaviour": behaviour,
        "policy_optimizer": optimizer,
        "value_optimizer": optimizer,
    }
    if algorithm == "grpo":
        common |= {"advantage": GroupNormalised(), "answers_per_prompt": GROUP, "kl_in": "loss"}
        ppo = PPOConfig(num_epochs=1, num_minibatches=1, **common)
    else:
        ppo = PPOConfig(advantage=GAE(), kl_in="reward", num_epochs=2, num_minibatches=2, **common)
    train = TrainConfig(prompts_per_step=work.batch // ppo.answers_per_prompt, prompt_length=work.prompt)
    return Settings(train, ppo, SamplingConfig(max_new_tokens=work.response))


def decoder(work: Work) -> DecoderConfig:
    """Returns the random Llama shape."""
    return DecoderConfig(
        vocab_size=work.vocab,
        num_layers=work.layers,
        width=work.width,
        num_heads=work.heads,
        num_kv_heads=work.heads,
        head_dim=work.width // work.heads,
        mlp_width=work.hidden,
        context_length=256,
        norm_eps=1e-6,
        tie_embeddings=False,
    )


def prompt_batches(work: Work, count: int, seed: int) -> Iterator[PromptBatch]:
    """Yields batches of `count` prompts of uniformly random ids without padding, endlessly."""
    rng = np.random.default_rng(seed)
    mask = np.ones((count, work.prompt), bool)
    first = 0
    while True:
        tokens = rng.integers(0, work.vocab, mask.shape, dtype=np.int32)
        yield PromptBatch(
            tokens=tokens,
            mask=mask,
            uid=np.arange(first, first + count, dtype=np.uint32),
            records=tuple({"prompt": ""} for _ in range(count)),
        )
        first += count


def matmul_flops(work: Work, config: Settings) -> dict[str, float]:
    """Returns the FLOPs of the matrix products of one step by phase.

    A backward pass counts as two forward passes. What XLA computes twice counts once.
    """
    critics = int(config.ppo.advantage.needs_critic)
    trained, heads = trained_flops(work, full_lengths(work, config))
    policy_again = (config.ppo.behaviour == "recompute") * (trained + heads)
    rollout = full_length(work, config)
    return {
        "gen": rollout.prefill + rollout.decode + rollout.attention,
        "score": trained + heads + critics * trained + policy_again,
        "update": 3.0 * config.ppo.num_epochs * (trained + heads + critics * trained),
    }


def full_lengths(work: Work, config: Settings) -> np.ndarray:
    """Returns the lengths [prompts, K] of a step's answers, all at the limit."""
    return np.full((config.train.prompts_per_step, config.ppo.answers_per_prompt), work.response)


def full_length(work: Work, config: Settings) -> RolloutCost:
    """Returns the cost of a step's rollout in which each answer has its full length."""
    return rollout_cost(work, full_lengths(work, config))


def rooflines(work: Work, config: Settings, took: dict[str, float], ceilings: Ceilings) -> dict[str, float]:
    """Returns the share of the roofline that each phase reached in `took` seconds; 1 is the least possible time."""
    least = {name: flops / ceilings.flops for name, flops in matmul_flops(work, config).items()}
    least["gen"] = full_length(work, config).seconds(ceilings)
    return {f"{name}_roofline": round(seconds / took[name], 3) for name, seconds in least.items()}


def thin(x: Any) -> np.ndarray:
    """Copies about 65k elements, spread over the whole tensor (all rows of an embedding), to the host."""
    flat = np.asarray(x).ravel()
    return flat[:: max(1, flat.size // 65536)].copy()


class Step(NamedTuple):
    """A step: its seconds by phase, its rollout, and the time and the compiler's count at its end."""

    seconds: dict[str, float]
    rollout: Rollout
    answers: list[str]
    sampler_gap: float
    ended: float
    programs: int
    compile_s: float


def take_steps(
    work: Work,
    config: Settings,
    algorithm: PPO,
    tokenizer: Words,
    state: TrainState,
    reference: Params,
    *,
    count: int,
    seed: int,
    compiled: CompilationClock,
) -> tuple[list[Step], list[float]]:
    """Takes steps by the product's own code, each phase awaited.

    Args:
        work: the size.
        config: the loop's settings.
        agent: policy, critic and algorithm.
        tokenizer: turns answers into words.
        state: the state before the first step.
        reference: parameters of the reference policy.
        count: number of steps.
        seed: of the prompts.
        compiled: counts the compiled programs.

    Returns:
        (the steps, how far each weight tensor has moved)

    Raises AssertionError if a loss was not finite or a tensor did not move.
    """
    runner, pure = make_runner(config.train.parallel), programs(algorithm, algorithm.policy)
    sample, prepare, update = runner.map(pure.sample), runner.map(pure.prepare), runner.step(pure.step)
    state, frozen = runner.place(state), runner.place(Frozen(reference=jax.tree.map(jnp.asarray, reference)))
    before = jax.tree.map(thin, state.params)

    def lower_half(record: Any, answer: str) -> float:
        ids = [int(word[1:]) for word in answer.split()]
        return sum(i < work.vocab // 2 for i in ids) / max(len(ids), 1)

    feedback, batches = FunctionSource(lower_half), prompt_batches(work, config.train.prompts_per_step, seed)
    taken = []
    for i in range(count):
        begun = time.perf_counter()
        batch = next(batches)
        replicated, data = (state.without_optimizer(), frozen), step_data(batch)
        rollout = jax.block_until_ready(sample(replicated, data.prompts))
        rolled = time.perf_counter()
        answers = algorithm.policy.texts(rollout, tokenizer)  # type: ignore[arg-type]
        records = [record for record in batch.records for _ in range(config.ppo.answers_per_prompt)]
        judged = feedback(records, answers, rollout)
        learned, _, _ = jax.block_until_ready(prepare(replicated, (data, rollout, judged)))
        scored = time.perf_counter()
        state, metrics = jax.block_until_ready(update(state, Frozen(), learned))
        done = time.perf_counter()
        seconds = {"step": done - begun, "gen": rolled - begun, "score": scored - rolled, "update": done - scored}
        gap = float(metrics["first/sampler_gap"])
        taken.append(Step(seconds, rollout, answers, gap, time.time(), compiled.programs, compiled.seconds))
        assert float(metrics["nonfinite"]) == 0, f"step {i}: a loss is not finite"
    moved = jax.tree.leaves(jax.tree.map(lambda x, old: float(np.abs(thin(x) - old).max()), state.params, before))
    still = sum(x == 0 for x in moved)
    assert still == 0, f"{still} of {len(moved)} tensors did not move"
    return taken, moved


def run(work: Work, algorithm: str, behaviour: str, *, warmup: int, steps: int, seed: int) -> dict[str, Any]:
    """Takes `warmup` + `steps` steps of a work, checks them, and returns what was measured (the keys of `--json`).

    Args:
        work: the size.
        algorithm: "ppo" or "grpo".
        behaviour: whose log-probabilities the ratio is measured against, "sampler" or "recompute".
        warmup, steps: untimed and timed steps.
        seed: of weights and prompts.

    Raises AssertionError if a step did not do the work that is timed.
    """
    compiled = CompilationClock()
    config = settings(work, algorithm, behaviour)
    model, tokenizer = CausalLM(decoder(work)), Words(work.vocab)
    # A value head of zeros would pass no gradient to the trunk in the first step.
    critic = ScalarModel(model.config, initial="normal") if algorithm == "ppo" else None
    learner = config.build(model, critic, tokenizer)
    policy_key, value_key = jax.random.split(jax.random.key(seed))
    reference = jax.jit(model.init)(policy_key)
    params = {"policy": reference}
    if critic is not None:
        params["value"] = jax.jit(critic.init)(value_key, reference["trunk"])
    parameters = sum(x.size for x in jax.tree.leaves(reference))
    state = learner.init(params, jnp.uint32(seed))
    del params  # the state has its own copy
    taken, moved = take_steps(
        work, config, learner, tokenizer, state, reference, count=warmup + steps, seed=seed, compiled=compiled
    )
    for step in taken:
        check_answers(work, step.answers, step.rollout)
    assert len({step.answers[0] for step in taken}) == warmup + steps, "two steps drew the same answer"

    timed = taken[warmup:]
    median = {name: statistics.median(step.seconds[name] for step in timed) for name in timed[0].seconds}
    rates = {name: flops / median[name] / 1e9 for name, flops in matmul_flops(work, config).items()}
    devices, late = jax.device_count(), compiled.programs - timed[0].programs
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before the ceilings' own arrays
    ceilings = measure(model.config.compute_dtype)
    return {
        "system": f"rlaif_jax-{algorithm}",
        "version": f"rlaif_jax {importlib.metadata.version('rlaif-jax')}, jax {jax.__version__}",
        "algorithm": algorithm,
        "work": next(name for name, w in WORKS.items() if w == work),
        "step_s_median": round(median["step"], 4),
        "step_s_min": round(min(step.seconds["step"] for step in timed), 4),
        "step_s_max": round(max(step.seconds["step"] for step in timed), 4),
        "gen_s_median": round(median["gen"], 4),
        "update_s_median": round(median["update"], 4),
        "tokens_per_s": round(work.batch * work.response / median["step"], 1),
        **rooflines(work, config, median, ceilings),
        "first_step_s": round(taken[0].ended - START, 2),
        "compile_s": round(taken[0].compile_s, 2),
        "peak_rss_gib": round(peak / 2**20, 3),
        "steps": steps,
        "notes": f"{devices} {jax.default_backend()} device{'s' * (devices > 1)}; behaviour={behaviour}"
        f"{' (the log-probs the sampler reported)' * (behaviour == 'sampler')}, "
        f"gap to the trainer's {taken[-1].sampler_gap:.1e} nats a token; params={parameters}"
        f"{', same-size critic' * (critic is not None)} and reference; {config.train.prompts_per_step} prompts x "
        f"{config.ppo.answers_per_prompt}, {config.ppo.num_epochs * config.ppo.num_minibatches} updates/step; all "
        f"responses {work.response} tokens; {len(moved)}/{len(moved)} tensors changed, max |change| "
        f"{max(moved):.1e}; matrix products in GFLOP/s: "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        + f"; ceilings: {ceilings}; {late} programs compiled in timed steps; step - gen - update = "
        "decoding, reward, reference and value passes, advantages",
    }


def check_answers(work: Work, answers: list[str], rollout: Any) -> None:
    """Asserts that each answer has its full length and consists of ids of the vocabulary."""
    assert len(answers) == work.batch
    assert {len(a.split()) for a in answers} == {work.response}
    tokens, mask = jax.device_get((rollout.tokens, rollout.response_mask))
    assert mask.all()
    assert tokens.shape == (work.batch, work.prompt + work.response)
    assert 0 <= tokens.min() <= tokens.max() < work.vocab


def readable(result: dict[str, Any]) -> str:
    """Returns the result as text, one number per line."""
    units = {
        "first_step_s": "from the start of the process",
        "compile_s": "of it in XLA's compiler",
        "gen_s_median": "rollout",
        "update_s_median": "gradient passes and optimiser",
        "gen_roofline": "of the speed that the ceilings allow",
    }
    lines = [
        f"{name:>16}  {value}{'  ' + units[name] if name in units else ''}"
        for name, value in result.items()
        if name != "notes"
    ]
    return "\n".join(lines + [f"{'notes':>16}  " + result["notes"].replace("; ", "\n" + " " * 18)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=("ppo", "grpo"), default="ppo")
    parser.add_argument("--work", choices=tuple(WORKS), metavar="{S,M,V}", default="S", help="size (default S)")
    parser.add_argument(
        "--behaviour",
        choices=("sampler", "recompute"),
        default="sampler",
        help="log-probs of the behaviour policy: the sampler's (default), or one more forward pass",
    )
    parser.add_argument("--steps", type=int, help="timed steps (default 6 for S, 3 for M and V)")
    parser.add_argument("--warmup", type=int, help="untimed steps (default 2 for S, 1 for M and V)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args(arguments)
    work = WORKS[options.work]
    result = run(
        work,
        options.algorithm,
        options.behaviour,
        seed=options.seed,
        warmup=work.warmup if options.warmup is None else options.warmup,
        steps=work.steps if options.steps is None else options.steps,
    )
    print(json.dumps(result) if options.json else readable(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
