#!/usr/bin/env bash
# Once, on a compute node of the cluster (srun --partition p5en --pty bash): vLLM and vllm-efa-ep in /shared/vllm.
# REPOSITORY is a checkout of this repository.
set -euo pipefail

repository=${REPOSITORY:?a checkout of vllm-efa-ep}
# Ubuntu has venv in a package of its own.
python3 -c 'import ensurepip' 2>/dev/null || { sudo apt-get update -q && sudo apt-get install -y -q python3-venv; }
python3 -m venv /shared/vllm
/shared/vllm/bin/pip install 'vllm>=0.32,<0.34' 'ray[default]>=2.50'
# The EFA installer's headers and nvcc are found in /opt/amazon/efa and on the PATH; ON refuses to build without nvcc.
PATH=/usr/local/cuda/bin:$PATH CMAKE_ARGS=-DEFA_EP_CUDA=ON /shared/vllm/bin/pip install "${repository}[cuda]"
/shared/vllm/bin/vllm-efa-ep doctor --require-efa
