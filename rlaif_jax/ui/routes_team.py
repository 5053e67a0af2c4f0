"""The routes of the team: progress, agreement, disputes, adjudication, stop requests and exports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from rlaif_jax.feedback.records.forms import canonical
from rlaif_jax.ui.routes_tasks import json_body, request_id
from rlaif_jax.ui.service import AnnotationService


def add_team_routes(app: FastAPI, service: AnnotationService) -> None:
    """Adds to `app` the routes of the team, such as GET /api/team; each calls a method of `service`."""

    counting: set[asyncio.Task[None]] = set()

    @app.get("/api/team")
    async def team(request: Request) -> Any:
        found = await service.run(service.team)
        if found["uncounted"] and not counting:
            counting.add(asyncio.create_task(service.count_posts()))
            next(iter(counting)).add_done_callback(counting.discard)
        return found

    @app.get("/api/disputes")
    async def disputes(request: Request) -> Any:
        skip = request.query_params.get("skip", "0")
        number = int(skip) if skip.isdecimal() and len(skip) < 10 else 0
        return await service.run(service.disputes, request.state.rater, number)

    @app.post("/api/adjudicate")
    async def adjudicate(request: Request) -> Any:
        body = await json_body(request)
        return await service.run(service.adjudicate, request.state.rater, request_id(body), body)

    @app.post("/api/stop")
    async def stop(request: Request) -> Any:
        return await service.run(service.stop, request.state.rater, (await json_body(request)).get("stop"))

    @app.get("/export.jsonl")
    async def export(request: Request) -> Response:
        final = request.query_params.get("final") == "1"
        overruled = await service.run(service.overruled, request.state.rater)

        async def lines() -> AsyncIterator[str]:
            after = -1
            while after:
                part = await service.run(service.export, final, overruled if final else frozenset(), max(after, 0))
                records, after = part
                yield "".join(canonical(record) + "\n" for record in records)

        name = "feedback-final.jsonl" if final else "feedback.jsonl"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return StreamingResponse(lines(), media_type="application/x-ndjson", headers=headers)
