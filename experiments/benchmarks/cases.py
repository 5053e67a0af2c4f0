"""Times updates at several fills, and steps that wait for a judge.

    python -m experiments.benchmarks.cases --case U25
    python -m experiments.benchmarks.cases --case E --way ahead --json

    case  what is timed                                                       ways
    U25   the update alone: 64 answers to 8 prompts, which fill a quarter     packed (`packed_rows`), padded
    U50   of the [64, 128] places, half of them, all of them
    U100
    E     the loop itself (`train`) with a judge behind HTTP on this          ahead (`train.staleness` 1), waiting (0)
          machine that takes 200 ms per answer

Both cases train with GRPO on the random Llama shape of work S (`step.py`) with prompts of 32 tokens.

U: lengths are evenly spread and answers are random ids. `update_roofline` counts the matrix products of real
tokens only. E: answers have 64 tokens; the project's own client judges each in one call, all at the same
time. Medians leave out the last step, which draws nothing ahead. Judge and client share the cores with the
devices. `hidden` is the time that a step ahead saves, as a share of the rollout time of a step that waits.

Both ways run by default. Run it on an idle machine; `compare.py` compares the ways.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.ceilings import measure
from experiments.benchmarks.costs import trained_flops
from experiments.benchmarks.step import GROUP, Words, decoder, settings
from experiments.benchmarks.works import WORKS, Work
from rlaif_jax.data.prompts import prompt_batches
from rlaif_jax.data.tokenizers import WORD_SPECIALS, word_level_tokenizer
from rlaif_jax.feedback.api.builtin_templates import RATING
from rlaif_jax.feedback.api.config import ApiConfig
from rlaif_jax.feedback.api.judge import ApiJudge
from rlaif_jax.feedback.api.source import ApiJudgeSource
from rlaif_jax.metrics import MetricsWriter, read_metrics
from rlaif_jax.models.causal_lm import CausalLM
from rlaif_jax.parallel import make_runner
from rlaif_jax.programs import CompilationClock, programs
from rlaif_jax.run import Run
from rlaif_jax.train import train
from rlaif_jax.types import Feedback, Frozen, Prompts, Rollout, StepData

FILLS = {"U25": 0.25, "U50": 0.5, "U100": 1.0}
WAYS = {**dict.fromkeys(FILLS, ("packed", "padded")), "E": ("ahead", "waiting")}
ROWS = 2  # packed rows at a time
UPDATE = dataclasses.replace(WORKS["S"], response=128, warmup=1, steps=3)


def spread_lengths(work: Work, fill: float) -> np.ndarray:
    """Returns lengths [prompts, K] in random order, spread evenly and as widely as possible about `fill` x limit."""
    limit = work.response
    low, high = max(1, (2 * fill - 1) * limit), min(2 * fill * limit - 1, limit)
    lengths = np.linspace(low, high, work.batch).round().astype(int)
    return np.random.default_rng(0).permutation(lengths).reshape(-1, GROUP)


def update_alone(work: Work, fill: float, way: str, *, warmup: int, steps: int) -> dict[str, Any]:
    """Times repeated updates of one batch and returns what was measured."""
    clock, config, tokenizer = CompilationClock(), settings(work, "grpo", "recompute"), Words(work.vocab)
    if way == "packed":
        config = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, packed_rows=ROWS))
    model, lengths, rng = CausalLM(decoder(work)), spread_lengths(work, fill), np.random.default_rng(1)
    algorithm, runner = config.build(model, None, tokenizer), make_runner(config.train.parallel)
    pure = programs(algorithm, algorithm.policy)
    prepare, update = runner.map(pure.prepare), runner.step(pure.step)
    params = jax.jit(model.init)(jax.random.key(0))
    state = runner.place(algorithm.init({"policy": params}, jnp.uint32(0)))
    frozen = runner.place(Frozen(reference=params))
    prompts = rng.integers(0, work.vocab, (len(lengths), work.prompt)).repeat(GROUP, axis=0)
    mask = np.arange(work.response) < lengths.reshape(-1, 1)
    answers = np.where(mask, rng.integers(0, work.vocab, mask.shape), 0)
    rollout = Rollout(
        tokens=jnp.asarray(np.concatenate([prompts, answers], axis=1), jnp.int32),
        prompt_mask=jnp.ones(prompts.shape, bool),
        response_mask=jnp.asarray(mask),
        logprobs=jnp.where(mask, -math.log(work.vocab), 0.0),
        finished=jnp.asarray(lengths.reshape(-1) < work.response),
    )
    judged = Feedback.single(rng.random(work.batch, np.float32), np.ones(work.batch, bool))
    asked = Prompts(
        rollout.tokens[::GROUP, : work.prompt], rollout.prompt_mask[::GROUP], jnp.arange(len(lengths), dtype=jnp.uint32)
    )
    replicated, inputs = (state.without_optimizer(), frozen), (StepData(asked), rollout, judged)
    learned, _, _ = jax.block_until_ready(prepare(replicated, inputs))
    seconds, losses = [], []
    for _ in range(warmup + steps):
        begun = time.perf_counter()
        state, metrics = jax.block_until_ready(update(state, Frozen(), learned))
        seconds.append(time.perf_counter() - begun)
        assert float(metrics["nonfinite"]) == 0, "a loss is not finite"
        losses.append(float(metrics["loss"]))
    median = statistics.median(seconds[warmup:])
    common = row(way, work, seconds[warmup:], clock)
    ceilings = measure(model.config.compute_dtype)
    least = 3 * sum(trained_flops(work, lengths)) / ceilings.flops
    return common | {
        "update_s_median": round(median, 4),
        "tokens_per_s": round(float(lengths.sum()) / median, 1),
        "update_roofline": round(least / median, 3),
        "padding": round(1 - float(mask.mean()), 3),
        "loss": losses[0],
        "notes": f"{common['notes']}; ceilings: {ceilings}",
    }


@contextmanager
def judge(delay: float) -> Iterator[str]:
    """Runs a server that scores each answer after `delay` seconds, any number at a time; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet a response
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            request = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(delay)
            letter = "ABCDEFGHIJ"[sum(request) % 10]
            scored = {"token": letter, "logprob": 0.0, "bytes": list(letter.encode())}
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": letter},
                "logprobs": {"content": [scored | {"top_logprobs": [scored]}]},
            }
            reply = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def judged_steps(work: Work, way: str, *, delay: float, warmup: int, steps: int) -> dict[str, Any]:
    """Times the steps of a run and returns what was measured.

    Raises AssertionError if judgements are missing or steps do not have the staleness of `way`.
    """
    clock, config = CompilationClock(), settings(work, "grpo", "recompute")
    loop = dataclasses.replace(config.train, steps=warmup + steps + 1, staleness=int(way == "ahead"), save_every=10**6)
    tokenizer = word_level_tokenizer(tuple(f"t{i}" for i in range(len(WORD_SPECIALS), work.vocab)))
    words = np.random.default_rng(0).integers(4, work.vocab, (8 * loop.prompts_per_step, work.prompt))
    prompts = prompt_batches(
        [{"prompt": tokenizer.decode(ids)} for ids in words.tolist()],
        tokenizer,
        batch_size=loop.prompts_per_step,
        seed=0,
        prompt_length=work.prompt,
    )
    model = CausalLM(decoder(work))
    algorithm = dataclasses.replace(config, train=loop).build(model, None, tokenizer)
    with (
        tempfile.TemporaryDirectory() as folder,
        judge(delay) as address,
        ApiJudge(ApiConfig(server=address, model="judge", concurrency=work.batch)) as client,
    ):
        out = Path(folder) / "run"
        with Run(out, "judged", loop, seed=0) as run, MetricsWriter(out, terminal=False, sinks=()) as writer:
            train(
                loop,
                run,
                writer,
                algorithm=algorithm,
                policy=algorithm.policy,
                params={"policy": jax.jit(model.init)(jax.random.key(0))},
                tokenizer=tokenizer,
                prompts=prompts,
                feedback=ApiJudgeSource(client, RATING),
            )
        timed = list(read_metrics(out / "metrics.jsonl"))[warmup:-1]
    assert len(timed) == steps and all(line["feedback_missing"] == 0 for line in timed), "judgements are missing"
    assert all(line["staleness"] == loop.staleness for line in timed), "steps of another staleness"
    phases = {name: [line[f"time/{name}_s"] for line in timed] for name in ("rollout", "feedback", "update")}
    seconds = [sum(phase) for phase in zip(*phases.values())]
    return row(way, work, seconds, clock) | {
        "gen_s_median": round(statistics.median(phases["rollout"]), 4),
        "feedback_s_median": round(statistics.median(phases["feedback"]), 4),
        "update_s_median": round(statistics.median(phases["update"]), 4),
        "tokens_per_s": round(statistics.median(line["time/tokens_per_s"] for line in timed), 1),
    }


def row(way: str, work: Work, seconds: list[float], clock: CompilationClock) -> dict[str, Any]:
    """Returns the columns that each way has."""
    return {
        "system": way,
        "version": f"rlaif_jax {importlib.metadata.version('rlaif-jax')}, jax {jax.__version__}",
        "step_s_median": round(statistics.median(seconds), 4),
        "step_s_min": round(min(seconds), 4),
        "step_s_max": round(max(seconds), 4),
        "compile_s": round(clock.seconds, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "steps": len(seconds),
        "notes": f"{work.batch // GROUP} prompts x {GROUP}, {work.prompt} + at most {work.response} tokens",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(WAYS), default="U50", help="default U50")
    parser.add_argument("--way", help="one way only")
    parser.add_argument("--work", choices=tuple(WORKS), help="another size (default: S, U with answers of 128 tokens)")
    parser.add_argument("--warmup", type=int, help="untimed steps (default: U 1, E 2)")
    parser.add_argument("--steps", type=int, help="timed steps (default: U 3, E 6)")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that the judge of E takes (default 0.2)")
    parser.add_argument("--json", action="store_true", help="print a line of JSON a way")
    options = parser.parse_args(arguments)
    ways = WAYS[options.case]
    if options.way not in (None, *ways):
        parser.error(f"--way of {options.case} is one of {', '.join(ways)}")
    if options.case == "E" and not importlib.util.find_spec("openai"):
        parser.error('--case E needs the package openai: pip install -e ".[api]"')
    work = WORKS[options.work] if options.work else WORKS["S"] if options.case == "E" else UPDATE
    count = {
        "warmup": work.warmup if options.warmup is None else options.warmup,
        "steps": work.steps if options.steps is None else options.steps,
    }
    rows = {}
    for way in [options.way] if options.way else ways:
        if options.case == "E":
            rows[way] = judged_steps(work, way, delay=options.delay, **count)
        else:
            rows[way] = update_alone(work, FILLS[options.case], way, **count)
    if options.case == "E" and len(rows) == 2:
        gained = rows["waiting"]["step_s_median"] - rows["ahead"]["step_s_median"]
        rows["ahead"]["hidden"] = round(gained / rows["waiting"]["gen_s_median"], 3)
    first = next(iter(rows.values()))
    for way, result in rows.items():
        ratio = result["step_s_median"] / first["step_s_median"]
        print(json.dumps({"case": options.case} | result) if options.json else f"{ratio:6.2f}x {way}  {result}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
