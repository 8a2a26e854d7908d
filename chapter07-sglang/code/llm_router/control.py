"""The control plane, on a port of its own: workers come and go, and anyone may look.

A framework is right here: a call a minute, described by OpenAPI. None of it is on a request's way.
"""

from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import Response
from pydantic import BaseModel, Field

from distlab.errors import UsageError
from llm_router.balancer import Router
from llm_router.mirror import Mirrors
from llm_router.worker import Worker

DRAIN_S = 60.0


class NewWorker(BaseModel):
    url: Annotated[str, Field(max_length=1000)]
    kv_events: Annotated[str, Field(max_length=1000)] | None = None


class WorkerState(BaseModel):
    url: str
    state: str  # up, down, hung, open or draining
    load: int
    requests: int
    failures: int
    models: list[str]


class Problem(BaseModel):
    detail: Any


def state_of(worker: Worker) -> WorkerState:
    return WorkerState(
        url=worker.url, state=worker.state, load=worker.load, requests=worker.requests,
        failures=worker.failures, models=[*worker.models],
    )  # fmt: skip


def control_app(router: Router, mirrors: Mirrors | None) -> FastAPI:
    app = FastAPI(title="llm_router")

    @app.get("/workers")
    async def workers() -> list[WorkerState]:
        return [state_of(worker) for worker in router.workers.values()]

    @app.post("/workers", status_code=201, responses={422: {"model": Problem}})
    async def add(new: NewWorker) -> WorkerState:
        """It is used when it has answered a request for one token."""
        try:
            worker = Worker(new.url, new.kv_events)
            if mirrors is not None:
                mirrors.follow(worker)
        except UsageError as error:
            raise HTTPException(422, str(error)) from error
        known = router.add(worker)
        if known is not worker and mirrors is not None:
            mirrors.leave(worker)
        return state_of(known)

    @app.delete("/workers", responses={404: {"model": Problem}})
    async def remove(
        url: str, limit_s: Annotated[float, Query(ge=0, le=3600)] = DRAIN_S
    ) -> WorkerState:
        """Drain it: nothing new, and gone when its last request is answered."""
        worker = router.workers.get(url.rstrip("/"))
        if worker is None:
            raise HTTPException(404, f"there is no worker {url[:200]}")
        await router.remove(worker, limit_s)
        if mirrors is not None:
            mirrors.leave(worker)
        return state_of(worker)

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"workers": len(router.workers), "usable": len(router.usable)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(router.metrics.text(router), media_type="text/plain; version=0.0.4")

    return app
