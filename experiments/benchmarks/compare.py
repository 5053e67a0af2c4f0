"""Set our step beside those of other systems: same work, same machine, one process at a time, in turn.

    python experiments/benchmarks/compare.py --peers PEERS --environments ENVIRONMENTS
    python experiments/benchmarks/compare.py --works S --algorithms grpo --rounds 3 --peers ... --environments ...

PEERS is a folder of scripts that time the same work in other systems and print one line of JSON with the keys of
`step.py --json`; ENVIRONMENTS holds the virtual environments they run in:

    system  PEERS/            ENVIRONMENTS/      with
    TRL     trl_grpo.py       trl/bin/python     torch 2.13.0, trl 1.16.0, transformers 5.23.0
    TRL     trl_ppo.py        ppo/bin/python     torch 2.13.0, trl 1.12.0 (the last with PPO), transformers 5.23.0
    Tunix   tunix_grpo.py     tun/bin/python     google-tunix 0.1.7, jax 0.10.2, flax 0.12.8
    Tunix   tunix_ppo.py      tun/bin/python

Without the two options, or where one of these files is missing, the table has our own numbers alone and says so.
A round runs every system once; with several rounds a system's number is the median over them. The ratio is the other
system's time over ours: 2.0x means that we take half its time. Run on an idle machine only: timings of threads that
share their cores with other work say nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

OWN = Path(__file__).with_name("step.py")
# Freed memory stays in the process: helps torch (a GRPO step by about 15 %), does nothing for JAX.
TORCH_ALLOCATOR = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.hugetlb=1"
COLUMNS = {
    "step_s_median": "step s",
    "step_s_min": "min",
    "gen_s_median": "rollout s",
    "update_s_median": "update s",
    "tokens_per_s": "tokens/s",
    "first_step_s": "first step s",
    "compile_s": "compile s",
    "peak_rss_gib": "peak GiB",
}


class Peer(NamedTuple):
    """Another system: the folder of its environment, its script, and what its process finds in its environment."""

    environment: str
    script: str
    variables: dict[str, str]


PEERS = {
    "ppo": (Peer("ppo", "trl_ppo.py", {"GLIBC_TUNABLES": TORCH_ALLOCATOR}), Peer("tun", "tunix_ppo.py", {})),
    "grpo": (Peer("trl", "trl_grpo.py", {"GLIBC_TUNABLES": TORCH_ALLOCATOR}), Peer("tun", "tunix_grpo.py", {})),
}


def run_json(command: Sequence[str], variables: dict[str, str]) -> dict[str, Any] | str:
    """What a benchmark printed as its last line, or why there is nothing."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return f"{Path(command[1]).name} ended with exit code {done.returncode}: {last}"


def commands(
    algorithm: str,
    peers: Path | None,
    environments: Path | None,
) -> tuple[list[tuple[list[str], dict[str, str]]], list[str]]:
    """(command lines with their variables, ours first; what is missing, in words)."""
    found: list[tuple[list[str], dict[str, str]]] = [
        ([sys.executable, str(OWN), "--algorithm", algorithm, "--json"], {})
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
            found.append(([str(python), str(script)], peer.variables))
    return found, missing


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One system's rounds as one row: medians, except the least of the minima and the greatest peak memory."""
    row = {"system": runs[0]["system"], "version": runs[0]["version"]}
    for key in COLUMNS:
        values = [r[key] for r in runs if r.get(key) is not None]
        pick = {"step_s_min": min, "peak_rss_gib": max}.get(key, statistics.median)
        row[key] = pick(values) if values else None
    return row


def table(work: str, algorithm: str, rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, our row first, with each other system's step time as a multiple of ours."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    head = [f"{work} {algorithm}", "times ours", *COLUMNS.values()]
    body = [
        [row["system"], f"{row['step_s_median'] / rows[0]['step_s_median']:.2f}x", *(cell(row[key]) for key in COLUMNS)]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    rule = ["-" * width for width in widths]
    lines = ["| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in [head, rule, *body]]
    return "\n".join(lines + [f"{row['system']}: {row['version']}" for row in rows])


def compare(
    work: str,
    algorithm: str,
    *,
    peers: Path | None = None,
    environments: Path | None = None,
    rounds: int = 1,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row a system, ours first; remarks: what was missing or failed). RuntimeError when our own step failed."""
    systems, remarks = commands(algorithm, peers, environments)
    runs: list[list[dict[str, Any]]] = [[] for _ in systems]
    for turn in range(rounds):
        for i, (command, variables) in enumerate(systems):
            name = Path(command[1]).name
            print(f"{work} {algorithm}, round {turn + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            result = run_json([*command, "--work", work], variables)
            if isinstance(result, str):
                remarks.append(result)
            else:
                runs[i].append(result)
    if not runs[0]:
        raise RuntimeError(remarks[-1])
    return [summary(r) for r in runs if r], remarks


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the other systems' scripts")
    parser.add_argument("--environments", type=Path, help="folder with their virtual environments: trl/, ppo/ and tun/")
    parser.add_argument("--works", nargs="+", default=["S", "M"], metavar="WORK", help="sizes (default: S M)")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(PEERS), default=["ppo", "grpo"])
    parser.add_argument("--rounds", type=int, default=1, help="how often every system takes its turn (default 1)")
    parser.add_argument("--output", type=Path, help="also write all rows as JSON lines to this file")
    options = parser.parse_args(arguments)
    for work in options.works:
        for algorithm in options.algorithms:
            rows, remarks = compare(
                work, algorithm, peers=options.peers, environments=options.environments, rounds=options.rounds
            )
            print(table(work, algorithm, rows), *remarks, "", sep="\n", flush=True)
            if options.output is not None:
                with options.output.open("a") as file:
                    file.writelines(json.dumps({"work": work, "algorithm": algorithm, **row}) + "\n" for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
