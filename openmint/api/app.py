"""The ASGI application: routers, error handlers, guard. Everything else is behind `Gateway`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from openmint.api.errors import install_error_handlers
from openmint.api.guard import Guard
from openmint.api.routes import (
    catalog,
    health,
    metrics,
    openai,
    tenants,
    tinker_checkpoints,
    tinker_futures,
    tinker_sampling,
    tinker_session,
    tinker_training,
    traffic,
)
from openmint.service.gateway import Gateway

ROUTERS = (
    tinker_futures.router,
    tinker_sampling.router,
    openai.router,
    tinker_training.router,
    tinker_session.router,
    tinker_checkpoints.router,
    health.router,
    metrics.router,
    catalog.router,
    traffic.router,
    tenants.router,
)
"""Those that are asked most come first: a request tries the routes one after another."""


def create_app(gateway: Gateway) -> FastAPI:
    """The application that serves `gateway`; ready to be handed to uvicorn."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = FastAPI(title="OpenMinT", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.gateway = gateway
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    app.add_middleware(Guard, limits=gateway.settings.service)
    return app
