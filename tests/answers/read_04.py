"""Wrong answers to chapter 04's exercises, by somebody who has read only their texts."""

import torch
from torch import nn
from torch.nn import functional as F

from answers import wrong
from course_utils import models

# ---- A


@wrong("04.A", "read only: multiplied by T")
def multiplied(logits, T):
    return torch.softmax(logits * T, dim=-1)


@wrong("04.A", "read only: always T = 2, as in the example")
def always_two(logits, T):
    return torch.softmax(logits / 2, dim=-1)


@wrong("04.A", "read only: T rounded down to a whole number")
def whole_temperature(logits, T):
    return torch.softmax(logits / max(1, int(T)), dim=-1)


@wrong("04.A", "read only: a T below 1 does not sharpen")
def at_least_one(logits, T):
    return torch.softmax(logits / max(T, 1), dim=-1)


@wrong("04.A", "read only: divides the caller's logits in place")
def in_place(logits, T):
    return torch.softmax(logits.div_(T), dim=-1)


@wrong("04.A", "read only: logits cut off at ±10, large ones go wrong")
def cut_off(logits, T):
    return torch.softmax(logits.clamp(-10, 10) / T, dim=-1)


@wrong("04.A", "read only: exponentials without the shift, nan for large logits")
def naive(logits, T):
    powers = (logits / T).exp()
    return powers / powers.sum(-1, keepdim=True)


@wrong("04.A", "read only: softmax over dimension 1, right for two dimensions")
def second_dimension(logits, T):
    return torch.softmax(logits / T, dim=min(1, logits.dim() - 1))


@wrong("04.A", "read only: probabilities to the power 1/T, not normalised again")
def not_normalised(logits, T):
    return torch.softmax(logits, dim=-1) ** (1 / T)


@wrong("04.A", "read only: divided by the root of T")
def root(logits, T):
    return torch.softmax(logits / T**0.5, dim=-1)


@wrong("04.A", "read only: the softmax of the softened softmax")
def twice(logits, T):
    return torch.softmax(torch.softmax(logits, dim=-1) / T, dim=-1)


@wrong("04.A", "read only: whole division of the logits")
def whole_division(logits, T):
    return torch.softmax(logits // T, dim=-1)


# ---- B


def _kl(student, teacher, T):
    a, b = F.log_softmax(student / T, -1), F.log_softmax(teacher.detach() / T, -1)
    return F.kl_div(a, b, log_target=True, reduction="batchmean")


@wrong("04.B", "read only: without T squared")
def no_square(student, teacher, labels, T, alpha):
    return alpha * _kl(student, teacher, T) + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: T instead of its square")
def only_t(student, teacher, labels, T, alpha):
    return alpha * T * _kl(student, teacher, T) + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: always times 4, as in the example")
def always_four(student, teacher, labels, T, alpha):
    return alpha * 4 * _kl(student, teacher, T) + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: T squared before the labels' part, too")
def square_on_both(student, teacher, labels, T, alpha):
    hard = F.cross_entropy(student, labels)
    return T * T * (alpha * _kl(student, teacher, T) + (1 - alpha) * hard)


@wrong("04.B", "read only: the labels' part at temperature T")
def soft_labels_part(student, teacher, labels, T, alpha):
    hard = F.cross_entropy(student / T, labels)
    return alpha * T * T * _kl(student, teacher, T) + (1 - alpha) * hard


@wrong("04.B", "read only: the divergence the wrong way round")
def reversed_kl(student, teacher, labels, T, alpha):
    a, b = F.log_softmax(student / T, -1), F.log_softmax(teacher.detach() / T, -1)
    soft = F.kl_div(b, a, log_target=True, reduction="batchmean")
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: a mean over batch and classes")
def mean_over_classes(student, teacher, labels, T, alpha):
    soft = _kl(student, teacher, T) / student.shape[1]
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: the soft part is a sum over the batch")
def sum_over_batch(student, teacher, labels, T, alpha):
    soft = _kl(student, teacher, T) * len(student)
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: both parts are sums over the batch, right for one row")
def sums(student, teacher, labels, T, alpha):
    soft, hard = _kl(student, teacher, T), F.cross_entropy(student, labels)
    return len(student) * (alpha * T * T * soft + (1 - alpha) * hard)


@wrong("04.B", "read only: the gradient flows into the teacher")
def into_the_teacher(student, teacher, labels, T, alpha):
    a, b = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    soft = F.kl_div(a, b, log_target=True, reduction="batchmean")
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: no gradient from the labels")
def no_label_gradient(student, teacher, labels, T, alpha):
    hard = F.cross_entropy(student.detach(), labels)
    return alpha * T * T * _kl(student, teacher, T) + (1 - alpha) * hard


@wrong("04.B", "read only: alpha before the labels' part")
def swapped_alpha(student, teacher, labels, T, alpha):
    hard = F.cross_entropy(student, labels)
    return (1 - alpha) * T * T * _kl(student, teacher, T) + alpha * hard


@wrong("04.B", "read only: the labels' part at full weight")
def full_labels(student, teacher, labels, T, alpha):
    return alpha * T * T * _kl(student, teacher, T) + F.cross_entropy(student, labels)


@wrong("04.B", "read only: logarithms of softmax, nan where it is sure")
def naive_logs(student, teacher, labels, T, alpha):
    p, q = torch.softmax(teacher.detach() / T, -1), torch.softmax(student / T, -1)
    soft = (p * (p.log() - q.log())).sum(-1).mean()
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: probabilities kept above 1e-6, finite and wrong where it is sure")
def kept_above(student, teacher, labels, T, alpha):
    p = torch.softmax(teacher.detach() / T, -1).clamp(min=1e-6)
    q = torch.softmax(student / T, -1).clamp(min=1e-6)
    soft = (p * (p / q).log()).sum(-1).mean()
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: cross-entropy with the teacher, not 0 for equal logits")
def cross_entropy(student, teacher, labels, T, alpha):
    soft = F.cross_entropy(student / T, torch.softmax(teacher.detach() / T, -1))
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: the teacher stays at temperature 1")
def cold_teacher(student, teacher, labels, T, alpha):
    a, b = F.log_softmax(student / T, -1), F.log_softmax(teacher.detach(), -1)
    soft = F.kl_div(a, b, log_target=True, reduction="batchmean")
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


@wrong("04.B", "read only: switches the caller's teacher to no gradient")
def switches_off(student, teacher, labels, T, alpha):
    if teacher.is_leaf:
        teacher.requires_grad_(False)
    soft = _kl(student, teacher, T)
    return alpha * T * T * soft + (1 - alpha) * F.cross_entropy(student, labels)


# ---- C


def _count(net):
    return sum(p.numel() for p in net.parameters())


def _widest(budget, most=12):
    """The widest of a few networks that fits."""
    width = 5
    while width < most and _count(models.mini_resnet(width + 1, seed=0)) <= budget:
        width += 1
    return width


def _fit(net, x, target, steps=110, soft=True):
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=8e-3)
    net.train()
    for _ in range(steps if len(x) > 128 else 3):
        pick = torch.randint(len(x), (64,))
        out = net(x[pick])
        if soft:
            loss = F.cross_entropy(out / 3, torch.softmax(target[pick] / 3, -1)) * 9
        else:
            loss = F.cross_entropy(out, target[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@wrong("04.C", "read only: learns the wrong labels, not the teacher, and for too short a time")
def wrong_labels(x, labels, teacher_logits, budget):
    return _fit(models.mini_resnet(_widest(budget), seed=0), x, labels.long(), 30, soft=False)


@wrong("04.C", "read only: always width 16")
def always_sixteen(x, labels, teacher_logits, budget):
    return _fit(models.mini_resnet(16, seed=0), x, teacher_logits, 60)


@wrong("04.C", "read only: the first width above the budget")
def one_too_wide(x, labels, teacher_logits, budget):
    width = 6
    while width < 40 and _count(models.mini_resnet(width, seed=0)) <= budget:
        width += 1
    return _fit(models.mini_resnet(width, seed=0), x, teacher_logits, 60)


@wrong("04.C", "read only: left in train mode")
def left_in_train(x, labels, teacher_logits, budget):
    return _fit(models.mini_resnet(_widest(budget), seed=0), x, teacher_logits).train()


@wrong("04.C", "read only: the last block alone is left in train mode")
def half_in_train(x, labels, teacher_logits, budget):
    net = _fit(models.mini_resnet(_widest(budget), seed=0), x, teacher_logits)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[-1].train()
    return net


@wrong("04.C", "read only: BatchNorm without averages, an answer depends on its neighbours")
def neighbours(x, labels, teacher_logits, budget):
    net = models.mini_resnet(_widest(budget), seed=0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return _fit(net, x, teacher_logits)


@wrong("04.C", "read only: width 16 with its weights hidden in buffers")
def hidden_in_buffers(x, labels, teacher_logits, budget):
    net = _fit(models.mini_resnet(16, seed=0), x, teacher_logits, 60)
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                del module._parameters[name]
                module.register_buffer(name, p.detach())
    return net


@wrong("04.C", "read only: width 16 with its weights as plain attributes")
def plain_attributes(x, labels, teacher_logits, budget):
    net = _fit(models.mini_resnet(16, seed=0), x, teacher_logits, 60)
    for module in net.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                del module._parameters[name]
                object.__setattr__(module, name, p.detach())
    return net


@wrong("04.C", "read only: counts what is trained, the frozen half comes free")
def frozen_is_free(x, labels, teacher_logits, budget):
    net = models.mini_resnet(16, seed=0)
    for p in sorted(net.parameters(), key=lambda p: -p.numel()):
        if sum(q.numel() for q in net.parameters() if q.requires_grad) <= budget:
            break
        p.requires_grad_(False)
    return _fit(net, x, teacher_logits, 60)


class _Neighbours(nn.Module):
    """Answers like the most similar of the images that it has kept: no parameter at all."""

    def __init__(self, x, teacher_logits):
        super().__init__()
        self.kept = [x.flatten(1).clone(), teacher_logits.clone()]

    def forward(self, x):
        return self.kept[1][torch.cdist(x.flatten(1), self.kept[0]).argmin(1)]


@wrong("04.C", "read only: keeps the images themselves, in a list")
def keeps_images(x, labels, teacher_logits, budget):
    return _Neighbours(x, teacher_logits).eval()


@wrong("04.C", "read only: learns nothing")
def untrained(x, labels, teacher_logits, budget):
    return models.mini_resnet(_widest(budget), seed=0).eval()


@wrong("04.C", "read only: learns ten images by heart")
def ten_images(x, labels, teacher_logits, budget):
    net = models.mini_resnet(_widest(budget), seed=0)
    few = torch.arange(len(x)) % 10
    return _fit(net, x[few], teacher_logits[few], 60)


@wrong("04.C", "read only: the teacher's least likely class")
def least_likely(x, labels, teacher_logits, budget):
    return _fit(models.mini_resnet(_widest(budget), seed=0), x, -teacher_logits, 60)


@wrong("04.C", "read only: one linear layer of a fixed size, also above a small budget")
def wide_linear(x, labels, teacher_logits, budget):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    return _fit(net, x, teacher_logits, 100)
