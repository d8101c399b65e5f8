"""One ONNX operator at a time, in the reference implementation: the judge of integer arithmetic."""

import numpy as np


def onnx_reference(operator: str, *inputs: np.ndarray | np.generic) -> list[np.ndarray]:
    """The outputs of one ONNX operator (opset 21) in ONNX's own reference implementation, which is
    plain numpy and follows the standard.

    >>> onnx_reference("MatMulInteger", np.array([[3]], np.uint8), np.array([[5]], np.int8))[0]
    array([[15]], dtype=int32)
    """
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    arrays = [np.asarray(a) for a in inputs]
    names = [f"input{i}" for i in range(len(arrays))]
    outputs = ["y", "y_scale", "y_zero_point"] if operator == "DynamicQuantizeLinear" else ["y"]
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    results = [helper.make_tensor_value_info(n, 1, None) for n in outputs]
    graph = helper.make_graph(
        [helper.make_node(operator, names, outputs)], operator, values, results
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
