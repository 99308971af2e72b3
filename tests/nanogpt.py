"""nanoGPT's kind of model in torch, for the contests beside it (bench_shakespeare.py, bench_gpu.py).

Written after its description: GPT-2's shape without biases, norms before each branch, one matrix for
queries, keys and values, a tied head; with other norms, activations and positions where asked for.
"""

import math


def model(c: dict):
    "From fields of GPTConfig; dropout where c asks for it, gelu: its approximation (tanh or none)"
    import torch
    from torch import nn
    from torch.nn import functional as F

    D, H, N, L = c["d_model"], c["n_heads"], c["n_layers"], c["max_seq_len"]
    K, drop = D // H, c.get("dropout", 0.0)

    def norm(width):
        return nn.RMSNorm(width) if c["norm"] == "rmsnorm" else nn.LayerNorm(width, bias=False)

    def rotate(x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.n1, self.n2, gated = norm(D), norm(D), c["activation"] == "swiglu"
            self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.up = nn.Linear(D, c["d_ff"] * (1 + gated), bias=False)
            self.down = nn.Linear(c["d_ff"], D, bias=False)
            if c["qk_norm"]:
                self.qn, self.kn = norm(K), norm(K)

        def forward(self, x, cos, sin):
            B, T, _ = x.shape
            q, k, v = (a.view(B, T, H, K) for a in self.qkv(self.n1(x)).split(D, 2))
            if c["qk_norm"]:
                q, k = self.qn(q), self.kn(k)
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            if c["positions"] == "rope":
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            p = drop if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
            x = x + F.dropout(self.out(y.transpose(1, 2).reshape(B, T, D)), drop, self.training)
            h = self.up(self.n2(x))
            if c["activation"] == "swiglu":
                gate, h = h.chunk(2, -1)
                h = F.silu(gate) * h
            elif c["activation"] == "gelu":
                h = F.gelu(h, approximate=c.get("gelu", "tanh"))
            else:
                h = F.relu(h).square()
            return x + F.dropout(self.down(h), drop, self.training)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(c["vocab_size"], D)
            if c["positions"] == "learned":
                self.wpe = nn.Embedding(L, D)
            self.h, self.nf = nn.ModuleList(Block() for _ in range(N)), norm(D)
            angle = torch.outer(torch.arange(L), 10_000.0 ** -(torch.arange(0, K, 2) / K))
            self.register_buffer("cos", angle.cos())
            self.register_buffer("sin", angle.sin())
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    branch = name.endswith(("out.weight", "down.weight"))
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * N) if branch else 0.02)

        def forward(self, tokens, targets=None):
            "Logits, or with targets the mean loss"
            T = tokens.shape[1]
            x = self.wte(tokens)
            if c["positions"] == "learned":
                x = x + self.wpe.weight[:T]
            x = F.dropout(x, drop, self.training)
            for block in self.h:
                x = block(x, self.cos[:T], self.sin[:T])
            logits = F.linear(self.nf(x), self.wte.weight)
            if targets is None:
                return logits
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Model()


def groups(params: list, decay: float) -> list[dict]:
    "Weight decay for matrices and tables only"
    return [dict(params=[p for p in params if p.dim() >= 2], weight_decay=decay),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]  # fmt: skip


def rate(step: int, steps: int, warmup: int, top: float, low: float) -> float:
    "Warm-up, then half a cosine down"
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    t = min((step - warmup) / (steps - warmup), 1)
    return low + 0.5 * (1 + math.cos(math.pi * t)) * (top - low)
