"""Brindlemoor: a procedurally generated text world whose quality can be computed exactly.

A labeler may import `scenes`, `grammar`, `vocabulary`, `labeler_prompts`, `tasks` and `builder`. Gold scores (`gold`),
simulated people (`people`) and the training corpora (`corpus`) are behind the labeler's firewall, which
`tests/feedback/test_firewall.py` guards.
"""
