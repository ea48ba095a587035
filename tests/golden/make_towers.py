"""Writes siglip.safetensors and clip.safetensors: tiny random towers and what transformers makes of
them. Run from this folder; needs torch and transformers.

Tensors: `weight.<name in the state dict>`, `in.pixels` (uint8 views), `in.ids`, `out.*`.
Every parameter is drawn, biases and norms too, so that none can be dropped unnoticed.
"""

from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipConfig, SiglipModel

HERE = Path(__file__).parent
SIZE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=30,
    patch_size=8,
)
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def draw(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    model.eval()


def normalise(views: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return ((views / 255 - mean) / std).permute(0, 3, 1, 2)


def write(name: str, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    state = {f"weight.{k}": v for k, v in model.state_dict().items() if v.is_floating_point()}
    out = {k: v.detach().contiguous() for k, v in (state | tensors).items()}
    save_file(out, HERE / f"{name}.safetensors")


def siglip(views: torch.Tensor) -> None:
    # The text tower is narrower than the shared space, as in g-opt.
    text = dict(SIZE, hidden_size=12, projection_size=16, vocab_size=40, max_position_embeddings=6)
    for key in ("image_size", "patch_size"):
        del text[key]
    model = SiglipModel(SiglipConfig(vision_config=SIZE, text_config=text))
    draw(model)
    pixels = normalise(views, torch.full((3,), 0.5), torch.full((3,), 0.5))
    ids = torch.randint(0, 40, (3, 6))
    with torch.no_grad():
        model.logit_scale.fill_(1.2)
        model.logit_bias.fill_(-0.7)
        vision = model.vision_model(pixels, output_hidden_states=True)
        full = model(input_ids=ids, pixel_values=pixels)
        text_out = model.text_model(ids).pooler_output
    write(
        "siglip",
        model,
        {
            "in.pixels": views,
            "in.ids": ids,
            "out.hidden_states": torch.stack(vision.hidden_states),
            "out.last_hidden_state": vision.last_hidden_state,
            "out.pooled": vision.pooler_output,
            "out.text": text_out,
            "out.scores": torch.sigmoid(full.logits_per_image),
        },
    )


def clip(views: torch.Tensor) -> None:
    model = CLIPVisionModel(CLIPVisionConfig(**SIZE, hidden_act="quick_gelu"))
    draw(model)
    with torch.no_grad():
        out = model(normalise(views, CLIP_MEAN, CLIP_STD), output_hidden_states=True)
        inner = getattr(model, "vision_model", model)
        normed = inner.post_layernorm(out.hidden_states[-1])
    write(
        "clip",
        model,
        {
            "in.pixels": views,
            "out.hidden_states": torch.stack(out.hidden_states),
            "out.normed": normed,
        },
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (2, 30, 30, 3), dtype=torch.uint8)
    siglip(pixels)
    clip(pixels)
