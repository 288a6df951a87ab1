"""An OpenAI-compatible server with a real model, which misbehaves when told to.

It computes every answer by plain passes over one text, without a cache and without batches.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

KEY = "sk-secret-0123456789"
PERIOD = 0.05  # seconds between two bytes of an answer that trickles


class CompletionServer:
    """A server on a port of its own; faults are used up one by one, then the last one stays."""

    def __init__(self, model_folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.faults: list[str] = []
        self.stays = ""  # fault of all requests after those
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.arrived = threading.Semaphore(0)  # released by each request
        self.released = threading.Event()  # ends stalls
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                with contextlib.suppress(ConnectionError):
                    server.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=[0.01], daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def asked(self) -> Counter[str]:
        """How often each prompt was asked."""
        return Counter(json.dumps(body.get("messages") or body["prompt"]) for body in self.bodies)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            fault = self.faults.pop(0) if self.faults else self.stays
            self.bodies.append(body)
            self.keys.append(handler.headers["Authorization"])
            path = handler.path.removeprefix("/v1")
            found = self._chat(body) if path == "/chat/completions" else self._completion(body)
        self.arrived.release()
        status, headers = 200, {}
        if fault == "stall":
            self.released.wait()
        elif fault == "429":
            status, headers, found = 429, {"Retry-After": "7"}, {"error": {"message": "slow down"}}
        elif fault.isdigit():
            status, found = int(fault), {"error": {"message": f"no: {KEY} is not right"}}
        elif fault == "echo of the key":
            found["choices"][0] |= {"message": {"content": f"the key is {KEY}"}}
        elif fault == "another echo":
            found["choices"][0]["text"] = "x" + found["choices"][0]["text"]
        elif fault == "truncated":
            logprobs = found["choices"][0]["logprobs"]
            for name in logprobs:
                logprobs[name] = logprobs[name][:-1]
        elif fault == "uneven":
            found["choices"][0]["logprobs"]["top_logprobs"].pop()
        elif fault == "empty list":
            found["choices"][0]["logprobs"]["top_logprobs"][-1] = None
        elif fault == "not numbers":
            top = found["choices"][0]["logprobs"]["top_logprobs"][-1]
            found["choices"][0]["logprobs"]["top_logprobs"][-1] = dict.fromkeys(top, float("nan"))
        elif fault == "no log-probabilities":
            found["choices"][0]["logprobs"] = None
        elif fault == "no choices":
            found = {"choices": []}
        sent = json.dumps(found).encode()
        if fault == "malformed":
            sent = sent[:-5]
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        if fault == "hang up":
            handler.close_connection = True
            sent = sent[:5]
        if fault == "trickle":
            for byte in sent:
                if self.released.wait(PERIOD):
                    return
                handler.wfile.write(bytes([byte]))
        handler.wfile.write(sent)

    def _logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0]  # [tokens, vocabulary]

    def _continued(self, ids: list[int], most: int) -> list[int]:
        new: list[int] = []
        while len(new) < most:
            token = int(self._logits([*ids, *new])[-1].argmax())
            if token == self.tokenizer.eos_token_id:
                break
            new.append(token)
        return new

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        turns = [f"{m['role'].capitalize()}: {m['content']}\n\n" for m in body["messages"]]
        ids = self.tokenizer.encode("".join(turns) + "Assistant:")
        new = self._continued(ids, body["max_tokens"])
        message = {"role": "assistant", "content": self.tokenizer.decode(new)}
        return {"choices": [{"message": message}], "usage": _usage(ids, new)}

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["echo"] is True
        encoded = self.tokenizer(body["prompt"], return_offsets_mapping=True)
        ids = encoded["input_ids"]
        shares = self._logits(ids).double().log_softmax(-1)
        new = int(shares[-1].argmax())
        names = [self.tokenizer.decode([token]) for token in range(shares.shape[-1])]
        top: list[Any] = [None]
        for row in shares:
            best = row.topk(min(body["logprobs"], len(row)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            top.append({names[token]: value for token, value in reversed([*pairs])})
        offsets = [begin for begin, _ in encoded["offset_mapping"]]
        logprobs = {
            "tokens": [names[token] for token in (*ids, new)],
            "text_offset": [*offsets, len(body["prompt"])],
            "top_logprobs": top,
        }
        choice = {"text": body["prompt"] + names[new], "logprobs": logprobs}
        return {"choices": [choice], "usage": _usage(ids, [new])}


def _usage(ids: list[int], new: list[int]) -> dict[str, int]:
    return {"prompt_tokens": len(ids), "completion_tokens": len(new)}


@contextlib.contextmanager
def serving(model_folder: Path) -> Iterator[CompletionServer]:
    server = CompletionServer(model_folder)
    try:
        yield server
    finally:
        server.close()
