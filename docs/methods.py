"""Write docs/methods.md from the methods themselves: `python docs/methods.py`."""

from pathlib import Path

from kdfast.methods import methods_table

TEXT = """# Distillation methods

The total loss is gamma * cross-entropy + the sum over methods of weight * term. Gamma is 1, or
1 - alpha beside `kd`, unless `--gamma` or the recipe says otherwise. Methods combine freely:
`--method kd at fsp --beta at=1000 fsp=0.1`. Terms are logged without their weight.

"""

if __name__ == "__main__":
    Path(__file__).with_suffix(".md").write_text(TEXT + methods_table())
