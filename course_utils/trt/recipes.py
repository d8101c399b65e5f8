"""What circulates as TensorRT code, and what became of each line."""

from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Recipe:
    """A line of an old tutorial, the name it rests on, and the name that took its place.

    >>> Recipe("builder.max_batch_size = 64", "Builder.max_batch_size", "a profile's set_shape").old
    'Builder.max_batch_size'
    """

    line: str
    old: str
    new: str
    how: str = ""

    def today(self, tensorrt: ModuleType) -> str:
        """What this line does with the TensorRT that is installed."""
        found = tensorrt
        try:
            for part in self.old.split("."):
                found = getattr(found, part)
        except AttributeError as error:
            return f"AttributeError: {error}"
        return "still there, deprecated"


RECIPES = (
    Recipe("builder.build_engine(…)", "Builder.build_engine", "Builder.build_serialized_network"),
    Recipe(
        "builder.build_cuda_engine(…)",
        "Builder.build_cuda_engine",
        "Runtime.deserialize_cuda_engine",
    ),
    Recipe(
        "1 << int(…EXPLICIT_BATCH)",
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
        "Builder.create_network",
        "it is always so",
    ),
    Recipe(
        "builder.max_batch_size = 64", "Builder.max_batch_size", "IOptimizationProfile.set_shape"
    ),
    Recipe(
        "config.max_workspace_size = 1 << 30",
        "IBuilderConfig.max_workspace_size",
        "IBuilderConfig.set_memory_pool_limit",
    ),
    Recipe(
        "config.set_flag(BuilderFlag.FP16)",
        "BuilderFlag.FP16",
        "INetworkDefinition.add_cast",
        "types in the file",
    ),
    Recipe(
        "config.set_flag(BuilderFlag.INT8)",
        "BuilderFlag.INT8",
        "INetworkDefinition.add_quantize",
        "pairs in the file",
    ),
    Recipe(
        "class C(IInt8EntropyCalibrator2)",
        "IInt8EntropyCalibrator2",
        "INetworkDefinition.add_dequantize",
        "pairs in the file",
    ),
    Recipe(
        "engine.get_binding_index(name)",
        "ICudaEngine.get_binding_index",
        "ICudaEngine.get_tensor_name",
    ),
    Recipe(
        "context.set_binding_shape(0, shape)",
        "IExecutionContext.set_binding_shape",
        "IExecutionContext.set_input_shape",
    ),
    Recipe(
        "context.execute_async_v2(bindings, …)",
        "IExecutionContext.execute_async_v2",
        "IExecutionContext.execute_async_v3",
        "after set_tensor_address",
    ),
)
"""Old lines by what they rest on; names as in TensorRT's Python module."""
