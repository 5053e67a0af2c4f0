"""Times whole GRPO steps whose answers have uneven lengths: most are short, a few are long.

    python -m experiments.benchmarks.uneven --case T1
    python -m experiments.benchmarks.uneven --case T2 --trl ENVIRONMENT/bin/python --tunix ENVIRONMENT/bin/python --json

The policy and the lengths are those of `rollouts.py` (T1 lognormal; T2 nine of ten short and the rest at the
cap). A step has 8 prompts of 32 tokens, 8 answers to each of at most 256 tokens, KL (0.05) in the loss, one
update over the batch, AdamW at 1e-6 and the reward on the host.

    way     rollout              scoring and update
    padded  all at once          one row per sequence, as long as the cap
    packed  8 slots              rows of many answers, 2 at a time (`sampling.slots`, `packed_rows`)
    trl     TRL's GRPOTrainer on the same weights, by the Python that `--trl` names (torch, trl), without and with its
            continuous batching where that runs
    tunix   Tunix's GRPOLearner on the same weights, by the Python that `--tunix` names (google-tunix), without and with its
            packing (`uneven_tunix.py`)

Numbers are medians over the steps. Both of our ways have the same lengths; the other systems draw other
answers from the same distribution, so tokens/s compare better than seconds. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.compare import TORCH_ALLOCATOR, run_json
from experiments.benchmarks.rollouts import CASES, PAD, STOP, Case, check_lengths, distribution, stopping_policy
from experiments.benchmarks.step import GROUP, Settings, Words, settings, take_steps
from experiments.benchmarks.works import Work
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.models.hf.files import save_model
from rlaif_jax.programs import CompilationClock
from rlaif_jax.types import Params

SLOTS, ROWS = 8, 2


def way_settings(case: Case, way: str) -> Settings:
    """Returns the loop's settings for one of our ways."""
    config = settings(case.work, "grpo", "sampler")
    if way == "padded":
        return config
    return dataclasses.replace(
        config,
        sampling=dataclasses.replace(config.sampling, slots=SLOTS),
        ppo=dataclasses.replace(config.ppo, packed_rows=ROWS),
    )


def ours(case: Case, way: str, model: CausalLM, params: Params, *, warmup: int, steps: int) -> dict[str, Any]:
    """Takes `warmup` + `steps` steps by the product's own code and returns the row of `way`.

    Raises AssertionError if the steps did not do the work.
    """
    config, tokenizer = way_settings(case, way), Words(case.work.vocab, pad_id=PAD, eos_id=STOP)
    algorithm, clock = config.build(model, None, tokenizer), CompilationClock()
    state = algorithm.init({"policy": params}, jnp.uint32(0))
    taken, _ = take_steps(
        case.work, config, algorithm, tokenizer, state, params, count=warmup + steps, seed=0, compiled=clock
    )
    times = {name: [step.seconds[name] for step in taken[warmup:]] for name in taken[0].seconds}
    lengths = [np.asarray(step.rollout.response_mask).sum(-1) for step in taken[warmup:]]
    return summary(case, way, times, np.concatenate(lengths))


def summary(case: Case, way: str, times: dict[str, list[float]], lengths: np.ndarray) -> dict[str, Any]:
    """Returns the row of a way: medians of the phases and the lengths."""
    check_lengths(distribution(case), lengths)
    return {
        "way": way,
        **{f"{name}_s_median": round(statistics.median(seconds), 3) for name, seconds in times.items()},
        "tokens_per_s": round(float(lengths.sum()) / sum(times["step"]), 1),
        "length_mean": round(float(lengths.mean()), 1),
        "length_max": int(lengths.max()),
    }


def peers(work: Work) -> dict[str, list[str]]:
    """Returns script and options of the other systems by way; the first word of a way names its Python."""
    tunix, budget = "uneven_tunix.py", 4 * (work.prompt + work.response)
    return {
        "trl": ["uneven_trl.py"],
        "trl, continuous batching": ["uneven_trl.py", "--batching"],
        "tunix": [tunix],
        "tunix, packing": [tunix, f"--budget={budget}"],
    }


def peer(case: Case, way: str, python: Path, folder: str, *, warmup: int, steps: int) -> dict[str, Any] | str:
    """Runs the same steps in another system on the weights in `folder`; returns its row or why it has none."""
    work, (script, *more) = case.work, peers(case.work)[way]
    options = {"prompts": work.batch // GROUP, "prompt": work.prompt, "cap": work.response}
    options |= {"vocab": work.vocab, "group": GROUP, "warmup": warmup, "steps": steps}
    command = [str(python), str(Path(__file__).with_name(script)), folder]
    command += [*(f"--{name}={value}" for name, value in options.items()), *more]
    # The script of TRL sets the CPU itself.
    variables = {"GLIBC_TUNABLES": TORCH_ALLOCATOR} if way.startswith("trl") else {"JAX_PLATFORMS": "cpu"}
    found = run_json(command, variables)
    if isinstance(found, str):
        return found
    row = summary(case, way, found["times"], np.array(found["lengths"])) | {"version": found["version"]}
    return row | {"updates": found["updates"]} if "updates" in found else row


def save_policy(folder: str, model: CausalLM, params: Params, work: Work) -> None:
    """Saves the weights for other systems, with log-probabilities of some answers to check them by."""
    save_model(folder, model, params)
    tokens = np.random.default_rng(0).integers(2, work.vocab, (2, work.prompt + work.response), dtype=np.int32)
    logits = jax.jit(model.__call__)(params, tokens, np.ones(tokens.shape, bool))[:, work.prompt - 1 : -1]
    answers = tokens[:, work.prompt :, None]
    logprobs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), answers, axis=-1)[..., 0]
    np.savez(Path(folder) / "expected.npz", tokens=tokens, logprobs=logprobs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=("T1", "T2"), default="T1", help="default T1")
    parser.add_argument("--prompts", type=int, help=f"prompts of {GROUP} answers each (default 8)")
    parser.add_argument("--cap", type=int, help="most tokens of an answer (default 256)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps (default 1)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps (default 4)")
    parser.add_argument("--trl", type=Path, help="a Python with torch and trl")
    parser.add_argument("--tunix", type=Path, help="a Python with google-tunix")
    parser.add_argument("--json", action="store_true", help="print a line of JSON a way")
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    sizes = {"batch": options.prompts and options.prompts * GROUP, "response": options.cap}
    work = dataclasses.replace(case.work, **{name: size for name, size in sizes.items() if size is not None})
    case = dataclasses.replace(case, work=work)
    model, params = stopping_policy(work, distribution(case))
    times = {"warmup": options.warmup, "steps": options.steps}
    rows: list[dict[str, Any]] = [ours(case, way, model, params, **times) for way in ("padded", "packed")]
    pythons = {"trl": options.trl, "tunix": options.tunix}
    with tempfile.TemporaryDirectory() as folder:
        save_policy(folder, model, params, work)
        for way in peers(work):
            python = pythons[way.split(",")[0]]
            row = python and peer(case, way, python, folder, **times)
            if isinstance(row, str):
                print(f"{way}: {row}", file=sys.stderr)
            elif row:
                rows.append(row)
    packed = rows[1]["step_s_median"]
    for row in rows:
        ratio = row["step_s_median"] / packed
        print(json.dumps({"case": options.case, **row}) if options.json else f"{ratio:6.2f}x packed  {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
