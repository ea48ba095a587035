"""Systems that transformers does not have, in float64 NumPy, written from their descriptions alone.

Tensors have the names and layouts that their authors save them under.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Tensors = dict[str, np.ndarray]
Size = tuple[int, int]


def layer_norm(x: np.ndarray, t: Tensors, name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * t[f"{name}.weight"] + t[f"{name}.bias"]


def linear(x: np.ndarray, t: Tensors, name: str) -> np.ndarray:
    y = x @ t[f"{name}.weight"].T
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, heads: int, causal: bool = False
) -> np.ndarray:
    """[Q, D], [K, D], [K, D] -> [Q, D]; fewer heads of keys than of queries serve groups."""
    dim = q.shape[-1] // heads
    groups = heads // (k.shape[-1] // dim)
    out = []
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        theirs = slice(head // groups * dim, (head // groups + 1) * dim)
        scores = q[:, own] @ k[:, theirs].T / math.sqrt(dim)
        if causal:
            scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
        out.append(softmax(scores) @ v[:, theirs])
    return np.concatenate(out, axis=-1)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.702 * x))


def patches(pixels: np.ndarray, t: Tensors, name: str) -> np.ndarray:
    """[H, W, 3] -> [rows * columns, D], a convolution whose stride is its kernel."""
    kernel = t[f"{name}.weight"]  # [D, 3, P, P]
    P = kernel.shape[-1]
    rows, columns = pixels.shape[0] // P, pixels.shape[1] // P
    out = []
    for i in range(rows):
        for j in range(columns):
            patch = pixels[i * P : (i + 1) * P, j * P : (j + 1) * P].transpose(2, 0, 1)
            out.append((kernel * patch).sum(axis=(1, 2, 3)))
    return np.array(out) + t.get(f"{name}.bias", 0)


def blocks(
    x: np.ndarray, t: Tensors, at: str, number: int, heads: int, act: Callable, eps: float
) -> np.ndarray:
    """Pre-norm blocks of a SigLIP or CLIP tower."""
    for layer in range(number):
        name = f"{at}.encoder.layers.{layer}"
        y = layer_norm(x, t, f"{name}.layer_norm1", eps)
        q, k, v = (linear(y, t, f"{name}.self_attn.{p}_proj") for p in "qkv")
        x = x + linear(attend(q, k, v, heads), t, f"{name}.self_attn.out_proj")
        y = act(linear(layer_norm(x, t, f"{name}.layer_norm2", eps), t, f"{name}.mlp.fc1"))
        x = x + linear(y, t, f"{name}.mlp.fc2")
    return x


def sincos(rows: int, columns: int, dim: int) -> np.ndarray:
    """[rows * columns, dim]: the column in the first half, the row in the second."""

    def one(place: int) -> np.ndarray:
        omega = np.array([10000 ** (-i / (dim / 4)) for i in range(dim // 4)])
        return np.concatenate([np.sin(place * omega), np.cos(place * omega)])

    return np.array([np.concatenate([one(j), one(i)]) for i in range(rows) for j in range(columns)])


def packed_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, t: Tensors, name: str, heads: int
) -> np.ndarray:
    """torch.nn.MultiheadAttention: three matrices in one."""
    weights = np.split(t[f"{name}.in_proj_weight"], 3)
    biases = np.split(t[f"{name}.in_proj_bias"], 3)
    q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weights, biases, strict=True))
    return linear(attend(q, k, v, heads), t, f"{name}.out_proj")


def llama(embeddings: np.ndarray, t: Tensors, at: str, config: dict[str, Any]) -> np.ndarray:
    """Hidden states after the final norm, [L, D]; names as in transformers, after `at`."""
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    dim = config["hidden_size"] // heads

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * t[f"{at}.{name}.weight"]

    rates = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    angles = np.arange(len(embeddings))[:, None] * rates
    cos, sin = (np.concatenate([f(angles)] * 2, axis=-1) for f in (np.cos, np.sin))

    def rotate(x: np.ndarray) -> np.ndarray:
        parts = []
        for head in np.split(x, x.shape[-1] // dim, axis=-1):
            half = np.concatenate([-head[:, dim // 2 :], head[:, : dim // 2]], axis=-1)
            parts.append(head * cos + half * sin)
        return np.concatenate(parts, axis=-1)

    x = embeddings
    for layer in range(config["num_hidden_layers"]):
        name = f"layers.{layer}"
        y = norm(x, f"{name}.input_layernorm")
        q, k, v = (linear(y, t, f"{at}.{name}.self_attn.{p}_proj") for p in "qkv")
        mixed = attend(rotate(q), rotate(k), v, heads, causal=True)
        x = x + linear(mixed, t, f"{at}.{name}.self_attn.o_proj")
        y = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (linear(y, t, f"{at}.{name}.mlp.{p}_proj") for p in ("gate", "up"))
        x = x + linear(gate / (1 + np.exp(-gate)) * up, t, f"{at}.{name}.mlp.down_proj")
    return norm(x, "norm")


def slices(
    image: Image.Image, side: int, patch: int, most: int, whole: Callable[[float], int]
) -> tuple[Image.Image, list[list[Image.Image]]]:
    """The overview, and rows of slices; none where the picture is not cut. whole: from a number to
    a whole one."""
    width, height = image.size

    def divide(length: float, by: float) -> int:
        return max(whole(length / by) * by, by)

    def fit(w: float, h: float, enlarge: bool) -> Size:
        if enlarge or w * h > side * side:
            ratio = w / h
            h = int(side / math.sqrt(ratio))
            w = int(h * ratio)
        return divide(w, patch), divide(h, patch)

    multiple = min(math.ceil(width * height / side**2), most)
    if multiple <= 1:
        return image.resize(fit(width, height, True), Image.Resampling.BICUBIC), []
    grids = [
        (m, n // m)
        for n in (multiple - 1, multiple, multiple + 1)
        if n != 1 and n <= most
        for m in range(1, n + 1)
        if n % m == 0
    ]
    wanted = math.log(width / height)
    columns, rows = min(grids, key=lambda g: abs(wanted - math.log(g[0] / g[1])))
    overview = image.resize(fit(width, height, False), Image.Resampling.BICUBIC)
    w, h = fit(divide(width, columns) / columns, divide(height, rows) / rows, True)
    canvas = image.resize((w * columns, h * rows), Image.Resampling.BICUBIC)
    return overview, [
        [canvas.crop((j * w, i * h, (j + 1) * w, (i + 1) * h)) for j in range(columns)]
        for i in range(rows)
    ]


def normalised(image: Image.Image, mean: Any, std: Any) -> np.ndarray:
    return (np.asarray(image, np.float64) / 255 - np.array(mean)) / np.array(std)


def minicpm_view(pixels: np.ndarray, t: Tensors, config: dict[str, Any]) -> np.ndarray:
    """What the language model sees of a view, [queries, D]; features of the tower are beside."""
    tower, P = config["vision_config"], config["vision_config"]["patch_size"]
    eps, side = 1e-6, tower["image_size"] // P
    rows, columns = pixels.shape[0] // P, pixels.shape[1] // P

    def bucket(i: int, n: int) -> int:
        return sum(k / side <= min(i / n, 1 - 1e-6) for k in range(1, side))

    ids = [bucket(i, rows) * side + bucket(j, columns) for i in range(rows) for j in range(columns)]
    x = patches(pixels, t, "vpm.embeddings.patch_embedding")
    x = x + t["vpm.embeddings.position_embedding.weight"][ids]
    number = tower["num_hidden_layers"] - int(config["drop_vision_last_layer"])
    x = blocks(x, t, "vpm", number, tower["num_attention_heads"], gelu_tanh, eps)
    x = layer_norm(x, t, "vpm.post_layernorm", eps)
    values = layer_norm(linear(x, t, "resampler.kv_proj"), t, "resampler.ln_kv", eps)
    queries = layer_norm(t["resampler.query"], t, "resampler.ln_q", eps)
    width = queries.shape[-1]
    keys = values + sincos(rows, columns, width)
    out = packed_attention(queries, keys, values, t, "resampler.attn", max(1, width // 128))
    return layer_norm(out, t, "resampler.ln_post", eps) @ t["resampler.proj"]


def minicpm_logits(
    ids: list[int], image_id: int, images: list[Image.Image], t: Tensors, config: dict[str, Any]
) -> np.ndarray:
    """[L, V] of one prompt; the views' tokens, in order, in the places of `image_id`."""
    cut, found = config["slice_config"], []
    for image in images:
        side, patch = cut["scale_resolution"], cut["patch_size"]
        overview, grid = slices(image, side, patch, cut["max_slice_nums"], round)
        for view in [overview, *(one for row in grid for one in row)]:
            pixels = normalised(view, (0.5,) * 3, (0.5,) * 3)
            found.append(minicpm_view(pixels, t, config))
    embeddings = t["llm.model.embed_tokens.weight"][ids].copy()
    places = np.array(ids) == image_id
    if found:
        embeddings[places] = np.concatenate(found)
    assert places.sum() == sum(map(len, found))
    return llama(embeddings, t, "llm.model", config) @ t["llm.lm_head.weight"].T


def cubic(x: float) -> float:
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resized(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[side * side, D] -> [rows * columns, D], bicubic, edges repeated, corners not aligned."""
    side = math.isqrt(len(table))
    grid = table.reshape(side, side, -1)
    out = []
    for i in range(rows):
        for j in range(columns):
            y, x = (i + 0.5) * side / rows - 0.5, (j + 0.5) * side / columns - 0.5
            value = 0
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = cubic(y - a) * cubic(x - b)
                    value = (
                        value + weight * grid[min(max(a, 0), side - 1), min(max(b, 0), side - 1)]
                    )
            out.append(value)
    return np.array(out)


def roi_align(grid: np.ndarray, box: tuple[float, ...], size: Size) -> np.ndarray:
    """[h, w, D], (x1, y1, x2, y2), (rows, columns) -> [rows * columns, D]; aligned=False."""
    x1, y1, x2, y2 = box
    height, width = grid.shape[:2]
    tall, wide = max(y2 - y1, 1.0), max(x2 - x1, 1.0)
    rows, columns = size
    down, across = math.ceil(tall / rows), math.ceil(wide / columns)

    def at(y: float, x: float) -> Any:
        if y > height or x > width:
            return np.zeros(grid.shape[-1])
        top, left = min(int(y), height - 1), min(int(x), width - 1)
        dy, dx = (y - top if top < height - 1 else 0), (x - left if left < width - 1 else 0)
        low, right = min(top + 1, height - 1), min(left + 1, width - 1)
        upper = (1 - dx) * grid[top, left] + dx * grid[top, right]
        return (1 - dy) * upper + dy * ((1 - dx) * grid[low, left] + dx * grid[low, right])

    out = []
    for i in range(rows):
        for j in range(columns):
            points = [
                at(
                    y1 + (i + (a + 0.5) / down) * tall / rows,
                    x1 + (j + (b + 0.5) / across) * wide / columns,
                )
                for a in range(down)
                for b in range(across)
            ]
            out.append(sum(points) / len(points))
    return np.array(out)


def uhd_features(pixels: np.ndarray, t: Tensors, tower: dict[str, Any]) -> np.ndarray:
    """[patches, D] of CLIP's last block but one, without its class token."""
    at, P, eps = "model.vision_tower.vision_tower.vision_model", tower["patch_size"], 1e-5
    rows, columns = pixels.shape[0] // P, pixels.shape[1] // P
    table = t[f"{at}.embeddings.position_embedding.weight"]
    x = patches(pixels, t, f"{at}.embeddings.patch_embedding")
    x = np.concatenate([t[f"{at}.embeddings.class_embedding"][None], x])
    x = x + np.concatenate([table[:1], resized(table[1:], rows, columns)])
    x = layer_norm(x, t, f"{at}.pre_layrnorm", eps)
    number = tower["num_hidden_layers"] - 1
    return blocks(x, t, at, number, tower["num_attention_heads"], quick_gelu, eps)[1:]


def uhd_view(pixels: np.ndarray, t: Tensors, tower: dict[str, Any]) -> np.ndarray:
    """What the language model sees of a view, [queries, D]."""
    at, P, eps = "model.mm_projector", tower["patch_size"], 1e-6
    rows, columns = pixels.shape[0] // P, pixels.shape[1] // P
    x = linear(uhd_features(pixels, t, tower), t, f"{at}.kv_proj")
    x = layer_norm(x, t, f"{at}.ln_kv", eps)
    width, side = x.shape[-1], math.isqrt(len(t[f"{at}.query"]))
    values = x.reshape(rows, columns, -1)
    keys = (x + resized(t[f"{at}.pos_embed"], rows, columns)).reshape(rows, columns, -1)
    sizes = [(4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4)]
    w, h = min(sizes, key=lambda s: abs(math.log(columns / rows) - math.log(s[0] / s[1])))
    queries = layer_norm(t[f"{at}.query"], t, f"{at}.ln_q", eps) + t[f"{at}.pos_embed"]
    out = []
    for number, query in enumerate(queries):
        i, j = divmod(number, side)
        box = (
            *(j * columns / side, i * rows / side),
            *((j + 1) * columns / side, (i + 1) * rows / side),
        )
        near, far = (roi_align(grid, box, (h, w)) for grid in (keys, values))
        heads = max(1, width // 128)
        out.append(packed_attention(query[None], near, far, t, f"{at}.attn", heads)[0])
    return layer_norm(np.array(out), t, f"{at}.ln_post", eps) @ t[f"{at}.proj"]


def uhd_embeddings(
    image: Image.Image, t: Tensors, tower: dict[str, Any], words: tuple[int, int]
) -> np.ndarray:
    """[L, D] that stand for a picture: slices with commas and newlines (ids `words`), overview."""
    overview, grid = slices(image, tower["image_size"], tower["patch_size"], 7, math.floor)
    comma, newline = (t["model.embed_tokens.weight"][word] for word in words)
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    out = []
    for row in grid:
        for number, view in enumerate(row):
            out += [*uhd_view(normalised(view, mean, std), t, tower)]
            out.append(comma if number + 1 < len(row) else newline)
    return np.array([*out, *uhd_view(normalised(overview, mean, std), t, tower)])
