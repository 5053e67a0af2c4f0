"""Compares our steps and rollouts with those of other systems on the same work and the same machine.

    python -m experiments.benchmarks.compare --peers PEERS --environments ENVIRONMENTS
    python -m experiments.benchmarks.compare --works S --algorithms grpo --rounds 3 --peers ... --environments ...
    python -m experiments.benchmarks.compare --works --rollouts G --slots 8 16 32
    python -m experiments.benchmarks.compare --works --cases U25 U50 U100 E

One process runs at a time, the systems in turn. PEERS is a folder of scripts that time the same work in other
systems and print one line of JSON with the keys of `step.py --json`. ENVIRONMENTS holds the virtual
environments that they run in:

    system  PEERS/            ENVIRONMENTS/      with
    TRL     trl_grpo.py       trl/bin/python     torch 2.13.0, trl 1.16.0, transformers 5.23.0
    TRL     trl_ppo.py        ppo/bin/python     torch 2.13.0, trl 1.12.0 (the last with PPO), transformers 5.23.0
    Tunix   tunix_grpo.py     tun/bin/python     google-tunix 0.1.7, jax 0.10.2, flax 0.12.8
    Tunix   tunix_ppo.py      tun/bin/python

Without the two options, or if one of these files is missing, the table contains only our own steps, and a
remark says so. A case of `rollouts.py` is decoded all at once, in slots, and by transformers if this
environment has it. A case of `cases.py` runs in both of our ways. `peer.py` adds works that the scripts' own
tables lack.

A round runs each system once; with several rounds a system's number is the median over the rounds. The ratio
is a system's time divided by the time of the first row of the case, which is ours: 2.0x means that we take
half of that system's time. `roof` is the share of the speed that the ceilings of the machine allow
(`ceilings.py`), for our own systems and for rollouts. Run it on an idle machine only: timings of threads that
share their cores with other work are meaningless.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Arguments of an interpreter that is started in ROOT.
STEP, ROLLOUTS, CASES, PEER = (
    ("-m", f"experiments.benchmarks.{name}") for name in ("step", "rollouts", "cases", "peer")
)
# Freed memory stays in the process: helps torch (a GRPO step by about 15 %), does nothing for JAX.
TORCH_ALLOCATOR = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
COLUMNS = {
    "step_s_median": "s",
    "step_s_min": "min",
    "gen_s_median": "rollout s",
    "feedback_s_median": "feedback s",
    "update_s_median": "update s",
    "tokens_per_s": "tokens/s",
    "gen_roofline": "rollout roof",
    "score_roofline": "score roof",
    "update_roofline": "update roof",
    "occupancy": "occupancy",
    "padding": "padding",
    "first_step_s": "first s",
    "compile_s": "compile s",
    "peak_rss_gib": "peak GiB",
}
Command = tuple[list[str], dict[str, str]]  # a command line, and the environment variables of its process


class Peer(NamedTuple):
    """Another system.

    Attributes:
        environment: the folder of its virtual environment.
        script: the name of its script.
        variables: environment variables of its process.
    """

    environment: str
    script: str
    variables: dict[str, str]


THEIR_WORKS = ("S", "M")  # the tables of their scripts have these; `peer.py` adds the others
PEERS = {
    "ppo": (Peer("ppo", "trl_ppo.py", {"GLIBC_TUNABLES": TORCH_ALLOCATOR}), Peer("tun", "tunix_ppo.py", {})),
    "grpo": (Peer("trl", "trl_grpo.py", {"GLIBC_TUNABLES": TORCH_ALLOCATOR}), Peer("tun", "tunix_grpo.py", {})),
}


def run_json(command: Sequence[str], variables: dict[str, str]) -> dict[str, Any] | str:
    """Runs a benchmark and returns the JSON of its last line, or a sentence about why it gave no result."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    script = [part for part in command if part.endswith(".py") or part.startswith("experiments.")][-1]
    return f"{Path(script).name} ended with exit code {done.returncode}: {last}"


def step_commands(
    work: str,
    algorithm: str,
    peers: Path | None,
    environments: Path | None,
) -> tuple[list[Command], list[str]]:
    """Returns (the commands that time a step, ours first; a remark for each missing system)."""
    found: list[Command] = [
        ([sys.executable, *STEP, "--algorithm", algorithm, "--json", "--work", work], {}),
    ]
    if peers is None or environments is None:
        return found, ["no other systems: --peers and --environments were not given"]
    missing = []
    for peer in PEERS[algorithm]:
        python, script = environments / peer.environment / "bin" / "python", peers / peer.script
        absent = [str(path) for path in (python, script) if not path.exists()]
        if absent:
            missing.append(f"{peer.script} not run: {' and '.join(absent)} not found")
        else:
            known = [] if work in THEIR_WORKS else PEER
            found.append(([str(python), *known, str(script), "--work", work], peer.variables))
    return found, missing


def rollout_commands(case: str, slots: Sequence[int]) -> tuple[list[Command], list[str]]:
    """Returns (the commands that time the ways of decoding a case, all at once first; remarks on missing ones)."""
    command = [sys.executable, *ROLLOUTS, "--case", case, "--json"]
    found: list[Command] = [(command, {}), *(([*command, "--slots", str(n)], {}) for n in slots)]
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return found, ["no generate of transformers: torch or transformers is not installed here"]
    return [*found, ([*command, "--system", "transformers"], {"GLIBC_TUNABLES": TORCH_ALLOCATOR})], []


def way_commands(case: str) -> tuple[list[Command], list[str]]:
    """Returns (the commands that time the two ways of a case of `cases.py`; remarks on missing ones)."""
    if case == "E" and not importlib.util.find_spec("openai"):
        return [], ['no case E: it needs the package openai (pip install -e ".[api]")']
    ways = ("ahead", "waiting") if case == "E" else ("packed", "padded")
    return [([sys.executable, *CASES, "--case", case, "--way", way, "--json"], {}) for way in ways], []


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combines a system's rounds: the median of each column, the least minimum, the greatest peak memory."""
    row = {"system": runs[0]["system"], "version": runs[0]["version"]}
    for key in COLUMNS:
        values = [r[key] for r in runs if r.get(key) is not None]
        pick = {"step_s_min": min, "peak_rss_gib": max}.get(key, statistics.median)
        row[key] = pick(values) if values else None
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table of the rows without columns that are empty in all rows, and the versions."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    keys = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    head = ["case", "system", "times ours", *(COLUMNS[key] for key in keys)]
    body = [
        [row["case"], row["system"], f"{row['times_ours']:.2f}x", *(cell(row[key]) for key in keys)] for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in [head, rule, *body]]
    return "\n".join([*lines, *dict.fromkeys(f"{row['system']}: {row['version']}" for row in rows)])


def compare(case: str, systems: Sequence[Command], rounds: int = 1) -> tuple[list[dict[str, Any]], list[str]]:
    """Runs the systems in turn and returns (a row for each, ours first; a sentence for each failure).

    Without a result of our own there is nothing to compare with, and no row.
    """
    runs: list[list[dict[str, Any]]] = [[] for _ in systems]
    remarks = []
    for turn in range(rounds):
        for i, (command, variables) in enumerate(systems):
            print(f"{case}, round {turn + 1} of {rounds}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
            result = run_json(command, variables)
            if isinstance(result, str):
                remarks.append(result)
            else:
                runs[i].append(result)
    if not any(runs[:1]):
        return [], remarks
    rows = [{"case": case} | summary(r) for r in runs if r]
    return [row | {"times_ours": row["step_s_median"] / rows[0]["step_s_median"]} for row in rows], remarks


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the other systems' scripts")
    parser.add_argument("--environments", type=Path, help="folder with their virtual environments: trl/, ppo/ and tun/")
    parser.add_argument("--works", nargs="*", default=["S", "M"], metavar="WORK", help="sizes (default: S M)")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(PEERS), default=["ppo", "grpo"])
    parser.add_argument(
        "--rollouts", nargs="+", default=[], metavar="CASE", help="cases of rollouts.py (default: none)"
    )
    parser.add_argument("--slots", nargs="+", type=int, default=[16], help="answers at a time (default 16)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="cases of cases.py (default: none)")
    parser.add_argument("--rounds", type=int, default=1, help="how often every system takes its turn (default 1)")
    parser.add_argument("--output", type=Path, help="also write all rows as JSON lines to this file")
    options = parser.parse_args(arguments)
    # Absolute, but links are kept: a virtual environment's python is a link.
    peers, environments = (path and path.absolute() for path in (options.peers, options.environments))
    cases = {
        f"{work} {algorithm}": step_commands(work, algorithm, peers, environments)
        for work in options.works
        for algorithm in options.algorithms
    }
    cases |= {case: rollout_commands(case, options.slots) for case in options.rollouts}
    cases |= {case: way_commands(case) for case in options.cases}
    table_rows, remarks, whole = [], [], True
    for case, (systems, missing) in cases.items():
        rows, failed = compare(case, systems, options.rounds)
        table_rows += rows
        remarks += missing + failed
        whole &= bool(rows) or not systems
        if options.output is not None:
            with options.output.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    if table_rows:
        print(table(table_rows))
    print(*dict.fromkeys(remarks), sep="\n")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
