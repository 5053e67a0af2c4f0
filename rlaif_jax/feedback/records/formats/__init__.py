"""Readers and writers of the formats in which other tools and published data sets keep feedback.

A reader is `read_X(path, ...) -> (judgements, messages)`: good records are kept, and each bad one is a message with file and
line; what a good row has and no judgement holds (a field, a draft, an empty annotation) is counted in `unused` of the result.
A file that cannot be read at all is a UserError. Readers of files that do not name the judge take the rater as an argument.
A writer is `write_X(judgements, path) -> number of rows`; judgements that the format cannot hold (another form, no value) are
left out.

    pairs:   HH, distilabel, oasst trees; the Anthropic critique and revision requests
    judges:  alpaca_eval, FastChat, PandaLM, LLMBar, prometheus
    tools:   Argilla, label-studio, crowd-kit, get-another-label
    texts:   FineGrained RLHF, SQuALITY, MLQE-PE, XSum hallucinations, ILF
"""
