# GPU (the default):
#   docker build -t registry.example.com/distributed-inr:0.1.0 .
# CPU:
#   docker build -t distributed-inr:cpu --build-arg BASE=python:3.12-slim-bookworm \
#       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .

# Python 3.12 with the torch and torchvision of constraints.txt, for drivers from 580 on; cuda12.6 in the tag for older ones.
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

# One more package index, for torch; none: pip's own.
ARG TORCH_INDEX=
ARG EXTRAS=s3,optuna,minilm

# Kubernetes must see a number to know that it is not root; some base images have a user 1000 already.
RUN groupadd --non-unique --gid 1000 ray \
    && useradd --non-unique --uid 1000 --gid 1000 --create-home --home-dir /home/ray --shell /bin/bash ray

# What the base image has is used where its version is the one in constraints.txt.
RUN python3 -m venv --system-site-packages --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/ray \
    USER=ray \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    RAY_USAGE_STATS_ENABLED=0

# The working folder of jobs, installed in place, so that the bundled data are found. Dependencies first: a layer that stays.
WORKDIR /opt/distributed_inr
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
RUN mkdir distributed_inr \
    && touch distributed_inr/__init__.py \
    && python -m pip install ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -c constraints.txt -e ".[${EXTRAS}]"
COPY distributed_inr distributed_inr
COPY jobs jobs
COPY tune_spaces tune_spaces
COPY examples examples

USER 1000:1000
CMD ["python", "jobs/train_ddmi.py", "--help"]
