"""The scoring routes, without what FastAPI does for every request and these do not need."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import cast

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.convertors import PathConvertor, StringConvertor
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.auth import ApiKeyRequired, require_api_key

_Handler = Callable[[Request, Exception], Awaitable[Response]]


class ScoringRoute(APIRoute):
    """A route that requests without a query reach by the :class:`ScoringLane`.

    An endpoint takes the request, the parameters of its path as text, and its query's, which have
    defaults. Its router's dependencies are ``ApiKeyRequired``, no more; the application has none,
    and includes the router without a prefix.
    """


class ScoringLane:
    """Answers what is asked of scoring routes without a query; the rest goes on to the router.

    Without a query every parameter has its default, so that there is nothing to parse and to
    check; FastAPI and the router would take a good part of the event loop's time to find that out.
    The credentials are checked either way.

    Args:
        app: the router and what surrounds it.
        routers: whose scoring routes are answered here.
    """

    def __init__(self, app: ASGIApp, *, routers: Sequence[APIRouter]) -> None:
        self._app = app
        routes = [
            route
            for router in routers
            for route in router.routes
            if isinstance(route, ScoringRoute)
        ]
        for route in routes:
            assert list(route.dependencies) == ApiKeyRequired, "others would not be resolved"
            kinds = {type(kind) for kind in route.param_convertors.values()}
            assert kinds <= {StringConvertor, PathConvertor}, "others would not be converted"
        self._fixed: Mapping[tuple[str, str], ScoringRoute] = {
            (method, route.path): route
            for route in routes
            if not route.param_convertors
            for method in route.methods or ()
        }
        self._patterns = [route for route in routes if route.param_convertors]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        route = self._route(scope)
        if route is None:
            await self._app(scope, receive, send)
            return
        # As the router would: who traces a request asks for its route.
        scope["route"], scope["endpoint"] = route, route.endpoint
        request = Request(scope, receive, send)
        try:
            await require_api_key(request)
            response: Response = await route.endpoint(request, **request.path_params)
        except Exception as error:
            response = await _told(request, error)
            # It holds the frames that it went through, and they hold it: the upload and the model
            # would stay until the collector of garbage comes by.
            error.__traceback__ = None
        await response(scope, receive, send)

    def _route(self, scope: Scope) -> ScoringRoute | None:
        if scope["type"] != "http" or scope["query_string"] or scope.get("root_path"):
            return None
        method, path = scope["method"], scope["path"]
        if route := self._fixed.get((method, path)):
            return route
        for route in self._patterns:
            if method in (route.methods or ()) and (match := route.path_regex.match(path)):
                scope["path_params"] = match.groupdict()
                return route
        return None


async def _told(request: Request, error: Exception) -> Response:
    """The answer that tells of an error; one that nobody handles is raised again."""
    app: FastAPI = request.app
    for kind in type(error).__mro__:
        # The server's own handler of bugs stands further out, and logs them.
        if kind is not Exception and (handler := app.exception_handlers.get(kind)):
            response: Response = await cast(_Handler, handler)(request, error)
            return response
    raise error
