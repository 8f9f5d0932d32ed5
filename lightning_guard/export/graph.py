"""ONNX graphs: from a traced program, and to whole numbers."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from lightning_guard.export.tracing import OUTPUT, ExportError, Signature, needs, quiet

Linear = Literal["static", "dynamic"]
SIGNATURE = "lightning_guard.signature"  # key in the file's metadata

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = ("Gemm", "MatMul")
_PASSING = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Add")
_NARROW = 4  # input channels below which onnxruntime's int8 convolution is slower than its float one


def to_onnx(program: Any, signature: Signature) -> tuple[Any, dict[str, str]]:
    """The program as an ONNX model, and the graph's name for the input of each layer.

    Nothing but the graph stays in the model: the exporter would leave shapes that break quantisation, and the paths
    of source files.

    Raises:
        ExportError: if an operator has no translation.
    """
    needs("onnx", "onnxscript", "onnxruntime")
    try:
        with quiet():
            made = torch.onnx.export(
                program, dynamo=True, input_names=signature.names, output_names=[OUTPUT], external_data=False,
                verbose=False
            )  # fmt: skip
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(
            f"ONNX has no form for this module: {(lines or [type(error).__name__])[-1][:300]}; use format='torch'"
        ) from error
    assert made is not None  # only without dynamo
    model: Any = made.model_proto
    layers = dict(_layers(model))
    graph = model.graph
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = SIGNATURE, signature.text()
    return model, layers


def _layers(model: Any) -> Iterator[tuple[str, str]]:
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        names = [name.strip(" '\"") for name in scopes.strip("[]").split(",")]
        if node.op_type in (*_CONVOLUTIONS, *_PRODUCTS) and len(names) > 1:
            # A convolution into which a normalisation is folded stands under that one's name; its weight does not.
            own = node.input[1].removesuffix(".weight") if node.input[1].endswith(".weight") else names[-2]
            yield own.removeprefix("module").lstrip("."), node.input[0]


def to_int8(
    model: Any,
    layers: Mapping[str, str],
    batches: Iterable[Mapping[str, np.ndarray]],
    linear: Linear = "static",
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Any:
    """The model with int8 weights and uint8 activations, quantised by onnxruntime.

    Weights are symmetric per output channel, so zeros stay zero and weights on such a grid stay as they are.
    Activations have one scale and zero point a tensor.

    Args:
        model: in float32, as :func:`to_onnx` made it.
        layers: the graph's name for the input of each layer.
        batches: what ranges of activations are read from.
        linear: ranges of the inputs of linear layers: ``"static"``, read from ``batches``, or ``"dynamic"``, taken
            from each batch as it comes.
        ranges: fixed ranges ``(low, high)`` of the input of a layer, by its name, or of a tensor of the graph.

    Raises:
        ExportError: if ``ranges`` name nothing, or there is nothing to quantise.
    """
    needs("onnx", "onnxruntime")
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Any:
            return next(self.rest, None)

    convolutions, products = chosen(model)
    if not convolutions and not products:
        raise ExportError("the graph has no convolution or linear layer to quantise; use format='onnx'")
    static = convolutions + (products if linear == "static" else [])
    fixed = _fixed(model, layers, ranges or {})
    weights = {"WeightSymmetric": True, "MatMulConstBOnly": True}
    with TemporaryDirectory() as folder, quiet():
        path = f"{folder}/int8.onnx"
        if static:
            quantize_static(
                model, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, nodes_to_quantize=static,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                extra_options={
                    **weights, "ActivationSymmetric": False, "TensorQuantOverrides": fixed,
                    # Between a product and the bias behind it nothing is gained by rounding.
                    "OpTypesToExcludeOutputQuantization": ["MatMul"],
                },
            )  # fmt: skip
            model = _read(path)
            _unround_output(model)
        if linear == "dynamic" and products:
            quantize_dynamic(
                model, path, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=list(_PRODUCTS),
                extra_options=weights,  # not by name: a Gemm is first made a MatMul of another name
            )  # fmt: skip
            model = _read(path)
    del model.graph.value_info[:]
    return model


def chosen(model: Any) -> tuple[list[str], list[str]]:
    """Names of the nodes that are quantised: convolutions with what may follow them, and products with weights.

    What onnxruntime runs slower in int8 stays in float: attention's products and softmax, normalisations, additions
    and poolings that are not among convolutions, and a convolution of fewer than four input channels whose output
    goes on in float.
    """
    constants = {one.name: list(one.dims) for one in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    convolutions: list[str] = []
    products: list[str] = []
    inside: set[str] = set()
    biased: set[str] = set()

    def weight_of(node: Any) -> list[int] | None:
        return constants.get(node.input[1]) if len(node.input) > 1 else None

    def goes_on(name: str) -> bool:
        """Whether this output is read in int8: by convolutions and residual additions, activations between."""

        def takes(node: Any) -> bool:
            if node.op_type in ("Add", "Concat"):
                return not any(name in constants for name in node.input)
            return node.op_type in _CONVOLUTIONS or (node.op_type in _PASSING and goes_on(node.output[0]))

        return bool(readers.get(name)) and all(map(takes, readers[name]))

    for node in model.graph.node:
        weight = weight_of(node)
        if node.op_type in _CONVOLUTIONS and weight is not None:
            inside.update(node.output)
            groups = next((a.i for a in node.attribute if a.name == "group"), 1)
            channels = weight[1] if node.op_type == "Conv" else weight[0]
            if groups == 1 and channels < _NARROW and not goes_on(node.output[0]):
                continue
            convolutions.append(node.name)
        elif node.op_type in _PRODUCTS and weight is not None and len(weight) == 2:
            products.append(node.name)
            biased.update(node.output if node.op_type == "Gemm" else ())
        elif node.op_type in ("Relu", "Clip") and node.input[0] in biased:
            products.append(node.name)  # one with the product in front of it
        elif node.op_type in _PASSING and all(name in inside for name in node.input if name not in constants):
            if any(name in constants for name in node.input) and node.op_type in ("Add", "Concat"):
                continue
            inside.update(node.output)
            convolutions.append(node.name)
    heavy = {node.name for node in model.graph.node if node.op_type in _CONVOLUTIONS}
    return (convolutions if heavy & set(convolutions) else []), products


def _fixed(
    model: Any, layers: Mapping[str, str], ranges: Mapping[str, tuple[float, float]]
) -> dict[str, list[dict[str, Any]]]:
    tensors = {name for node in model.graph.node for name in (*node.input, *node.output)}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (low, high) in ranges.items():
        if name not in layers and name not in tensors:
            known = ", ".join(layers) or "none"
            raise ExportError(f"ranges: there is no convolution or linear layer {name!r}; there are {known}")
        found[layers.get(name, name)] = [{"rmin": np.float32(low), "rmax": np.float32(high)}]
    return found


def _unround_output(model: Any) -> None:
    """Take away the rounding of the logits: their last digits cost nothing."""
    made = {name: node for node in model.graph.node for name in node.output}

    def maker(node: Any, kind: str) -> Any:
        return made.get(node.input[0]) if node is not None and node.op_type == kind else None

    for output in model.graph.output:
        last = made.get(output.name)
        before = maker(last, "DequantizeLinear")
        source = maker(before, "QuantizeLinear")
        if source is None:
            continue
        rounded, raw = before.output[0], before.input[0]
        if (
            sum(rounded in node.input for node in model.graph.node)
            == sum(raw in node.input for node in model.graph.node)
            == 1
        ):
            source.output[list(source.output).index(raw)] = output.name
            model.graph.node.remove(last)
            model.graph.node.remove(before)


def _read(path: str) -> Any:
    import onnx

    return onnx.load_from_string(Path(path).read_bytes())
