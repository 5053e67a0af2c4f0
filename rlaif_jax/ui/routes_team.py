"""The routes of the team: progress, agreement, disputes, adjudication, stop requests and exports."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.concurrency import run_in_threadpool

from rlaif_jax.feedback.records.forms import canonical
from rlaif_jax.quality.annotators import annotator_agreement
from rlaif_jax.ui.routes_tasks import json_body, request_id
from rlaif_jax.ui.service import AnnotationService


def add_team_routes(app: FastAPI, service: AnnotationService) -> None:
    """Adds to `app` the routes of the team, such as GET /api/team; each calls a method of `service`."""

    @app.get("/api/team")
    async def team(request: Request) -> Any:
        posts = [post for post in service.queue.posts(acts=("answer",)) if post.records]
        kinds = {queued.task.id: queued.task.kind for queued in service.queue.tasks(only_open=False)}
        return service.team() | {"agreement": await run_in_threadpool(annotator_agreement, posts, kinds)}

    @app.get("/api/disputes")
    async def disputes(request: Request) -> Any:
        return service.disputes(request.state.rater)

    @app.post("/api/adjudicate")
    async def adjudicate(request: Request) -> Any:
        body = await json_body(request)
        return service.adjudicate(request.state.rater, request_id(body), body)

    @app.post("/api/stop")
    async def stop(request: Request) -> Any:
        return service.stop(request.state.rater, (await json_body(request)).get("stop"))

    @app.get("/export.jsonl")
    async def export(request: Request) -> Response:
        final = request.query_params.get("final") == "1"
        lines = [canonical(record) + "\n" for record in service.export(request.state.rater, final)]
        name = "feedback-final.jsonl" if final else "feedback.jsonl"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return PlainTextResponse("".join(lines), media_type="application/x-ndjson", headers=headers)
