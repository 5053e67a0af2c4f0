"""Rules about the world's summaries: predicates that read the facts off the prompt.

A constitution names them as `rlaif_jax.recipes.world.rules:NAME`; see experiments/brindlemoor.toml.
"""

from __future__ import annotations

from rlaif_jax.data.world.grammar import parse, summary
from rlaif_jax.data.world.scenes import SALIENCE_WORDS
from rlaif_jax.data.world.tasks.summarisation import MAX_FACTS


def facts(prompt: str) -> dict[str, tuple[int, str]]:
    """Returns aspect -> (salience 1 .. 3, value), as the prompt lists them."""
    words = prompt.partition(":")[2].split()
    return {
        words[i]: (SALIENCE_WORDS.index(words[i + 2]) + 1, words[i + 1])
        for i in range(0, len(words) - 2, 3)
        if words[i + 2] in SALIENCE_WORDS
    }


def telling(prompt: str, answer: str) -> float:
    """Returns the salience of the answer's true claims as a share of the most that is possible, in [0, 1].

    Only the first MAX_FACTS claims count. `prompt` lists the facts.
    """
    known = facts(prompt)
    true = {c.aspect for c in parse(answer).claims[:MAX_FACTS] if known.get(c.aspect, (0, ""))[1] == c.value}
    best = sum(sorted((salience for salience, _ in known.values()), reverse=True)[:MAX_FACTS])
    return sum(known[aspect][0] for aspect in true) / max(best, 1)


def faithful(prompt: str, answer: str) -> float:
    """Returns 1 if all claims of the answer are facts of the prompt, else 0."""
    known = facts(prompt)
    return float(all(known.get(claim.aspect, (0, ""))[1] == claim.value for claim in parse(answer).claims))


def fresh(prompt: str, answer: str) -> float:
    """Returns 1 unless two claims of the answer are about one aspect; `prompt` is not used."""
    aspects = [claim.aspect for claim in parse(answer).claims]
    return float(len(set(aspects)) == len(aspects))


def town(prompt: str, answer: str) -> float:
    """Returns 1 if the answer names the prompt's town and no other, else 0."""
    named = {name.entity for name in parse(answer).names}
    return float(named == {" ".join(prompt.partition(":")[0].split()[1:])})


def mended(prompt: str, answer: str) -> str:
    """Corrects an answer: removes false and repeated claims, and replaces its least salient claim.

    The least salient claim gives way to the most salient fact that the answer leaves out, where that one matters more.

    Args:
        prompt: the prompt, which holds the facts.
        answer: the answer.
    """
    known = facts(prompt)
    kept: list[str] = []
    for claim in parse(answer).claims:
        if claim.aspect in known and claim.aspect not in kept:
            kept.append(claim.aspect)
    kept = kept[:MAX_FACTS]
    unsaid = sorted((a for a in known if a not in kept), key=lambda a: -known[a][0])
    if unsaid and len(kept) < 2:
        kept.append(unsaid[0])
    elif unsaid:
        least = min(kept, key=lambda a: known[a][0])
        if known[least][0] < known[unsaid[0]][0]:
            kept[kept.index(least)] = unsaid[0]
    return summary([(a, known[a][1]) for a in kept], " ".join(prompt.partition(":")[0].split()[1:]))
