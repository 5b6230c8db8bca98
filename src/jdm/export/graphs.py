"""Functions of tensors as ONNX files: traced, held against PyTorch, and stored without what no reader needs."""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jdm.errors import RunError, UsageError, in_short

TOLERANCE = 1e-3  # between a graph's outputs and PyTorch's
LARGEST = 1_500_000_000  # bytes of weights inside one file; protobuf's bound is 2 GB, and more go into a file beside it
SMALLEST = 1024  # numbers of a tensor that is halved; below are biases, and constants that must be exact
BATCHES = (1, 3)  # numbers of rows that a graph is held against PyTorch with


@dataclass(frozen=True)
class Graph:
    """A function that becomes one ONNX file.

    Attributes:
        run: function of the inputs in their order; returns the outputs.
        networks: networks whose weights it reads.
        inputs: an example of each input, by name. Those of two or more axes have rows along the first.
        outputs: names of the outputs.
        rows: the number of rows is free, and examples have at least two: the tracer takes one for a constant. Where
            False there is one row.
    """

    run: Callable[..., Sequence[Tensor]]
    networks: Sequence[nn.Module]
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    rows: bool = True


class GraphError(RunError):
    """A function that cannot be an ONNX graph."""


class _Traced(nn.Module):
    def __init__(self, graph: Graph):
        super().__init__()
        self.run, self.networks = graph.run, nn.ModuleList(graph.networks)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run(*tensors))


def write(graph: Graph, file: Path, half: bool = False) -> None:
    """Writes a graph with weights in float32, or in float16 that are widened when they are loaded.

    Raises:
        UsageError: a package is missing, or a weight is too large for float16.
        GraphError: PyTorch cannot trace the function, or the graph's outputs are further than TOLERANCE from its own.
    """
    onnx, *_ = map(needed, ("onnx", "onnxscript", "onnxruntime"))
    weights = sum(p.numel() * p.element_size() for net in graph.networks for p in net.state_dict().values())
    apart = weights > LARGEST
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as folder:
        draft = Path(folder) / file.name
        _trace(graph, draft, apart)
        _hold(graph, draft, file.name)
        model = onnx.load(draft)
    _strip(model.graph)
    if half:
        _halve(model.graph, file.name)
    beside: dict[str, Any] = {"save_as_external_data": True, "location": f"{file.name}.data"} if apart else {}
    onnx.save(model, file, **beside)


def needed(name: str) -> Any:
    """The module of a package of the extra `onnx`.

    Raises:
        UsageError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(f"ONNX graphs need {error.name}; run: pip install 'jdm[onnx]'") from None


def _trace(graph: Graph, file: Path, apart: bool) -> None:
    optimizer = needed("onnxscript.optimizer")
    # A named Dim would be traced twice: diffusers' UNets have a branch for 64 rows and more.
    free = {0: torch.export.Dim.DYNAMIC}
    shapes = {"tensors": tuple(free if tensor.ndim > 1 and graph.rows else None for tensor in graph.inputs.values())}
    with torch.no_grad(), _quiet():
        try:
            program: Any = torch.onnx.export(
                _Traced(graph).eval(), tuple(graph.inputs.values()), dynamo=True, input_names=list(graph.inputs),
                output_names=list(graph.outputs), dynamic_shapes=shapes, verbose=False, optimize=False)
            # Folded first, two thirds of the nodes are gone before the slow search for patterns.
            optimizer.fold_constants(program.model)
            optimizer.remove_unused_nodes(program.model)
            program.optimize()
        except Exception as error:  # the exporter raises many kinds
            raise GraphError(f"{file.name} cannot be written: PyTorch does not trace it "
                             f"({in_short(error.__cause__ or error)})") from error
    program.save(file, external_data=apart)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the exporter says of itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _hold(graph: Graph, file: Path, name: str) -> None:
    """Raises GraphError unless onnxruntime and PyTorch agree, at several numbers of rows."""
    session = session_of(file)
    for rows in BATCHES if graph.rows else (1,):
        given = [tensor if tensor.ndim < 2 else tensor[torch.arange(rows) % len(tensor)]
                 for tensor in graph.inputs.values()]
        with torch.no_grad():
            expected = graph.run(*given)
        feed = {key: tensor.numpy() for key, tensor in zip(graph.inputs, given, strict=True)}
        try:
            found = session.run(list(graph.outputs), feed)
        except Exception as error:  # onnxruntime has kinds of its own
            raise GraphError(f"{name} does not run ({rows} rows; {in_short(error)})") from error
        apart = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected, strict=True))
        if not apart <= TOLERANCE:
            raise GraphError(f"{name} and PyTorch differ by {apart:.2g} ({rows} rows), the bound is {TOLERANCE:g}; "
                             "a function that reads its inputs' values in Python cannot be traced")


def session_of(file: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as PyTorch has."""
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _strip(graph: Any) -> None:
    """Removes where in Python each node came from: a tenth of a small model's file, and paths of this machine."""
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _halve(graph: Any, name: str) -> None:
    """Stores weights in float16, each widened by a Cast, which runtimes compute once when they load the graph."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT or math.prod(weight.dims) < SMALLEST:
            continue
        with np.errstate(over="ignore"):
            half = numpy_helper.to_array(weight).astype(np.float16)
        if not np.isfinite(half).all():
            raise UsageError(f"{weight.name} of {name} is too large for float16; choose --dtype fp32")
        casts.append(helper.make_node("Cast", [f"{weight.name}.half"], [weight.name], to=TensorProto.FLOAT))
        weight.CopyFrom(numpy_helper.from_array(half, f"{weight.name}.half"))
    for cast in reversed(casts):
        graph.node.insert(0, cast)
