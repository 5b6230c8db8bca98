"""ONNX graphs: they compute what PyTorch does, at any number of rows, and the README's code draws with them alone."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import families
import tiny
from jdm.controls import ColourHints, Control, Scribble, Silhouette
from jdm.errors import UsageError
from jdm.evaluation.sampling import Sampler
from jdm.export import graphs
from jdm.export.graphs import TOLERANCE, Graph, GraphError, session_of, write
from jdm.export.onnx_folder import write_control
from jdm.export.parts import Parts
from jdm.export.writers import export
from jdm.generator import fresh_noise
from jdm.library import load_model
from jdm.models.folder import save_pipeline
from jdm.space import unit

onnx = pytest.importorskip("onnx", reason="pip install 'jdm[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'jdm[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'jdm[onnx]'")
PROMPTS = ["an ankle boot", "one dress", ""]


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    """The folder of the tiny student in four steps, with weights in float16."""
    return export(student.with_name("student-4"), tmp_path_factory.mktemp("onnx") / "mine", torch.float16, "onnx")


def drawn(folder, model, z, control, noise):
    """Images [n, 3, H, W] in [0, 1] by the graphs of a folder."""
    card = json.loads((folder / "jdm.json").read_text())["onnx"]

    def run(name, **given):
        session = session_of(folder / f"{name}.onnx")
        known = {one.name for one in session.get_inputs()}
        return session.run(None, {key: np.asarray(value) for key, value in given.items() if key in known})[0]

    states = run("text_encoder", ids=model.text().ids(PROMPTS)[0])
    x = z
    for k, step in enumerate(card["steps"]):
        x_t = z if k == 0 else np.float32(step["alpha"]) * x + np.float32(step["sigma"]) * noise[k].numpy()
        x = run("student", x_t=x_t, step=[k], states=states, map=control, strength=np.float32(0.75))
    return run("decoder", x=x)


def expected(model, z, control, noise):
    with torch.no_grad():
        x = Sampler(model, strengths=[0.75] * (model.controlnet is not None)).x(z, PROMPTS, control, noise.get)
        return unit(model.space.decode(x)).clamp(0, 1).numpy()


def asked(model):
    """(noise, a control map, the noise of further steps) for three pictures."""
    shape = model.latent_shape(3, model.size)
    control = (torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.2).float().expand(-1, 3, -1, -1)
    return fresh_noise(shape, 5, 0), control, {k: fresh_noise(shape, 5, k) for k in (1, 2, 3)}


def test_graphs_of_four_steps_equal_pytorch(exported, student):
    model = tiny.halved(load_model(str(student.with_name("student-4"))))
    z, control, noise = asked(model)
    images = drawn(exported, model, z, control, noise)
    assert np.abs(images - expected(model, z, control, noise)).max() < TOLERANCE
    blank = drawn(exported, model, z, torch.zeros_like(control), noise)
    assert np.abs(images - blank).max() > 3 * TOLERANCE, "a control that changes nothing would prove nothing"


def test_the_readmes_code_needs_onnxruntime_alone(exported, student):
    """8-bit pictures, and noise that the snippet draws by numpy."""
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[1]
    edges = (np.random.default_rng(0).random((32, 32)) < 0.2) * np.uint8(255)
    Image.fromarray(edges).save(exported / "control.png")
    alone = "import sys; sys.modules.update(torch=None, jdm=None, transformers=None)\n"
    code = code.replace("your prompt", PROMPTS[0])
    done = subprocess.run([sys.executable, "-c", f"{alone}import numpy; numpy.random.seed(3)\n{code}"], cwd=exported,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    model = tiny.halved(load_model(str(student.with_name("student-4"))))
    noise = np.random.RandomState(3)
    z = [torch.from_numpy(noise.randn(1, *model.latent_shape(1, 32)[1:])).float() for _ in range(4)]
    with torch.no_grad():
        x = Sampler(model).x(z[0], PROMPTS[:1], torch.from_numpy(edges / 255.0).float().expand(1, 3, -1, -1),
                             z.__getitem__)
        image = (255 * unit(model.space.decode(x)).clamp(0, 1)[0].permute(1, 2, 0)).numpy()
    assert np.abs(np.asarray(Image.open(exported / "picture.png"), float) - image).max() <= 1


def test_files_hold_halved_weights_and_no_paths(exported):
    weights = onnx.load(exported / "student.onnx").graph.initializer
    large = [weight for weight in weights if np.prod(weight.dims) >= graphs.SMALLEST]
    assert len(large) > 20
    assert {weight.data_type for weight in large} == {onnx.TensorProto.FLOAT16}
    assert {file.name for file in exported.iterdir()} - {"control.png", "picture.png"} == {
        "text_encoder.onnx", "student.onnx", "decoder.onnx", "tokenizer", "jdm.json", "README.md"}
    assert not [file for file in exported.glob("*.onnx") if b"site-packages" in file.read_bytes()]
    card = json.loads((exported / "jdm.json").read_text())
    assert card["onnx"]["size"] == [32, 32]
    assert [step["level"] for step in card["onnx"]["steps"]] == card["levels"]


@pytest.mark.slow
def test_a_shipped_students_graphs_equal_pytorch(tmp_path):
    model = load_model("nano-canny")
    folder = export("nano-canny", tmp_path / "boots", torch.float16, "onnx")
    z, control, noise = asked(model)
    assert np.abs(drawn(folder, model, z, control, noise) - expected(model, z, control, noise)).max() < TOLERANCE
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 12e6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd21-v", "sdxl"])
def test_other_unets_graphs_equal_pytorch(kind, tmp_path):
    teacher = families.made(kind)
    card = {"kind": "one-step", "levels": [499]}
    save_pipeline(teacher, tmp_path / "model", teacher.step_scheduler([499]), card=card)
    folder = export(tmp_path / "model", tmp_path / "onnx", format="onnx")
    model = load_model(str(tmp_path / "model"))
    parts = Parts("it", model)
    z = fresh_noise(model.latent_shape(3, model.size), 5, 0)
    given = dict(zip(("ids", "ids_2"), (ids.numpy() for ids in model.text().ids(PROMPTS)), strict=False))
    states = session_of(folder / "text_encoder.onnx").run(None, given)
    states = dict(zip(parts.text_encoder().outputs, states, strict=True))
    x = session_of(folder / "student.onnx").run(None, {"x_t": z.numpy(), **states})[0]
    with torch.no_grad():
        zeros = replace(model, zeros=False) if kind == "sdxl" else model
        assert np.abs(x - Sampler(zeros).x(z, PROMPTS).numpy()).max() < TOLERANCE


# Controls


class Either(Silhouette):
    """What it computes depends on a value, which Python reads."""

    def h(self, images):
        return super().h(images) if images.mean() > 0.5 else super().h(1 - images)


@pytest.mark.parametrize("control", [Silhouette(), Scribble(), ColourHints()], ids=lambda control: control.name)
def test_a_controls_graph_measures_the_same(control, student, tmp_path):
    parts = Parts("it", load_model(str(student)))
    assert write_control(parts, control, tmp_path / "control.onnx")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    found = session_of(tmp_path / "control.onnx").run(None, {"images": images.numpy()})[0]
    assert np.abs(found - control.image(control.h(images)).numpy()).max() < 1e-4


@pytest.mark.parametrize("control", [tiny.Canny(), Either()], ids=["canny", "either"])
def test_a_control_of_python_gets_no_graph(control, student, tmp_path):
    assert not write_control(Parts("it", load_model(str(student))), control, tmp_path / "control.onnx")
    assert list(tmp_path.iterdir()) == []


# What is refused


def constant(value: float) -> Control:
    """A function of tensors that the tracer takes for a constant: it draws anew at each call."""
    calls = iter([value, 2 * value, 3 * value])
    return lambda x: (x + next(calls),)


def test_a_graph_that_differs_is_refused(tmp_path):
    graph = Graph(constant(1.0), [], {"x": torch.ones(2, 3)}, ["y"])
    with pytest.raises(GraphError, match=r"y\.onnx and PyTorch differ by 1 \(1 rows\), the bound is 0\.001"):
        write(graph, tmp_path / "y.onnx")
    assert list(tmp_path.iterdir()) == []


def test_weights_too_large_for_half_are_refused(tmp_path):
    layer = torch.nn.Linear(32, 32).requires_grad_(False)
    layer.weight[0, 0] = 1e6
    graph = Graph(lambda x: (layer(x) * 0,), [layer], {"x": torch.ones(2, 32)}, ["y"])
    with pytest.raises(UsageError, match=r"networks\.0\.weight.* of y\.onnx is too large for float16; .*--dtype fp32"):
        write(graph, tmp_path / "y.onnx", half=True)


def test_large_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST", 1000)
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    write(Graph(lambda x: (layer(x),), [layer], {"x": torch.ones(2, 64)}, ["y"]), tmp_path / "y.onnx", half=True)
    assert (tmp_path / "y.onnx.data").stat().st_size >= 64 * 64 * 2
    y = session_of(tmp_path / "y.onnx").run(None, {"x": np.ones((1, 64), np.float32)})[0]
    assert np.abs(y - layer(torch.ones(1, 64)).numpy()).max() < 0.02  # 64 weights, each rounded by 2^-11 of itself


@pytest.mark.parametrize(("name", "said"), [
    ("controlled", "draws in many guided steps; ONNX graphs are written for students, such as nano-canny"),
    ("flow", "is a SD3 model; ONNX graphs are written for students that are UNets")])
def test_other_models_are_refused(name, said, controlled, tmp_path):
    if name == "flow":
        save_pipeline(families.made("sd3"), controlled.with_name("flow"), card={"kind": "one-step", "levels": [999]})
    with pytest.raises(UsageError, match=re.escape(said)):
        export(controlled.with_name(name), tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_and_missing_packages_are_refused(student, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="hold weights in fp32 or fp16, not bf16; choose --dtype fp16"):
        export(student, tmp_path / "out", torch.bfloat16, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"ONNX graphs need onnxruntime; run: pip install 'jdm\[onnx\]'"):
        export(student, tmp_path / "out", format="onnx")
    assert list(tmp_path.iterdir()) == []
