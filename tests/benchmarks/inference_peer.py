"""mlx-vlm and transformers behind the inference benchmark's gate: python inference_peer.py SUBJECT
TASK

Run by the interpreter of an environment that has both; nothing of ours is imported but the gate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from inference_gate import Turn, serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", type=Path)
    parser.add_argument("task", choices=("pictures", "tower"))
    args = parser.parse_args()
    sizes = SimpleNamespace(**json.loads((args.subject / "shape.json").read_text()))
    serve({"pictures": pictures, "tower": tower}[args.task](args.subject, sizes))


def pictures(subject: Path, sizes: Any) -> dict[str, Turn]:
    """mlx-vlm's image processor of SigLIP models (llava_bunny's) and transformers' SigLIP one."""
    from mlx_vlm.models.llava_bunny.llava_bunny import (  # pyright: ignore[reportMissingImports]
        ImageProcessor,
    )
    from mlx_vlm.utils import load_image  # pyright: ignore[reportMissingImports]
    from PIL import Image
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    size = sizes.image_size
    files = [str(path) for path in sorted((subject / "pictures").iterdir())]
    theirs = ImageProcessor(size=(size, size))
    hub = SiglipImageProcessorPil(size={"height": size, "width": size})

    def mlx_vlm() -> dict[str, Any]:
        pixels = mx.array(np.stack(theirs.preprocess([load_image(file) for file in files])))
        mx.eval(pixels)
        return _keep(subject / "pixels-mlx-vlm.npy", pixels)

    def transformers() -> dict[str, Any]:
        opened = [Image.open(file) for file in files]
        pixels = mx.array(hub(images=opened, return_tensors="np")["pixel_values"])
        mx.eval(pixels)
        return _keep(subject / "pixels-transformers.npy", pixels)

    return {"mlx-vlm": mlx_vlm, "transformers": transformers}


def tower(subject: Path, sizes: Any) -> dict[str, Turn]:
    """gemma3's, which is mlx-vlm's SigLIP with SigLIP's own activation."""
    from mlx_vlm.models.gemma3.config import (  # pyright: ignore[reportMissingImports]
        VisionConfig,
    )
    from mlx_vlm.models.gemma3.vision import (  # pyright: ignore[reportMissingImports]
        VisionModel,
    )

    model = VisionModel(
        VisionConfig(
            model_type="siglip_vision_model",
            num_hidden_layers=sizes.tower_layers,
            hidden_size=sizes.tower_width,
            intermediate_size=sizes.tower_ffn,
            num_attention_heads=sizes.tower_heads,
            patch_size=sizes.patch_size,
            image_size=sizes.image_size,
        )
    )
    model.vision_model.load_weights(str(subject / "tower" / "model.safetensors"))
    mx.eval(model.parameters())
    view = np.load(subject / "view.npy")
    pixels = mx.array(view[None].astype(np.float32) / 127.5 - 1)
    mx.eval(pixels)

    def run() -> dict[str, Any]:
        features = model(pixels)[0]
        mx.eval(features)
        return _keep(subject / "features-mlx-vlm.npy", features)

    return {"mlx-vlm": run}


def _keep(path: Path, array: mx.array) -> dict[str, Any]:
    if not path.exists():
        np.save(path, np.array(array))
    return {}


if __name__ == "__main__":
    main()
