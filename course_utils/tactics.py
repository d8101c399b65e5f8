"""What chapter 12's builder races on: the input that reaches each convolution of a network."""

from torch import Tensor, nn


def convolutions(model: nn.Module, x: Tensor) -> dict[str, tuple[nn.Conv2d, Tensor]]:
    """Each convolution of `model` by name, with the input that reaches it when the model gets `x`.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3))
    >>> found = convolutions(net, torch.ones(1, 1, 9, 9))
    >>> {name: given.shape[1] for name, (_, given) in found.items()}
    {'0': 1, '1': 4}
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> object:
        def hook(_: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
            inputs[name] = given[0]

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (layers[name], inputs[name]) for name in layers}
