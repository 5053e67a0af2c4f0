"""Times rollouts: of fixed length, with a long tail, after long prompts, from large vocabularies.

    python -m experiments.benchmarks.rollouts --case T1
    python -m experiments.benchmarks.rollouts --case T1 --slots 16 --json
    python -m experiments.benchmarks.rollouts --case T1 --system transformers
    python -m experiments.benchmarks.rollouts --case P1 --prompt 1024 --cap 256

    case   lengths of the answers, in tokens                               prompt  cap  vocabulary
    F      all at the cap                                                  64      64   4096
    T1     lognormal with sigma 1, mean 32                                 32      256  4096
    T2     90 % anything up to an eighth of the cap, 10 % at the cap       32      256  4096
    P1     all at the cap                                                  256     64   4096
    V32k   all at the cap; a trunk of 1 x 64 x 2 under a large vocabulary  16      32   32000
    V152k  the same                                                        16      32   152000
    G      geometric with mean 64                                          32      512  4096

64 answers (V: 32), 8 to a prompt, are decoded all at once or in slots (`sampling.slots`). The model is a random
GPT-2 shape in float32 of 4 x 256 x 8 and GELU 1536 (as many weights as SwiGLU 1024), untied. The logit of its
stop token depends on the position alone and is such that P(stop at t | not before) is that of the wished
lengths. So the policy itself draws the lengths, in any system that loads its weights. Hugging Face
`generate`, which TRL's trainers use, draws from the same weights if torch and transformers are installed.

Each run checks that the drawn lengths have the wished distribution. `tokens_per_s` counts tokens up to the
stop. `occupancy` is the share of rows x steps in which a token of an answer was drawn, `padding` the share of
the result after the stops, and `gen_roofline` the share of the speed that the ceilings allow (`RolloutCost`)
in any order of drawing. Numbers are medians over rounds with different random numbers. The peak memory of
transformers includes JAX, which makes the weights. Run it on an idle machine; `compare.py` compares the ways
of decoding.
"""

import time

START = time.time()  # the first round's time counts from here: imports and compilation included

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import importlib.metadata  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from typing import Any, Literal  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from experiments.benchmarks.ceilings import measure  # noqa: E402
from experiments.benchmarks.costs import rollout_cost  # noqa: E402
from experiments.benchmarks.step import GROUP  # noqa: E402
from experiments.benchmarks.works import Work  # noqa: E402
from rlaif_jax.models.causal_lm import CausalLM  # noqa: E402
from rlaif_jax.models.decoder import block_params  # noqa: E402
from rlaif_jax.models.decoder_config import DecoderConfig  # noqa: E402
from rlaif_jax.models.hf.files import save_model  # noqa: E402
from rlaif_jax.models.sampling import SamplingConfig  # noqa: E402
from rlaif_jax.policies.text import generate  # noqa: E402
from rlaif_jax.programs import CompilationClock  # noqa: E402
from rlaif_jax.types import Params, Prompts  # noqa: E402

PAD, STOP = 0, 1
WAYS = ("all at once", "slots", "transformers")
Draw = Callable[[int], np.ndarray]  # round -> mask [R, T] of an answer's tokens, the stop included


@dataclasses.dataclass(frozen=True)
class Case:
    """A work with a distribution of lengths.

    Attributes:
        work: the size; `batch` counts answers, `response` is the cap on their tokens, `steps` are the timed rounds.
        lengths: the distribution of the lengths.
        mean: its mean before the cap; NaN if the distribution has no free mean.
    """

    work: Work
    lengths: Literal["fixed", "lognormal", "mixed", "geometric"]
    mean: float = math.nan


SHAPE_S = Work(
    layers=4, width=256, heads=8, hidden=1024, vocab=4096, batch=64, prompt=32, response=256, warmup=1, steps=3
)
LARGE_V = Work(
    layers=1, width=64, heads=2, hidden=128, vocab=32000, batch=32, prompt=16, response=32, warmup=1, steps=3
)
CASES = {
    "F": Case(dataclasses.replace(SHAPE_S, prompt=64, response=64), "fixed"),
    "T1": Case(SHAPE_S, "lognormal", 32),
    "T2": Case(SHAPE_S, "mixed"),
    "P1": Case(dataclasses.replace(SHAPE_S, prompt=256, response=64), "fixed"),
    "V32k": Case(LARGE_V, "fixed"),
    "V152k": Case(dataclasses.replace(LARGE_V, vocab=152_000), "fixed"),
    "G": Case(dataclasses.replace(SHAPE_S, response=512), "geometric", 64),
}


def distribution(case: Case) -> np.ndarray:
    """Returns P(an answer has 1, 2 ... cap tokens) [cap]; longer answers count at the cap."""
    cap, mean = case.work.response, case.mean
    t = np.arange(cap + 1)
    if case.lengths == "lognormal":  # rounded up
        middle = math.log(mean) - 0.5
        upto = np.array([0.0, *(0.5 * math.erfc((middle - math.log(x)) / math.sqrt(2)) for x in t[1:])])
    elif case.lengths == "geometric":
        upto = 1 - (1 - 1 / mean) ** t
    elif case.lengths == "mixed":
        upto = 0.9 * np.minimum(t / (cap // 8), 1)
    else:
        upto = np.zeros(cap + 1)
    upto[-1] = 1
    return np.diff(upto)


def stopping_policy(work: Work, chances: np.ndarray) -> tuple[CausalLM, Params]:
    """Returns the model and weights whose answers have 1 .. cap tokens with the probabilities `chances` [cap].

    Four coordinates of the residual stream belong to the position embeddings alone. The first carries the
    logit of the stop token and the second its negative, so that the mean stays. The other two are +-level, so
    large that each norm divides by the same number for all tokens. The norms multiply the other coordinates
    by this number again, and the blocks see none of the four coordinates.
    """
    config = DecoderConfig(
        vocab_size=work.vocab,
        num_layers=work.layers,
        width=work.width,
        num_heads=work.heads,
        num_kv_heads=work.heads,
        head_dim=work.width // work.heads,
        mlp_width=3 * work.hidden // 2,
        context_length=work.prompt + work.response,
        norm="layer",
        positions="learned",
        mlp="gelu",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_embeddings=False,
    )
    model = CausalLM(config)
    params = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0)))
    trunk, layers, head = params["trunk"], block_params(config, params["trunk"]), params["lm_head"]["kernel"]
    deviation, weight = 100.0, 16.0
    trunk["embed"]["embedding"][:, :4] = 0
    for kernel in (layer[name]["kernel"] for layer in layers for name in ("o", "down")):
        kernel[:, :4] = 0
    for norm in (*(layer[name] for layer in layers for name in ("norm1", "norm2")), trunk["norm"]):
        norm["scale"][...] = deviation
        norm["scale"][:4] = 0
    trunk["norm"]["scale"][0] = 1
    level = deviation * math.sqrt(work.width / 2)
    table = trunk["position_embed"]["embedding"]
    table[:, :4] = 0, 0, level, -level
    head[0], head[:, STOP] = 0, 0

    some = prompts(dataclasses.replace(work, batch=8 * GROUP))
    logits = np.array(jax.jit(model.__call__)(params, some.tokens, some.mask))
    others = float(jax.nn.logsumexp(np.delete(logits, STOP, axis=-1), axis=-1).mean())
    surviving = np.maximum(chances[::-1].cumsum()[::-1], 1e-300)
    hazard = np.clip(chances / surviving, 1e-9, 1 - 1e-9)  # P(stop at t | not before)
    normed = (others + np.log(hazard / (1 - hazard))) / weight
    # The x whose layer norm is `normed`: x / sqrt(deviation^2 + 2 x^2 / D).
    x = normed * deviation / np.sqrt(1 - 2 * normed**2 / work.width)
    table[work.prompt - 1 : -1, :2] = np.stack([x, -x], axis=-1)  # token t is drawn at the position before its own
    head[0, STOP] = weight
    return model, params


def prompts(work: Work) -> Prompts:
    """Returns prompts of random words without padding."""
    tokens = np.random.default_rng(1).integers(2, work.vocab, (work.batch // GROUP, work.prompt), dtype=np.int32)
    return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.arange(len(tokens), dtype=jnp.uint32))


def ours(model: CausalLM, params: Params, work: Work, slots: int) -> Draw:
    """Returns the draw by the project's own engine, which is compiled in the first round."""
    rollout_fn = jax.jit(
        functools.partial(
            generate,
            model,
            sampling=SamplingConfig(max_new_tokens=work.response, slots=slots),
            answers=GROUP,
            eos_id=STOP,
            pad_id=PAD,
        )
    )
    placed, batch = jax.tree.map(jnp.asarray, params), prompts(work)
    return lambda turn: np.asarray(rollout_fn(placed, batch, jax.random.key(turn)).response_mask)


def huggingface(model: CausalLM, params: Params, work: Work) -> Draw:
    """Returns the draw by `generate` of transformers on the same weights."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_model(f"{folder}/model", model, params)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32).eval()
    ids = torch.tensor(np.asarray(prompts(work).tokens), dtype=torch.long).repeat_interleave(GROUP, dim=0)
    settings = transformers.GenerationConfig(
        max_new_tokens=work.response,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=STOP,
        pad_token_id=PAD,
    )

    def draw(turn: int) -> np.ndarray:
        torch.manual_seed(turn)
        with torch.no_grad():
            out = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        stops = (out[:, work.prompt :] == STOP).numpy()
        return stops.cumsum(-1) - stops == 0

    return draw


def steps_in_slots(lengths: Sequence[int], slots: int) -> int:
    """Returns the number of steps that the engine decodes for answers of these lengths in `slots` slots.

    The rule is the engine's: free slots are filled from the queue, an eighth of all slots at a time.
    """
    waiting, left, some, steps = list(lengths), np.zeros(slots, int), max(1, slots // 8), 0
    while waiting or left.any():
        free = np.flatnonzero(left == 0)[:some][: len(waiting)]
        left[free], waiting = waiting[: len(free)], waiting[len(free) :]
        while left.any() and not (waiting and np.sum(left == 0) >= some):
            left, steps = np.maximum(left - 1, 0), steps + 1
    return steps


def check_lengths(chances: np.ndarray, lengths: np.ndarray) -> None:
    """Asserts that mean and share at the cap are as near to the wished ones as chance allows."""
    t = np.arange(1, len(chances) + 1)
    mean, capped = float(chances @ t), float(chances[-1])
    spread = math.sqrt(max(float(chances @ t**2) - mean**2, 0))
    for name, wished, drawn, deviation in (
        ("mean length", mean, float(lengths.mean()), spread),
        ("share at the cap", capped, float((lengths == len(chances)).mean()), math.sqrt(capped * (1 - capped))),
    ):
        # 5 standard errors, and 2 % for the numbers of the policy.
        allowed = 5 * deviation / math.sqrt(lengths.size) + 0.02 * wished
        assert abs(drawn - wished) <= allowed, f"{name} {drawn:.4g}, but {wished:.4g} +- {allowed:.2g} was wished"


def run(name: str, case: Case, way: str, slots: int = 0) -> dict[str, Any]:
    """Draws the rounds of a case in one of the `WAYS`, checks them and returns what was measured (the keys of `--json`).

    Raises AssertionError if the answers do not have the lengths of the case.
    """
    compiled = CompilationClock()
    work, chances = case.work, distribution(case)
    model, params = stopping_policy(work, chances)
    of_policy = compiled.seconds
    version = f"rlaif_jax {importlib.metadata.version('rlaif-jax')}, jax {jax.__version__}"
    if way == "transformers":
        draw = huggingface(model, params, work)
        version = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    else:
        draw = ours(model, params, work, slots if way == "slots" else 0)
    del params
    for turn in range(work.warmup):
        draw(turn)
        if turn == 0:
            first, compile_s = time.time() - START, compiled.seconds - of_policy
    seconds, masks = [], []
    for turn in range(work.warmup, work.warmup + work.steps):
        begun = time.perf_counter()
        masks.append(draw(turn))
        seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # before the ceilings' own arrays
    ceilings = measure("float32")

    lengths = np.stack([mask.sum(-1) for mask in masks])
    check_lengths(chances, lengths)
    if way == "slots":
        places = sum(slots * steps_in_slots(drawn.tolist(), slots) for drawn in lengths)
    else:
        places = lengths.max(-1).sum() * work.batch
    least = sum(rollout_cost(work, drawn.reshape(-1, GROUP)).seconds(ceilings) for drawn in lengths)
    tokens, median = int(lengths.sum()), statistics.median(seconds)
    return {
        "system": f"{slots} slots" if way == "slots" else way,
        "version": version,
        "work": name,
        "step_s_median": round(median, 4),
        "step_s_min": round(min(seconds), 4),
        "step_s_max": round(max(seconds), 4),
        "gen_s_median": round(median, 4),
        "tokens_per_s": round(tokens / sum(seconds), 1),
        "gen_roofline": round(least / sum(seconds), 3),
        "occupancy": round(tokens / float(places), 3),
        "padding": round(1 - tokens / sum(mask.size for mask in masks), 3),
        "length_mean": round(tokens / lengths.size, 1),
        "length_max": int(lengths.max()),
        "first_step_s": round(first, 2),
        "compile_s": None if way == "transformers" else round(compile_s, 2),
        "peak_rss_gib": round(peak / 2**20, 3),
        "steps": work.steps,
        "notes": f"{work.batch // GROUP} prompts x {GROUP}, {work.prompt} + at most {work.response} tokens; {case.lengths} "
        f"lengths, mean {float(chances @ np.arange(1, len(chances) + 1)):.1f} wished; ceilings: {ceilings}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), default="T1", help="default T1")
    parser.add_argument("--system", choices=("rlaif_jax", "transformers"), default="rlaif_jax")
    parser.add_argument("--slots", type=int, default=0, help="answers at a time (default 0: all at once)")
    parser.add_argument("--prompts", type=int, help=f"prompts of {GROUP} answers each")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--cap", type=int, help="most tokens of an answer")
    parser.add_argument("--mean", type=float, help="mean length in tokens before the cap, of T1 and G")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 3)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args(arguments)
    case = CASES[options.case]
    if options.mean is not None and math.isnan(case.mean):
        parser.error(f"--mean is an option of T1 and G: the lengths of {options.case} are {case.lengths}")
    if options.slots and options.system == "transformers":
        parser.error("--slots is an option of --system rlaif_jax only")
    if options.system == "transformers" and not has_transformers():
        parser.error("--system transformers needs torch and transformers, which are not installed")
    sizes = {
        "batch": options.prompts and options.prompts * GROUP,
        "prompt": options.prompt,
        "response": options.cap,
        "steps": options.rounds,
    }
    work = dataclasses.replace(case.work, **{name: size for name, size in sizes.items() if size is not None})
    case = dataclasses.replace(case, work=work, mean=case.mean if options.mean is None else options.mean)
    way = "transformers" if options.system == "transformers" else "slots" if options.slots else "all at once"
    result = run(options.case, case, way, options.slots)
    print(json.dumps(result) if options.json else "\n".join(f"{name:>16}  {value}" for name, value in result.items()))
    return 0


def has_transformers() -> bool:
    """Returns whether torch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


if __name__ == "__main__":
    sys.exit(main())
