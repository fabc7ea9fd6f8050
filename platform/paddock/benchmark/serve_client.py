"""The load: vLLM's own `vllm bench serve`, in a process that imports it once, and what it lacks.

It always streams. `openai-unary` is one more of its backends here: the same prompts, the same clock, one JSON answer.
All of it sends the key in OPENAI_API_KEY.
"""

from __future__ import annotations

import io
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from math import exp, log
from typing import Any

import httpx

from paddock.errors import ServiceError

API_KEY = "OPENAI_API_KEY"
UNARY = "openai-unary"

Likeliest = Sequence[Mapping[int, float]]
"""For each position, the logarithms of the probabilities of the likeliest next tokens."""


def bench(arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """`vllm bench serve ARGUMENTS`: its result, and what it printed. Raises ServiceError where a request failed."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib import endpoint_request_func as functions
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    functions.ASYNC_REQUEST_FUNCS[UNARY] = _unary
    if UNARY not in functions.OPENAI_COMPATIBLE_BACKENDS:
        functions.OPENAI_COMPATIBLE_BACKENDS.append(UNARY)
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    with redirect_stdout(io.StringIO()) as printed:
        result = serve.main(parser.parse_args(list(arguments)))
    if result["failed"]:
        first = next((error for error in result.get("errors", ()) if error), "no reason given")
        raise ServiceError(f"{result['failed']} requests failed, the first one with: {first[-500:]}")
    each = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors")
    return {key: value for key, value in result.items() if key not in each}, printed.getvalue()


async def _unary(request_func_input: Any, session: Any, pbar: Any = None) -> Any:
    """A request function of vLLM's client that does not stream: the first token comes with the last."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

    request = request_func_input
    body = {
        "model": request.model_name or request.model,
        "prompt": request.prompt,
        "repetition_penalty": 1.0,
        "max_tokens": request.output_len,
        "ignore_eos": request.ignore_eos,
        **(request.extra_body or {}),
    }
    output = RequestFuncOutput()
    output.prompt_len = request.prompt_len
    output.start_time = time.perf_counter()
    headers = {**_headers(), **(request.extra_headers or {})}
    try:
        async with session.post(url=request.api_url, json=body, headers=headers) as response:
            if response.status == 200:
                said = await response.json()
                output.latency = output.ttft = time.perf_counter() - output.start_time
                output.generated_text = said["choices"][0]["text"]
                output.output_tokens = said["usage"]["completion_tokens"]
                output.prompt_len = said["usage"]["prompt_tokens"]
                output.success = True
            else:
                output.error = f"{response.status}: {await response.text()}"
    except Exception:
        output.error = traceback.format_exc()
    if pbar:
        pbar.update(1)
    return output


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {os.environ[API_KEY]}"} if os.environ.get(API_KEY) else {}


def likeliest(url: str, model: str, prompts: Sequence[Sequence[int]], count: int, timeout_s: float) -> Likeliest:
    """What the model says of each prompt's own tokens (teacher-forced): the `count` likeliest at each position."""
    found: list[Mapping[int, float]] = []
    with httpx.Client(base_url=url, headers=_headers(), timeout=timeout_s) as http:
        for prompt in prompts:
            body = {"model": model, "prompt": list(prompt), "max_tokens": 1, "prompt_logprobs": count}
            response = http.post("/v1/completions", json=body)
            if response.status_code != 200:
                raise ServiceError(f"{url}: prompt_logprobs: {response.status_code}: {response.text[:500]}")
            for position in response.json()["choices"][0]["prompt_logprobs"][1:]:
                # The prompt's own token comes along wherever it ranks.
                found.append({int(token): said["logprob"] for token, said in position.items() if said["rank"] <= count})
    return found


def divergence(ours: Likeliest, theirs: Likeliest) -> tuple[float, float]:
    """(KL(theirs || ours) in nats, share of positions with the same likeliest token), means over positions.

    KL is taken over the tokens that both list and one bucket for all others, which makes it a lower bound.
    """
    total, same = 0.0, 0
    for q, p in zip(ours, theirs, strict=True):
        same += max(q, key=q.__getitem__) == max(p, key=p.__getitem__)
        common = p.keys() & q.keys()
        total += sum(exp(p[token]) * (p[token] - q[token]) for token in common)
        rest_p, rest_q = (max(1 - sum(exp(side[token]) for token in common), 1e-9) for side in (p, q))
        total += rest_p * log(rest_p / rest_q)
    return total / len(theirs), same / len(theirs)
