"""The numbers of a run and what they mean: one table for the page's titles, hints and glossary."""

from __future__ import annotations

from typing import NamedTuple


class Quantity(NamedTuple):
    """What a number is.

    Attributes:
        title: its name on the page; {} is what the * of its key matches.
        unit: its unit, or ""; that of a share begins with %.
        meaning: a sentence or two for a reader who has not seen it before.
    """

    title: str
    unit: str
    meaning: str


_PER_ANSWER, _PER_TOKEN = "nats per answer", "nats per token"

QUANTITIES = {
    # ---- What a policy's answers are worth
    "win_rate_*": Quantity(
        "Win rate by {}",
        "%",
        "Share of the held-out prompts for which the answer after training has the higher score; ties count half. "
        "50 % means no difference.",
    ),
    "win_rate_*_length_controlled": Quantity(
        "Win rate by {}, equal lengths",
        "%",
        "Win rate after the effect of the answers' length is taken out by a logistic regression.",
    ),
    "reward": Quantity(
        "Reward",
        "score",
        "Mean reward of the answers of a training step, after all shaping: what the policy learned from. A higher "
        "reward is what training aims at; it does not prove that the answers are better.",
    ),
    "score": Quantity("Score", "score", "Mean score that the feedback gave a step's answers, before any shaping."),
    "score/*": Quantity(
        "Score {}",
        "score",
        "Mean score that one of several kinds of feedback gave a step's answers, before any shaping.",
    ),
    "eval_reward": Quantity(
        "Reward on held-out prompts",
        "score",
        "Mean reward of the answers to held-out prompts, combined as in training.",
    ),
    "eval/*": Quantity(
        "Reward {}",
        "score",
        "Mean of one reward over the answers to held-out prompts, before it is scaled and weighted.",
    ),
    "missing/*": Quantity(
        "Missing: {}",
        "%",
        "Share of a step's answers that one reward gave no judgement on. Their other rewards count for it.",
    ),
    "missing_longer/*": Quantity(
        "Length of answers without {}",
        "tokens",
        "How much longer the answers are that one reward gave no judgement on than the others. A judge may fail on long "
        "answers.",
    ),
    "missing/partly": Quantity(
        "Partly judged answers", "%", "Share of a step's answers that have some of their rewards and miss others."
    ),
    "missing/partly_advantage": Quantity(
        "Advantage of partly judged answers",
        "",
        "How much higher it is than that of complete answers: the reward less the mean over the prompt's answers, in standard "
        "deviations.",
    ),
    "spread/drawn": Quantity(
        "Prompts with different rewards",
        "% of prompts",
        "Prompts of a step whose answers got different rewards. Where all are equal, a comparison teaches nothing.",
    ),
    "spread/kept": Quantity(
        "Prompts with different rewards, of those kept",
        "% of prompts",
        "The same share of the prompts that a step learns from, which were chosen for it (train.oversample).",
    ),
    "*_order_consistency": Quantity(
        "Order consistency of the judge ({})",
        "%",
        "Share of pairs in which the judge prefers the same answer in both orders.",
    ),
    "*_first_shown": Quantity(
        "Preference for the answer shown first ({})",
        "%",
        "Mean probability that the judge calls the answer shown first better: 50 % is no position bias.",
    ),
    "*_agrees": Quantity(
        "Judge and reward agree ({})",
        "%",
        "Share of the held-out prompts for which the judge prefers the answer with the higher reward.",
    ),
    "second_missing": Quantity("Missing verdicts of the second judge", "%", "Share of pairs without a usable verdict."),
    "second_opinion": Quantity(
        "Second opinion",
        "score",
        "Mean score of the answers to held-out prompts by a judge that the policy does not learn from. If it falls "
        "while the reward rises, the policy exploits its reward.",
    ),
    "second_opinion_se": Quantity(
        "Second opinion, standard error", "score", "How far chance alone moves the second opinion's mean."
    ),
    "gold": Quantity(
        "Gold score",
        "score",
        "Mean score of the answers to held-out prompts by the task's exact measure, which no part of the training sees.",
    ),
    "judge": Quantity("Judge's score", "score", "Mean score that the judge gives the answers to held-out prompts."),
    "judge_win_rate": Quantity(
        "Win rate by the judge",
        "%",
        "How often the judge scores the answer after training higher than the one before; ties count half.",
    ),
    "gain_sd": Quantity(
        "Gain in standard deviations",
        "",
        "Mean gain of the score, divided by the spread of the scores before training.",
    ),
    "gain": Quantity(
        "Gain", "score", "Mean of the score after training minus the score before, over held-out prompts."
    ),
    # ---- What the answers look like
    "kl": Quantity(
        "KL to the reference",
        _PER_ANSWER,
        "How far the policy has moved from the one that training began with: 0 is not at all. A large or leaping value "
        "means that it has left the answers on which its feedback can be trusted.",
    ),
    "kl_k3": Quantity(
        "KL, second estimate", _PER_ANSWER, "The KL to the reference by an estimate that is never negative (k3)."
    ),
    "length": Quantity("Answer length", "tokens", "Mean number of tokens of an answer."),
    "eval_length": Quantity(
        "Held-out answer length", "tokens", "Mean number of tokens of an answer to a held-out prompt."
    ),
    "finished": Quantity(
        "Finished answers",
        "% of answers",
        "Share of a step's answers that ended by themselves, before the length limit.",
    ),
    "entropy": Quantity(
        "Entropy",
        _PER_TOKEN,
        "How undecided the policy is about the next token, estimated from its answers. Near 0 all answers become alike.",
    ),
    "entropy_exact": Quantity(
        "Entropy, exact",
        _PER_TOKEN,
        "How undecided the policy is about the next token, summed over the whole vocabulary.",
    ),
    "distinct2": Quantity(
        "Distinct token pairs",
        "%",
        "Different pairs of neighbouring tokens among all pairs: how varied the answers are.",
    ),
    # ---- How good the feedback is
    "reference_logprob": Quantity(
        "Log-prob under the start",
        _PER_TOKEN,
        "Mean log-prob of a token of the held-out answers under the policy that training began with. Where it falls, that "
        "policy finds the answers less fluent.",
    ),
    "reference_logprob_change": Quantity(
        "Change of the log-prob under the start",
        _PER_TOKEN,
        "Log-prob of a token under the policy that training began with: of the answers after training less those before.",
    ),
    "judge_agreement": Quantity(
        "Judge agrees with gold",
        "%",
        "Share of labelled pairs of answers in which the judge prefers the better one by gold.",
    ),
    "judge_agreement_final": Quantity(
        "Judge agrees with gold at the end",
        "%",
        "Share of held-out prompts where the judge and gold prefer the same of two answers: before or after training.",
    ),
    "judge_accuracy": Quantity(
        "Judge's accuracy", "%", "Share of held-out texts with a known label that the judge classifies correctly."
    ),
    "judge_missing": Quantity(
        "Missing judgements",
        "%",
        "Share of answers, or of pairs of answers, about which the judge gave no usable judgement.",
    ),
    "judge_sd": Quantity("Spread of the judge's scores", "score", "Standard deviation of the judge's scores."),
    "same_position_rate": Quantity(
        "Same position",
        "%",
        "Share of pairs for which the judge prefers the same place, first or second, in both orders.",
    ),
    "rm_accuracy": Quantity(
        "Reward model's accuracy",
        "%",
        "Share of held-out pairs of answers that the reward model orders as the judge's labels do.",
    ),
    "longer_accuracy": Quantity(
        "Accuracy of the longer answer",
        "%",
        "Share of held-out pairs whose preferred answer is the longer one: what a score by length alone would reach.",
    ),
    "heldout_margin": Quantity(
        "Held-out margin", "score", "Mean score of the preferred answer minus that of the other, over held-out pairs."
    ),
    "heldout_ece": Quantity(
        "Held-out calibration error",
        "%",
        "How far the probability that the scores give a preference is from how often it is right, over held-out pairs, "
        "without the part that chance makes. 0 is perfect.",
    ),
    "length_correlation": Quantity(
        "Correlation with length",
        "",
        "Spearman's rank correlation of scores and answer lengths: near 1 or -1 the score is little more than a length.",
    ),
    "pairs_learned": Quantity("Pairs learned from", "pairs", "Number of pairs of answers that the training has."),
    "pairs_heldout": Quantity("Held-out pairs", "pairs", "Number of pairs of answers that the measurements have."),
    "columns_filled": Quantity("Columns filled", "%", "Share of the training's columns that hold a token, no padding."),
    # ---- What a language model has learned
    "perplexity": Quantity(
        "Perplexity", "", "How undecided the model is about each learned token of held-out texts: 1 is certain."
    ),
    "texts_learned": Quantity("Texts learned from", "texts", "Number of texts that the training has."),
    "texts_heldout": Quantity("Held-out texts", "texts", "Number of texts that the perplexity is measured on."),
    "accuracy_*": Quantity(
        "Accuracy, {}",
        "%",
        "Share of held-out pairs ordered correctly after all labels, where this rule chose what to ask.",
    ),
    "labels_saved_*": Quantity(
        "Labels saved, {}", "labels", "How many labels fewer than at random this rule needs for the same accuracy."
    ),
    "check": Quantity("Held-out check", "%", "The smallest of the held-out checks of the model in training."),
    "check/*": Quantity(
        "Held-out check, {}",
        "%",
        "Share of words of this kind that the model in training writes correctly in texts about towns that it has not seen.",
    ),
    "base_check_*": Quantity(
        "Base model knows {}",
        "%",
        "Share of words of this kind that the base model writes correctly in texts about towns that it has not seen.",
    ),
    "labeler_check_*": Quantity(
        "Labeler knows {}",
        "%",
        "Share of notes of this kind that the AI labeler writes as people do, on answers about towns that it has not seen.",
    ),
    "labels": Quantity("Labels", "", "Number of judgements that the run collected."),
    "feedback_missing": Quantity("Missing so far", "answers", "Answers without a judgement since training began."),
    # ---- The update
    "loss": Quantity(
        "Loss", "", "What an update makes smaller. Its value has no meaning outside one stage of one run."
    ),
    "heldout_loss": Quantity("Held-out loss", "", "The loss of examples that are not learned from."),
    "accuracy": Quantity(
        "Accuracy", "%", "Share of examples that are classified, or pairs that are ordered, as labelled."
    ),
    "heldout_accuracy": Quantity(
        "Held-out accuracy", "%", "Share of examples that are right, of those that are not learned from."
    ),
    "learning_rate": Quantity("Learning rate", "", "Size of the optimiser's steps."),
    "grad_norm": Quantity(
        "Gradient norm", "", "Length of the gradient before clipping. Spikes mean unstable training."
    ),
    "grad_norm/*": Quantity(
        "Gradient norm, {}", "", "Length of the gradient of one part before clipping. Spikes mean unstable training."
    ),
    "policy_loss": Quantity(
        "Policy loss", "", "The policy's part of the loss. It need not fall while the policy improves."
    ),
    "value_loss": Quantity("Value loss", "", "Squared error of the critic, which predicts the return."),
    "explained_variance": Quantity(
        "Explained variance", "", "How well the critic predicts returns: 1 is perfectly, 0 no better than their mean."
    ),
    "return": Quantity("Return", "score", "Mean sum of the rewards from a token to the end of its answer."),
    "kl_coef": Quantity("KL coefficient", "", "How much reward a policy loses per nat of KL to the reference."),
    "kl_loss": Quantity("KL in the loss", _PER_TOKEN, "The KL term of the loss, before its coefficient."),
    "approx_kl": Quantity(
        "KL of the update", _PER_TOKEN, "How far the updates of a step move the policy from the one that answered."
    ),
    "clip_fraction": Quantity(
        "Clip fraction", "% of tokens", "Tokens whose update is cut off because the policy has changed enough at them."
    ),
    "ratio_error": Quantity(
        "Ratio error", "", "Mean distance from 1 of the ratio of a token's probability to that when it was drawn."
    ),
    "sampler_gap": Quantity(
        "Sampler gap",
        _PER_TOKEN,
        "Mean difference between the log-probs of the sampler and of the trainer: rounding only.",
    ),
    "sampler_gap_max": Quantity(
        "Largest sampler gap",
        "nats",
        "Largest difference of a step between the log-probs of the sampler and of the trainer.",
    ),
    "effective_sample_size": Quantity(
        "Effective sample size", "%", "Share of tokens that count fully after weights correct for the sampler's gap."
    ),
    "nonfinite": Quantity(
        "Skipped updates", "updates", "Updates of a step that were left out: loss or gradient not finite."
    ),
    "staleness": Quantity("Staleness", "steps", "Steps between the policy that answered and the policy that learned."),
    "margin": Quantity(
        "Margin", "nats", "By how much more the policy has raised the preferred answer than the other, times beta."
    ),
    "margin_size": Quantity(
        "Size of the margin", "nats", "Mean size of the margin between two answers, whichever is preferred."
    ),
    "pairs": Quantity("Pairs", "pairs", "Pairs of answers with a preference in a minibatch."),
    "dpo_loss": Quantity(
        "Preference loss", "", "The loss of direct preference optimisation; log 2 = 0.69 at the start."
    ),
    # ---- Time
    "time/tokens_per_s": Quantity("Speed", "tokens per second", "Answer tokens over the time of a whole step."),
    "time/updates_per_s": Quantity("Updates per second", "", "Updates of a stage per second."),
    "time/rollout_s": Quantity("Rollout", "s", "Seconds of a step until its answers were drawn."),
    "time/feedback_s": Quantity("Feedback", "s", "Seconds of a step until its answers were judged."),
    "time/update_s": Quantity("Update", "s", "Seconds of a step for rewards, update and evaluation."),
    "time/compilations": Quantity(
        "Compilations", "programs", "Programs compiled so far: a number that grows costs time."
    ),
    "time/elapsed_s": Quantity("Elapsed", "s", "Seconds since the run began."),
    "wall_s": Quantity("Wall time", "s", "Seconds from the start of the run to its end."),
    # ---- Fingerprints
    "chat_template_day": Quantity(
        "Day in the chat template", "", "The day that the chat template prints: that of the run's start, always."
    ),
    "weights_sha256": Quantity("Weights' fingerprint", "", "SHA-256 over the weights that training began with."),
    "texts_sha256": Quantity("Texts' fingerprint", "", "SHA-256 over the tokens that are learned."),
    "pairs_sha256": Quantity("Pairs' fingerprint", "", "SHA-256 over the tokens and labels that are learned."),
    "measured_texts_sha256": Quantity(
        "Held-out texts' fingerprint", "", "SHA-256 over the tokens that the perplexity is measured on."
    ),
    "measured_pairs_sha256": Quantity(
        "Held-out pairs' fingerprint", "", "SHA-256 over the tokens and labels of the pairs that are measured on."
    ),
    "prompts_sha256": Quantity(
        "Prompts' fingerprint", "", "SHA-256 over the records that are learned on, with all fields."
    ),
    "held_out_prompts_sha256": Quantity(
        "Held-out prompts' fingerprint", "", "SHA-256 over the records that are held out."
    ),
    "policy_sha256": Quantity("Policy's fingerprint", "", "SHA-256 over the policy's weights before training."),
    "labeler_sha256": Quantity(
        "Labeler's fingerprint", "", "SHA-256 of the AI labeler's weights, frozen before training."
    ),
    "judge_sha256": Quantity("Judge's fingerprint", "", "SHA-256 of the judge's weights, frozen before training."),
    "results": Quantity("Results", "", "All results of the experiment."),
}
"""The numbers that the package and its experiments write, in the glossary's order; * matches any name.

Keys are those of metrics.jsonl and of summary.json without `_before`, `_after`, `_ci95`, and without what precedes the
last slash where the whole key is not in the table.
"""
