# An image of this clone, for CPUs or for NVIDIA GPUs. BuildKit builds only the stages that BASE needs.
#   docker build -t pretrain:cpu .
#   docker build -t pretrain:cuda --build-arg BASE=cuda .
#   docker run --rm --init pretrain:cpu python -m pipeline.train --help
#   docker run --rm --init -v "$PWD/data:/opt/pretrain/data" -v "$PWD/runs:/opt/pretrain/runs" --shm-size=8g \
#     --gpus=all pretrain:cuda launch/local.sh 8 name=big model=gpt3-1.3b data.path=data/corpus
# Mounted folders must be writable for user id 1000; `--build-arg USER_ID=$(id -u)` makes it yours.
# BASE: cpu, cuda, or any other image with apt and Python 3.11 or 3.12 with venv.
ARG BASE=cpu
ARG USER_ID=1000

FROM python:3.11-slim-bookworm AS cpu

# devel, not runtime: DeepSpeed compiles its operators when they are first used, those with CUDA code by nvcc, which
# only devel has. It refuses an nvcc of another version than torch's CUDA: 13.0 for the torch of constraints.txt.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04 AS cuda
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# What the machine must have; .devcontainer stops here and makes its .venv in the clone.
FROM ${BASE} AS system
# g++: operators that DeepSpeed, Triton and torch.compile build. git: the commit in a run's record.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git make \
 && rm -rf /var/lib/apt/lists/*
# Ubuntu's image already has a user 1000. safe.directory: mounted clones, and containers started under another user id,
# do not own the repository, and git would refuse to say its commit.
ARG USER_ID
RUN if id "$USER_ID" > /dev/null 2>&1; then userdel "$(id -nu "$USER_ID")"; fi \
 && useradd --uid "$USER_ID" --create-home --shell /bin/bash pretrain \
 && install -d -o pretrain -g pretrain /opt/pretrain /opt/venv \
 && git config --system --add safe.directory '*'

FROM system
# A number, because Kubernetes' runAsNonRoot cannot judge a name.
ARG USER_ID
USER $USER_ID
WORKDIR /opt/pretrain
ENV PATH=/opt/venv/bin:$PATH
# pip takes torch's CUDA build unless this index offers CPU wheels (several GB less for the CPU image). The value stays
# in the image's history: no credentials.
ARG PIP_EXTRA_INDEX_URL=
# Of pyproject.toml: hf (import, export, generation), s3, gcs, clean, eval, dev.
ARG EXTRAS=hf,s3
# Before the source, so that a change of the source does not install everything again.
COPY --chown=pretrain:pretrain constraints.txt pyproject.toml README.md LICENSE ./
RUN python3 -m venv /opt/venv \
 && DS_BUILD_OPS=0 pip install --no-cache-dir -c constraints.txt -e ".[$EXTRAS]"
COPY --chown=pretrain:pretrain . .
RUN pip install --no-cache-dir --no-deps -e .
# NVIDIA's images begin with a banner: both images run the command as it is.
ENTRYPOINT []
CMD ["python", "-m", "pipeline.train", "--help"]
