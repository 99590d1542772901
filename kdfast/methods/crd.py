"""Contrastive representation distillation (CRD)."""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdfast import ops
from kdfast.errors import UsageError, UserError
from kdfast.methods._contrast import ContrastMemory
from kdfast.methods.base import Method, Option, Outputs, Pairing, method
from kdfast.ops import Key
from kdfast.ops.reference.philox import counter_of, philox

__all__ = ["ContrastMemory", "ContrastiveRepresentation"]


@method("crd")
class ContrastiveRepresentation(Method):
    """Contrastive representations: tell an image from others across the networks.

    The penultimate vectors f of both networks are embedded by a linear layer each, trained with the
    student, and brought to length 1. A student's embedding is to resemble the teacher's of the same
    image more than those of K images of other classes, and the other way round; what it is compared
    with comes from a bank of a row an image, M_t and M_s, blended with the embeddings of every
    optimizer step (also of one that fp16 skips: its gradients overflowed, its embeddings did not).
    Z is n times the mean of exp(score / tau) over the first micro-batch of the run. Where a class
    leaves fewer than K images of others, those are drawn with replacement.

    Source: Tian, Krishnan and Isola, "Contrastive Representation Distillation", ICLR 2020,
    arXiv 1910.10699, equations 14 to 18; epsilon, banks and sizes of its public code.
    """

    default_weight = 0.8
    dim = Option(128, "d of the embeddings", positive=True)
    negatives = Option(16384, "K, images of other classes to tell one from", positive=True)
    temperature = Option(0.07, "tau of the scores", positive=True)
    momentum = Option(0.5, "what a bank row keeps of itself at an update, 0 to 1", least=0.0)
    positives = Option(
        "exact", "the image itself, or any of its class (relax)", choices=("exact", "relax")
    )
    formula = (
        "L(e_s, M_t) + L(e_t, M_s), L = -mean_b [log(x_0 / (x_0 + K/n)) + sum_j log((K/n) / "
        "(x_j + K/n))], x_j = exp(M_j e_b / tau) / Z, e = (W f + b) / ||W f + b||"
    )

    def taps(self) -> str:
        return "penultimate"

    def setup(self, pairing: Pairing) -> None:
        if self.momentum > 1:
            raise UsageError(f"crd momentum must be 1 or less, got {self.momentum:g}")
        targets = torch.tensor(pairing.training_labels(), dtype=torch.int64)
        counts = _class_sizes(targets, pairing.classes)
        self.others = len(targets) - int(counts.max())
        self.seed = pairing.seed
        student, teacher = (
            shapes[0][1:].numel() for shapes in (pairing.student_shapes, pairing.teacher_shapes)
        )
        self.embed_student = nn.Linear(student, self.dim)
        self.embed_teacher = nn.Linear(teacher, self.dim)
        self.memory = ContrastMemory(
            len(targets),
            self.dim,
            self.negatives,
            self.temperature,
            self.momentum,
            step_images=pairing.step_images,
        )
        # Of the data, not of the run: they are made anew at every start.
        for name, table in (
            ("targets", targets),
            ("order", targets.argsort(stable=True)),  # the images class by class
            ("class_offsets", F.pad(counts.cumsum(0), (1, 0))),
            ("partners", torch.zeros_like(targets) if self.positives == "relax" else None),
        ):
            self.register_buffer(name, table, persistent=False)
        self.owner = _enter(self)
        self.start_epoch(0)

    def notes(self) -> list[str]:
        if self.negatives <= self.others:
            return []
        return [
            f"{self.negatives} negatives an image, but as few as {self.others} images of other "
            f"classes: drawn with replacement; --crd-negatives {self.others} draws none twice"
        ]

    def start_epoch(self, epoch: int) -> None:
        self.key = Key(self.seed, "crd", epoch)
        if self.partners is not None:
            ids = torch.arange(len(self.targets), device=self.targets.device)
            zero = torch.zeros_like(ids)
            key = Key(self.seed, "crd", "positives", epoch)
            bits = philox(key.value, counter_of(zero, ids, zero))[0]
            first, end = (self.class_offsets[self.targets + i] for i in (0, 1))
            self.partners.copy_(self.order[first + ((bits * (end - first)) >> 32)])

    def after_step(self) -> None:
        self.memory.update()

    def draw(self, labels: Tensor, index: Tensor) -> Tensor:
        """[B, K + 1] data set indices for images `index` [B] of classes `labels` [B].

        Column 0 is the positive, the others are of other classes. A function of the seed, the
        epoch and the image alone.
        """
        drawn = ops.draw_negatives(
            labels, self.class_offsets, self.negatives, index, self.key, self.order
        )
        if self.partners is not None:
            drawn[:, 0] = self.partners[index]
        return drawn

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        if student.indices is None:
            raise ValueError("crd needs the data set indices of the images: Outputs.indices")
        ours = _embedding(self.embed_student, student.features[0])
        theirs = _embedding(self.embed_teacher, teacher.features[0])
        seen = (ours.detach(), theirs.detach(), labels, student.indices)
        z = (self.memory.z_student, self.memory.z_teacher)
        if torch.compiler.is_compiling():
            negatives = _observe(*seen, *z, self.owner)
        else:
            negatives = self.observe(*seen, z)
        return self.memory.loss(ours, theirs, negatives)

    def observe(
        self, student: Tensor, teacher: Tensor, labels: Tensor, index: Tensor, z: tuple
    ) -> Tensor:
        """Draw for a batch of embeddings, and have the memory see it; Z is set in `z`."""
        negatives = self.draw(labels, index)
        self.memory.observe(student, teacher, index, negatives, z)
        return negatives

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.owner = _enter(self)  # a copy keeps a memory of its own


def _embedding(layer: nn.Linear, feature: Tensor) -> Tensor:
    embedding = layer(feature.flatten(1).to(layer.weight.dtype))
    return embedding / torch.linalg.vector_norm(embedding, dim=1, keepdim=True)


def _class_sizes(targets: Tensor, classes: int) -> Tensor:
    """Images of each class, [classes]; raises when there is nothing to tell apart."""
    for i in ((targets < 0) | (targets >= classes)).nonzero().flatten().tolist():
        raise UserError(f"training image {i} has label {targets[i]}, outside the {classes} classes")
    counts = torch.bincount(targets, minlength=classes)
    if (counts > 0).sum() < 2:
        raise UsageError(
            "method crd tells images of two classes or more apart, but all "
            f"{len(targets)} training images are of one; raise --train-limit or use another method"
        )
    return counts


# What is drawn and kept in a step is one opaque operation to torch.compile: the whole loss stays
# one graph, and the key of a new epoch compiles nothing anew. Methods by number, which it can take.
_numbers = count()
_methods: WeakValueDictionary[int, ContrastiveRepresentation] = WeakValueDictionary()


def _enter(owner: ContrastiveRepresentation) -> int:
    number = next(_numbers)
    _methods[number] = owner
    return number


# A replayed CUDA graph would leave this out; the compiler cuts its graphs here.
@torch.library.custom_op(
    "kdfast::crd_observe",
    mutates_args=("z_student", "z_teacher"),
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _observe(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    index: Tensor,
    z_student: Tensor,
    z_teacher: Tensor,
    owner: int,
) -> Tensor:
    """[B, K + 1] indices for a batch that method number `owner` observes."""
    # Compiled code uses the memory of its intermediate results again.
    kept = [x.clone() for x in (student, teacher, labels, index)]
    return _methods[owner].observe(*kept, (z_student, z_teacher))


@_observe.register_fake
def _(student, teacher, labels, index, z_student, z_teacher, owner):
    return index.new_empty((len(index), _methods[owner].negatives + 1))
