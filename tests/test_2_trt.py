"""course_utils.trt without a GPU: every TensorRT name it uses against the real bindings, every
failure its own exception.

The bindings (`tensorrt-cu13-bindings`) are read where they are installed; nothing of them is kept
or passed on.
"""

import ast
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import CHAPTERS

from course_utils import ROOT, trt

FILES = sorted((ROOT / "course_utils" / "trt").glob("*.py"))
SOURCES = [ROOT / "course_utils" / "trt" / name for name in ("building.py", "engine.py")]
BESIDE = Path(sys.prefix) / "tensorrt-10"  # where `make setup-extended` puts TensorRT 10's classes


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> types.ModuleType:
    """TensorRT's Python module, loaded as chapter 12 loads it."""
    module = trt.names(tmp_path_factory.mktemp("names"))
    if module is None:
        pytest.skip("no tensorrt, and no tensorrt_bindings with a C compiler on this platform")
    return module


class Names(ast.NodeVisitor):
    """Follows TensorRT's objects through a source: what is made of what, by the bindings' own
    signatures.

    `wrong` collects names and keywords that the bindings do not have, `seen` all that were
    resolved.
    """

    def __init__(self, module: types.ModuleType) -> None:
        self.module, self.known, self.wrong, self.seen = module, {}, [], set()

    def check(self, source: str) -> list[str]:
        self.visit(ast.parse(source))
        return sorted(set(self.wrong))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.known = {k: v for k, v in self.known.items() if k.startswith("self.")}
        for argument in node.args.args:
            if argument.arg == "trt":
                self.known["trt"] = ("module", self.module)
            if argument.arg == "context":  # _bind's
                self.known["context"] = ("instance", self.module.IExecutionContext)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            many = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            for t, v in (
                zip(target.elts, node.value.elts, strict=True) if many else [(target, node.value)]
            ):
                self.known.pop(ast.unparse(t), None)
                if kind := self.infer(v):
                    self.known[ast.unparse(t)] = kind

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.infer(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.infer(node)
        self.generic_visit(node)

    def infer(self, node: ast.AST) -> tuple | None:
        """("module" | "class" | "instance" | "function", object) of an expression, None if it is
        not TensorRT's.
        """
        text = ast.unparse(node)
        if text in self.known:
            return self.known[text]
        if text in ("load()", "tensorrt") or (text == "trt" and "trt" not in self.known):
            return ("module", self.module) if text != "trt" else None
        if isinstance(node, ast.Attribute):
            base = self.infer(node.value)
            return self._member(base, node.attr, text) if base else None
        if isinstance(node, ast.Call):
            if (
                ast.unparse(node.func) == "made"
            ):  # course_utils.trt's own: makes one of its first argument
                made = self.infer(node.args[0])
                return ("instance", made[1]) if made else None
            if ast.unparse(node.func).endswith("._new_context"):
                return ("instance", self.module.IExecutionContext)
            kind = self.infer(node.func)
            return self._call(kind, node, text) if kind else None
        return None

    def _member(self, base: tuple, name: str, text: str) -> tuple | None:
        if base[0] == "function":
            return None
        if not hasattr(base[1], name):
            self.wrong.append(f"{text}: {getattr(base[1], '__name__', base[1])} has no {name}")
            return None
        self.seen.add(f"{getattr(base[1], '__name__', '')}.{name}")
        value = getattr(base[1], name)
        if isinstance(value, type):
            return ("class", value)
        return ("function", value) if callable(value) and not isinstance(value, property) else None

    def _call(self, kind: tuple, node: ast.Call, text: str) -> tuple | None:
        function = kind[1].__init__ if kind[0] == "class" else kind[1]
        signatures = re.findall(r"(?<!\w)\w+\(self: [^\n]*\) -> [^\n]+", function.__doc__ or "")
        if signatures:
            fits = [s for s in signatures if self._fits(s, node)]
            if not fits:
                self.wrong.append(f"{text}: takes {signatures}")
                return None
            result = fits[0].rsplit("-> ", 1)[1].split(".")[-1].strip()
            if kind[0] == "function" and isinstance(getattr(self.module, result, None), type):
                return ("instance", getattr(self.module, result))
        return ("instance", kind[1]) if kind[0] == "class" else None

    @staticmethod
    def _fits(signature: str, node: ast.Call) -> bool:
        inside = signature[signature.index("(") + 1 : signature.rindex(") ->")]
        parameters = re.findall(r"(?:^|, )(\w+): ", inside)[1:]
        required = [p for p in parameters if not re.search(rf"\b{p}: [^,]*=", inside)]
        given = parameters[: len(node.args)] + [k.arg for k in node.keywords]
        return len(node.args) <= len(parameters) and set(required) <= set(given) <= set(parameters)


def test_every_name_and_keyword_of_the_module_is_in_the_bindings(real):
    names = Names(real)
    for path in SOURCES:
        assert names.check(path.read_text(encoding="utf-8")) == [], path.name
    assert len(names.seen) >= 45, sorted(names.seen)  # it must not pass because it saw nothing
    expected = {
        "Builder.build_serialized_network",
        "MemoryPoolType.WORKSPACE",
        "IExecutionContext.execute_async_v3",
    }
    assert (
        expected | {"OnnxParserRefitter.refit_from_file", "EngineInspector.get_engine_information"}
        <= names.seen
    )


def test_every_name_of_the_chapter_is_in_the_bindings(real):
    source = next(c for c in CHAPTERS if c.number == "12").source.read_text(encoding="utf-8")
    assert (
        Names(real).check(
            "\n".join(line for line in source.splitlines() if not line.startswith("# %%"))
        )
        == []
    )


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("builder.build_engine(network, config)", "build_engine"),
        (
            "builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))",
            "EXPLICIT_BATCH",
        ),
        ("config.set_flag(trt.BuilderFlag.FP16)", "FP16"),
        ("config.max_workspace_size = 1", "max_workspace_size"),
        ("context.execute_async_v2([], 0)", "execute_async_v2"),
        ("builder.create_network(explicit=True)", "explicit"),
        ("config.set_timing_cache(cache, ignore=True)", "ignore"),
        ("trt.Builder()", "Builder"),
        ("context.set_input_shape('x')", "set_input_shape"),
    ],
)
def test_the_name_checker_can_fail(real, line, name):
    good = """
def f(trt, log):
    builder = trt.Builder(log)
    network = builder.create_network(0)
    config = builder.create_builder_config()
    cache = config.create_timing_cache(b"")
    engine = trt.Runtime(log).deserialize_cuda_engine(b"")
    context = engine.create_execution_context()
"""
    if real.__version__.startswith("10") and name in ("EXPLICIT_BATCH", "FP16"):
        pytest.skip("TensorRT 10 still has this name")
    assert Names(real).check(good) == []
    wrong = Names(real).check(f"{good}    {line}\n")
    assert any(name in complaint for complaint in wrong), wrong


def test_the_recipes_of_the_chapter_are_gone_and_their_successors_are_there(real):
    def there(chain: str) -> bool:
        owner, _, name = chain.rpartition(".")
        return hasattr(getattr(real, owner) if owner else real, name)

    assert len(trt.RECIPES) >= 10
    assert [recipe.new for recipe in trt.RECIPES if not there(recipe.new)] == []
    if not real.__version__.startswith("10"):
        assert [recipe.old for recipe in trt.RECIPES if there(recipe.old)] == []
        assert all(r.today(real).startswith("AttributeError") for r in trt.RECIPES)


def test_the_other_major_version_has_every_name_too():
    """The two have one import name, so 10 is asked in a process of its own."""
    if not (BESIDE / "tensorrt_bindings").is_dir():
        pytest.skip("TensorRT 10's classes come with make setup-extended, on Linux and x86_64")
    asked = ["name_and_keyword", "name_of_the_chapter", "checker_can_fail", "recipes", "asked_for"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = os.environ | {"PYTHONPATH": f"{BESIDE}{os.pathsep}{ROOT}", "COURSE_TENSORRT": "10"}
    done = subprocess.run(
        [*command, "-k", " or ".join(asked)], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_version_that_was_asked_for_is_there(real):
    assert real.__version__.split(".")[0] == os.environ.get("COURSE_TENSORRT", "11")


# What goes wrong, one exception each.


@pytest.fixture
def no_driver(real, monkeypatch):
    """The real classes, and nothing behind them that could make a builder: as on a machine without
    a driver.
    """
    if "libs" in str(getattr(real, "__file__", "")) or real.__name__ == "tensorrt":
        pytest.skip("a real tensorrt is installed")
    monkeypatch.setitem(sys.modules, "tensorrt", real)


def test_without_tensorrt_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(trt.NoTensorRT, match="pip install tensorrt"):
        trt.build(tmp_path / "x.onnx")


def test_without_a_driver_builder_and_runtime_say_so(no_driver, tmp_path):
    with pytest.raises(trt.NoDriver, match="nvidia-smi"):
        trt.build(tmp_path / "x.onnx")
    with pytest.raises(trt.NoDriver, match="nvidia-smi"):
        trt.Engine(b"")


class Fake:
    """A module `tensorrt` whose classes answer what a test wants; they have the real ones' names
    and no other.
    """

    def __init__(self, real: types.ModuleType) -> None:
        made = {
            n: mock.Mock(spec_set=dir(getattr(real, n)))
            for n in (
                "Builder",
                "OnnxParser",
                "IBuilderConfig",
                "Runtime",
                "ICudaEngine",
                "Refitter",
                "OnnxParserRefitter",
                "INetworkDefinition",
            )
        }
        self.module = types.ModuleType("tensorrt")
        self.module.__dict__.update(real.__dict__)
        self.log = None
        for name in ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter"):
            setattr(self.module, name, lambda *given, made=made[name]: self._keep(given, made))
        self.builder, self.parser, self.config, self.runtime = list(made.values())[:4]
        self.engine, self.refitter, self.refit_parser, self.network = list(made.values())[4:]
        self.builder.create_network.return_value = self.network
        self.builder.create_builder_config.return_value = self.config
        self.config.add_optimization_profile.return_value = 0
        self.config.set_timing_cache.return_value = True
        self.config.get_timing_cache.return_value.serialize.return_value = b"times"
        self.builder.build_serialized_network.return_value = b"plan"
        self.network.num_inputs = 1
        self.network.get_input.return_value = types.SimpleNamespace(
            name="image", shape=(-1, 1, 28, 28)
        )
        self.runtime.deserialize_cuda_engine.return_value = self.engine
        self.engine.num_io_tensors, self.engine.num_optimization_profiles = 2, 2
        self.engine.get_tensor_name.side_effect = lambda i: ["image", "logits"][i]
        modes = {"image": real.TensorIOMode.INPUT, "logits": real.TensorIOMode.OUTPUT}
        self.engine.get_tensor_mode.side_effect = modes.get
        self.engine.get_tensor_shape.side_effect = lambda name: (
            (-1, 1, 28, 28) if name == "image" else (-1, 10)
        )
        profiles = [[(n, 1, 28, 28) for n in sizes] for sizes in ((1, 4, 8), (8, 64, 256))]
        self.engine.get_tensor_profile_shape.side_effect = lambda name, index: profiles[index]

    def _keep(self, given: tuple, made: mock.Mock) -> mock.Mock:
        self.log = given[-1]
        return made

    def says(self, *lines: str) -> object:
        """A side effect that logs errors and gives None."""

        def effect(*_: object) -> None:
            for line in lines:
                self.log.log(self.module.ILogger.ERROR, line)

        return effect


@pytest.fixture
def fake(real, monkeypatch) -> Fake:
    fake = Fake(real)
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock())
    return fake


PROFILE = {"image": ((1, 1, 28, 28), (64, 1, 28, 28), (256, 1, 28, 28))}


def test_build_gives_the_plan_and_writes_the_timing_cache(fake, tmp_path):
    cache = tmp_path / "timing.cache"
    assert (
        trt.build("m.onnx", [PROFILE], workspace=2**30, timing_cache=cache, refit=True) == b"plan"
    )
    assert cache.read_bytes() == b"times"
    trt.build("m.onnx", [PROFILE], timing_cache=cache)
    fake.config.create_timing_cache.assert_called_with(b"times")
    fake.config.set_flag.assert_called_once_with(fake.module.BuilderFlag.REFIT)
    fake.config.set_memory_pool_limit.assert_called_once_with(
        fake.module.MemoryPoolType.WORKSPACE, 2**30
    )


def test_fp32_is_fp32_and_a_build_can_be_held_to_its_cache(fake):
    flags = fake.module.BuilderFlag
    trt.build("m.onnx", [PROFILE], only_cached=True)
    fake.config.clear_flag.assert_called_once_with(flags.TF32)
    fake.config.set_flag.assert_called_once_with(flags.ERROR_ON_TIMING_CACHE_MISS)
    trt.build("m.onnx", [PROFILE], tf32=True)
    fake.config.clear_flag.assert_called_once()


def test_a_timing_cache_of_another_gpu_is_replaced_by_an_empty_one(fake, tmp_path):
    (tmp_path / "timing.cache").write_bytes(b"from elsewhere")
    fake.config.set_timing_cache.return_value = False
    assert trt.build("m.onnx", [PROFILE], timing_cache=tmp_path / "timing.cache") == b"plan"
    assert [c.args for c in fake.config.create_timing_cache.call_args_list] == [
        (b"from elsewhere",),
        (b"",),
    ]


def test_parser_errors_become_one_message(fake):
    fake.parser.parse_from_file.return_value = False
    fake.parser.num_errors = 2
    fake.parser.get_error.side_effect = lambda i: mock.Mock(
        desc=lambda: f"no importer for operator Op{i}"
    )
    with pytest.raises(trt.ParseError, match=r"m\.onnx.*Op0.*Op1"):
        trt.build("some/folder/m.onnx", [PROFILE])


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        (
            [
                "Skipping tactic 0 due to insufficient memory",
                "Could not find any implementation for node conv1.",
            ],
            trt.OutOfWorkspace,
        ),
        (["Could not find any implementation for node conv1."], trt.UnsupportedLayer),
        (
            ["Skipping tactic 0 due to insufficient memory", "Error Code 4: shapes do not match"],
            trt.BuildError,
        ),
        (["Try increasing the workspace size"], trt.OutOfWorkspace),
        (["Error Code 2: OutOfMemory (Requested size was 8 bytes.)"], trt.OutOfWorkspace),
        (["Error Code 4: shapes do not match"], trt.BuildError),
        ([], trt.BuildError),
    ],
)
def test_a_builder_that_gives_up_says_why(fake, lines, kind):
    fake.builder.build_serialized_network.side_effect = fake.says(*lines)
    fake.builder.build_serialized_network.return_value = None
    with pytest.raises(trt.TrtError) as caught:
        trt.build("m.onnx", [PROFILE])
    assert type(caught.value) is kind
    assert (lines or ["said nothing"])[-1] in str(caught.value)


@pytest.mark.parametrize(
    "profiles",
    [
        [],
        [{}],
        [{"picture": PROFILE["image"]}],
        [{"image": ((1, 1, 28, 28), (64, 1, 28, 28), (32, 1, 28, 28))}],
        [{"image": ((1, 1, 28, 28), (64, 1, 32, 28), (256, 1, 28, 28))}],
        [{"image": ((1, 28, 28),) * 3}],
        [PROFILE, {"image": ((9, 1, 28, 28), (8, 1, 28, 28), (9, 1, 28, 28))}],
    ],
)
def test_profiles_that_do_not_fit_are_refused_before_tensorrt_sees_them(fake, profiles):
    with pytest.raises(trt.ProfileError):
        trt.build("m.onnx", profiles)
    fake.builder.build_serialized_network.assert_not_called()


def test_a_foreign_plan_is_a_mismatch_with_tensorrts_own_words(fake):
    fake.runtime.deserialize_cuda_engine.side_effect = fake.says(
        "generated on an incompatible device, expecting compute 8.6 got 7.5"
    )
    fake.runtime.deserialize_cuda_engine.return_value = None
    with pytest.raises(
        trt.EngineMismatch, match=r"expecting compute 8\.6 got 7\.5.*build it again"
    ):
        trt.Engine(b"old")


def test_an_engine_knows_its_bounds_and_refuses_shapes_outside(fake):
    engine = trt.Engine(b"plan")
    assert (engine.inputs, engine.outputs) == (["image"], ["logits"])
    assert [b["image"][2][0] for b in engine.bounds()] == [8, 256]
    with pytest.raises(trt.OutsideProfile, match="257"):
        engine.run({"image": torch.zeros(257, 1, 28, 28)})
    with pytest.raises(KeyError, match="image"):
        engine.run({"picture": torch.zeros(1, 1, 28, 28)})


@pytest.mark.parametrize(("batch", "index"), [(1, 0), (7, 0), (8, 0), (9, 1), (256, 1)])
def test_the_profile_tuned_nearest_is_taken(fake, batch, index):
    assert trt.choose_profile(trt.Engine(b"plan").bounds(), {"image": (batch, 1, 28, 28)}) == index


def test_refit_refuses_an_engine_with_baked_weights_and_names_what_is_missing(fake):
    engine = trt.Engine(b"plan")
    fake.engine.refittable = False
    with pytest.raises(trt.RefitError, match="refit=True"):
        engine.refit("new.onnx")
    fake.engine.refittable = True
    fake.refit_parser.refit_from_file.return_value = False
    fake.refit_parser.num_errors = 0
    with pytest.raises(trt.RefitError, match="does not fit"):
        engine.refit("new.onnx")
    fake.refit_parser.refit_from_file.return_value = True
    fake.refitter.refit_cuda_engine.return_value = False
    fake.refitter.get_missing_weights.return_value = ["conv1.weight"]
    with pytest.raises(trt.RefitError, match=r"conv1\.weight"):
        engine.refit("new.onnx")


def test_layers_of_tensorrt_10_and_11_are_read(fake):
    old = {
        "Name": "conv1 + relu1",
        "LayerType": "CaskConvolution",
        "TacticName": "sm80_i8",
        "Inputs": [
            {
                "Name": "x",
                "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format",
            }
        ],
        "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP16 format"}],
        "Metadata": "[ONNX Layer: conv1]\u001e[ONNX Layer: relu1]",
    }
    new = {
        "Name": "__myl_Conv",
        "LayerType": "kgen",
        "Inputs": [{"Format/Datatype": "Half"}],
        "Outputs": [{"DataType": "Float"}],
    }
    split = {"Name": "z", "Format": "Row major linear", "DataType": "INT8"}
    first, second = trt.layers(json.dumps({"Layers": [old, new | {"Outputs": [split]}]}))
    assert first.inputs == (trt.Tensor("x", "int8"),)
    assert first.outputs == (trt.Tensor("y", "fp16"),)
    assert first.nodes == ("conv1", "relu1")
    assert (second.inputs[0].dtype, second.outputs, second.nodes) == (
        "fp16",
        (trt.Tensor("z", "int8"),),
        (),
    )
    with pytest.raises(trt.TrtError, match="DETAILED"):
        trt.layers(json.dumps({"Layers": ["conv1"]}))
    with pytest.raises(trt.TrtError, match="no engine inspector"):
        trt.layers("Segmentation fault")


@pytest.fixture
def device(fake, monkeypatch):
    """An engine whose context notes what is asked of it, and tensors that stay on the CPU."""
    context = fake.engine.create_execution_context.return_value = mock.Mock()
    context.active_optimization_profile = 0
    context.infer_shapes.return_value = []
    context.get_tensor_shape.side_effect = lambda name: (4, 10)
    fake.engine.get_tensor_dtype.side_effect = lambda name: fake.module.DataType.FLOAT
    for name in ("current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, mock.Mock())
    monkeypatch.setattr(torch.cuda, "graph", mock.MagicMock())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    for name in ("empty", "zeros"):
        made = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, made=made, **k: made(*a, **{**k, "device": "cpu"})
        )
    return types.SimpleNamespace(fake=fake, context=context)


def test_a_slice_at_an_odd_address_is_copied_to_an_aligned_one(device):
    whole = torch.randn(5, 1, 28, 28).flatten()
    odd = whole[1 : 1 + 4 * 784].view(4, 1, 28, 28)
    assert odd.data_ptr() % 256
    trt.Engine(b"plan").run({"image": odd})
    addresses = dict(call.args for call in device.context.set_tensor_address.call_args_list)
    assert addresses["image"] != odd.data_ptr()


def test_an_output_whose_shape_depends_on_the_data_is_refused_by_name(device):
    device.context.get_tensor_shape.side_effect = lambda name: (-1, 10)
    with pytest.raises(trt.TrtError, match="logits depends on the data"):
        trt.Engine(b"plan").run({"image": torch.zeros(4, 1, 28, 28)})
    device.context.infer_shapes.side_effect = RuntimeError("broken")
    with pytest.raises(trt.TrtError, match="can't be inferred"):
        trt.Engine(b"plan").run({"image": torch.zeros(4, 1, 28, 28)})


def test_a_type_without_a_tensor_is_named(device):
    kinds = device.fake.module.DataType
    device.fake.engine.get_tensor_dtype.side_effect = lambda name: kinds.INT4
    with pytest.raises(trt.TrtError, match="image is .*INT4"):
        trt.Engine(b"plan").run({"image": torch.zeros(4, 1, 28, 28)})


def test_a_captured_engine_runs_once_before_it_records_and_then_only_replays(device):
    call = trt.Engine(b"plan").capture({"image": (4, 1, 28, 28)})
    assert device.fake.engine.create_execution_context.call_count == 2  # one of its own
    assert device.context.execute_async_v3.call_count == 2
    settled = device.context.set_input_shape.call_count
    assert [tuple(call()["logits"].shape) for _ in range(3)] == [(4, 10)] * 3
    assert torch.cuda.CUDAGraph.return_value.replay.call_count == 3
    assert device.context.set_input_shape.call_count == settled
    assert device.context.execute_async_v3.call_count == 2
    with pytest.raises(KeyError, match="picture"):
        trt.Engine(b"plan").capture({"picture": (4, 1, 28, 28)})


def test_a_refit_waits_for_the_gpu(device):
    order = []
    torch.cuda.synchronize.side_effect = lambda: order.append("wait")
    device.fake.refit_parser.refit_from_file.side_effect = lambda _: order.append("refit") or True
    trt.Engine(b"plan").refit("new.onnx")
    assert order == ["wait", "refit"]


def test_the_module_is_short_and_light():
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 300 for path in FILES)
    code = "import sys; from course_utils import trt; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "False", out.stderr
