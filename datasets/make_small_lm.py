"""Train the course's own language model on the first 85 % of persuasion.txt. Twenty minutes on one
core.

    python datasets/make_small_lm.py

The validation part says when to stop; the test part is looked at once, at the end. Weights are
trained in fp32 and stored in fp16: a rounding far below what chapter 15 measures, and printed.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from course_utils import decoder

HERE = Path(__file__).resolve().parent
SEED, STEPS, BATCH, CONTEXT, RATE = 1, 1100, 16, 256, 3e-3


def loss_on(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> float:
    """Nats a byte over stretches of 256 bytes that do not overlap."""
    rows = tokens[: len(tokens) // 257 * 257].view(-1, 257)
    with torch.inference_mode():
        logits = decoder.forward(decoder.SMALL, weights, rows[:, :-1])
        return float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def main() -> None:
    torch.manual_seed(SEED)
    train, valid, test = (decoder.text(s) for s in ("train", "validation", "test"))
    weights = {n: t.requires_grad_() for n, t in decoder.blank(decoder.SMALL, SEED).items()}
    decayed = [t for n, t in weights.items() if t.ndim == 2 and n != "embed"]
    others = [t for n, t in weights.items() if t.ndim != 2 or n == "embed"]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))

    def dropping(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, w[name])
        return F.dropout(out, 0.1) if name.endswith((".o", ".down")) else out

    best, kept, start = math.inf, {}, time.perf_counter()
    for step in range(STEPS):
        warm, done = min(1.0, step / 50), step / STEPS
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        at = torch.randint(len(train) - CONTEXT - 1, (BATCH, 1)) + torch.arange(CONTEXT + 1)
        rows = train[at]
        logits = decoder.forward(decoder.SMALL, weights, rows[:, :-1], dropping)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step == STEPS - 1:
            now = loss_on(weights, valid)
            took = time.perf_counter() - start
            print(f"{step + 1}: {loss:.3f}, validation {now:.4f}, {took:.0f} s", flush=True)
            if now < best:
                best, kept = now, {n: t.detach().half().clone() for n, t in weights.items()}
    save_file({n: t.contiguous() for n, t in kept.items()}, HERE / "small_lm.safetensors")
    stored = {n: t.float() for n, t in kept.items()}
    print(f"validation {best:.4f} nats a byte, {loss_on(stored, valid):.4f} as stored in fp16")
    print(f"test {loss_on(stored, test):.4f} nats a byte")


if __name__ == "__main__":
    main()
