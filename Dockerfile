# A container image of the service. NOT BUILT BY OUR TESTS, which only check the names in it: where they
# run there is no container engine. Build it with: docker build --tag retry-scheduler .

FROM python:3.11-slim-bookworm AS wheel
WORKDIR /checkout
# All of the locked tools, because the lock with its hashes is one file; the image itself gets none of them.
COPY requirements/dev.lock requirements/
RUN python -m pip install --no-cache-dir --require-hashes --requirement requirements/dev.lock
COPY pyproject.toml README.md LICENSE ./
COPY retry_scheduler retry_scheduler
RUN python -m pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /dist .

FROM python:3.11-slim-bookworm
ENV PYTHONFAULTHANDLER=1
COPY requirements/runtime.lock /tmp/
RUN python -m pip install --no-cache-dir --require-hashes --requirement /tmp/runtime.lock \
    && rm /tmp/runtime.lock
COPY --from=wheel /dist /dist
RUN python -m pip install --no-cache-dir --no-deps --no-index /dist/*.whl

# Nobody's: it writes no file and listens above 1024.
USER 65532:65532
EXPOSE 8086 9094
STOPSIGNAL SIGTERM
# Alive, which is not the same as healthy: /health says 503 while a server is away, and an orchestrator that
# restarted us for that would heal nothing. Whatever /health answers, the event loop is not blocked.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", \
    "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('HTTP_PORT') or 8086), timeout=4); c.request('GET', '/health'); c.getresponse()"]
ENTRYPOINT ["retry-scheduler"]
CMD ["run"]
