"""The page as a parser sees it, and run folders to make pages of."""

import html.parser
import json
import re

from rlaif_jax.metrics import MetricsWriter
from rlaif_jax.report import report

ATTACK = "<script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)> {{ 7 * 7 }} \" ' & $x_{1$"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page; checks that every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def make(folder):
    return Page(report.write_report(folder).read_text(encoding="utf-8"))


def write_json(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def write_samples(folder, *samples):
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def sample(stage, index, response, **more):
    base = {"step": 0, "stage": stage, "prompt": f"prompt {index}", "response": response, "index": index}
    return base | {"reward": None, "gold": None} | more


def finished_run(folder):
    """Writes the folder of a finished run and returns it."""
    with MetricsWriter(folder, terminal=False, sinks=()) as writer:
        with writer.stage("reward_model", 60) as stage:
            for step in range(1, 61):
                stage.write(step, {"loss": 1 / step, "heldout_accuracy": 1 - 0.5 / step, "learning_rate": 1e-3})
        with writer.stage("rl", 5) as stage:
            for step in range(1, 6):
                values = {"reward": 0.1 * step, "kl": 0.5 * step, "length": 20.0, "entropy": 2.0}
                values |= {"clip_fraction": 0.1, "first/sampler_gap": 1e-7, "grad_norm": 1.0, "time/tokens_per_s": 9e3}
                stage.write(step, values | ({"gold": 0.4} if step == 1 else {}))
    write_json(folder, "config.json", {"seed": 0, "ppo": {"clip_range": 0.2, "policy": {"lr": 3e-6}}})
    write_samples(
        folder,
        sample("before", 0, "a cup cup", reward=-0.25, gold=0.5),
        sample("before", 1, "nothing"),
        sample("rl", 0, "while it learns", step=3),
        sample("after", 1, "everything"),
        sample("after", 0, "The cook gives a cup.", reward=1.5, gold=0.75),
    )
    metrics = {"win_rate_gold": 0.7134, "win_rate_gold_ci95": [0.651, 0.772], "gold_before": 0.412}
    metrics |= {
        "gold_after": 0.741,
        "judge_agreement": 0.874,
        "same_position_rate": 0.093,
        "rm_accuracy": 0.842,
    }
    metrics |= {"kl": 8.91, "length_before": 22.3, "length_after": 25.9, "wall_s": 432.7}
    summary = {"experiment": "quickstart", "status": "done", "seed": 0, "steps": 5, "wall_s": 432.7}
    checks = {"kl_at_step_0_is_zero": True, "loss_finite": False}
    claim = {"claim": "RLAIF beats SFT", "paper": 0.71, "ours": 0.7134, "ci95": [0.651, 0.772]}
    claim["verdict"] = "reproduced"
    write_json(folder, "summary.json", summary | {"metrics": metrics, "checks": checks, "claims": [claim]})
    return folder
