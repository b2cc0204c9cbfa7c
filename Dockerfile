# syntax=docker/dockerfile:1
# afina with its C++ kernels, the server and PyTorch for CPUs. The versions are those of constraints.txt.
#
#   docker build -t afina .
#   docker run --rm -v "$PWD:/work" afina train rows.jsonl

FROM python:3.12-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /source
COPY constraints.txt ./
RUN python -m venv /opt/afina \
    && /opt/afina/bin/pip install -c constraints.txt torch transformers
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY src ./src
RUN /opt/afina/bin/pip install -c constraints.txt ".[serve,parquet,gguf,audit,mcp]"

FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 afina \
    && install --directory --owner afina /work
COPY --from=build /opt/afina /opt/afina
ENV PATH=/opt/afina/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["afina"]
CMD ["--help"]
