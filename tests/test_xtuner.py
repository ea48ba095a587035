"""XTuner's three layouts hold one model; and what its own folder leaves out is found, never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import Tensors, read, rename, write
from llava_exports import adapters, merged, parts, write_adapters
from mlx.utils import tree_flatten
from tiny_tokenizers import LLAMA3_TEMPLATE, byte_level, write_folder
from tiny_vlm import picture
from typer.testing import CliRunner

from mlxvlm.cli.main import app
from mlxvlm.errors import ConfigError, WeightsError
from mlxvlm.images.preprocess import crop, pad
from mlxvlm.weights.families.towers import CLIP_MEAN
from mlxvlm.weights.load import load, load_encoder, load_projected, outline

WIDTH, LAYERS = 32, 2
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 4,
}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 14},
    "crop_size": {"height": 14, "width": 14},
    "do_center_crop": True,
}
VIT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
# As `xtuner convert` dumps it: settings, then the model that they make.
SETTINGS = """
llm_name_or_path = '{language}'
visual_encoder_name_or_path = '{vision}'
image_processor = dict(
    pretrained_model_name_or_path='other', type='transformers.CLIPImageProcessor.from_pretrained')
model = dict(
    freeze_llm=True,
    llm=dict(pretrained_model_name_or_path='{language}', type='...from_pretrained'),
    visual_encoder=dict(pretrained_model_name_or_path='{vision}', type='...from_pretrained'),
    visual_select_layer=-2,
    type='xtuner.model.LLaVAModel')
raise SystemExit('this file was run')
"""


def clip_tower(seed: int = 3) -> Tensors:
    """A random CLIP tower, as the hub's files have it."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32) / 4)

    stem = "vision_model."
    out = {
        f"{stem}embeddings.class_embedding": draw(WIDTH),
        f"{stem}embeddings.patch_embedding.weight": draw(WIDTH, 3, 4, 4),
        f"{stem}embeddings.position_embedding.weight": draw(10, WIDTH),
        f"{stem}embeddings.position_ids": mx.arange(10)[None],
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    linears: dict[str, tuple[int, int]] = {}
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linears[f"{layer}self_attn.{name}"] = (WIDTH, WIDTH)
        linears |= {f"{layer}mlp.fc1": (40, WIDTH), f"{layer}mlp.fc2": (WIDTH, 40)}
    for name in norms:
        out |= {f"{stem}{name}.weight": 1 + draw(WIDTH), f"{stem}{name}.bias": draw(WIDTH)}
    for name, shape in linears.items():
        out |= {f"{stem}{name}.weight": draw(*shape), f"{stem}{name}.bias": draw(shape[0])}
    return out


class Run:
    """The parts of a run under Llama-3's tokens, on disk as the hub has them, and what it trained:
    pairs for the language model and for the tower, a projector."""

    def __init__(self, place: Path):
        self.place = place
        raw, projector = parts(place)
        self.projector = rename(projector, "model.mm_projector.", "model.")
        self.language = read(place / "language")[1]
        self.text = {k: v for k, v in raw.items() if not k.startswith(("mm_", "image_"))}
        for name in ("tune_mm_mlp_adapter", "tokenizer_model_max_length", "_name_or_path"):
            del self.text[name]
        self.text |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        self.write_language(place / "llama", self.language)
        self.tower = clip_tower()
        self.write_tower(place / "clip", self.tower)
        self.pairs = adapters(self.language, 5)
        self.tower_pairs = adapters(self.tower, 6, VIT_TARGETS)

    def write_language(self, folder: Path, tensors: Tensors) -> None:
        settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        settings["chat_template"] = LLAMA3_TEMPLATE
        write_folder(folder, byte_level(), config=self.text, tokenizer_config=settings)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})

    def write_tower(self, folder: Path, tensors: Tensors) -> None:
        write(folder, CLIP, tensors, preprocessor_config=CLIP_PROCESSOR)
        (folder / "tokenizer.json").unlink()

    def own(self, language: str, vision: str) -> Path:
        """XTuner's folder; language, vision: "here", "llm" (of the first), "adapter", "frozen"."""
        folder = self.place / f"xtuner-{language}-{vision}"
        if folder.exists():
            return folder
        base, eyes = str(self.place / "llama"), str(self.place / "clip")
        folder.mkdir()
        (folder / "xtuner_config.py").write_text(SETTINGS.format(language=base, vision=eyes))
        if language in ("here", "llm"):
            whole = merged(self.language, self.pairs)
            self.write_language(folder / ("llm" if language == "llm" else "."), whole)
        elif language == "adapter":
            write_adapters(folder / "llm_adapter", base, self.pairs)
        if vision == "here":
            whole = merged(self.tower, self.tower_pairs)
            self.write_tower(folder / "visual_encoder", whole)
        elif vision == "adapter":
            targets = list(VIT_TARGETS)
            pairs = self.tower_pairs
            write_adapters(folder / "visual_encoder_adapter", eyes, pairs, target_modules=targets)
        made = {"model_type": "projector", "visual_hidden_size": WIDTH, "llm_hidden_size": 32}
        made |= {"depth": 2, "hidden_act": "gelu", "bias": True}
        (folder / "projector").mkdir()
        (folder / "projector" / "config.json").write_text(json.dumps(made))
        (folder / "projector" / "modeling_projector.py").write_text("raise SystemExit('run')")
        file = folder / "projector" / "model.safetensors"
        mx.save_safetensors(str(file), self.projector, {"format": "pt"})
        return folder

    def wanted(self, language: str, vision: str) -> tuple[Tensors, Tensors]:
        """The two parts' tensors in such a folder."""
        one = self.language if language == "frozen" else merged(self.language, self.pairs)
        other = self.tower if vision == "frozen" else merged(self.tower, self.tower_pairs)
        return one, other

    def official(self) -> Path:
        """The "official" LLaVA layout, of a run that trained everything."""
        language, tower = self.wanted("here", "here")
        config = {
            **self.text,
            "model_type": "llava",
            "architectures": ["LlavaLlamaForCausalLM"],
            "image_aspect_ratio": "pad",
            "mm_hidden_size": WIDTH,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": str(self.place / "clip"),
            "unfreeze_mm_vision_tower": True,
            "use_mm_proj": True,
        }
        tensors = language | rename(self.projector, "model.", "model.mm_projector.")
        tensors |= rename(tower, "vision_model.", "model.vision_tower.vision_tower.vision_model.")
        folder = self.place / "official"
        self.write_language(folder, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PROCESSOR))
        return folder

    def transformers(self) -> Path:
        """The Hugging Face layout: <image> and <pad> are added, and the table is padded to 64."""
        language, tower = self.wanted("here", "here")
        backend = byte_level()
        backend.add_special_tokens(["<pad>"])
        image, rows = backend.token_to_id("<image>"), 9 * 64
        config = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": image,
            "ignore_index": -100,
            "projector_hidden_act": "gelu",
            "pad_token_id": backend.token_to_id("<pad>"),
            "text_config": {**self.text, "vocab_size": rows},
            "vision_config": {**CLIP, "projection_dim": 8, "vocab_size": 32000},
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            more = mx.full((rows - len(language[name]), 32), 0.5)
            language[name] = mx.concatenate([language[name], more])
        tensors = {f"language_model.{n}": v for n, v in language.items()}
        tensors |= {f"vision_tower.{n}": v for n, v in tower.items()}
        for number, name in (("0", "linear_1"), ("2", "linear_2")):
            new = f"multi_modal_projector.{name}."
            tensors |= {
                n.replace(f"model.{number}.", new): v
                for n, v in self.projector.items()
                if n.startswith(f"model.{number}.")
            }
        settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        settings["chat_template"] = LLAMA3_TEMPLATE
        folder = self.place / "transformers"
        write_folder(
            folder,
            backend,
            config=config,
            tokenizer_config=settings,
            preprocessor_config=CLIP_PROCESSOR,
        )
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
        return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("xtuner"))


def parameters(vlm: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(vlm.parameters()))


def question(vlm: Any, image: Any) -> Any:
    return vlm.tokenize([{"role": "user", "content": "What is this?"}], [image])


@pytest.mark.parametrize(
    ("language", "vision"),
    [
        ("here", "adapter"),  # as LLaVA-Llama-3-8B
        ("llm", "here"),
        ("adapter", "frozen"),  # as one GPU's
        ("adapter", "adapter"),
        ("frozen", "frozen"),  # as a first stage
    ],
)
def test_its_own_folder(run: Run, language: str, vision: str) -> None:
    folder = run.own(language, vision)
    vlm = load(folder)
    found = parameters(vlm)
    text, tower = run.wanted(language, vision)
    wanted = {f"language.{name}": value for name, value in text.items()}
    for name, value in tower.items():
        name = "vision." + name.removeprefix("vision_model.")
        unused = (
            "vision.post_layernorm",
            "vision.encoder.layers.1",
            "vision.embeddings.position_i",
        )
        if not name.startswith(unused):
            patches = name.endswith("patch_embedding.weight")
            wanted[name] = value.transpose(0, 2, 3, 1) if patches else value
    for name, value in run.projector.items():
        name = name.replace("model.0", "linear_1").replace("model.2", "linear_2")
        wanted[f"projector.{name}"] = value
    assert found.keys() == wanted.keys()
    assert max(mx.abs(found[name] - wanted[name]).max().item() for name in found) < 1e-5
    config = vlm.config
    assert config.prompt.layout == "llama-3" and config.tiling.resize == "pad"
    assert config.tiling.background == (122, 116, 104) and config.vision.image_mean == CLIP_MEAN
    assert (config.vision.vision_feature_layer, config.tokens_per_view) == (-2, 9)
    assert load_encoder(folder).identity() == vlm.encoder.identity()
    assert load_projected(folder).identity() == vlm.projected_encoder.identity()
    shapes = {name: value.shape for name, value in parameters(outline(folder)[0]).items()}
    assert shapes == {name: value.shape for name, value in found.items()}


def test_three_layouts_are_one_model(run: Run) -> None:
    image = picture(4)[:30]
    ids, logits = [], []
    for folder in (run.own("here", "here"), run.official(), run.transformers()):
        vlm = load(folder)
        assert vlm.config.prompt.layout == "llama-3" and vlm.config.tiling.resize == "pad"
        prompt = question(vlm, image)
        token = vlm.config.prompt.image_token_id
        places = prompt.tokens == token
        assert places.sum() == 9
        ids.append(np.where(places, -200, prompt.tokens).tolist())
        logits.append(np.array(vlm(prompt.tokens[None], prompt.pictures))[0, -1, :512])
    assert ids[0] == ids[1] == ids[2]
    for other in logits[1:]:
        np.testing.assert_allclose(other, logits[0], atol=1e-4)
    # XTuner's llama3_chat, with <image> and a new line before the question.
    text = vlm.tokenizer.decode([i if i >= 0 else token for i in ids[0]], skip_special=False)
    head = "<|start_header_id|>user<|end_header_id|>\n\n"
    end = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    asked = "<image>" * 9 + "\nWhat is this?"
    assert text == f"<|begin_of_text|>{head}{asked}{end}"


def test_pictures_are_padded_or_as_transformers_file_says(run: Run) -> None:
    """The processor's file crops, which none of them was trained with; a flag goes by the file."""
    from PIL import Image

    folder = run.place / "transformers"
    folder = folder if folder.exists() else run.transformers()
    image = Image.fromarray(picture(5)[:25])
    (padded,) = load(folder).look([image])
    assert (padded.views[0] == pad(image, 14, "bicubic", (122, 116, 104))).all()
    (cropped,) = load(folder, resize="crop").look([image])
    assert (cropped.views[0] == crop(image, 14, "bicubic")).all()
    assert (padded.views[0] != cropped.views[0]).any()
    # A file that speaks of padding is believed.
    for told, resize in ((False, "crop"), (True, "pad")):
        other = run.place / f"told-{told}"
        shutil.copytree(folder, other)
        raw = {**CLIP_PROCESSOR, "do_pad": told}
        (other / "preprocessor_config.json").write_text(json.dumps(raw))
        assert load(other).config.tiling.resize == resize
    said = command("convert", "-m", folder, "--resize", "crop", "--out", run.place / "cropped")
    assert "Saved" in said and load(run.place / "cropped").config.tiling.resize == "crop"


def command(*args: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done.output


def test_commands(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    folder = tmp_path / "x"
    shutil.copytree(run.own("adapter", "frozen"), folder)
    words = [tmp_path / "a.png", "-p", "What is this?", "--max-tokens", 4]
    plain = command("chat", "-m", folder, *words)
    command("fuse", "-m", folder, "--out", tmp_path / "fused")
    command("convert", "-m", folder, "--out", tmp_path / "converted")
    ours, theirs = (parameters(load(tmp_path / name)) for name in ("fused", "converted"))
    assert all(mx.array_equal(ours[name], theirs[name]).item() for name in ours)
    assert command("chat", "-m", tmp_path / "fused", *words) == plain
    # Without the settings there is nothing that names the tower.
    (folder / "xtuner_config.py").unlink()
    said = command("chat", "-m", folder, *words, code=1)
    assert "does not say which one it belongs to" in said and "--vision" in said
    flags = ["--vision", run.place / "clip"]
    assert command("chat", "-m", folder, *flags, *words) == plain
    flags += ["--language", run.place / "llama"]
    assert command("chat", "-m", folder, *flags, *words) == plain


def test_merged_tokens_are_neighbours_column_after_column(run: Run, tmp_path: Path) -> None:
    """token_merge_ratio 4, by the reshapes of XTuner's own _merge_tokens; 9 has no place here."""
    folder = tmp_path / "x"
    shutil.copytree(run.own("adapter", "frozen"), folder)
    eyes = tmp_path / "eyes"
    config, tensors = read(run.place / "clip")
    tensors["vision_model.embeddings.position_embedding.weight"] = mx.random.normal((17, WIDTH))
    write(eyes, {**config, "image_size": 16}, tensors)
    raw = json.loads((folder / "projector" / "config.json").read_text())
    raw["visual_hidden_size"] = 4 * WIDTH
    (folder / "projector" / "config.json").write_text(json.dumps(raw))
    weight = np.random.default_rng(0).standard_normal((32, 4 * WIDTH), np.float32) / 8
    projector = {**run.projector, "model.0.weight": mx.array(weight)}
    file = folder / "projector" / "model.safetensors"
    mx.save_safetensors(str(file), projector, {"format": "pt"})
    vlm = load(folder, vision=str(eyes))
    assert vlm.config.tokens_per_view == 4
    x = np.random.default_rng(1).standard_normal((1, 16, WIDTH)).astype(np.float32)
    b, n, c = x.shape
    tokens = x.reshape(b, 4, 2, 2 * c).transpose(0, 2, 1, 3).reshape(b, 2, 2, 4 * c)
    pooled = np.array(vlm.projector.pool(mx.array(x)))
    np.testing.assert_array_equal(pooled, tokens.reshape(b, n // 4, 4 * c))
    raw["visual_hidden_size"] = 9 * WIDTH
    (folder / "projector" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"must be the tower's 32, or 4 times that"):
        load(folder, vision=str(eyes))


def test_what_does_not_fit_is_named(run: Run, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(run.own("adapter", "frozen"), folder)
        return folder

    folder = copy("pickles")
    for part in ("llm_adapter/adapter_model", "projector/model"):
        (folder / f"{part}.safetensors").rename(folder / f"{part}.bin")
    (folder / "epoch_1.pth").write_bytes(b"")  # a trainer's own, and none of its parts
    with pytest.raises(WeightsError) as error:
        load(folder)
    both = f"{folder}/llm_adapter/adapter_model.bin {folder}/projector/model.bin"
    assert str(error.value).endswith(both)
    folder = copy("deep")
    raw = json.loads((folder / "projector" / "config.json").read_text())
    (folder / "projector" / "config.json").write_text(json.dumps({**raw, "depth": 3}))
    with pytest.raises(ConfigError, match="depth .=3. must be 2"):
        load(folder)
    for number, (change, told) in enumerate(
        (
            ({"model.2.bias": None}, "missing: projector.linear_2.bias"),
            ({"model.4.bias": mx.zeros((2,))}, "unexpected: projector.linear_4.bias"),
            ({"model.2.bias": mx.zeros((31,))}, r"linear_2.bias is \[31\] and should be \[32\]"),
            ({"model.2.bias": mx.full((32,), mx.nan)}, "infinite values: projector.linear_2.bias"),
        )
    ):
        folder = copy(str(number))
        tensors = {n: v for n, v in {**run.projector, **change}.items() if v is not None}
        file = folder / "projector" / "model.safetensors"
        mx.save_safetensors(str(file), tensors, {"format": "pt"})
        with pytest.raises(WeightsError, match=told):
            load(folder)
    folder = copy("tower")
    pairs = dict(list(run.tower_pairs.items())[2:])
    targets = {"target_modules": list(VIT_TARGETS)}
    write_adapters(folder / "visual_encoder_adapter", "x", pairs, **targets)
    with pytest.raises(WeightsError, match=r"missing: vision.encoder.layers.0.mlp.fc1.lora_A"):
        load(folder, vision=str(run.place / "clip"))
