"""XTuner's three layouts, and adapters that PEFT itself wrote: what transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from checkpoints import read, rename  # noqa: E402
from llava_exports import RANK, adapters, write_adapters  # noqa: E402
from padded_rows import two_rows  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_tokenizers import LLAMA3_TEMPLATE, byte_level, write_folder  # noqa: E402

import mlxvlm  # noqa: E402
from mlxvlm.data.buckets import collate, group  # noqa: E402
from mlxvlm.train.losses import batch_loss, count  # noqa: E402

pytestmark = pytest.mark.parity

SIDE, ROWS = 32, 9 * 64
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
NAMES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
VIT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": SIDE},
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_center_crop": True,
}
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def draw(model: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (1 if "norm" in name and p.ndim == 1 else 0))


def merge(module: Any, pairs: dict[str, mx.array], scale: float) -> None:
    """Adds adapters to torch's weights, as PEFT's merge_and_unload does."""
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for name, a in pairs.items():
            if ".lora_A." in name:
                b = pairs[name.replace(".lora_A.", ".lora_B.")]
                key = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
                weights[key] += scale * torch.tensor(np.array(b)) @ torch.tensor(np.array(a))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A LLaVA of transformers with adapters merged, and a folder in each of the layouts."""
    place = tmp_path_factory.mktemp("xtuner")
    backend = byte_level()
    rows = backend.get_vocab_size()
    text = transformers.LlamaConfig(**LLAMA, vocab_size=rows, tie_word_embeddings=False)
    text.bos_token_id, text.eos_token_id = (backend.token_to_id(t) for t in NAMES.values())
    llama = transformers.LlamaForCausalLM(text).eval()
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)).eval()
    layers = [torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)]
    projector = torch.nn.Sequential(*layers)
    for module in (llama, clip, projector):
        draw(module)
    settings = {**NAMES, "chat_template": LLAMA3_TEMPLATE}
    for module, name in ((llama, "llama"), (clip, "clip")):
        module.save_pretrained(place / name)
    write_folder(place / "llama", backend, tokenizer_config=settings)
    (place / "clip" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    own = place / "own"
    for name, part, targets in (("llm", llama, None), ("visual_encoder", clip, VIT)):
        stored = read(place / ("llama" if part is llama else "clip"))[1]
        # PEFT names modules, which since transformers 5 are not called as the files' tensors are.
        known = {n for n, _ in part.named_parameters()}
        stored = {n: v for n, v in rename(stored, "vision_model.", _stem(known)).items()}
        more = {"targets": targets} if targets else {}
        pairs = adapters(stored, 3, **more)
        base = str(place / ("llama" if part is llama else "clip"))
        config = {"target_modules": list(targets)} if targets else {}
        write_adapters(own / f"{name}_adapter", base, pairs, **config)
        merge(part, pairs, 6 / RANK)
    made = {"model_type": "projector", "visual_hidden_size": 32, "llm_hidden_size": 64, "depth": 2}
    (own / "projector").mkdir(parents=True)
    (own / "projector" / "config.json").write_text(json.dumps(made))
    state = {f"model.{n}": mx.array(v.numpy()) for n, v in projector.state_dict().items()}
    mx.save_safetensors(str(own / "projector" / "model.safetensors"), state, {"format": "pt"})
    # As XTuner's converter: <image> and <pad> are added, the table grows to a multiple of 64.
    backend.add_special_tokens(["<pad>"])
    image = backend.token_to_id("<image>")
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=clip.config,
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    load_into(model, llama, clip, projector)
    model.resize_token_embeddings(ROWS)
    model.save_pretrained(place / "transformers")
    write_folder(
        place / "transformers",
        backend,
        tokenizer_config={**settings, "pad_token": "<pad>"},
        preprocessor_config=PROCESSOR,
    )
    official(place / "official", llama, clip, state, place)
    write_folder(place / "official", byte_level(), tokenizer_config=settings)
    return place, model, image


def _stem(known: set[str]) -> str:
    return "vision_model." if any(name.startswith("vision_model.") for name in known) else ""


def load_into(model: Any, llama: Any, clip: Any, projector: Any) -> None:
    wanted = model.state_dict()
    ours: dict[str, Any] = {}
    for name, value in llama.state_dict().items():
        ours[name if name.startswith("lm_head") else f"model.language_{name}"] = value
    for name, value in clip.state_dict().items():
        ours["model.vision_tower." + name] = value
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        for leaf in ("weight", "bias"):
            stem = f"model.multi_modal_projector.{name}.{leaf}"
            ours[stem] = projector.state_dict()[f"{number}.{leaf}"]
    renamed = {n.replace("language_model.", "language_model.", 1): v for n, v in ours.items()}
    assert renamed.keys() == wanted.keys(), renamed.keys() ^ wanted.keys()
    model.load_state_dict(renamed)


def official(folder: Path, llama: Any, clip: Any, state: Any, place: Path) -> None:
    tensors = {n: mx.array(v.numpy()) for n, v in llama.state_dict().items()}
    tensors |= rename(state, "model.", "model.mm_projector.")
    stem = "model.vision_tower.vision_tower.vision_model."
    for name, value in clip.state_dict().items():
        tensors[stem + name.removeprefix("vision_model.")] = mx.array(value.numpy())
    raw = json.loads((place / "llama" / "config.json").read_text())
    raw |= {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(place / "clip"),
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.mark.parametrize("layout", ["own", "official", "transformers"])
def test_ids_pixels_logits_and_greedy_text(run: Any, layout: str) -> None:
    """A processor that pads, as XTuner's own code does and CLIP's does not."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    place, model, image = run
    vlm = mlxvlm.load(place / layout)
    assert vlm.config.prompt.layout == "llama-3" and vlm.config.tiling.resize == "pad"
    shown = picture((50, 31), 1)
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True
    )
    pixels = processor(shown, return_tensors="pt")["pixel_values"]
    ours = vlm.encoder.normalise([vlm.look([shown])[0].views[0]])
    assert np.abs(np.array(ours).transpose(0, 3, 1, 2) - pixels.numpy()).max() < 1e-5
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(place / "transformers")
    messages = [{"role": "user", "content": "<image>" * 16 + "\nWhat is this?"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = vlm.tokenize([{"role": "user", "content": "What is this?"}], [shown])
    token = vlm.config.prompt.image_token_id
    assert np.where(prompt.tokens == token, image, prompt.tokens).tolist() == ids
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
    with torch.no_grad():
        wanted = model(**inputs).logits.numpy()
    found = np.array(vlm(prompt.tokens, prompt.pictures))
    rows = min(found.shape[-1], wanted.shape[-1])
    assert np.abs(wanted).max() > 1
    assert np.abs(found[..., :rows] - wanted[..., :rows]).max() < 1e-4
    first = vlm.tokenizer.vocab_size if layout != "transformers" else image
    said = model.generate(
        **inputs,
        max_new_tokens=32,
        do_sample=False,
        suppress_tokens=sorted({image, *range(min(first, found.shape[-1]), ROWS)}),
        eos_token_id=sorted(vlm.tokenizer.eos_token_ids),
        pad_token_id=0,
    )[0, len(ids) :].tolist()
    reply = vlm.generate([{"role": "user", "content": "What is this?"}], [shown], max_tokens=32)
    assert reply.tokens == said and len(set(said)) > 3


def test_loss_of_a_training_batch(run: Any) -> None:
    place, model, image = run
    vlm = mlxvlm.load(place / "transformers")
    looked = vlm.look([picture((50, 31), 1), picture((20, 60), 2)])
    rows, padded = two_rows(vlm, looked)
    pixels = np.array(vlm.encoder.pixels(looked)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        out = model(
            **{name: torch.tensor(values) for name, values in padded.items()},
            pixel_values=torch.tensor(pixels),
        )
    batch = collate(group(rows, 0), 8)
    views = mx.concatenate([f.array for f in vlm.features(looked)])
    _, parts = batch_loss(vlm, batch, views, {}, count([batch]), True)
    assert parts["loss"].item() == pytest.approx(out.loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 20, "layers.0.mlp": 1}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": r".*language_model.*\.(q_proj|up_proj)"},
    ],
)
def test_adapters_that_peft_wrote(run: Any, more: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    place, _, image = run
    folder = place / "transformers"
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "up_proj"], **more}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape) / 3)
    tuned.save_pretrained(tmp_path / "adapter")
    rows = np.array([[1, 2, *[image] * 16, 5, 6, 7]])
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), np.float32)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(rows), "pixel_values": torch.tensor(pixels)}
        plain = mlxvlm.load(folder)
        wanted = tuned.eval()(**inputs).logits.numpy()
    vlm = mlxvlm.load(folder, adapter=tmp_path / "adapter")
    shown = [mlxvlm.Picture([pixels[0].transpose(1, 2, 0)])]
    found = np.array(vlm(rows, shown))
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 1e-4 * max(1, scale)
    assert np.abs(np.array(plain(rows, shown)) - wanted).max() > 0.01 * scale
