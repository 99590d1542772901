"""What the processes of a step tell each other, and no more."""

from __future__ import annotations

import json

from test_resume import DISTILL, ROOT, TORCHRUN, command, finish

from kdfast.training.setup import gradient_sharing

FEW = ("--train-limit", 203, "--eval-limit", 90, "--output", "out", "--epochs", 2,
       "--student", "cifar_resnet8", "--no-baseline", "--teacher", "cifar_resnet8")  # fmt: skip


SHARING = """
import sys, torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from kdfast.training.setup import gradient_sharing

distributed.init_process_group("gloo")
rank = distributed.get_rank()
found = []
for arguments in ({}, gradient_sharing(True, accumulates=False).to_kwargs()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.Linear(30, 3))
    wrapped = DistributedDataParallel(model, **arguments)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    generator = torch.Generator().manual_seed(rank)
    gradients = []
    for step in range(4):
        wrapped(torch.randn(5, 6, generator=generator)).square().mean().backward()
        gradients += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    found.append(gradients)
    assert wrapped.static_graph == bool(arguments)
    assert wrapped.gradient_as_bucket_view == bool(arguments)
for one, other in zip(*found, strict=True):
    assert torch.equal(one, other) and one.abs().sum() > 0
sys.stdout.write(f"equal on {rank}\\n")
distributed.destroy_process_group()
"""


def test_gradients_of_a_static_graph(tmp_path):
    """As GPUs share them, tried on CPUs: a static graph and buckets that the gradients lie in."""
    (tmp_path / "sharing.py").write_text(SHARING)
    said = finish(command(*TORCHRUN, "sharing.py", ROOT, cwd=tmp_path))
    assert "equal on 0" in said and "equal on 1" in said


def test_a_graph_is_static_where_nothing_accumulates():
    assert gradient_sharing(True, accumulates=False).static_graph
    assert not gradient_sharing(True, accumulates=True).static_graph
    on_cpus = gradient_sharing(False, accumulates=False)
    assert on_cpus.find_unused_parameters and not on_cpus.static_graph


COUNTING = """
import collections, functools, json, runpy, sys
from torch import distributed
from kdfast.training import loop

counts, epochs = collections.Counter(), []
for name in ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "broadcast",
             "gather", "reduce", "reduce_scatter_tensor", "all_to_all_single", "barrier",
             "gather_object", "broadcast_object_list", "send", "recv", "scatter"):
    def called(*args, original=getattr(distributed, name), name=name, **more):
        counts[name] += 1
        return original(*args, **more)
    setattr(distributed, name, functools.wraps(getattr(distributed, name))(called))

train = loop.Trainer._train_epoch
def watched(self, started):
    counts.clear()
    tally = train(self, started)
    epochs.append(dict(counts, steps=self.train.plan.steps))
    return tally
loop.Trainer._train_epoch = watched
script = sys.argv.pop(1)
sys.argv = sys.argv[1:] and [script, *sys.argv[1:]]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    sys.stdout.write(f"counts {json.dumps(epochs)}\\n")
"""


def test_crd_shares_its_embeddings_alone(teacher_run, tmp_path):
    """A collective a step, beside the gradients' and the one that agrees on signals."""
    (tmp_path / "counting.py").write_text(COUNTING)
    found = {}
    for method in ("kd", "crd"):
        flags = (*FEW, "-b", 16, "--method", method, "--teacher-checkpoint", teacher_run,
                 "--experiment", method, "--log-interval", 1000)  # fmt: skip
        flags += ("--crd-negatives", 50) if method == "crd" else ()
        script = (*TORCHRUN, "counting.py", ROOT / DISTILL)
        said = finish(command(*script, *flags, cwd=tmp_path))
        lines = [line for line in said.splitlines() if "counts [" in line]
        assert len(lines) == 2
        found[method] = [json.loads(line.partition("counts ")[2]) for line in lines]
    for plain, crd in zip(found["kd"], found["crd"], strict=True):
        steps = plain[1]["steps"]
        assert plain[1] == {"all_reduce": steps, "steps": steps}
        assert crd[1] == plain[1] | {"all_gather_into_tensor": steps}
        assert crd[0] == crd[1] | {"all_reduce": steps + 1}, "Z is agreed on in the first step"
