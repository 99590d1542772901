"""A request that cannot be served ends at once, in one line: what, where and what to do."""

import subprocess
import sys

import pytest
from conftest import ROOT

CLASSIFIER, DISTILL, HEADS = "train/classifier.py", "train/distill.py", "train/heads.py"
BOTH = (CLASSIFIER, DISTILL)

# (flags, words the line must hold)
EITHER = [
    ("--learning-rat 1", "unknown flag '--learning-rat'"),
    ("--batchsize 8", "did you mean --batch-size"),
    ("--weight_deca=1", "did you mean --weight-decay"),
    ("digits", "unexpected argument 'digits'"),
    ("--epochs 3 4", "unexpected argument '4'"),
    ("--epochs", "--epochs", "expected one argument"),
    ("--epochs three", "--epochs", "'three'"),
    ("--epochs 0", "--epochs", "at least 1"),
    ("--batch_size 0", "--batch-size", "at least 1"),
    ("-j -1", "--workers", "not be negative"),
    ("--lr -1", "--lr", "from 0 up"),
    ("--lr nan", "--lr", "from 0 up"),
    ("--seed 1.5", "--seed", "1.5"),
    ("--hflip 2", "--hflip", "[0, 1]"),
    ("--crop-pct 0", "--crop-pct", "above 0"),
    ("--mean 0 nan 0", "--mean", "nan"),
    ("--std 1 0 1", "--std", "above 0"),
    ("--mean 1 1", "--mean", "expected 3"),
    ("--train-crop-mode rrc --scale 0.9 0.1", "--scale", "0.9 0.1"),
    ("--train-crop-mode rrc --ratio 0 1", "--ratio", "above 0"),
    ("--sched cosin", "--sched", "'cosin'", "cosine"),
    ("--pretrained=yes", "--pretrained", "yes"),
    ("--model cifar_resnet21", "did you mean", "cifar_resnet20"),
    ("--model resnet18.a1_in2k", "pretrained tag", "a1_in1k"),
    ("--model torchvision.models:alexnett", "did you mean", "alexnet"),
    ("--model torchvision.model:alexnet", "cannot import torchvision.model"),
    ("--model :alexnet", "module.path:function"),
    ("--model torchvision.models:alexnet", "32x32", "--img-size"),
    (
        "--model torchvision.models.segmentation:fcn_resnet50 --model-kwargs weights_backbone=null",
        "fcn_resnet50",
        "logits",
    ),
    ("--model os:getcwd", "os:getcwd", "num_classes"),
    ("--model collections:OrderedDict", "not a torch module"),
    ("--model-kwargs depth", "--model-kwargs", "key=value"),
    ("--model-kwargs depth=[", "--model-kwargs", "depth=["),
    ("--model-kwargs colour=1", "cifar_resnet", "'colour'"),
    ("--model-kwargs init=zeros", "cifar_resnet", "zeros"),
    ("--model resnet18 --model-kwargs drop_rate=much", "resnet18", "'much'"),
    ("--model-kwargs num_classes=7", "num_classes", "--num-classes"),
    ("--model vit_tiny_patch16_224 --img-size 8", "vit_tiny_patch16_224", "8x8"),
    ("--dataset digit", "did you mean digits"),
    ("--val-split test", "--val-split"),
    ("--dataset torch/nothing", "torch/nothing"),
    ("--dataset wds/set", "wds/set", "stream"),
    ("--num-classes 7", "--num-classes 7", "10 classes"),
    ("-b 2000", "2000", "1437", "--batch-size"),
    ("--global-batch-size 10 --grad-accum-steps 3", "10", "3 accumulation steps"),
    ("-b 8 --global-batch-size 64", "--batch-size 8", "--global-batch-size 64"),
    ("-b 361 --eval-drop-last", "--eval-drop-last", "--batch-size"),
    ("--mixed-precision fp16", "fp16 needs a GPU", "bf16"),
    ("--amp --mixed-precision fp16", "--amp contradicts"),
    ("--epochs 2 --save-epochs 1 3", "--save-epochs 3"),
    ("--save-epochs -1", "--save-epochs", "not be negative"),
    ("--path-length layer9", "unknown layer 'layer9'"),
    ("--init xavier", "--init", "'xavier'", "vgg"),
    ("--reset-layers layer9", "unknown layer 'layer9'"),
    ("--sched plateau --patience-epochs -1", "--patience-epochs", "not be negative"),
    ("--sched log --sched-on-updates", "--sched-on-updates"),
    ("--opt sgdd", "--opt", "'sgdd'", "did you mean", "sgd"),
    ("--opt adahessian", "--opt adahessian", "second-order"),
    ("--opt sgd --momentum 0", "--opt sgd", "momentum"),
    ("--aa rand-m9", "--aa", "--train-crop-mode rrc"),
    ("--train-crop-mode rrc --aa fast", "--aa fast"),
    ("--recipe digit", "unknown recipe", "digits"),
    ("--config", "--config", "expected one argument"),
]
DISTILLED = [
    ("--tempereture 4", "unknown flag '--tempereture'", "--temperature"),
    ("--temperature 0", "temperature", "above 0"),
    ("--temperature inf", "temperature", "inf"),
    ("--temperature hot", "--temperature", "hot"),
    ("--method ta", "unknown method 'ta'", "at"),
    ("--method kd --at-power 2", "--at-power", "at is not used"),
    ("--method fsp --fsp-pool mean", "--fsp-pool", "'mean'", "avg"),
    ("--alpha 2", "--alpha 2", "--gamma"),
    ("--method at --alpha 1", "--alpha", "kd"),
    ("--method at fsp --beta 3", "--beta 3", "at=..."),
    ("--beta fsp=3", "fsp is not used"),
    ("--beta at=lots", "--beta at=lots", "must be a number"),
    ("--beta at=-1", "--beta at=-1", "0 or more"),
    ("--student-layers layer9 --teacher-layers layer3", "unknown layer 'layer9'", "layer3"),
    ("--student-layers layer3 --teacher-layers lair3", "unknown layer 'lair3'", "layer3"),
    ("--student-layers layer3", "--student-layers and --teacher-layers"),
    ("--student-layers layer2 layer3 --teacher-layers layer3", "2 --student-layers", "1 --teacher"),
    ("--method fsp --student-layers layer3 --teacher-layers layer3", "at least two layers"),
    ("--method at --student-layers layer3 --teacher-layers fc", "teacher layer fc", "[2, 10]"),
    ("--method fsp --student-layers conv1 fc --teacher-layers conv1 fc", "student layer fc"),
    ("--method fsp --student cifar_resnet8x4", "equal channels", "16", "32", "method at"),
    ("--method layer --classifier-epochs -1", "--classifier-epochs", "not be negative"),
    ("--method layer --student-layers fc --classifier-epochs 1", "no weights lie behind fc"),
    ("--teacher cifar_resnet21", "did you mean", "cifar_resnet20"),
    ("--teacher-kwargs colour=1", "cifar_resnet20", "'colour'"),
    ("--teacher-kwargs num_classes=7", "num_classes", "--num-classes"),
    ("--student torchvision.models:resnet18", "--student-layers"),
    ("--dataset fashion-mnist", "no teacher", "train/classifier.py", "--teacher-checkpoint"),
    ("--plugin", "--plugin", "expected one argument"),
    ("--plugin none.py", "no plugin file at none.py"),
]
ROWS = [(script, *row) for script in BOTH for row in EITHER] + [(DISTILL, *r) for r in DISTILLED]


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """Nothing here may get as far as training."""
    monkeypatch.setattr("kdfast.training.loop.Trainer.fit", lambda self: pytest.fail("trains"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0][6:-3]} {row[1]}")
def test_usage(refused, row):
    script, flags, *words = row
    refused(2, script, *flags.split(), words=words)


CONFIGS = [
    ("epohcs: 3", "'epohcs'", "epochs"),
    ("- epochs", "mapping"),
    ("", "mapping"),
    ("epochs: {", "not valid YAML"),
    ("epochs: three", "epochs", "'three'"),
    ("epochs: true", "epochs", "True"),
    ("epochs:", "epochs", "value"),
    ("epochs: [1, 2]", "epochs", "one value"),
    ("dataset: {name: digits}", "dataset", "one value"),
    ("mean: [0.5, 0.5]", "mean", "3 values"),
    ("mean: []", "mean", "value"),
    ("lr: .nan", "lr", "from 0 up"),
    ("sched: cosin", "sched", "cosine"),
    ("download: maybe", "download", "true or false"),
    ("plugin: code.py", "plugin", "command line"),
    ("print-config: true", "print-config", "command line"),
    ("model-kwargs: [depth]", "model-kwargs", "key=value"),
    ("methods: [at]", "methods", "map"),
    ("methods: {at: 3}", "methods", "map"),
    ("lr: !!python/object/apply:os.system ['touch ran']", "not valid YAML"),
]
METHOD_CONFIGS = [
    ("methods: {ta: {beta: 3}}", "unknown method 'ta'", "at"),
    ("methods: {1: {beta: 3}}", "unknown method '1'"),
    ("methods: {at: {betta: 3}}", "betta", "beta"),
    ("methods: {at+fsp: {gama: 3}}", "gama", "gamma"),
    ("methods: {kd: {temperature: hot}}", "temperature", "hot"),
    ("methods: {kd: {temperature: 0}}", "temperature", "above 0"),
    ("methods: {kd: {alpha: much}}", "alpha", "much"),
    ("methods: {at: {beta: [1]}}", "beta", "[1]"),
    ("methods: {at: {beta: -1}}", "beta", "-1"),
    ("methods: {kd: {gamma: .inf}}\nmethod: kd", "gamma", "inf"),
    ("methods: {fsp: {pool: mean}}\nmethod: fsp", "pool", "avg"),
    ("tempereture: 3", "'tempereture'", "temperature"),
]
CONFIG_ROWS = [
    *((script, *row) for script in BOTH for row in CONFIGS),
    *((DISTILL, *row) for row in METHOD_CONFIGS),
]


@pytest.mark.parametrize("flag", ["--config", "--recipe"])
@pytest.mark.parametrize("row", CONFIG_ROWS, ids=lambda row: f"{row[0][6:-3]} {row[1]}")
def test_usage_in_files(refused, tmp_path, row, flag):
    script, content, *words = row
    (tmp_path / "mine.yaml").write_text(content)
    refused(2, script, flag, "mine.yaml", words=["mine.yaml", *words])


PLUGINS = [
    ("import nothing_of_this_name", "nothing_of_this_name"),
    ("def f(:\n", "line 1"),
    ("\nx = undefined_name", "NameError", "line 2"),
    ("raise ValueError('no\\nway')", "ValueError", "no way"),
    ("from kdfast.methods import method\nmethod('mine')(int)", "Method"),
    ("from kdfast.methods import Method, method\n@method('kd')\nclass A(Method):\n  'a'", "'kd'"),
]


@pytest.mark.parametrize("row", PLUGINS, ids=lambda row: row[0])
def test_plugins(refused, tmp_path, row):
    content, *words = row
    (tmp_path / "mine.py").write_text(content)
    refused(2, DISTILL, "--plugin", "mine.py", words=["plugin mine.py", *words])


def test_plugin_that_is_no_python_file(refused, tmp_path):
    (tmp_path / "mine.txt").write_text("x = 1")
    refused(2, DISTILL, "--plugin", "mine.txt", words=["plugin mine.txt", ".py"])


def test_folder_without_a_place(refused):
    refused(2, CLASSIFIER, "--dataset", "folder", words=["--dataset folder", "--data-dir"])


@pytest.mark.parametrize("script", BOTH)
def test_existing_run_folder(refused, tmp_path, script):
    (tmp_path / "output" / "mine").mkdir(parents=True)
    (tmp_path / "output" / "mine" / "summary.csv").write_text("epoch\n1\n")
    refused(2, script, "--experiment", "mine", words=["output/mine", "--resume auto"])


def test_set_without_class_count(refused, monkeypatch):
    class Anonymous(list):
        reader = None

    monkeypatch.setattr("timm.data.create_dataset", lambda *args, **kwargs: Anonymous("ab"))
    flags = ("--dataset", "hfds/owner/set")
    refused(2, CLASSIFIER, *flags, words=["hfds/owner/set", "--num-classes"])


def test_both_spellings_are_one_flag(run_script):
    printed = []
    for flags in (
        ["--weight-decay", "1", "--global-batch-size=8"],
        ["--weight_decay", "1", "--global_batch_size=8"],
    ):
        code, out, _ = run_script(DISTILL, "--print-config", *flags)
        assert code == 0 and "weight-decay: 1.0" in out and "global-batch-size: 8" in out
        printed.append(out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize("flags", [[], ["-b", "8"], ["--method", "at", "fsp", "--seed", "3"]])
def test_printed_config_is_accepted(run_script, tmp_path, flags):
    code, printed, _ = run_script(DISTILL, "--print-config", *flags)
    assert code == 0
    (tmp_path / "mine.yaml").write_text(printed)
    again = run_script(DISTILL, "--print-config", "--config", "mine.yaml")
    assert again == (0, printed, "")
    with pytest.raises(pytest.fail.Exception, match="trains"):
        run_script(DISTILL, "--config", "mine.yaml")


@pytest.mark.parametrize(
    "script, flags, code, word",
    [
        (CLASSIFIER, ["--epohcs", "3"], 2, "--epochs"),
        (DISTILL, ["--teacher-checkpoint", "none.pt"], 1, "none.pt"),
    ],
)
def test_real_processes(tmp_path, script, flags, code, word):
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == code
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{script[6:]}: error: ") and word in line
    assert "Traceback" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
