"""DeepSpeed's ZeRO, stages 1 to 3, and its automatic tensor parallelism, against plain AdamW.

Settings: width. Needs the package deepspeed; start it with DS_ACCELERATOR=cpu where there is no
GPU.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from course_utils.distributed import batch, chain, mine, step

__all__ = ["run"]

ADAMW = {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.01}
STEPS = 4


def run(settings: dict) -> dict:
    """By way: the share of a layer's output that this worker computes, bytes of its weights, and
    the gap of the weights to plain training on all rows (for ZeRO; AutoTP keeps no whole weights).

    >>> run({"width": 64})["ZeRO-3"]["share"]  # doctest: +SKIP
    1.0
    """
    import deepspeed

    # Messages between CPU workers go by gloo, as elsewhere: no library of DeepSpeed's own is
    # compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    x, y = batch(64, settings["width"])
    plain = chain(settings["width"], 2)
    optimizer = torch.optim.AdamW(plain.parameters(), **ADAMW)
    for _ in range(STEPS):
        optimizer.zero_grad()
        step(plain, x, y)
        optimizer.step()
    want = torch.cat([p.detach().flatten() for p in plain.parameters()])
    result = {}
    for stage in (1, 2, 3):
        result[f"ZeRO-{stage}"], weights = _train(stage, {}, settings["width"], *mine(x, y))
        result[f"ZeRO-{stage}"]["apart"] = float((weights - want).abs().max())
    cut = {"autotp_size": dist.get_world_size(), "partition_config": PARTS}
    result["AutoTP"], _ = _train(0, {"tensor_parallel": cut}, settings["width"], x, y)
    return result


PARTS = {  # which layers are cut into columns, which into rows
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.up\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight$"], "partition_type": "row"},
    ],
}


def _train(
    stage: int, more: dict, width: int, x: torch.Tensor, y: torch.Tensor
) -> tuple[dict, torch.Tensor]:
    import deepspeed

    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": len(x), "zero_optimization": zero} | more
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True} | ADAMW}
    engine, *_ = deepspeed.initialize(model=chain(width, 2), config=config)
    columns = []
    for block in engine.module:
        block.up.register_forward_hook(lambda layer, _, out: columns.append(out.shape[1]))
    for _ in range(STEPS):
        engine.backward(F.mse_loss(engine(x), y))
        engine.step()
    parameters = list(engine.module.parameters())
    held = sum(getattr(p, "ds_tensor", p).nbytes for p in parameters)
    with deepspeed.zero.GatheredParameters(parameters, enabled=stage == 3):
        weights = torch.cat([p.detach().flatten() for p in parameters])
    engine.destroy()
    return {"share": columns[0] / (4 * width), "weights": held}, weights
