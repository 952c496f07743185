"""The programs that Inductor writes for a GPU, on a machine without one: assembled, or run.

For an H200: :func:`lower` gives a program's source, :func:`assemble` its kernels as machine code,
and what :func:`compile_for_gpu` returns runs the whole program on CPU tensors, its Triton kernels
in Triton's interpreter. No driver is touched: the device's properties are given, and a guard that
does nothing stands in for the one that a CPU build of PyTorch lacks.

Only for a process of its own, which is set up to do one or the other: see :func:`in_process`. What
this cannot show is speed, races between threads, and how tensor cores round.

Private interfaces of torch and triton are patched here; tried with those of constraints.txt.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CAPABILITY = (9, 0)
SHARED_MEMORY = 232_448  # bytes that a block of threads may ask for

_PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=132,
    total_memory=150_000_000_000,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=SHARED_MEMORY,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=62914560,
    is_integrated=0,
    gcnArchName="",
    uuid="0",
)

_GUARD_VARIABLE = "WITHOUT_GPU_GUARD"  # where a process finds the guard, or leaves it
_GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using namespace c10;
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}  // namespace
"""


def in_process(function: str, *args: Any, folder: Path, interpret: bool = False) -> Any:
    """Call ``"module:function"`` of this folder in a process of its own, which pretends.

    Args:
        function: Takes and returns what JSON can say.
        folder: Where processes leave for each other what they build.
        interpret: Whether kernels are run; otherwise they can be assembled.

    Raises:
        AssertionError: It failed; the message is what the process wrote.
    """
    code = "import sys, without_gpu; without_gpu._serve(*sys.argv[1:])"
    here = str(Path(__file__).parent)
    with tempfile.TemporaryDirectory() as own:
        result = Path(own, "result.json")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([here, *sys.path]),
            "TRITON_INTERPRET": "1" if interpret else "0",
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
            "TRITON_CACHE_DIR": str(Path(folder, "triton")),
            _GUARD_VARIABLE: str(Path(folder, "guard.so")),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        command = [sys.executable, "-c", code, function, json.dumps(args), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(f"{function}{args} failed:\n{done.stdout}\n{done.stderr}")
        return json.loads(result.read_text())


def _serve(function: str, args: str, result: str) -> None:
    module, _, name = function.partition(":")
    with pretend_gpu():
        returned = getattr(importlib.import_module(module), name)(*json.loads(args))
    Path(result).write_text(json.dumps(returned))


class _Driver:
    """What Triton and Inductor ask of a driver while they compile."""

    def __init__(self, target: Any) -> None:
        self._target = target
        properties = {
            "max_shared_mem": SHARED_MEMORY,
            "multiprocessor_count": _PROPERTIES.multi_processor_count,
            "warpSize": 32,
            "max_num_regs": 65536,
        }
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    @classmethod
    def is_active(cls) -> bool:
        return True


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _load_guard() -> None:
    """Register a guard for CUDA devices: operators on fake tensors ask for one."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(os.environ.get(_GUARD_VARIABLE, Path(folder, "guard.so")))
        if not library.exists():
            root = Path(torch.__file__).parent
            source, built = Path(folder, "guard.cpp"), library.with_suffix(f".{os.getpid()}")
            source.write_text(_GUARD)
            command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", str(source)]
            command += ["-o", str(built), f"-L{root}/lib", "-lc10", f"-Wl,-rpath,{root}/lib"]
            subprocess.run(command, check=True)
            built.replace(library)  # at once: nobody loads half of it
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside, Inductor compiles for an H200, and its programs run on CPU tensors."""
    import torch.utils._triton as probes
    import triton
    from torch._C._dynamo import guards
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.runtime import hints, triton_helpers
    from triton.backends.compiler import GPUTarget

    if torch.version.cuda is None:
        _load_guard()
    driver = _Driver(GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32))
    has, first, one, properties = map(_always, (True, 0, 1, _PROPERTIES))
    # torch.cuda.is_available stays false: Dynamo would save the state of a generator otherwise,
    # and Inductor would trace its patterns with real tensors.
    patches: list[tuple[object, dict[str, Any]]] = [
        (
            torch.cuda,
            {
                "device_count": one,
                "current_device": first,
                "set_device": first,
                "get_device_properties": properties,
                "get_device_capability": _always(CAPABILITY),
                "get_device_name": _always(_PROPERTIES.name),
                "is_bf16_supported": has,
                "_DeviceGuard": lambda _: contextlib.nullcontext(),
            },
        ),
        (
            CudaInterface,
            {
                "is_available": staticmethod(has),
                "current_device": staticmethod(first),
                "device_count": staticmethod(one),
                "get_device_properties": staticmethod(properties),
                "is_bf16_supported": staticmethod(has),
            },
        ),
        (
            CudaInterface.Worker,
            {
                "current_device": staticmethod(first),
                "get_device_properties": staticmethod(properties),
            },
        ),
        (triton_helpers, {"set_driver_to_gpu": first}),
        (torch._C, {"_cuda_getCurrentRawStream": first}),
        (guards, {"_empty_strided_cuda": _unwritten}),
        # Without these TMA would be left out silently.
        (probes, {"_device_supports_tma": has, "has_triton_tma_device": has}),
        (probes, {"has_triton_stable_tma_api": has}),
    ]
    options = {
        "fx_graph_cache": False,
        "force_disable_caches": True,
        "compile_threads": 1,
        # These compute on the device.
        "joint_graph_constant_folding": False,
        "shape_padding": False,
    }
    cached = [hints.DeviceProperties.create, *vars(probes).values()]

    def forget() -> None:
        for function in cached:
            function = getattr(function, "__func__", function)
            if hasattr(function, "cache_clear"):
                function.cache_clear()

    if os.environ.get("TRITON_INTERPRET") == "1":
        patches.append((triton_helpers, {"libdevice": _Library()}))

    with contextlib.ExitStack() as stack:
        for target, replaced in patches:
            stack.enter_context(_patch(target, replaced))
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(driver)
        stack.callback(lambda: triton.runtime.driver.set_active(before))
        forget()
        stack.callback(forget)
        stack.enter_context(config.patch(options))
        stack.enter_context(_fast_interpreter())
        stack.enter_context(_bfloat16_interpreter())
        yield


@contextlib.contextmanager
def _patch(target: object, replaced: dict[str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            missing = not hasattr(target, name)
            stack.enter_context(mock.patch.object(target, name, value, create=missing))
        yield


def _unwritten(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a buffer that shows when it is read before it is written."""
    buffer = torch.empty_strided(size, stride, dtype=dtype)
    return buffer.fill_(float("nan")) if dtype.is_floating_point else buffer


class _Library:
    """CUDA's library of functions, which the interpreter does not have."""

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        from triton.language import tensor
        from triton.runtime.interpreter import TensorHandle

        def inverse_root(x: Any) -> Any:
            return 1 / np.sqrt(x)

        function = inverse_root if name == "rsqrt" else getattr(np, name)

        def call(x: Any) -> Any:
            handle = x.handle
            found = function(handle.data).astype(handle.data.dtype)
            return tensor(TensorHandle(found, handle.dtype), x.type)

        return call


@contextlib.contextmanager
def _fast_interpreter() -> Iterator[None]:
    """Let Triton's interpreter do with fewer steps of Python what it does anyway.

    It reduces and scans in log2(n) steps of whole blocks instead of element by element (what
    combines is associative), looks for the functions to stand in for once per kernel instead of
    once per call, and Inductor gives it wide tiles, of which an autotuner may choose any.
    """
    import triton
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime import interpreter

    def tensors(ops: Any, given: Sequence[Any], arrays: Sequence[np.ndarray]) -> list[Any]:
        return [ops.to_tensor(x, like.dtype) for x, like in zip(arrays, given, strict=True)]

    def combined(ops: Any, left: list[Any], right: list[Any]) -> list[np.ndarray]:
        found = ops.combine_fn.fn(*left, *right)
        return [x.handle.data for x in (found if isinstance(found, tuple) else (found,))]

    def reduce(ops: Any, given: Sequence[Any]) -> list[Any]:
        given, axis = ops.unravel(given, ops.axis)
        assert ops.axis is not None or not ops.keep_dims
        arrays = [x.handle.data for x in given]
        while (size := arrays[0].shape[axis]) > 1:
            even, odd = ([x.take(range(at, size, 2), axis) for x in arrays] for at in (0, 1))
            arrays = combined(ops, tensors(ops, given, even), tensors(ops, given, odd))
        if not ops.keep_dims:
            arrays = [x.squeeze(axis) for x in arrays]
        return tensors(ops, given, arrays)

    def scan(ops: Any, given: Sequence[Any]) -> list[Any]:
        arrays = [x.handle.data for x in given]
        shape = [1] * arrays[0].ndim
        shape[ops.axis] = size = arrays[0].shape[ops.axis]
        index = np.arange(size).reshape(shape)
        step = 1
        while step < size:
            before = [np.roll(x, step, ops.axis) for x in arrays]
            both = combined(ops, tensors(ops, given, before), tensors(ops, given, arrays))
            arrays = [np.where(index < step, x, y) for x, y in zip(arrays, both, strict=True)]
            step *= 2
        return tensors(ops, given, arrays)

    patch_language = interpreter._patch_lang
    language = {"tl": triton.language, "core": triton.language.core}
    is_patched = False

    def patch_once(function: Any) -> Any:
        nonlocal is_patched
        if is_patched:
            return None  # a function that a kernel calls
        scope = patch_language(types.SimpleNamespace(__globals__=language))
        is_patched = True

        def restore() -> None:
            nonlocal is_patched
            scope.restore()
            is_patched = False

        return types.SimpleNamespace(restore=restore)

    run = CachingAutotuner.run

    def run_wide(tuner: Any, *args: Any, **options: Any) -> Any:
        (tuner.configs[0].kwargs).update(_wide(tuner))
        return run(tuner, *args, **options)

    with (
        _patch(interpreter.ReduceOps, {"generic_reduce": reduce}),
        _patch(interpreter.ScanOps, {"generic_scan": scan}),
        _patch(interpreter, {"_patch_lang": patch_once}),
        _patch(CachingAutotuner, {"run": run_wide}),
    ):
        yield


@contextlib.contextmanager
def _bfloat16_interpreter() -> Iterator[None]:
    """Let Triton's interpreter compute with bfloat16, which it holds as bits.

    Left to itself it multiplies the bits as if they were integers, and cuts numbers off where a GPU
    rounds to the nearest.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def as_float(x: Any) -> np.ndarray:
        bits: np.ndarray = x.data
        return (bits.astype(np.uint32) << 16).view(np.float32)

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widened(x: Any) -> Any:
        is_bits = x.dtype.scalar == tl.bfloat16
        return TensorHandle(as_float(x), tl.float32) if is_bits else x

    def cast_exactly(builder: Any, source: Any, target: Any) -> Any:
        source = widened(source)
        if target.scalar != tl.bfloat16:
            return cast(builder, source, target)
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def dot_of_numbers(builder: Any, a: Any, b: Any, *args: Any) -> Any:
        return dot(builder, widened(a), widened(b), *args)

    with _patch(InterpreterBuilder, {"cast_impl": cast_exactly, "create_dot": dot_of_numbers}):
        yield


def _wide(tuner: Any) -> dict[str, int]:
    """Return another width for tiles of a kernel of Inductor's that is no template."""
    if "XBLOCK" not in tuner.configs[0].kwargs or not tuner.size_hints:
        return {}
    wanted = 1 << max(tuner.size_hints["x"] - 1, 0).bit_length()
    return {"XBLOCK": min(wanted, 2048)}


def on_gpu(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a tensor like it that is on the GPU, and holds nothing."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def compile_for_gpu(
    function: Callable[..., Any], inputs: Sequence[Tensor], *, symbolic: Sequence[int] = ()
) -> Callable[..., Any]:
    """Compile a function of tensors; the result takes CPU tensors.

    Args:
        function: Returns a tensor, or several.
        inputs: Like those that it will be called with.
        symbolic: Sizes that are to be symbolic wherever they occur; the others are fixed.
    """
    graph = fx.Graph()
    names = [graph.placeholder(f"x{at}") for at in range(len(inputs))]
    graph.output((graph.call_function(function, tuple(names)),))
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fake = _with_symbols(inputs, symbolic, mode) if symbolic else [on_gpu(x, mode) for x in inputs]
    with torch.no_grad(), tracing(TracingContext(mode)):
        return _compile_fx(fx.GraphModule({}, graph), fake)


def _with_symbols(
    inputs: Sequence[Tensor], symbolic: Sequence[int], mode: FakeTensorMode
) -> list[Tensor]:
    env = mode.shape_env
    sizes: dict[int, Any] = {}
    for size in symbolic:
        source = ConstantSource(f"size_{size}")
        symbol = env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
        sizes[size] = env.create_symintnode(symbol, hint=size, source=source)
    with mode:
        return [
            torch.empty([sizes.get(n, n) for n in x.shape], dtype=x.dtype, device="cuda")
            for x in inputs
        ]


def _compile_fx(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(inputs))


@dataclass(frozen=True)
class Program:
    """What Inductor wrote: Python, with the kernels in it."""

    source: str

    @property
    def launches(self) -> list[str]:
        """Names of what it calls on the GPU, in order: Triton kernels, and operators."""
        found = []
        operator = r".*?((?:extern_kernels|torch\.ops|aten)\.[\w.]+)\("
        for line in self.source.splitlines():
            for pattern in (r"\s*(triton_\w+)\.run\(", operator):
                if match := re.match(pattern, line):
                    found.append(match[1])
        return found

    def largest_buffer(self, length: int) -> int:
        """Return the elements of the largest buffer it allocates, ``length`` for symbolic sizes."""
        pattern = r"= empty_strided_\w+(\(\(.*\), \(.*\), )torch\.\w+\)"
        layouts = re.findall(pattern, self.source)
        assert len(layouts) == self.source.count("= empty_strided_")
        pairs = (eval(re.sub(r"\b[su]\d+\b", str(length), each) + ")") for each in layouts)
        return max(math.prod(shape) for shape, _ in pairs)

    @property
    def kernels(self) -> dict[str, str]:
        """Sources of the Triton kernels, by name."""
        pattern = r"async_compile\.triton\('([^']+)', '''\n(.*?)'''"
        found = re.findall(pattern, self.source, re.DOTALL)
        return {name: source.replace("\\\\", "\\") for name, source in found}


@contextlib.contextmanager
def written(*, only: bool = False) -> Iterator[list[Program]]:
    """Inside, collect what is written.

    Args:
        only: Whether to leave it at that, and go on after the block.
    """
    from torch._inductor.graph import GraphLowering

    programs: list[Program] = []

    def save(source: str) -> None:
        programs.append(Program(source))
        if only:
            raise _Written

    with (
        contextlib.suppress(_Written),
        _patch(GraphLowering, {"save_output_code": staticmethod(save)}),
    ):
        yield programs


class _Written(BaseException):
    pass


def lower(
    function: Callable[..., Any], inputs: Sequence[Tensor], *, symbolic: Sequence[int] = ()
) -> Program:
    """Return the program of a function, see :func:`compile_for_gpu`."""
    with written(only=True) as programs:
        compile_for_gpu(function, inputs, symbolic=symbolic)
    (program,) = programs
    return program


class LargestTensor(TorchDispatchMode):
    """Inside, note the most elements of any tensor that an operator returns."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        # The interpreter looks at memory as bytes.
        sizes = [x.numel() for x in tensors if x.dtype != torch.uint8]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@contextlib.contextmanager
def inductor_for_gpu() -> Iterator[LargestTensor]:
    """Inside, Inductor compiles rewritten graphs for the GPU, though their inputs are the CPU's.

    Masks are traced as there, and short prompts are as long ones. What is noted of tensors is for
    all programs that were compiled here.
    """
    from torch._inductor import compile_fx as inductor
    from torch.fx.node import map_aggregate

    from blindsight.attention import chunks
    from blindsight.passes import replace_attention
    from blindsight.runtime import any_length

    compile_fx = inductor.compile_fx
    is_inside = False

    def takes_any_number(size: int | torch.SymInt, _: torch.device) -> bool:
        return any_length.is_symbol(size)

    def moved(x: Any) -> Any:
        return torch.device("cuda", 0) if x == torch.device("cpu") else x

    def compile_moved(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        nonlocal is_inside
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        is_rewritten = any(name.startswith("blindsight") for name in names)
        if is_inside or not is_rewritten:  # it calls itself; and the model's own form never runs
            return compile_fx(gm, inputs, **options)
        for node in gm.graph.nodes:
            node.args = map_aggregate(node.args, moved)
            node.kwargs = map_aggregate(node.kwargs, moved)
        gm.recompile()
        context = TracingContext.try_get()
        mode = detect_fake_mode(inputs) or (context.fake_mode if context else None)
        assert mode is not None
        on_it = [on_gpu(x, mode) if isinstance(x, Tensor) else x for x in inputs]
        is_inside = True
        try:
            compiled = compile_fx(gm, on_it, **options)
        finally:
            is_inside = False

        def run(*args: Any) -> Any:
            with largest:
                return compiled(*args)

        return run

    largest = LargestTensor()
    with (
        _patch(inductor, {"compile_fx": compile_moved}),
        mock.patch.dict(replace_attention._BY_OPERATOR, replace_attention._MAKE_MASK),
        _patch(any_length, {"_MIN_CAPACITY": 1, "takes_any_number": takes_any_number}),
        _patch(chunks, {"_MAX_CHUNKS": 2}),  # so that less is filled up
    ):
        yield largest


@dataclass(frozen=True)
class Assembled:
    """A kernel as machine code.

    Attributes:
        block_m, block_n: Queries and keys of a tile; 0 where it is no FlexAttention.
        num_warps, num_stages: Of a block of threads, and of its pipeline.
        registers: Per thread.
        spilled: Bytes that a thread stores and loads for want of registers, and its stack.
        shared: Bytes that a block of threads has.
        hgmma, hmma: Instructions of the tensor cores, for groups of warps and for one.
        instructions: All of them.
    """

    name: str
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared: int
    hgmma: int
    hmma: int
    instructions: int


def assemble(name: str, source: str) -> Assembled:
    """Compile a kernel as Inductor's own workers do, which have no driver either."""
    from torch._inductor import config
    from triton.backends.nvidia.compiler import get_ptxas

    static = "use_static_triton_launcher"
    if not hasattr(config, static):
        static = "use_static_cuda_launcher"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        tuner.configs = tuner.configs[:1]
        # Triton's own object, which keeps the code.
        with config.patch({static: False}):
            tuner.precompile(warm_cache_only=True)
        (result,) = tuner.compile_results
        kernel = result.kernel
        binary, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        (target,) = re.findall(r"^\.target\s+(\w+)", kernel.asm["ptx"], re.MULTILINE)
        usage = _tool("cuobjdump", "--dump-resource-usage", binary)
        code = _tool("nvdisasm", "-c", binary)
        ptxas = get_ptxas(int(re.findall(r"\d+", target)[0])).path
        said = _tool(ptxas, "-v", f"--gpu-name={target}", ptx, "-o", Path(folder, "out"))
    operations = re.findall(
        r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.MULTILINE
    )
    spills = re.findall(r"(\d+) bytes spill", said)
    constants = dict(re.findall(r"^\s*(BLOCK_[MN]) : tl.constexpr = (\d+)", source, re.MULTILINE))
    return Assembled(
        name=name,
        block_m=int(constants.get("BLOCK_M", 0)),
        block_n=int(constants.get("BLOCK_N", 0)),
        num_warps=kernel.metadata.num_warps,
        num_stages=kernel.metadata.num_stages,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spilled=sum(map(int, spills)) + int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared=kernel.metadata.shared,
        hgmma=operations.count("HGMMA"),
        hmma=operations.count("HMMA"),
        instructions=len(operations),
    )


def _tool(name: str, *args: str | Path) -> str:
    """Run a tool, one of those that Triton brings or at a path, and return what it says."""
    import triton.backends.nvidia

    assert triton.backends.nvidia.__file__ is not None
    path = Path(triton.backends.nvidia.__file__).parent / "bin" / name
    done = subprocess.run([path, *args], capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{name} {' '.join(map(str, args))} failed: {said}")
    return said
