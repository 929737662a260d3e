# pmd with vLLM and QLoRA on CUDA. Linted with hadolint; not built yet.
#   docker build -t pmd .
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/work/runs" -v "$HOME/.cache/huggingface:/home/pmd/.cache/huggingface" \
#     pmd fit --config configs/qwen3_8b.yaml
# The mounted folders must be writable for user 1000. The strongest sandbox for programs that verifiers run needs user
# namespaces, which Docker's default profiles refuse (docs/sandbox.md).
# CUDA comes with torch's wheels; the base adds the compiler and headers that Triton and vLLM's kernels are built with.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/pmd
ENV PATH=/opt/pmd/bin:$PATH HNSWLIB_NO_NATIVE=1 PIP_NO_CACHE_DIR=1 VLLM_NO_USAGE_STATS=1

# The dependencies first: a layer that changes only with them.
WORKDIR /src
COPY pyproject.toml constraints-gpu.txt ./
RUN mkdir pmd && echo '__version__ = "0"' > pmd/__init__.py && touch README.md LICENSE \
    && pip install -c constraints-gpu.txt '.[gpu]' && pip uninstall -y pmd
COPY . .
RUN pip install --no-deps .

# Ubuntu's image has a user of number 1000 already.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 pmd && install -d -o pmd -g pmd /work /work/runs
USER 1000
WORKDIR /work
RUN pmd config export .
ENTRYPOINT ["pmd"]
CMD ["--help"]
