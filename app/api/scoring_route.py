"""The routes that score, without what FastAPI does for every request and these do not need."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from app.api.auth import ApiKeyRequired, require_api_key


class ScoringRoute(APIRoute):
    """A route whose endpoint is called at once when the request has no query.

    Without a query every parameter has its default, so that there is nothing for FastAPI to parse
    and to check; it would take as long over that as everything else takes that an image costs
    beside the network. The credentials are checked either way.

    An endpoint takes the request, the parameters of its path as text, and its query's, which have
    defaults. Its router's dependencies are ``ApiKeyRequired``, no more.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        assert list(self.dependencies) == ApiKeyRequired, "others would not be resolved"
        resolve = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.scope["query_string"]:
                return await resolve(request)
            await require_api_key(request)
            response: Response = await self.endpoint(request, **request.path_params)
            return response

        return handle
