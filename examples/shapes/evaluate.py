"""Measures a model on drawn scenes that nothing was trained on.

An answer counts if it equals the only right one, to the letter, in greedy decoding. Greedy decoding
gives exactly the right answer if, and only if, each of its tokens (the end token too) is the most
likely one after the right ones before it. So one forward pass over question and right answer
decides; `--generate` compares that with answers that were really generated.

Beside each kind stands a blind guesser, who knows the question and the most frequent answer to it
in 15,000 training scenes, but not the picture.

    python -m examples.shapes.evaluate --model runs/shapes/sft
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlxvlm
from examples.shapes.drawing import draw
from examples.shapes.exam import BLIND_SCENES, EXTRA, blind_guesses, exam, take, wilson
from examples.shapes.questions import QA, SCORED
from examples.shapes.world import Scene


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


def features(vlm: Any, scenes: Sequence[Scene], batch: int = 64) -> list[Any]:
    """What the encoder says of the drawn scenes."""
    found = []
    for start in range(0, len(scenes), batch):
        part = vlm.features([draw(scene) for scene in scenes[start : start + batch]])
        mx.eval([view for one in part for view in one.views])
        found += part
    return found


def messages(qas: Iterable[QA]) -> list[dict[str, str]]:
    turns = []
    for qa in qas:
        turns.append({"role": "user", "content": qa.question})
        turns.append({"role": "assistant", "content": qa.answer})
    return turns


def right_answers(vlm: Any, asked: Sequence[tuple[Any, QA]], batch: int = 64) -> list[bool]:
    """Whether greedy decoding answers each (features, question) exactly right."""
    prompts = [vlm.tokenize(messages([qa]), [picture]) for picture, qa in asked]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    verdict = [False] * len(prompts)
    image_token = vlm.config.prompt.image_token_id
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        tokens = np.zeros((len(part), max(len(prompts[i].tokens) for i in part)), np.int32)
        for line, i in enumerate(part):
            tokens[line, : len(prompts[i].tokens)] = prompts[i].tokens
        logits = vlm(tokens, [picture for i in part for picture in prompts[i].pictures])
        # The image token is never sampled.
        keep = mx.arange(logits.shape[-1]) != image_token
        guess = np.array(mx.where(keep, logits.astype(mx.float32), -mx.inf).argmax(-1))
        for line, i in enumerate(part):
            where = np.flatnonzero(prompts[i].supervised)
            verdict[i] = bool((guess[line, where - 1] == tokens[line, where]).all())
    return verdict


def measure(vlm: Any, split: str, shapes: int, blind_scenes: int = BLIND_SCENES) -> dict[str, Any]:
    """Scores by kind, and by the number of things."""
    scenes = take(split, shapes)
    pictures = features(vlm, scenes)
    guesses = blind_guesses(blind_scenes)
    asked = [
        (scene, picture, qa)
        for scene, picture in zip(scenes, pictures, strict=True)
        for qa in exam(scene)
    ]
    verdicts = right_answers(vlm, [(picture, qa) for _, picture, qa in asked])
    right: dict[str, list[bool]] = defaultdict(list)
    blind: dict[str, list[bool]] = defaultdict(list)
    by_things: dict[str, dict[int, list[bool]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[str, str] = {}
    for (scene, _, qa), ok in zip(asked, verdicts, strict=True):
        right[qa.kind].append(ok)
        blind[qa.kind].append(guesses.get(qa.ask) == qa.answer)
        by_things[qa.kind][len(scene.things) or len(scene.bars)].append(ok)
        examples.setdefault(qa.kind, f"{qa.question} {qa.answer}")
    scores = []
    for kind in (*SCORED, *EXTRA):
        if kind in right:
            hits, count = sum(right[kind]), len(right[kind])
            guessed = sum(blind[kind]) / count
            scores.append(
                Score(kind, examples[kind], count, hits / count, *wilson(hits, count), guessed)
            )
    goal = [score for score in scores if score.kind in SCORED]
    return {
        "split": split,
        "scenes": len(scenes),
        "scenes_of_shapes": sum(not scene.bars for scene in scenes),
        "mean": sum(score.right for score in goal) / len(goal),
        "blind_mean": sum(score.blind for score in goal) / len(goal),
        "kinds": [asdict(score) for score in scores],
        "by_things": {
            kind: {str(n): [sum(found), len(found)] for n, found in sorted(counts.items())}
            for kind, counts in by_things.items()
        },
    }


def measure_generated(vlm: Any, split: str, count: int) -> dict[str, int]:
    """Generates `count` answers for real and compares with what the one pass said of them."""
    scenes = take(split, count)
    asked = []
    for i, scene in enumerate(scenes):
        qas = exam(scene)
        asked.append((scene, qas[i % len(qas)]))
    asked = asked[:count]
    pictures = features(vlm, [scene for scene, _ in asked])
    said = right_answers(vlm, [(p, qa) for p, (_, qa) in zip(pictures, asked, strict=True)])
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
    for scene in take(split, 4 * count):
        qas = [qa for qa in exam(scene, "chats") if qa.kind in SCORED]
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
        "| kind | for example | asked | right | 95% interval | blind | right with 5 |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for score in result["kinds"]:
        five = result["by_things"][score["kind"]].get("5", [0, 0])
        most = f"{100 * five[0] / five[1]:.0f}%" if five[1] else ""
        lines.append(
            f"| {score['kind']} | {score['example']} | {score['asked']} "
            f"| {100 * score['right']:.1f}% "
            f"| {100 * score['low']:.1f} to {100 * score['high']:.1f} "
            f"| {100 * score['blind']:.1f}% | {most} |"
        )
    lines.append(
        f"| **mean of the first {len(SCORED)}** | | | **{100 * result['mean']:.1f}%** | "
        f"| {100 * result['blind_mean']:.1f}% | |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures a model on held-out scenes.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--split", choices=("heldout", "progress"), default="heldout")
    parser.add_argument("--scenes", type=int, default=500, help="scenes of shapes; charts come too")
    parser.add_argument("--blind-scenes", type=int, default=BLIND_SCENES)
    parser.add_argument("--generate", type=int, default=60, help="answers to generate for real")
    parser.add_argument("--chats", type=int, default=60, help="chats of four turns to generate")
    parser.add_argument("--out", type=Path, help="also write the result as JSON to this file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    vlm = mlxvlm.load(args.model)
    result = measure(vlm, args.split, args.scenes, args.blind_scenes)
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
