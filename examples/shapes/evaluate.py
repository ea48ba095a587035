"""Measures a model on drawn scenes that nothing was trained on.

An answer counts if it equals the only right one, to the letter, in greedy decoding. Greedy decoding
gives exactly the right answer if, and only if, each of its tokens (the end token too) is the most
likely one after the right ones before it. So one forward pass over question and right answer
decides; `--generate` compares that with answers that were really generated. Boxes are generated,
and scored by intersection over union.

Beside each kind stands a blind guesser, who knows the question and the most frequent answer to it
in 15,000 training scenes, but not the picture.

    python -m examples.shapes.evaluate --model runs/shapes/sft
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

import mlxvlm
from examples.shapes.drawing import draw
from examples.shapes.exam import BLIND_SCENES, blind_guesses, exam, take, wilson
from examples.shapes.qa import QA, turns
from examples.shapes.questions import SCORED, ask_many
from examples.shapes.world import Scene, make_scene, seeds
from mlxvlm.boxes import parse
from mlxvlm.language.forward import head, hidden_states
from mlxvlm.language.prefix import BranchCache, PrefixCache, prefix_caches
from mlxvlm.merge import visual_tokens
from mlxvlm.prompts import Prompt, normalize_messages, render_many

# A scene to anything that the model opens as a picture.
Draw = Callable[[Scene], Image.Image | Path]
# A question, or a chat, which is right if all of its answers are.
Asked = QA | Sequence[QA]


@dataclass
class Score:
    """One kind: how many were asked, shares right with Wilson's 95% interval, and blind."""

    kind: str
    example: str
    asked: int
    right: float
    low: float
    high: float
    blind: float


def features(
    vlm: Any, scenes: Iterable[Scene], batch: int = 64, render: Draw = draw
) -> dict[int, Any]:
    """What the encoder says of the drawn scenes, by their seeds."""
    unique = list({scene.seed: scene for scene in scenes}.values())
    found = {}
    for start in range(0, len(unique), batch):
        part = unique[start : start + batch]
        seen = vlm.features([render(scene) for scene in part])
        mx.eval([view for one in seen for view in one.views])
        found |= {scene.seed: one for scene, one in zip(part, seen, strict=True)}
    return found


class Verdict(NamedTuple):
    """Whether greedy decoding answers exactly right, and the token that it begins with."""

    right: bool
    first: int


class _Branches(BranchCache):
    """As its parent, for rows of which each says by number what it goes on from."""

    def __init__(self, prefix: PrefixCache, which: mx.array):
        super().__init__(prefix, 1)
        self.which = which

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        shared = self.prefix.keys[self.which], self.prefix.values[self.which]
        return mx.concatenate([shared[0], keys], axis=2), mx.concatenate(
            [shared[1], values], axis=2
        )


def verdicts(
    vlm: Any, asked: Sequence[tuple[Any, Asked]], batch: int = 64, pictures: int = 32
) -> list[Verdict]:
    """What greedy decoding makes of each (features, question or chat).

    Questions about one picture share its computation: they all begin with it.
    """
    prompts = tokenized(vlm, asked)
    # Beginnings of one length go together: what stands before the questions, pictures included.
    begins: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, prompt in enumerate(prompts):
        begins[sum(prompt.slots[-1])][id(asked[i][0])].append(i)
    found: dict[int, Verdict] = {}
    for begin, about in begins.items():
        groups = list(about.values())
        for start in range(0, len(groups), pictures):
            some = groups[start : start + pictures]
            firsts = [group[0] for group in some]
            visual = vlm.project([asked[i][0] for i in firsts])
            shared = np.stack([prompts[i].tokens[:begin] for i in firsts])
            caches = prefix_caches(vlm.language)
            mx.eval(hidden_states(vlm.language, vlm.splice(shared, visual), caches)[0])
            rows = [(i, which) for which, group in enumerate(some) for i in group]
            rows.sort(key=lambda row: len(prompts[row[0]]))
            for at in range(0, len(rows), batch):
                part = rows[at : at + batch]
                which = np.array([which for _, which in part], np.int32)
                if any((prompts[i].tokens[:begin] != shared[line]).any() for i, line in part):
                    raise ValueError("questions about one picture must begin alike.")
                branches = [_Branches(cache, mx.array(which)) for cache in caches]
                said = _verdicts(vlm, [prompts[i] for i, _ in part], branches, begin)
                found.update(zip((i for i, _ in part), said, strict=True))
    return [found[i] for i in range(len(asked))]


def tokenized(vlm: Any, asked: Sequence[tuple[Any, Asked]]) -> list[Prompt]:
    """Tokens of each (features, question or chat) with its right answers, all in one go."""
    rows = []
    for picture, qa in asked:
        parts, _ = normalize_messages(turns([qa] if isinstance(qa, QA) else qa), [picture])
        rows.append((parts, [visual_tokens(vlm.config, picture.cut)]))
    return render_many(rows, vlm.tokenizer, vlm.config.prompt, False)


def _verdicts(
    vlm: Any, prompts: Sequence[Prompt], branches: list[_Branches], begin: int
) -> list[Verdict]:
    """Verdicts of prompts whose first `begin` tokens the branches hold."""
    length = max(len(prompt) for prompt in prompts) - begin
    tokens = np.zeros((len(prompts), length), np.int32)
    answer = np.zeros((len(prompts), length), bool)
    for line, prompt in enumerate(prompts):
        tokens[line, : len(prompt) - begin] = prompt.tokens[begin:]
        answer[line, : len(prompt) - begin] = prompt.supervised[begin:]
    hidden, _ = hidden_states(vlm.language, vlm.splice(tokens, None), branches)
    # Each token is foretold by the one before it; a question stands before each answer.
    places = np.flatnonzero(answer[:, 1:])
    before = hidden[:, :-1].reshape(-1, hidden.shape[-1])[mx.array(places.astype(np.int32))]
    logits = head(vlm.language, before).astype(mx.float32)
    # The image token is never sampled.
    keep = mx.arange(logits.shape[-1]) != vlm.config.prompt.image_token_id
    guess = np.array(mx.where(keep, logits, -mx.inf).argmax(-1))
    same = guess == tokens[:, 1:].reshape(-1)[places]
    starts = np.searchsorted(places // (length - 1), np.arange(len(prompts)))
    right = np.logical_and.reduceat(same, starts)
    return [Verdict(bool(ok), int(guess[at])) for ok, at in zip(right, starts, strict=True)]


def right_answers(vlm: Any, asked: Sequence[tuple[Any, Asked]]) -> list[bool]:
    """Whether greedy decoding answers each (features, question) exactly right."""
    return [verdict.right for verdict in verdicts(vlm, asked)]


def overlap(said: str, wanted: str) -> float:
    """Intersection over union of the boxes in two answers; 0 where one has none."""
    found, right = (parse(text)[0] for text in (said, wanted))
    if not found or not right:
        return 0.0
    a, b = found[0], right[0]
    w = min(a.x1, b.x1) - max(a.x0, b.x0)
    h = min(a.y1, b.y1) - max(a.y0, b.y0)
    shared = max(0, w) * max(0, h)
    areas = sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in (a, b))
    return shared / (areas - shared)


def measure(
    vlm: Any,
    split: str,
    each: int,
    blind_scenes: int = BLIND_SCENES,
    kinds: Sequence[str] = SCORED,
    render: Draw = draw,
) -> dict[str, Any]:
    """Scores by kind, and by the number of items in the picture."""
    asked = take(split, each, kinds)
    seen = features(vlm, (scene for scene, _ in asked), render=render)
    guesses = blind_guesses(blind_scenes)
    verdicts = right_answers(vlm, [(seen[scene.seed], qa) for scene, qa in asked])
    right: dict[str, list[bool]] = defaultdict(list)
    blind: dict[str, list[bool]] = defaultdict(list)
    by_items: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[str, str] = {}
    for (scene, qa), ok in zip(asked, verdicts, strict=True):
        right[qa.kind].append(ok)
        blind[qa.kind].append(guesses.get(qa.ask) == qa.answer)
        by_items[qa.kind][len(scene.bars or scene.items)].append(ok)
        examples.setdefault(qa.kind, f"{qa.question} {qa.answer}")
    scores = []
    for kind in kinds:
        hits, count = sum(right[kind]), len(right[kind])
        guessed = sum(blind[kind]) / count
        scores.append(
            Score(kind, examples[kind], count, hits / count, *wilson(hits, count), guessed)
        )
    return {
        "split": split,
        "scenes": len(seen),
        "mean": sum(score.right for score in scores) / len(scores),
        "blind_mean": sum(score.blind for score in scores) / len(scores),
        "kinds": [asdict(score) for score in scores],
        "by_items": {
            kind: {str(n): [sum(found), len(found)] for n, found in sorted(counts.items())}
            for kind, counts in by_items.items()
        },
    }


def measure_boxes(vlm: Any, split: str, count: int, render: Draw = draw) -> dict[str, float]:
    """Mean intersection over union of generated boxes, and the share with 0.5 and more."""
    asked = take(split, count, ("box",))
    found = []
    for scene, qa in asked:
        question = [{"role": "user", "content": qa.question}]
        reply = vlm.generate(question, [render(scene)], max_tokens=40)
        found.append(overlap(reply.text, qa.answer))
    return {
        "asked": len(found),
        "mean_iou": float(np.mean(found)),
        "at_least_half": float(np.mean([v >= 0.5 for v in found])),
    }


def measure_refusals(vlm: Any, split: str, count: int) -> dict[str, int]:
    """How often questions about pictures with nothing drawn in them are refused as they should."""
    textures = (s for s in map(make_scene, seeds(split)) if s.kind == "texture")
    asked = [(scene, ask_many(scene, 1, "exam")[0]) for scene in islice(textures, count)]
    seen = features(vlm, (scene for scene, _ in asked))
    verdicts = right_answers(vlm, [(seen[scene.seed], qa) for scene, qa in asked])
    return {"asked": len(verdicts), "refused": sum(verdicts)}


def measure_generated(vlm: Any, split: str, each: int) -> dict[str, int]:
    """Generates answers for real and compares with what the one pass said of them."""
    asked = take(split, each, SCORED)
    seen = features(vlm, (scene for scene, _ in asked))
    said = right_answers(vlm, [(seen[scene.seed], qa) for scene, qa in asked])
    right = agree = 0
    for (scene, qa), verdict in zip(asked, said, strict=True):
        question = [{"role": "user", "content": qa.question}]
        reply = vlm.generate(question, [draw(scene)], max_tokens=80)
        right += reply.text == qa.answer
        agree += (reply.text == qa.answer) == verdict
    return {"asked": len(asked), "right": right, "agree": agree}


def measure_chats(vlm: Any, split: str, count: int, turns: int = 4) -> dict[str, list[int]]:
    """Chats of several turns, generated, the model's own answers standing in them: hits by turn."""
    right = [0] * turns
    chats = 0
    for scene in {scene.seed: scene for scene, _ in take(split, 2 * count, ("describe",))}.values():
        qas = exam(scene, SCORED, "chats")
        if len(qas) < turns or chats == count:
            continue
        chats += 1
        # Every turn gets every kind: the order rotates from chat to chat.
        at = chats % len(qas)
        history: list[dict[str, str]] = []
        for turn, qa in enumerate((qas[at:] + qas[:at])[:turns]):
            history.append({"role": "user", "content": qa.question})
            reply = vlm.generate(history, [draw(scene)], max_tokens=80)
            history.append({"role": "assistant", "content": reply.text})
            right[turn] += reply.text == qa.answer
    return {"right": right, "asked": [chats] * turns}


def table(result: dict[str, Any]) -> str:
    """The scores as a Markdown table."""
    lines = [
        "| kind | for example | asked | right | 95% interval | blind | right with 5 items |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for score in result["kinds"]:
        five = result["by_items"][score["kind"]].get("5", [0, 0])
        most = f"{100 * five[0] / five[1]:.0f}%" if five[1] else ""
        lines.append(
            f"| {score['kind']} | {score['example']} | {score['asked']} "
            f"| {100 * score['right']:.1f}% "
            f"| {100 * score['low']:.1f} to {100 * score['high']:.1f} "
            f"| {100 * score['blind']:.1f}% | {most} |"
        )
    lines.append(
        f"| **mean** | | | **{100 * result['mean']:.1f}%** | "
        f"| {100 * result['blind_mean']:.1f}% | |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures a model on held-out scenes.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--split", choices=("heldout", "progress"), default="heldout")
    parser.add_argument("--each", type=int, default=500, help="questions of each kind")
    parser.add_argument("--blind-scenes", type=int, default=BLIND_SCENES)
    parser.add_argument("--boxes", type=int, default=500, help="boxes to generate")
    parser.add_argument("--refusals", type=int, default=200, help="pictures of nothing drawn")
    parser.add_argument("--generate", type=int, default=5, help="answers of each kind to generate")
    parser.add_argument("--chats", type=int, default=100, help="chats of four turns to generate")
    parser.add_argument("--out", type=Path, help="also write the result as JSON to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    # float16 is how the model is shipped; what a CPU computes quickly in is float32.
    vlm = mlxvlm.load(args.model, dtype="float32")
    result = measure(vlm, args.split, args.each, args.blind_scenes)
    if args.boxes:
        result["boxes"] = measure_boxes(vlm, args.split, args.boxes)
    if args.refusals:
        result["refusals"] = measure_refusals(vlm, args.split, args.refusals)
    if args.generate:
        result["generated"] = measure_generated(vlm, args.split, args.generate)
    if args.chats:
        result["chats"] = measure_chats(vlm, args.split, args.chats)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(result, indent=1))
        return
    print(table(result))
    if args.boxes:
        boxes = result["boxes"]
        print(f"\n{boxes['asked']} boxes: mean IoU {boxes['mean_iou']:.3f},", end=" ")
        print(f"{100 * boxes['at_least_half']:.1f}% with 0.5 and more.")
    if args.refusals:
        told = result["refusals"]
        print(f"Pictures of nothing drawn: {told['refused']} of {told['asked']} refused.")
    if args.generate:
        made = result["generated"]
        print(f"\nGenerated for real: {made['right']} of {made['asked']} right,", end=" ")
        print(f"{made['agree']} as the one pass said.")
    if args.chats:
        chats = result["chats"]
        shares = ", ".join(str(n) for n in chats["right"])
        print(f"Chats of four turns, right by turn: {shares} of {chats['asked'][0]}.")


if __name__ == "__main__":
    main()
