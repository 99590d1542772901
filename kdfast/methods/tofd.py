"""Task-oriented feature distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import distributed, nn
from torch.nn import functional as F

from kdfast.errors import UsageError
from kdfast.methods.base import Method, Option, Outputs, Pairing, method
from kdfast.models import DeepHead, parameter_count


@method("tofd")
class TaskOriented(Method):
    """Task-oriented features: match what auxiliary classifiers of both networks see and say.

    Deep heads on all stages but the last, and each network's own classifier as the deepest: m in
    all. Features f [B, d] are compared through bias-free linear links W [d_t, d_s], kept close to
    orthogonal, one a head; logits by cross-entropy with the teacher's at tau = 1 + t / 250 * epoch.
    The deepest classifier's CE is the objective's own. The teacher's heads are trained before, with
    its trunk: train/heads.py --kind deep.

    Norms are not squared and run over the batch of all processes at once, so that a grows with the
    square root of the batch: it belongs to 128 images. With gradient accumulation they are those of
    one forward pass. They have subgradient 0 at 0.

    Source: Zhang, Shi, Shi, Ma, Bao, "Task-Oriented Feature Distillation", NeurIPS 2020, in the
    form of the public code.
    """

    gamma = 1.0
    heads = "deep"
    under_autocast = True
    feature = Option(0.05, "a, the weight of the distance of features", least=0.0)
    orthogonal = Option(0.03, "b, the weight of the links' distance from orthogonal", least=0.0)
    growth = Option(3.0, "t: the temperature rises by t / 250 an epoch", least=0.0)
    formula = (
        "sum_(i<m) CE(z_si) + sum_(i<=m) [a ||f_si W_i^T - f_ti||_F - mean_b sum_c p_ti log p_si "
        "+ b (||W_i W_i^T - I||_F + ||W_i^T W_i - I||_F)], p = softmax(z / tau)"
    )

    def __init__(self, **options: object):
        super().__init__(**options)
        # A tensor, so that a compiled step serves all epochs.
        self.register_buffer("tau", torch.tensor(1.0), persistent=False)
        self.start_epoch(0)

    def taps(self) -> str:
        return "stages+penultimate"

    def setup(self, pairing: Pairing) -> None:
        if not pairing.head_layers:
            raise UsageError(
                "method tofd needs a teacher with deep heads: train it with train/heads.py --kind "
                "deep and give that run as --heads"
            )
        self.smoothing = pairing.label_smoothing
        layers = list(pairing.teacher_layers[:-1])
        widths = [shape[1] for shape in pairing.student_shapes[:-1]]
        ours, theirs = (
            math.prod(shapes[-1][1:]) for shapes in (pairing.student_shapes, pairing.teacher_shapes)
        )
        if layers and layers[-1] not in pairing.head_layers:
            layers.pop()  # the last stage: of the student it tells where its heads lead to
        else:
            widths.append(ours)
        for layer in layers:
            if layer not in pairing.head_layers:
                raise UsageError(
                    f"method tofd: the teacher has no head on layer {layer}; choose "
                    f"--teacher-layers among {', '.join(pairing.head_layers)}"
                )
        self.mounted = [pairing.head_layers.index(layer) for layer in layers]
        self.student_heads = nn.ModuleList(
            DeepHead(widths[i:], pairing.classes) for i in range(len(layers))
        )
        from_to = [
            (head.width, pairing.head_widths[i])
            for head, i in zip(self.student_heads, self.mounted, strict=True)
        ]
        self.links = nn.ModuleList(
            nn.Linear(*widths, bias=False) for widths in (*from_to, (ours, theirs))
        )

    def notes(self) -> list[str]:
        heads, links = (
            " + ".join(f"{parameter_count(m):,}" for m in modules) or "none"
            for modules in (self.student_heads, self.links)
        )
        return [f"parameters of student heads {heads}, of links {links}"]

    def start_epoch(self, epoch: int) -> None:
        self.tau.fill_(1 + self.growth / 250 * (epoch + 1))

    def forward(self, student: Outputs, teacher: Outputs, labels: torch.Tensor) -> torch.Tensor:
        stages = zip(self.student_heads, student.features, strict=False)
        ours = [head(feature) for head, feature in stages]
        ours.append((student.features[-1], student.logits))
        theirs = [teacher.heads[i] for i in self.mounted]
        theirs.append((teacher.features[-1], teacher.logits))
        with torch.autocast(student.logits.device.type, enabled=False):
            dtype, batch = student.logits.dtype, len(labels)
            apart = [
                link(f_s.flatten(1).to(dtype)) - f_t.flatten(1).to(dtype)
                for link, (f_s, _), (f_t, _) in zip(self.links, ours, theirs, strict=True)
            ]
            z_s, z_t = (torch.cat([z.to(dtype) for _, z in net]) for net in (ours, theirs))
            loss = F.cross_entropy(z_s / self.tau, (z_t / self.tau).softmax(1), reduction="sum")
            loss = loss + F.cross_entropy(
                z_s[:-batch],
                labels.repeat(len(self.student_heads)),
                reduction="sum",
                label_smoothing=self.smoothing,
            )
            loss = loss / batch + self.feature * self._norms(apart, student.indices).sum()
            bound = sum(orthogonality(link.weight) for link in self.links)
            return loss + self.orthogonal * bound

    def _norms(self, parts: Sequence[torch.Tensor], indices: torch.Tensor | None) -> torch.Tensor:
        if self.training and distributed.is_available() and distributed.is_initialized():
            return global_norms(parts, indices)
        return torch.stack([torch.linalg.vector_norm(part) for part in parts])


@torch.compiler.disable
def global_norms(
    parts: Sequence[torch.Tensor], indices: torch.Tensor | None = None
) -> torch.Tensor:
    """Frobenius norms [M] of M matrices whose rows are spread over the processes.

    `parts` are this process's rows, M of [B, ...]; `indices` [B] tell a process that has none of
    its own and repeats the first image of process 0. Gradients are those of the norms times the
    inverse of this process's share of the rows: what becomes theirs in a mean over processes that
    is weighted by these shares.
    """
    squares = torch.stack([part.square().sum() for part in parts])
    rank, rows = distributed.get_rank(), len(parts[0])
    first = squares.new_full((1,), -1 - rank) if indices is None else indices[:1]
    own = [squares.detach(), squares.new_full((1,), rows), first]
    own = torch.cat([part.double() for part in own])
    everyone = own.new_empty(distributed.get_world_size(), len(own))
    distributed.all_gather_into_tensor(everyone, own[None])
    counted = everyone[:, -1] != everyone[0, -1]
    counted[0] = True
    *sums, count = (everyone[:, :-1] * counted[:, None]).sum(0)
    norms = torch.stack(sums).sqrt()
    slopes = torch.where(norms > 0, 0.5 * count / rows / norms, 0)
    moved = squares - squares.detach()  # 0, with a gradient
    return norms.to(squares.dtype) + slopes.to(squares.dtype) * moved


def orthogonality(weight: torch.Tensor) -> torch.Tensor:
    """||W W^T - I||_F + ||W^T W - I||_F, a scalar, of W [n, m].

    Only the smaller Gram matrix is formed: the other's residual squared is larger by |n - m|.
    """
    excess = abs(weight.shape[0] - weight.shape[1])
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    identity = torch.eye(len(wide), dtype=weight.dtype, device=weight.device)
    residual = torch.linalg.vector_norm(wide @ wide.T - identity)
    return residual + ((residual.square() + excess).sqrt() if excess else residual)
