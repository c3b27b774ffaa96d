#!/usr/bin/env bash
# Serve a small MoE model on two hosts over Ray, where the hosts are network namespaces of this machine.
#
#   sudo examples/local/two_hosts.sh           asks once, shows what travelled between the hosts, and ends
#   sudo examples/local/two_hosts.sh --keep    leaves the server running until Ctrl-C
#
# What runs inside a namespace is what runs on a real host. Everything made here is removed at the end.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
python=${PYTHON:-$root/.venv/bin/python}
bin=$(dirname "$python")
work=$(mktemp -d /tmp/two-hosts-XXXXXX)
subnet=10.78.0
switch=two-hosts-switch
hosts=(two-hosts-a two-hosts-b)
addresses=("$subnet.1" "$subnet.2")
port=8000

if [[ $EUID -ne 0 ]]; then
  echo "network namespaces need root: sudo $0" >&2
  exit 1
fi

clean_up() {
  for namespace in "${hosts[@]}" "$switch"; do
    ip netns pids "$namespace" 2>/dev/null | xargs -r kill -KILL
    ip netns del "$namespace" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 1' INT TERM

say() { printf '\n== %s\n' "$*"; }

# on HOST COMMAND...: run a command on a host, as its environment would be there
on() {
  local host=$1
  shift
  ip netns exec "${hosts[$host]}" env \
    PATH="$bin:$PATH" PYTHONPATH="$root" \
    VLLM_HOST_IP="${addresses[$host]}" GLOO_SOCKET_IFNAME=eth0 \
    RAY_ADDRESS="${addresses[0]}:6379" RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$work/token" \
    EFA_EP_TOKEN_FILE="$work/token" \
    HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 \
    "$@"
}

# Who does not have this secret may not use this Ray, and is no rank. On real hosts each has a copy of the file.
(umask 077 && "$python" -c 'import secrets; print(secrets.token_hex(32))' >"$work/token")

say "two hosts, ${addresses[0]} and ${addresses[1]}, on one switch"
ip netns add "$switch"
ip -n "$switch" link add bridge type bridge
ip -n "$switch" link set bridge up
for host in 0 1; do
  ip netns add "${hosts[$host]}"
  ip -n "$switch" link add "port$host" type veth peer name eth0 netns "${hosts[$host]}"
  ip -n "$switch" link set "port$host" master bridge up
  ip -n "${hosts[$host]}" addr add "${addresses[$host]}/24" dev eth0
  ip -n "${hosts[$host]}" link set eth0 up
  ip -n "${hosts[$host]}" link set lo up
done

say "a small model with random weights"
HF_HUB_OFFLINE=1 "$python" "$here/write_model.py" qwen3_moe --out "$work" 2>/dev/null

say "Ray on each host; --num-gpus says how many ranks a host has room for, on CPUs too"
ray_start=(ray start --disable-usage-stats --num-cpus 2 --num-gpus 1 --object-store-memory 80000000)
on 0 "${ray_start[@]}" --head --node-ip-address "${addresses[0]}" --port 6379 --include-dashboard=false \
  --temp-dir "$work/ray" >"$work/ray-0.log" 2>&1
on 1 "${ray_start[@]}" --address "${addresses[0]}:6379" --node-ip-address "${addresses[1]}" \
  >"$work/ray-1.log" 2>&1

say "vllm serve on the first host, one rank on each (about a minute; log: $work/server.log)"
on 0 env EFA_EP_STATS_DIR="$work/stats" EFA_EP_PROVIDER=tcp \
  vllm serve "$work/qwen3_moe" --served-model-name demo --host "${addresses[0]}" --port "$port" \
  --data-parallel-size 2 --data-parallel-size-local 1 --data-parallel-backend ray \
  --enable-expert-parallel --all2all-backend efa_ep_low_latency --api-server-count 1 \
  --dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 8 --kv-cache-memory-bytes 67108864 \
  >"$work/server.log" 2>&1 &
server=$!

on 0 "$python" - "http://${addresses[0]}:$port" "$server" <<'PYTHON'
import json, os, sys, time, urllib.request

url, server = sys.argv[1], int(sys.argv[2])
for _ in range(600):
    try:
        urllib.request.urlopen(f"{url}/health", timeout=2).close()
        break
    except OSError:
        if not os.path.exists(f"/proc/{server}"):
            sys.exit("the server has ended")
        time.sleep(0.5)
else:
    sys.exit("the server did not start")
body = {"model": "demo", "prompt": "hello", "max_tokens": 16, "return_token_ids": True}
request = urllib.request.Request(
    f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
print("answer:", json.load(urllib.request.urlopen(request, timeout=120))["choices"][0]["token_ids"])
PYTHON

say "what the ranks say about themselves"
grep -h -o 'EFA EP rank .*\|EFA EP: the ranks meet.*' "$work/server.log" || (tail -40 "$work/server.log"; exit 1)
"$python" - "$work/stats" <<'PYTHON'
import json, pathlib, sys, time


def read():
    paths = sorted(pathlib.Path(sys.argv[1]).glob("rank*.json"))
    return [each for path in paths for each in json.loads(path.read_text())["all_to_alls"]]


before, found = [], read()
for _ in range(20):  # the ranks write their counters four times a second: wait until they stand still
    if len(found) == 2 and found == before and all(counters["rounds"] for counters in found):
        break
    time.sleep(0.5)
    before, found = found, read()
else:
    sys.exit("the ranks did not count anything: the backend was not used")
for counters in found:
    print(f"rank {counters['rank']}: {counters['network_rows']} rows and {counters['bytes_written']} bytes",
          f"to the other host in {counters['rounds']} rounds")
PYTHON

if [[ ${1:-} == --keep ]]; then
  say "the server runs until Ctrl-C; from another shell:"
  echo "  sudo ip netns exec ${hosts[0]} curl http://${addresses[0]}:$port/v1/models"
  wait "$server" && exit
  say "the server has ended; what the ranks said last:"
  grep -h -o 'EFA EP: .*' "$work/server.log" | sort -u
  exit 1
fi
