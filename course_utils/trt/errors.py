"""What can go wrong with TensorRT: one class a cause."""


class TrtError(RuntimeError):
    """Something went wrong in TensorRT; a subclass says what, the message what to do."""


class NoTensorRT(TrtError):
    """The package or NVIDIA's libraries are missing."""


class NoDriver(TrtError):
    """TensorRT is installed and finds no usable NVIDIA driver or GPU."""


class ParseError(TrtError):
    """The ONNX file can't be read, or holds an operator that TensorRT does not know."""


class ProfileError(TrtError):
    """The shapes of a profile do not fit the network."""


class OutOfWorkspace(TrtError):
    """No kernel of a layer got by with the scratch memory that the builder may use."""


class UnsupportedLayer(TrtError):
    """A layer has no kernel in the types and shapes that the file asks for."""


class BuildError(TrtError):
    """The builder gave up for another reason; its own last words are in the message."""


class EngineMismatch(TrtError):
    """The engine file belongs to another TensorRT version or another GPU, or is no engine."""


class OutsideProfile(TrtError):
    """An input has a shape that no profile of the engine covers."""


class RefitError(TrtError):
    """New weights did not fit the engine."""
