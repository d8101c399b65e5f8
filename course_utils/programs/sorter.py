"""The capstone's service, a program for `serving.server`: orders of garments in, classes out, over
HTTP by mosec.

    PORT=8000 COURSE_TOKEN=0123456789abcdef MODEL=model.onnx python sorter.py

    POST /sort  a key of 16 bytes, then n·784 bytes of pixels → n bytes, the class of each garment

MODEL may be empty: then no network runs, and what is left is the price of everything else.
MAX_BATCH (orders) and MAX_WAIT_MS are the batcher's; CAPACITY is how many orders may be inside at
once, and one more is refused with status 429.
"""

import hmac
import os

import numpy as np
import onnxruntime
from mosec import Server, ValidationError, Worker

MEAN, STD = 0.2860, 0.3530  # models.MEAN and models.STD; importing them would import torch
KEY_BYTES = 16


class Sorter(Worker):
    """A worker process of mosec: bytes to images, images to classes, classes to bytes."""

    def __init__(self) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path, cpu = os.environ.get("MODEL"), ["CPUExecutionProvider"]
        self.session = path and onnxruntime.InferenceSession(path, options, providers=cpu)
        if self.session:  # the first call is slow: before the first order, not with it
            self.session.run(None, {"image": np.zeros((8, 1, 28, 28), np.float32)})

    def deserialize(self, body: bytes) -> np.ndarray:
        """An order's images (n, 1, 28, 28), uint8. Raises ValidationError (status 422) for a wrong
        key or a body that is no whole number of images.
        """
        key, pixels = body[:KEY_BYTES], body[KEY_BYTES:]
        if not hmac.compare_digest(key, os.environ["COURSE_TOKEN"].encode()):
            raise ValidationError("wrong key")
        if not pixels or len(pixels) % 784:
            raise ValidationError(f"{len(pixels)} bytes are no whole number of 28 x 28 images")
        return np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28)

    def forward(self, orders: list[np.ndarray]) -> list[np.ndarray]:
        """The classes of each order's images, from one call of the network."""
        sizes, x = [len(order) for order in orders], np.concatenate(orders).astype(np.float32)
        x = (x / 255 - MEAN) / STD
        logits = self.session.run(None, {"image": x})[0] if self.session else x[:, 0, 0, :10]
        return np.split(logits.argmax(1), np.cumsum(sizes)[:-1])

    def serialize(self, classes: np.ndarray) -> bytes:
        """One byte a garment."""
        return classes.astype(np.uint8).tobytes()


if __name__ == "__main__":
    os.environ |= {"MOSEC_PORT": os.environ["PORT"], "MOSEC_ADDRESS": "127.0.0.1"}
    os.environ["MOSEC_LOG_LEVEL"] = "warning"
    os.environ["MOSEC_CAPACITY"] = os.environ.get("CAPACITY", "1024")
    server = Server()
    batch, wait = int(os.environ.get("MAX_BATCH", 16)), int(os.environ.get("MAX_WAIT_MS", 1))
    # mosec takes a wait of 0 for "not set"
    server.append_worker(Sorter, max_batch_size=batch, max_wait_time=max(wait, 1), route="/sort")
    server.run()
