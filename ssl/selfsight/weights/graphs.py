"""Trunks as graphs without Python: ONNX and `torch.export`."""

import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from selfsight.trunks.trunk import Trunk
from selfsight.weights.files import WeightsError

Run = Callable[[Tensor], Tensor]


def onnx(trunk: Trunk, images: Tensor, path: Path) -> tuple[Run, str]:
    """Write an ONNX file for any number of images of this size, and open it with ONNX Runtime.

    Raises:
        WeightsError: a package is not installed.
    """
    if absent := [
        name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None
    ]:
        raise WeightsError(f"to=onnx needs {', '.join(absent)}: uv sync --extra export")
    import onnxruntime

    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of itself
        program = torch.onnx.export(
            trunk,
            (images,),
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("images_in_batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=_bytes(trunk) > 1_900_000_000)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    return run, (
        "import onnxruntime\n"
        'session = onnxruntime.InferenceSession("FILE")\n'
        'features = session.run(None, {"images": images.numpy()})[0]'
    )


def torch_export(trunk: Trunk, images: Tensor, path: Path) -> tuple[Run, str]:
    """Write what `torch.export` makes for any number of images of this size, and load it again."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            trunk, (images,), dynamic_shapes=({0: torch.export.Dim("images_in_batch")},)
        )
        with path.open("wb") as file:
            torch.export.save(program, file)
        with path.open("rb") as file:
            again = torch.export.load(file).module()
    return again, (
        'import torch\nmodel = torch.export.load("FILE").module()\nfeatures = model(images)'
    )


def _bytes(trunk: Trunk) -> int:
    return sum(t.numel() * t.element_size() for t in trunk.state_dict().values())
