"""Write docs/methods.md from the methods themselves: `python docs/methods.py`."""

from pathlib import Path

from kdfast.methods import find_method, method_names, methods_table

TEXT = """# Distillation methods

The total loss is gamma * cross-entropy + the sum over methods of weight * term. Gamma is 1, or
1 - alpha beside `kd`, unless `--gamma` or the recipe says otherwise. Methods combine freely:
`--method kd at fsp --beta at=1000 fsp=0.1`. Terms are logged without their weight.

Below, s is the student and t the teacher, b an image of a batch of B, c one of C classes or a
channel, z logits, F a feature map, i and j positions in `at` and channels in `fsp`.

"""

EQUIVALENCES = """
## The same in other code

What other implementations of these methods write, and the flags that give the same loss here. Each
line is a test of the same name in tests/test_published_formulas.py, in float64 where no network is
trained. CE is cross-entropy, averaged over the batch.

"""

GENERAL = {
    "gamma-default": "Cross-entropy counts once, whatever the number of methods: with weight 1, or "
    "1 - alpha when `kd` is among them.",
    "weight-decay": "`--weight-decay w` adds `w * theta` to the gradient under SGD, which is the "
    "penalty `w / 2 * ||theta||^2`; a penalty `l * ||theta||^2` is `--weight-decay 2*l`.",
}


def equivalences() -> dict[str, str]:
    """Every line on other conventions by its id: those of the total loss, then each method's."""
    found = dict(GENERAL)
    for name in method_names():
        found |= find_method(name).equivalences
    return found


def render() -> str:
    lines = [f"* `{key}`: {line}\n" for key, line in equivalences().items()]
    return TEXT + methods_table() + EQUIVALENCES + "".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(render())
