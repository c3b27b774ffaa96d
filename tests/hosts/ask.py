"""Ask a server on this host: ``ask.py ADDRESS PORT [forever]``. Prints JSON lines.

``{"healthy": seconds}`` when it answers, ``{"tokens": [...]}`` with the continuations of the tests' prompts;
then, with ``forever``, asks on and on and prints ``{"refused": why}`` when the server answers no more.
"""

import itertools
import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from vllm_server import MODEL_NAME, NEW_TOKENS, PROMPTS

_START_SECONDS = 900.0
_ANSWER_SECONDS = 120.0


def complete(url: str, prompt: str) -> list[int]:
    """Return the greedy continuation of ``prompt`` as token ids."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as response:
        token_ids: list[int] = json.load(response)["choices"][0]["token_ids"]
    return token_ids


def wait_until_healthy(url: str) -> float:
    """Return after how many seconds the server answered."""
    begun = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return time.monotonic() - begun
        except OSError:
            if time.monotonic() - begun > _START_SECONDS:
                raise
            time.sleep(0.2)


def main() -> None:
    """Do what the command line says."""
    address, port, *forever = sys.argv[1:]
    url = f"http://{address}:{port}"
    print(json.dumps({"healthy": wait_until_healthy(url)}), flush=True)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        tokens = list(pool.map(lambda prompt: complete(url, prompt), PROMPTS))
    print(json.dumps({"tokens": tokens}), flush=True)
    if forever:
        try:
            for prompt in itertools.cycle(PROMPTS):
                complete(url, prompt)
        except OSError as error:
            print(json.dumps({"refused": str(error)}), flush=True)


if __name__ == "__main__":
    main()
