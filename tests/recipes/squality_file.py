"""A small file in the form of SQuALITY's responses."""

import json

PROPERTIES = ("correctness", "selection", "overall")


def write_squality(folder, *orders):
    """12 questions, 3 answers; orders: a worker each, question -> the places of the answers."""
    questions = {}
    for q in range(12):
        review = lambda worker, place: (
            {"worker_id": worker, "annotations": []}
            | {
                f"{name}-{what}": value
                for name in PROPERTIES
                for what, value in (("rating", 90.0 - 30 * place), ("rank", place + 1))
            }
        )
        questions[str(q)] = {
            f"system {k}": {
                "response": f"answer {k} to {q}",
                "reviews": [review(str(worker), order(q)[k]) for worker, order in enumerate(orders)],
            }
            for k in range(3)
        }
    path = folder / "squality" / "all-responses.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"passage-id": "7", "questions": questions}) + "\n")
    return path


def upwards(q):
    return (0, 1, 2)


def turning(q):
    return (2, 1, 0) if q % 2 else (0, 1, 2)
