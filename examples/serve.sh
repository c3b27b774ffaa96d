#!/usr/bin/env bash
# Serves a large mixture-of-experts model on this node, together with the other nodes. Run it on every node:
#
#   serve.sh MODEL ROLE     MODEL: deepseek-v3 | kimi-k2      ROLE: mixed | prefill | decode
#
# NODES     nodes that serve together         (default: the LeaderWorkerSet's, or 1)
# NODE      which of them this is, from 0     (default: the LeaderWorkerSet's, or 0)
# LEADER    address of node 0                 (default: the LeaderWorkerSet's, or 127.0.0.1)
# INSTANCE  p5en | p6-b200 | p6-b300          (default: p5en)
# LAUNCH    mp: each node runs this; ray: only node 0 does, and Ray starts the ranks (default: mp)
#
# Further words go to vllm serve as they are.
set -euo pipefail

model=${1:?MODEL: deepseek-v3 or kimi-k2}
role=${2:?ROLE: mixed, prefill or decode}
shift 2
nodes=${NODES:-${LWS_GROUP_SIZE:-1}}
node=${NODE:-${LWS_WORKER_INDEX:-0}}
leader=${LEADER:-${LWS_LEADER_ADDRESS:-127.0.0.1}}
gpus=8

# One rank per GPU: attention is data parallel, experts are spread over all ranks.
options=(
  --enable-expert-parallel
  --data-parallel-size "$((nodes * gpus))"
  --data-parallel-size-local "$gpus"
  --gpu-memory-utilization 0.9
  --port 8000
)

case $model in
  deepseek-v3) name=deepseek-ai/DeepSeek-V3 ;;
  kimi-k2)
    name=moonshotai/Kimi-K2-Instruct
    options+=(--trust-remote-code --enable-auto-tool-choice --tool-call-parser kimi_k2)
    ;;
  *) echo "serve.sh: MODEL is $model; use deepseek-v3 or kimi-k2" >&2 && exit 2 ;;
esac

# What a rank may hold in flight: an H200 has 141 GB, a B200 180 GB, a B300 288 GB.
case ${INSTANCE:-p5en} in
  p5en) sequences=128 ;;
  p6-b200) sequences=256 ;;
  p6-b300) sequences=512 ;;
  *) echo "serve.sh: INSTANCE is $INSTANCE; use p5en, p6-b200 or p6-b300" >&2 && exit 2 ;;
esac

# Prefill moves many rows at a time: one row per (token, rank), large batches. Decode moves few: rows batched per
# expert, exchanged while the shared experts run, in CUDA graphs. Where the two are separate, NIXL moves the KV cache
# over EFA.
kv_transfer() {
  echo "{\"kv_connector\":\"NixlConnector\",\"kv_role\":\"$1\",\"kv_connector_extra_config\":{\"backends\":[\"LIBFABRIC\"]}}"
}
case $role in
  mixed)
    options+=(--all2all-backend efa_ep_high_throughput --max-num-batched-tokens 4096 --max-num-seqs "$sequences")
    ;;
  prefill)
    options+=(--all2all-backend efa_ep_high_throughput --max-num-batched-tokens 8192 --max-num-seqs 64)
    options+=(--kv-transfer-config "$(kv_transfer kv_producer)")
    ;;
  decode)
    options+=(--all2all-backend efa_ep_low_latency --max-num-batched-tokens "$sequences")
    options+=(--max-num-seqs "$sequences" --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}')
    options+=(--kv-transfer-config "$(kv_transfer kv_consumer)")
    ;;
  *) echo "serve.sh: ROLE is $role; use mixed, prefill or decode" >&2 && exit 2 ;;
esac

case ${LAUNCH:-mp} in
  mp)
    options+=(--data-parallel-address "$leader" --data-parallel-rpc-port 13345)
    if ((node > 0)); then
      options+=(--headless --data-parallel-start-rank "$((node * gpus))")
    fi
    ;;
  ray) options+=(--data-parallel-backend ray) ;;
  *) echo "serve.sh: LAUNCH is $LAUNCH; use mp or ray" >&2 && exit 2 ;;
esac

exec vllm serve "$name" "${options[@]}" "$@"
