"""The ASGI application: routers, error handlers, guard. Everything else is behind `Gateway`."""

from __future__ import annotations

from fastapi import FastAPI

from openmint.api.errors import install_error_handlers
from openmint.api.routes import health
from openmint.service.gateway import Gateway

ROUTERS = (health.router,)


def create_app(gateway: Gateway) -> FastAPI:
    """The application that serves `gateway`; ready to be handed to uvicorn."""
    app = FastAPI(title="OpenMinT", docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    return app
