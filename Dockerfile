# One image for workers and the dashboard; runs as a user of its own and writes under /app/storage alone.
FROM python:3.11-slim

WORKDIR /app
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install -c constraints.txt torch

COPY ris_hpo ris_hpo
COPY studies studies
RUN pip install -c constraints.txt -e '.[postgres]' \
    && useradd --create-home --uid 10001 ris_hpo \
    && install -d -o ris_hpo storage

USER ris_hpo
VOLUME /app/storage
ENTRYPOINT ["ris-hpo"]
CMD ["--help"]
