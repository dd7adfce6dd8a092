# NormGate with the bundled model. docs/monitoring.md tells how to build and run it.
#
#   docker build -t normgate .
#
# PyTorch's own wheels run on the CPU and on NVIDIA GPUs, and are large. For an image without CUDA
# give the address of PyTorch's CPU wheels, which its install page names:
#
#   docker build -t normgate --build-arg TORCH_INDEX=... .
ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS dependencies
ARG TORCH_INDEX=""
ARG EXTRAS="otel,onnx"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
# Without the package itself, so that a change of code leaves this large layer as it is.
RUN mkdir app && touch app/__init__.py \
    && /opt/venv/bin/python -m pip install -c constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} ".[${EXTRAS}]" \
    && /opt/venv/bin/python -m pip uninstall --yes normgate pip

FROM dependencies AS package
COPY app ./app
RUN python -m pip install --no-deps --target /opt/normgate .

FROM python:${PYTHON}
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin normgate
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/normgate /opt/normgate
COPY model_store /srv/normgate/model_store
WORKDIR /srv/normgate
# The allocator keeps what it has between batches; app/core/allocator.py gives the reasons.
ENV MALLOC_ARENA_MAX=1 \
    MALLOC_MMAP_THRESHOLD_=33554432 \
    MALLOC_TRIM_THRESHOLD_=2147483647 \
    MALLOC_TOP_PAD_=134217728 \
    PYTHONPATH=/opt/normgate \
    PYTHONUNBUFFERED=1 \
    NORMGATE_HOST=0.0.0.0 \
    NORMGATE_PORT=8000 \
    NORMGATE_MODEL_STORE=/srv/normgate/model_store
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m --retries=3 \
    CMD ["/opt/venv/bin/python", "-c", "import http.client, os, sys; probe = http.client.HTTPConnection('127.0.0.1', int(os.environ['NORMGATE_PORT']), timeout=4); probe.request('GET', '/readyz'); sys.exit(probe.getresponse().status != 200)"]
# In exec form SIGTERM reaches the server itself, which then serves on, drains and ends.
ENTRYPOINT ["/opt/venv/bin/python", "-m", "app.cli"]
CMD ["serve"]
