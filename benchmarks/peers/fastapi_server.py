"""FastAPI without batching.

``documented`` follows FastAPI's tutorial page "Request Files" (fastapi.tiangolo.com/tutorial/
request-files): a plain ``def`` endpoint, which FastAPI runs in its thread pool, and files of a
form; several processes as its page "Server Workers" has them. ``ours`` reads the raw body.
"""

from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, File, Request
from starlette.concurrency import run_in_threadpool

from benchmarks.peers.classifier import Answer, Options, classifier
from benchmarks.peers.framing import unpack

OPTIONS = Options.read()


def _application() -> FastAPI:
    """Made in each worker process: uvicorn imports it by name."""
    model = classifier(OPTIONS)

    def score(images: list[bytes]) -> list[Answer]:
        return [answer for data in images for answer in model.answer([model.prepare(data)])]

    app = FastAPI()
    if OPTIONS.variant == "ours":

        @app.post("/score")
        async def score_body(request: Request) -> Any:
            return {"results": await run_in_threadpool(score, unpack(await request.body()))}

    else:

        @app.post("/score")
        def score_files(file: Annotated[list[bytes], File()]) -> Any:
            return {"results": score(file)}

    return app


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.peers.fastapi_server:_application",
        factory=True,
        host="127.0.0.1",
        port=OPTIONS.port,
        workers=OPTIONS.workers,
        log_level="error",
        access_log=False,
        # A worker that still imports torch does not answer the supervisor, and would be replaced.
        timeout_worker_healthcheck=120,
    )
