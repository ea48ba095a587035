"""Writes llava/: a tiny LLaVA as transformers 5 saves it, and llava.safetensors, what it answers.

Run from this folder; needs torch and transformers. Values are rounded to bfloat16 and stored so:
read as float32 they are exact. Every parameter is drawn, biases and norms too, so that none can be
dropped unnoticed. The logits are float32's.
"""

import json
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

HERE = Path(__file__).parent
IMAGE = 63
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def main() -> None:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=14,
        patch_size=4,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        rope_parameters=LLAMA3,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + (1 if "norm" in name and p.ndim == 1 else 0))
            p.copy_(p.bfloat16().float())
    pixels = torch.randint(0, 256, (2, 14, 14, 3), dtype=torch.uint8)
    one = [IMAGE] * 9
    tokens = torch.tensor([[1, 5, *one, 7, 8, *one, 9, 10, 11]])
    with torch.no_grad():
        normal = ((pixels / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)
        logits = model(input_ids=tokens, pixel_values=normal).logits
    folder = HERE / "llava"
    model.save_pretrained(folder)
    state = {
        k: v.bfloat16().contiguous() for k, v in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 14, "width": 14},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"pixels": pixels, "tokens": tokens, "logits": logits}, HERE / "llava.safetensors")


if __name__ == "__main__":
    main()
