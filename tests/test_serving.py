"The exported model under mlx-lm, as its users meet it: a server, a stock client, four bits."

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import llmfs
from llmfs.evaluation.generate import Sampling, generate, generate_batch
from llmfs.evaluation.serving import (
    bits_per_weight,
    complete,
    quantize_group,
    quantized,
    serve,
    stream_completion,
)
from llmfs.model.pretrained import write_pretrained
from llmfs.model.transformer import GPT, preset
from llmfs.tokenizer.vocab import train_tokenizer

import mlx.core as mx
import numpy as np
import pytest

TEXT = "The cat sat on the mat; the dog, naïve as ever 😀, did not.\n" * 9
QUANTUM = dict(atol=1e-3, rtol=1e-3)


def small_model(seed=1, **shape):
    mx.random.seed(seed)
    tok = train_tokenizer([TEXT], 300)
    shape = dict(n_layers=2, d_model=64, n_heads=2, n_kv_heads=1, d_ff=128, init_std=0.3) | shape
    model = GPT(preset("tiny", vocab_size=tok.vocab_size, **shape)).eval()
    mx.eval(model.parameters())
    return model, tok


@pytest.fixture(scope="module")
def mine():
    return small_model()


@pytest.fixture(scope="module")
def folder(mine, tmp_path_factory):
    pytest.importorskip("mlx_lm")
    out = tmp_path_factory.mktemp("served") / "export"
    write_pretrained(out, *mine)
    return out


# ---- four bits


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "zeros", "flat", "outlier"])
def test_a_group_equals_mlx(bits, kind):
    w = np.random.default_rng(bits).normal(size=64).astype(np.float32)
    w = {
        "normal": w, "positive": np.abs(w) + 0.1, "negative": -np.abs(w) - 0.1, "zeros": w * 0,
        "flat": w * 0 + 0.3, "outlier": np.concatenate([w[:-1], [50]]),
    }[kind].astype(np.float32)  # fmt: skip
    codes, scale, bias = quantize_group(w, bits)
    parts = mx.quantize(mx.array(w[None]), group_size=64, bits=bits)
    want = np.array(mx.dequantize(*parts, group_size=64, bits=bits))[0]
    assert codes.min() >= 0 and codes.max() < 2**bits
    off = np.abs(bias + scale * codes - want)
    assert (off < 1e-5 * np.abs(w).max() + 1e-7).mean() > 0.95  # a tie may go either way
    assert off.max() <= abs(scale) * 1.01


def test_bits_per_weight_are_those_of_the_packed_arrays():
    w = mx.random.normal((8, 128)).astype(mx.float16)
    for bits, group in ((4, 32), (8, 64), (3, 128)):
        size = sum(part.nbytes for part in mx.quantize(w, group_size=group, bits=bits))
        assert bits_per_weight(bits, group) == 8 * size / w.size


def test_quantized_keeps_the_model_and_bends_the_copy(mine):
    model, _ = mine
    before = np.array(model.embed_tokens.weight)
    gaps = []
    for bits in (2, 4, 8):
        copy = quantized(model, bits, 32)
        gaps.append(float(mx.abs(copy.embed_tokens.weight - model.embed_tokens.weight).max()))
        assert (np.array(copy.norm.weight) == np.array(model.norm.weight)).all()
        w = np.array(copy.layers[0].mlp.up_proj.weight)[:, :32]
        assert max(len(set(row.tolist())) for row in w) <= 2**bits
    assert gaps[0] > 3 * gaps[1] > 20 * gaps[2] > 0
    assert (np.array(model.embed_tokens.weight) == before).all()


def test_rows_that_groups_do_not_divide_are_kept():
    model, _ = small_model(d_model=48, d_ff=128, head_dim=32)
    copy = quantized(model, 4, 64)
    assert mx.array_equal(copy.embed_tokens.weight, model.embed_tokens.weight)
    assert not mx.array_equal(copy.layers[0].mlp.down_proj.weight, model.layers[0].mlp.down_proj.weight)


def mlx_lm_command(*words):
    command = [sys.executable, "-m", "mlx_lm", *map(str, words)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_convert_computes_with_our_marks(folder, mine):
    from mlx_lm import load

    model, tok = mine
    four = folder.parent / "four"
    mlx_lm_command("convert", "--hf-path", folder, "--mlx-path", four, "-q",
                   "--q-bits", 4, "--q-group-size", 32)  # fmt: skip
    weights = lambda place: sum(p.stat().st_size for p in Path(place).glob("*.safetensors"))
    assert weights(folder) / weights(four) > 4.5
    ids = mx.array([[tok.eot_id, *tok.encode(TEXT[:60])]])
    theirs, _ = load(str(four))
    a, b = np.array(theirs(ids).astype(mx.float32)), np.array(quantized(model, 4, 32)(ids))
    assert np.abs(a - b).max() < 2e-3 * np.abs(b).max()
    assert np.abs(a - np.array(model(ids))).max() > 0.01 * np.abs(b).max()


def test_the_generate_command_writes_our_text(folder, mine):
    out = mlx_lm_command("generate", "--model", folder, "--prompt", "The cat", "-m", 24)
    ours = generate(*mine, "The cat", max_tokens=24, temperature=0)
    assert out.split("==========\n")[1].strip() == ours.text.strip()


# ---- the server


@pytest.fixture(scope="module")
def url(folder):
    with serve(folder) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


PROMPTS = ["The cat", "the dog, naïve", "😀", "The cat sat on the mat; the dog"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stock_client_gets_our_text(client, mine, prompt):
    ours = generate(*mine, prompt, max_tokens=24, temperature=0)
    ask = dict(model="default_model", prompt=prompt, max_tokens=24, temperature=0)
    got = client.completions.create(**ask)
    bare = lambda text: text.strip().rstrip("\ufffd")  # mlx-lm drops half a character at the end
    assert bare(got.choices[0].text) == bare(ours.text)
    assert got.choices[0].finish_reason == {"length": "length", "end": "stop"}[ours.finish]
    assert got.usage.completion_tokens == len(ours.ids) + (ours.finish == "end")
    parts = list(client.completions.create(stream=True, **ask))
    pieces = [p.choices[0].text for p in parts if p.choices]
    assert bare("".join(pieces)) == bare(got.choices[0].text) and len(pieces) > 3


def test_our_client_gets_the_same(client, url, mine):
    ask = dict(prompt="The cat", max_tokens=24, temperature=0)
    whole = complete(url, **ask)
    assert whole == client.completions.create(model="default_model", **ask).choices[0].text
    pieces = list(stream_completion(url, **ask))
    assert "".join(pieces) == whole and len(pieces) > 5


def test_models_stop_strings_and_chat(client, folder):
    assert str(folder) in [m.id for m in client.models.list()]
    ask = dict(model="default_model", prompt="The cat", max_tokens=24, temperature=0)
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[8:10]
    cut = client.completions.create(stop=[stop], **ask).choices[0]
    assert cut.finish_reason == "stop" and cut.text == whole[: whole.index(stop)]
    turn = [{"role": "user", "content": "The cat"}]
    said = client.chat.completions.create(model="default_model", messages=turn, max_tokens=5)
    assert said.choices[0].message.role == "assistant" and said.usage.completion_tokens == 5


def test_log_probabilities_agree(client, mine):
    ask = dict(model="default_model", prompt="The cat", max_tokens=8, temperature=0)
    got = client.completions.create(logprobs=True, **ask).choices[0].logprobs
    theirs = [token["logprob"] for token in got.model_dump()["content"]]
    ours = generate(*mine, "The cat", max_tokens=8, temperature=0, logprobs=True).logprobs
    np.testing.assert_allclose(theirs, ours, **QUANTUM)


def test_served_draws_have_the_models_distribution(client, mine):
    "200 first tokens at temperature 1, against the probabilities of the model."
    model, tok = mine
    z = np.array(model(mx.array([[tok.eot_id, *tok.encode("The cat")]]))[0, -1], dtype=np.float64)
    top = int(z.argmax())
    p = np.exp(z[top] - np.logaddexp.reduce(z))
    ask = dict(model="default_model", prompt="The cat", max_tokens=1, temperature=1)
    word, n = tok.decode([top]).strip(), 200
    hits = sum(client.completions.create(seed=i, **ask).choices[0].text.strip() == word for i in range(n))
    same = sum(np.exp(z - np.logaddexp.reduce(z))[i] for i in range(tok.vocab_size)
               if i != top and tok.decode([i]).strip() == word)  # fmt: skip
    p += same
    assert abs(hits - n * p) < 4 * np.sqrt(n * p * (1 - p)) + 1


def test_refusals_are_one_error(client, url):
    import openai

    with pytest.raises(ValueError, match="400"):
        complete(url, "The cat", max_tokens=-3)
    with pytest.raises(ValueError, match="404"):
        complete(url, "The cat", model="no-such-model")
    with pytest.raises(openai.APIStatusError):
        client.completions.create(model="no-such-model", prompt="The cat", max_tokens=2)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="llmfs export"):
        with serve(tmp_path):
            pass


def test_a_server_that_dies_says_why(tmp_path):
    pytest.importorskip("mlx_lm")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match="does not answer"):
        with serve(tmp_path, seconds=60):
            pass


def test_the_server_ends_with_the_block(folder):
    with serve(folder) as url:
        assert complete(url, "The", max_tokens=1, temperature=0)
    with pytest.raises(OSError):
        complete(url, "The", max_tokens=1)


# ---- our client on its own


class Fake(BaseHTTPRequestHandler):
    "Streams with what a real server may put between: comments, empty pieces, an end."

    def do_POST(self):
        self.server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        piece = lambda text: b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"
        body = b": waiting\n\n" + piece("na\u00efve ") + piece("") + piece("[x]") + b"data: [DONE]\n\n"
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_stream_of_a_fake_server():
    server = HTTPServer(("127.0.0.1", 0), Fake)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        assert list(stream_completion(url, "é", max_tokens=3)) == ["naïve ", "[x]"]
        assert server.asked == {"prompt": "é", "stream": True, "max_tokens": 3}
    finally:
        server.shutdown()
        server.server_close()


def test_batches_of_the_quantized_copy(mine):
    "A copy is a model like any other: it decodes with a cache, in batches."
    model, tok = mine
    copy, s = quantized(model, 4, 32), Sampling(max_tokens=8, temperature=0)
    together = generate_batch(copy, tok, PROMPTS, sampling=s)
    assert [g.ids for g in together] == [generate(copy, tok, p, s).ids for p in PROMPTS]
