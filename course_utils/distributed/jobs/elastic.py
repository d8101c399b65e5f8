"""Training that is killed while it writes its state, and goes on.

Settings: steps, kill_at (the step whose state is written when worker 0 dies); out, a folder (the
launcher's own is one). With `go_on`, the checkpoints of an earlier start are continued by however
many workers there are now.
"""

import os
import signal
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from course_utils.distributed import batch, chain, device, mine

__all__ = ["resume", "run", "train", "write"]


def _random() -> ModuleType:
    """Whose generator dropout uses."""
    return torch.cuda if device().type == "cuda" else torch


def write(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, done: int, die: bool = False
) -> None:
    """Everything that a run depends on into a file that is complete or absent: weights, momentum,
    each worker's random generator, the number of steps done. With `die`, worker 0 kills itself by
    signal 9 when half of it is written.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     _ = train(Path("run.st"), steps=2, drop=0.1)
    >>> Path("run.st").is_file(), Path("run.part").exists()
    (True, False)
    """
    states = [_random().get_rng_state() for _ in range(dist.get_world_size())]
    dist.all_gather(states, _random().get_rng_state())
    if dist.get_rank() > 0:
        return
    tensors = {f"generator.{i}": state for i, state in enumerate(states)}
    tensors |= {f"model.{k}": v for k, v in model.state_dict().items()}
    for i, p in enumerate(model.parameters()):
        tensors[f"momentum.{i}"] = optimizer.state[p]["momentum_buffer"]
    content = save(tensors | {"done": torch.tensor(done)})
    with path.with_suffix(".part").open("wb") as file:
        file.write(content[: len(content) // 2 if die else None])
    if die:
        os.kill(os.getpid(), signal.SIGKILL)  # kill -9: no warning, no cleaning up
    path.with_suffix(".part").replace(path)


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, forget: str = "") -> int:
    """The number of steps already done; all is put back to that point, but for what we forget
    ("momentum" or "generator").

    >>> resume(Path("none.st"), nn.Linear(1, 1), None)
    0
    """
    if not path.exists():
        return 0
    saved = load_file(path)
    model.load_state_dict({k[6:]: v for k, v in saved.items() if k.startswith("model.")})
    for i, p in enumerate(model.parameters()):
        if forget != "momentum":
            optimizer.state[p]["momentum_buffer"] = saved[f"momentum.{i}"].to(p.device)
    own = saved.get(f"generator.{dist.get_rank()}")  # there may be more of us than of them
    if own is not None and forget != "generator":
        _random().set_rng_state(own)
    return int(saved["done"])


def train(
    path: Path, steps: int, drop: float, kill_at: int | None = None, forget: str = ""
) -> tuple[Tensor, int]:
    """The weights after `steps`, in one row, and the step at which this process began. `drop` is
    the share of numbers that dropout sets to zero; `kill_at` counts in the first attempt alone.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     whole, begin = train(Path("whole.st"), steps=3, drop=0.1)
    ...     _ = train(Path("half.st"), steps=2, drop=0.1)
    ...     late, again = train(Path("half.st"), steps=3, drop=0.1)
    >>> torch.equal(whole, late), begin, again
    (True, 0, 2)
    """
    model = nn.Sequential(chain(16, 1), nn.Dropout(drop), chain(16, 1))
    torch.manual_seed(dist.get_rank())  # each worker's dropout draws its own
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    dist.barrier()  # nobody reads what worker 0 is still writing
    begin = resume(path, model, optimizer, forget)
    # After its first step DDP arranges its buckets anew, and three workers or more then add in
    # another order: a run that begins again would round otherwise. With this option it does not.
    together = DDP(model, find_unused_parameters=True)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    for k in range(begin, steps):
        x, y = mine(*batch(84, 16, seed=k))  # the rows depend on the step alone
        optimizer.zero_grad()
        F.mse_loss(together(x), y).backward()
        optimizer.step()
        write(path, model, optimizer, k + 1, die=first and k == kill_at)
    return torch.cat([q.detach().flatten() for q in model.parameters()]).cpu(), begin


def run(settings: dict) -> dict:
    """The largest gap of the weights to those of a run that nothing disturbed, by what happened.

    >>> from course_utils import distributed
    >>> with distributed.alone():
    ...     told = run({"out": ".", "steps": 4, "kill_at": None, "stop_at": 2})
    >>> told["nothing forgotten"], told["generator forgotten"] > 0
    (0.0, True)
    """
    out, steps = Path(settings["out"]), settings["steps"]
    stop_at = settings.get("stop_at", settings["kill_at"])
    result = {}
    if settings.get("go_on"):
        for drop in (0.0, 0.1):
            late, _ = train(out / f"half {drop}.st", steps, drop)
            whole, _ = train(out / f"whole {drop}.st", steps, drop)  # has all its steps: is read
            result[f"dropout {drop}"] = float((late - whole).abs().max())
        return result
    killed, result["begin"] = train(out / "killed.st", steps, 0.1, settings["kill_at"])
    for drop in (0.0, 0.1):
        train(out / f"half {drop}.st", stop_at, drop)  # for a start with another number of workers
        whole, _ = train(out / f"whole {drop}.st", steps, drop)
    result["killed and restarted"] = float((killed - whole).abs().max())
    for forget in ("nothing", "momentum", "generator"):
        path = out / f"{forget}.st"
        train(path, stop_at, 0.1)
        late, _ = train(path, steps, 0.1, forget=forget)
        result[f"{forget} forgotten"] = float((late - whole).abs().max())
    return result
