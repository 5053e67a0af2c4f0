"""Time rollouts whose answers end when they will: most soon, a few late.

    python experiments/benchmarks/tail.py
    python experiments/benchmarks/tail.py --prompts 32 --slots 16 64 --cap 512 --mean 64 --json

The policy is the random Llama shape S of `step.py` (4 x 256 x 8, SwiGLU 1024, vocabulary 4096, float32), made to say its
stop token with the same small probability at every step, so that lengths are geometric: of 64 answers of 64 tokens in the
mean, the longest has about 300. Decoding all at once goes on until the longest has stopped; in slots (`decode_slots`) a
finished answer's place goes to the next one. Where torch and transformers are installed, Hugging Face `generate` draws
from the same weights, as TRL's trainers do. Medians over the rounds, each with another key; tokens count up to the stop.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.config import DecoderConfig, SamplingConfig
from rlaif_jax.data.tokenizers import WordTokenizer
from rlaif_jax.models.heads import LanguageModel
from rlaif_jax.models.hf import save_model
from rlaif_jax.rollout import generate
from rlaif_jax.types import Params, Prompts

ANSWERS, PROMPT = 8, 32
TOKENIZER = WordTokenizer(tuple(f"t{i}" for i in range(4092)))  # and four special ones


def stopping_policy(mean: float, context: int) -> tuple[LanguageModel, Params]:
    """The model and weights under which every token is the stop token with probability about 1 / mean.

    One coordinate of the residual stream is the same for every token and written to by no layer; the stop token's logit
    reads that coordinate alone.
    """
    config = DecoderConfig(
        vocab_size=TOKENIZER.vocab_size,
        num_layers=4,
        width=256,
        num_heads=8,
        num_kv_heads=8,
        head_dim=32,
        mlp_width=1024,
        context_length=context,
        norm_eps=1e-6,
        tie_embeddings=False,
    )
    model = LanguageModel(config)
    params = jax.tree.map(np.array, jax.jit(model.init)(jax.random.key(0)))
    params["trunk"]["embed"]["embedding"][:, 0] = 1.0
    for name in ("o", "down"):
        params["trunk"]["layers"][name]["kernel"][..., 0] = 0.0
    some = prompts(8)
    hidden = model.hidden(params, some.tokens, some.mask)
    total = float(jax.nn.logsumexp(model.logits(params, hidden), axis=-1).mean())
    head = params["lm_head"]["kernel"]
    head[:, TOKENIZER.eos_id] = 0.0
    head[0, TOKENIZER.eos_id] = (total - math.log(mean)) / float(hidden[..., 0].mean())
    return model, params


def prompts(count: int) -> Prompts:
    """Prompts of random words, none padded."""
    tokens = np.random.default_rng(1).integers(4, TOKENIZER.vocab_size, (count, PROMPT), dtype=np.int32)
    return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.arange(count, dtype=jnp.uint32))


def timed(draw: Callable[[int], np.ndarray], rounds: int) -> dict[str, Any]:
    """`draw(round)` gives the lengths of the answers; the first call is not timed."""
    begun = time.perf_counter()
    draw(0)
    first, seconds, lengths = time.perf_counter() - begun, [], []
    for turn in range(1, rounds + 1):
        begun = time.perf_counter()
        lengths.append(draw(turn))
        seconds.append(time.perf_counter() - begun)
    every = np.concatenate(lengths)
    return {
        "s_median": round(statistics.median(seconds), 3),
        "tokens_per_s": round(float(every.sum()) / sum(seconds), 1),
        "length_mean": round(float(every.mean()), 1),
        "length_max": int(every.max()),
        "first_s": round(first, 2),
    }


def ours(model: LanguageModel, params: Params, asked: Prompts, cap: int, slots: int) -> Callable[[int], np.ndarray]:
    """`draw` of the project's own engine."""
    roll = jax.jit(
        functools.partial(
            generate,
            model,
            sampling=SamplingConfig(max_new_tokens=cap),
            answers=ANSWERS,
            eos_id=TOKENIZER.eos_id,
            pad_id=TOKENIZER.pad_id,
            slots=slots,
        )
    )
    return lambda turn: np.asarray(roll(params, asked, jax.random.key(turn)).response_mask).sum(-1)


def huggingface(folder: Path, asked: Prompts, cap: int) -> Callable[[int], np.ndarray]:
    """`draw` of transformers' `generate` on the same weights."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(np.asarray(asked.tokens), dtype=torch.long).repeat_interleave(ANSWERS, dim=0)
    settings = transformers.GenerationConfig(
        max_new_tokens=cap,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=TOKENIZER.eos_id,
        pad_token_id=TOKENIZER.pad_id,
    )

    def draw(turn: int) -> np.ndarray:
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        answers = out[:, PROMPT:].numpy()
        stops = answers == TOKENIZER.eos_id
        return np.where(stops.any(-1), stops.argmax(-1) + 1, answers.shape[1])

    return draw


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help=f"prompts of {ANSWERS} answers each (default 8)")
    parser.add_argument("--mean", type=float, default=64.0, help="mean length in tokens (default 64)")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of an answer (default 512)")
    parser.add_argument("--slots", type=int, nargs="+", default=[16], help="answers at a time (default 16)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print a line of JSON a way of decoding")
    options = parser.parse_args(arguments)
    model, params = stopping_policy(options.mean, PROMPT + options.cap)
    asked = prompts(options.prompts)
    ways = {
        f"slots={n}" if n else "all at once": (n, ours(model, params, asked, options.cap, n))
        for n in (0, *options.slots)
    }
    rows = {name: timed(draw, options.rounds) | {"slots": n} for name, (n, draw) in ways.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, model, params, TOKENIZER)
        try:
            rows["transformers"] = timed(huggingface(Path(folder), asked, options.cap), options.rounds)
        except ImportError as error:
            print(f"no transformers: {error}", file=sys.stderr)
    for name, row in rows.items():
        times = row["s_median"] / rows["all at once"]["s_median"]
        print(json.dumps({"way": name, **row}) if options.json else f"{name:>14}  {times:5.2f}x all at once  {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
