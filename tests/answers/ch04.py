"""Answers to the exercises of chapter 04."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from answers import right, wrong
from course_utils import data, models

right("04.A", "nn.functional")(lambda z, T: F.softmax(z.div(T), -1))
right("04.A", "logarithms first")(lambda z, T: torch.log_softmax(z / T, dim=-1).exp())
right("04.A", "64 bits")(lambda z, T: (z.double() / T).softmax(-1))


@right("04.A", "NumPy, by hand")
def numpy_softmax(logits, T):
    z = logits.numpy() / T
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@right("04.A", "row by row")
def row_by_row(logits, T):
    if logits.dim() == 1:
        return torch.softmax(logits / T, 0)
    return torch.stack([row_by_row(part, T) for part in logits])


wrong("04.A", "times T")(lambda z, T: torch.softmax(z * T, dim=-1))
wrong("04.A", "one-hot")(lambda z, T: F.one_hot(z.argmax(-1), z.shape[-1]).float())
wrong("04.A", "a million times sharper")(lambda z, T: torch.softmax(1e6 * z, dim=-1))
wrong("04.A", "T is a millionth")(lambda z, T: torch.softmax(z / 1e-6, dim=-1))
wrong("04.A", "no temperature")(lambda z, T: torch.softmax(z, dim=-1))
wrong("04.A", "never sharper")(lambda z, T: torch.softmax(z / max(T, 1), dim=-1))
wrong("04.A", "a whole T")(lambda z, T: torch.softmax(z / max(int(T), 1), dim=-1))
wrong("04.A", "the square of T")(lambda z, T: torch.softmax(z / T**2, dim=-1))
wrong("04.A", "probabilities over T")(lambda z, T: torch.softmax(z, dim=-1) / T)
wrong("04.A", "logarithms of probabilities")(lambda z, T: torch.log_softmax(z / T, dim=-1))
wrong("04.A", "over the batch")(lambda z, T: torch.softmax(z / T, dim=0))
wrong("04.A", "over dimension 1")(lambda z, T: torch.softmax(z / T, dim=min(1, z.dim() - 1)))
wrong("04.A", "over everything")(lambda z, T: torch.softmax((z / T).flatten(), 0).view_as(z))
wrong("04.A", "scaled probabilities, made to add up to one")(
    lambda z, T: (p := torch.softmax(z, -1) ** 2) / p.sum(-1, keepdim=True)
)
wrong("04.A", "logits")(lambda z, T: z / T)
wrong("04.A", "a list")(lambda z, T: torch.softmax(z / T, dim=-1).tolist())


@wrong("04.A", "the book's formula overflows")
def book(logits, T):
    e = torch.exp(logits / T)
    return e / e.sum(-1, keepdim=True)


@wrong("04.A", "one maximum for the whole batch")
def one_maximum(logits, T):
    e = torch.exp((logits - logits.max()) / T)
    return e / e.sum(-1, keepdim=True)


def _loss(
    *,
    p=lambda v, T: F.softmax(v.detach() / T, dim=1),
    log_q=lambda z, T: F.log_softmax(z / T, dim=1),
    soft=lambda log_q, p: F.kl_div(log_q, p, reduction="batchmean"),
    weight=lambda T: T**2,
    hard=lambda z, y, T: F.cross_entropy(z, y),
    mix=lambda alpha, soft, hard: alpha * soft + (1 - alpha) * hard,
):
    """The right answer, with one of its parts exchanged."""

    def kd_loss(student, teacher, labels, T, alpha):
        kl = soft(log_q(student, T), p(teacher, T))
        return mix(alpha, weight(T) * kl, hard(student, labels, T))

    return kd_loss


@right("04.B", "torch's modules")
def modules(student, teacher, labels, T, alpha):
    with torch.no_grad():
        log_p = nn.LogSoftmax(dim=-1)(teacher / T)
    kl = nn.KLDivLoss(reduction="batchmean", log_target=True)
    soft = kl(nn.LogSoftmax(dim=-1)(student / T), log_p)
    return torch.lerp(nn.CrossEntropyLoss()(student, labels), soft * T * T, alpha)


@right("04.B", "image by image, one number in a tensor")
def by_image(student, teacher, labels, T, alpha):
    losses = []
    for z, v, y in zip(student, teacher.detach(), labels, strict=True):
        log_p, log_q = torch.log_softmax(v / T, 0), torch.log_softmax(z / T, 0)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        losses.append(alpha * T * T * kl - (1 - alpha) * torch.log_softmax(z, 0)[y])
    return torch.stack(losses).mean().view(1)


@right("04.B", "cross-entropy with the teacher, less the teacher's entropy")
def cross(student, teacher, labels, T, alpha):
    p = F.softmax(teacher.detach() / T, dim=1)
    entropy = torch.special.entr(p).sum(1).mean()
    soft = F.cross_entropy(student / T, p) - entropy
    return alpha * T**2 * soft + (1 - alpha) * F.cross_entropy(student, labels)


wrong("04.B", "no T²")(_loss(weight=lambda T: 1))
wrong("04.B", "T once")(_loss(weight=lambda T: T))
wrong("04.B", "T² over both halves")(
    lambda z, v, y, T, a: T**2 * _loss(weight=lambda t: 1)(z, v, y, T, a)
)
wrong("04.B", "the default mean")(_loss(soft=lambda q, p: F.kl_div(q, p, reduction="mean")))
wrong("04.B", "a sum over the batch")(_loss(soft=lambda q, p: F.kl_div(q, p, reduction="sum")))
wrong("04.B", "the other way round")(
    _loss(soft=lambda q, p: F.kl_div((p + 1e-30).log(), q.exp(), reduction="batchmean"))
)
wrong("04.B", "probabilities for logarithms")(_loss(log_q=lambda z, T: F.softmax(z / T, dim=1)))
wrong("04.B", "cross-entropy with the teacher")(_loss(soft=lambda q, p: -(p * q).sum(1).mean()))
wrong("04.B", "squares of logits' differences")(_loss(soft=lambda q, p: ((q - p) ** 2).mean()))
wrong("04.B", "the teacher is not softened")(_loss(p=lambda v, T: F.softmax(v.detach(), dim=1)))
wrong("04.B", "the student is not softened")(_loss(log_q=lambda z, T: F.log_softmax(z, dim=1)))
wrong("04.B", "the hard half is softened, too")(
    _loss(hard=lambda z, y, T: F.cross_entropy(z / T, y))
)
wrong("04.B", "alpha for the labels")(_loss(mix=lambda a, soft, hard: (1 - a) * soft + a * hard))
wrong("04.B", "both halves whole")(_loss(mix=lambda a, soft, hard: soft + hard))
wrong("04.B", "over the batch")(_loss(p=lambda v, T: F.softmax(v.detach() / T, dim=0)))
wrong("04.B", "the teacher learns as well")(_loss(p=lambda v, T: F.softmax(v / T, dim=1)))
wrong("04.B", "the soft half without a graph")(
    _loss(soft=lambda q, p: torch.tensor(float(F.kl_div(q, p, reduction="batchmean"))))
)
wrong("04.B", "the soft half sees a detached student")(
    _loss(log_q=lambda z, T: F.log_softmax(z.detach() / T, dim=1))
)
wrong("04.B", "the hard half sees a detached student")(
    _loss(hard=lambda z, y, T: F.cross_entropy(z.detach(), y))
)
wrong("04.B", "a number of Python's")(lambda *given: _loss()(*given).item())
wrong("04.B", "a loss an image")(
    lambda z, v, y, T, a: _loss(soft=lambda q, p: F.kl_div(q, p, reduction="none").sum(1))(
        z, v, y, T, a
    )
)
wrong("04.B", "the logarithm of a softmax: a sure student")(
    _loss(log_q=lambda z, T: F.softmax(z / T, dim=1).log())
)
wrong("04.B", "the logarithm of the sure teacher")(
    _loss(soft=lambda q, p: (p * (p.log() - q)).sum(1).mean())
)
wrong("04.B", "finite by a cut at a thousandth")(
    _loss(p=lambda v, T: F.softmax(v.detach() / T, dim=1).clamp(1e-3))
)


def _distiller(
    *,
    width=6,
    target=lambda logits, labels: F.softmax(logits / 4, dim=1),
    T=4,
    end=lambda net, given: net.eval(),
    given=lambda x, labels, logits: (x, labels, logits),
    epochs=8,
):
    def distil(x, labels, teacher_logits, budget):
        x, labels, logits = given(x, labels, teacher_logits)
        net = models.mini_resnet(width).train()
        optimizer = torch.optim.SGD(
            net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        p, total = target(logits, labels), epochs * math.ceil(len(x) / 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=total + 1, pct_start=0.25
        )
        for _ in range(epochs):
            for i in torch.randperm(len(x)).split(64):
                loss = T * T * F.cross_entropy(net(x[i]) / T, p[i])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return end(net, (x, labels, logits))

    return distil


right("04.C", "always width 6, and cross-entropy with the teacher")(_distiller())
right("04.C", "the teacher's first choice is the label: so many are right that it will do")(
    _distiller(target=lambda logits, labels: logits.argmax(1), T=1)
)


class Named(nn.Module):
    """A network of one's own, with names that the course does not use."""

    def __init__(self, body):
        super().__init__()
        self.body, self.scale, self.names = body, 1.0, [str(i) for i in range(10)]

    def forward(self, x):
        return self.scale * self.body(x)


right("04.C", "wrapped in a module of one's own")(
    _distiller(end=lambda net, given: Named(net).eval())
)

wrong("04.C", "believes the labels")(_distiller(target=lambda logits, labels: labels, T=1))
wrong("04.C", "half teacher, half labels, sure of them")(
    _distiller(target=lambda logits, y: 10 * F.one_hot(y, 10) + F.softmax(logits, 1))
)
wrong("04.C", "width 8 whatever the budget")(_distiller(width=8))
wrong("04.C", "train mode")(_distiller(end=lambda net, given: net.train()))
wrong("04.C", "one layer in train mode")(
    _distiller(end=lambda net, given: (net.eval(), net.stem[1].train())[0])
)
wrong("04.C", "one step")(_distiller(epochs=1, given=lambda x, y, v: (x[:64], y[:64], v[:64])))
wrong("04.C", "not trained")(lambda x, labels, logits, budget: models.mini_resnet(6).eval())
wrong("04.C", "the state in place of the network")(
    _distiller(epochs=1, end=lambda net, given: net.state_dict())
)
wrong("04.C", "the teacher's logits over the batch")(
    _distiller(target=lambda logits, labels: F.softmax(logits, dim=0), T=1)
)
wrong("04.C", "clean labels from the course's data")(
    _distiller(
        given=lambda x, y, v: (
            models.normalise(data.fashion_mnist("train")[0][: len(x)]),
            data.fashion_mnist("train")[1][: len(x)],
            v,
        ),
        target=lambda logits, labels: labels,
        T=1,
    )
)
wrong("04.C", "trained on the validation images")(
    _distiller(
        given=lambda x, y, v: (
            models.normalise(data.fashion_mnist("validation")[0][:1000]),
            data.fashion_mnist("validation")[1][:1000],
            v,
        ),
        target=lambda logits, labels: labels,
        T=1,
    )
)


def _batch_averages(net, given):
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    return net.eval()


wrong("04.C", "BatchNorm takes the batch's own averages in eval mode")(
    _distiller(epochs=1, end=_batch_averages)
)


class Hidden(nn.Module):
    """A network in a list: its parameters are not counted."""

    def __init__(self, net):
        super().__init__()
        self.nets = [net]

    def forward(self, x):
        return self.nets[0](x)


class Neighbours(nn.Module):
    """The training images in buffers."""

    def __init__(self, x, logits):
        super().__init__()
        self.register_buffer("x", x.flatten(1))
        self.register_buffer("p", logits.softmax(1))

    def forward(self, x):
        near = torch.cdist(x.flatten(1), self.x).topk(5, largest=False).indices
        return self.p[near].mean(1)


class InClosure(nn.Module):
    """A network that a function remembers."""

    def __init__(self, net):
        super().__init__()
        self.call = lambda x: net(x)

    def forward(self, x):
        return self.call(x)


wrong("04.C", "the shipped network")(lambda x, labels, logits, budget: models.baseline())
wrong("04.C", "the shipped network in a list")(
    lambda x, labels, logits, budget: Hidden(models.baseline()).eval()
)
wrong("04.C", "a large network in a list")(
    _distiller(width=16, epochs=1, end=lambda net, given: Hidden(net.eval()).eval())
)
wrong("04.C", "a large network in a closure")(
    _distiller(width=16, epochs=1, end=lambda net, given: InClosure(net.eval()).eval())
)
wrong("04.C", "the nearest neighbours, in buffers")(
    lambda x, labels, logits, budget: Neighbours(x, logits).eval()
)
wrong("04.C", "weights in buffers")(
    lambda x, labels, logits, budget: _as_buffers(models.mini_resnet(16)).eval()
)


def _as_buffers(net):
    net = copy.deepcopy(net)
    for layer in net.modules():
        for name, value in list(layer._parameters.items()):
            del layer._parameters[name]
            layer.register_buffer(name, None if value is None else value.detach())
    return net


class Local(nn.Module):
    """The whole training set in the class itself."""

    kept = None

    def forward(self, x):
        return Local.kept(x)


@wrong("04.C", "the neighbours in an attribute of the class")
def in_class(x, labels, logits, budget):
    made = type("Local", (Local,), {"kept": Neighbours(x, logits)})
    Local.kept = made.kept
    return made().eval()
