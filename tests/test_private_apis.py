"""Private APIs of other packages do what we use them for: a release without one fails here."""

from __future__ import annotations

import asyncio
import inspect
import io
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import ray
import torch
import uvicorn
from transformers import AutoModelForCausalLM, LlamaConfig
from uvicorn.server import ServerState

from sae_harvest.common import private_apis
from sae_harvest.pipelines.viewer.connections import Connection
from tests.small_models import LAYERS, VOCABULARY, WIDTH, write_gguf


def test_the_module_itself_imports_none_of_the_packages() -> None:
    code = (
        "import sys, sae_harvest.common.private_apis\n"
        "print(*sorted({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_ray_prints_nothing_of_its_workers_once_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = ray._private.worker
    monkeypatch.setattr(worker, "_worker_logs_enabled", True)
    death = {"lines": ["A worker died."], "pid": 7, "ip": "127.0.0.1", "job": None}

    def printed() -> str:
        file = io.StringIO()
        worker.print_worker_logs(death, file)
        return file.getvalue()

    assert "A worker died." in printed()
    private_apis.silence_ray_workers()
    assert printed() == ""


def test_ray_takes_the_hidden_option() -> None:
    source = inspect.getsource(inspect.unwrap(ray.init))
    assert private_apis.RAY_ON_THIS_MACHINE == {"_node_ip_address": "127.0.0.1"}
    assert 'kwargs.pop("_node_ip_address"' in source


def test_the_processor_multiplies_int8_where_it_says_so() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert private_apis.multiplies_int8() == ("avx512_vnni" in flags)


def test_an_int8_product_is_exact() -> None:
    a = torch.tensor([[127, -128, 3], [1, 0, -1]], dtype=torch.int8)
    b = torch.tensor([[127, 1], [-128, 2], [5, -7]], dtype=torch.int8)
    out = torch.empty(2, 2, dtype=torch.int32)
    # 127 * 127 + 128 * 128 + 15, 127 - 256 - 21; 127 - 5, 1 + 7
    wanted = [[32_528, -150], [122, 8]]
    assert private_apis.int8_product(a, b, out) is out
    assert out.tolist() == wanted


def test_changes_in_place_are_counted_through_views() -> None:
    tensor = torch.zeros(2, 3)
    before = private_apis.n_changes(tensor)
    view = tensor.reshape(3, 2)
    view.add_(1)
    view[0] = 5
    assert private_apis.n_changes(tensor) == private_apis.n_changes(view) == before + 2
    assert private_apis.n_changes(tensor + 1) == 0
    with torch.inference_mode(), pytest.raises(RuntimeError):
        private_apis.n_changes(torch.zeros(1))


def test_a_gguf_file_gives_the_tensors_of_a_model(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    config = LlamaConfig(intermediate_size=48, num_attention_heads=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    found = private_apis.gguf_tensors(tmp_path / "tiny.gguf", model)
    assert {*found} == {*model.state_dict()} - {"lm_head.weight"}
    written = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    for name, place in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
    ):
        assert np.array_equal(np.asarray(found[name]), written[place])


def test_uvicorns_connection_has_what_ours_builds_on() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("no request is sent")

    config, state = uvicorn.Config(app, http=Connection), ServerState()
    config.load()
    loop = asyncio.new_event_loop()
    try:
        connection = Connection(config=config, server_state=state, app_state={}, _loop=loop)
    finally:
        loop.close()
    assert connection.loop is loop
    assert connection.connections is state.connections
    assert connection.cycle is None
    overridden = ("connection_made", "connection_lost", "handle_events", "on_response_complete")
    base = vars(Connection.__base__)
    assert all(inspect.isfunction(base[name]) for name in overridden)
