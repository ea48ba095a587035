"""prompt_cache.py: prefixes across runs, whole or not at all, within their bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from test_reuse import ask, close, decoder, logits, wide, work
from tiny_vlm import picture, tiny_vlm

from mlxvlm.errors import CacheError
from mlxvlm.fingerprint import fingerprint
from mlxvlm.prompt_cache import PromptCache
from mlxvlm.reuse import Reuse

__all__ = ["logits", "work"]  # fixtures
ROOT = Path(__file__).resolve().parent.parent


def run(vlm, folder, **options):
    """What a process of its own would keep."""
    return Reuse(vlm, disk=PromptCache(folder, **options))


def files(folder):
    return sorted(folder.glob("*/*.safetensors"))


@pytest.mark.parametrize("name", ["llama", "window 6", "window 120", "gemma3", "lfm2"])
def test_another_run_goes_on_where_the_last_one_ended(name, tmp_path, work, logits):
    vlm = decoder(name)
    first = vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6, reuse=run(vlm, tmp_path))
    turns = [*ask("What is it?"), {"role": "assistant", "content": first.text}, *ask("And?")]
    for messages in (ask("What is it?"), ask("Why, then?"), turns):
        fresh = vlm.generate(messages, [picture(1)], max_tokens=6)
        work.update(views=0, read=0)
        reply = vlm.generate(messages, [picture(1)], max_tokens=6, reuse=run(vlm, tmp_path))
        assert reply.tokens == fresh.tokens and close(*logits[-2:])
        assert work == {"views": 0, "read": reply.prompt_tokens - reply.reused_tokens}
        assert reply.reused_tokens > 16
    other = vlm.generate(ask("What is it?"), [picture(2)], max_tokens=6, reuse=run(vlm, tmp_path))
    assert other.reused_tokens < 16


def test_a_turn_writes_what_is_new_and_conversations_share_the_picture(tmp_path):
    vlm = decoder("llama")
    reuse = run(vlm, tmp_path)
    first = vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6, reuse=reuse)
    sizes = {path: path.stat().st_size for path in files(tmp_path)}
    assert len(sizes) == 2  # up to the end of the picture, and the rest
    turns = [*ask("What is it?"), {"role": "assistant", "content": first.text}, *ask("And now?")]
    vlm.generate(turns, [picture(1)], max_tokens=6, reuse=reuse)
    vlm.generate(ask("Another question?"), [picture(1)], max_tokens=6, reuse=reuse)
    assert len(files(tmp_path)) == 4
    assert all(path.stat().st_size == size for path, size in sizes.items())
    tokens = sum(len(s) - s.start for s in reuse.disk._segments.values())
    layer = 2 * 2 * 16 * 4  # keys and values of two heads of 16 in float32
    data = sum(path.stat().st_size for path in files(tmp_path)) - 2 * tokens * layer
    assert 0 < data < 4 * 6000  # beyond the numbers, headers alone


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_prefixes_and_settings_do_not_mix(bits, tmp_path):
    vlm = wide("llama")
    options = {"kv_bits": bits, "kv_group_size": 32, "max_tokens": 5}
    fresh = vlm.generate(ask("Why?"), [picture(1)], **options)
    vlm.generate(ask("Why?"), [picture(1)], reuse=run(vlm, tmp_path), **options)
    again = vlm.generate(ask("Why?"), [picture(1)], reuse=run(vlm, tmp_path), **options)
    assert again.reused_tokens == again.prompt_tokens - 1 and again.tokens == fresh.tokens
    plain = vlm.generate(ask("Why?"), [picture(1)], max_tokens=5, reuse=run(vlm, tmp_path))
    assert plain.reused_tokens == 0


def test_other_weights_and_another_adapter_are_another_model(tmp_path):
    vlm = tiny_vlm()
    vlm.generate(ask("Why?"), [picture(1)], max_tokens=5, reuse=run(vlm, tmp_path))
    bias = vlm.language.model.norm.weight
    vlm.language.model.norm.weight = mx.where(mx.arange(64) == 63, bias + 1e-3, bias)
    reply = vlm.generate(ask("Why?"), [picture(1)], max_tokens=5, reuse=run(vlm, tmp_path))
    assert reply.reused_tokens == 0
    vlm.language.model.norm.weight = bias
    reply = vlm.generate(ask("Why?"), [picture(1)], max_tokens=5, reuse=run(vlm, tmp_path))
    assert reply.reused_tokens == reply.prompt_tokens - 1


def test_a_fingerprint_tells_every_change_and_nothing_else():
    vlm = tiny_vlm()
    before = fingerprint(vlm)
    vlm.update(tree_map(lambda x: x + 0, vlm.parameters()))
    assert fingerprint(vlm) == before
    large = vlm.language.lm_head
    for dtype in (mx.float32, mx.bfloat16):
        large.weight = mx.zeros((1025, 2049), dtype)  # more than a block, and a rest
        seen = {fingerprint(vlm)}
        for at in (0, 1, 1025 * 2049 - 1, 1024 * 1024 * 2 - 1):
            flat = mx.where(mx.arange(1025 * 2049) == at, 1.0, 0.0).astype(dtype)
            large.weight = flat.reshape(1025, 2049)
            seen.add(fingerprint(vlm))
        assert len(seen) == 5


def test_bytes_are_bounded_and_what_was_used_longest_ago_goes(tmp_path):
    vlm = decoder("llama")
    reuse = run(vlm, tmp_path)
    for seed in (1, 2, 3):
        vlm.generate(ask("What is it?"), [picture(seed)], max_tokens=4, reuse=reuse)
    total = sum(path.stat().st_size for path in files(tmp_path))
    past = time.time() - 1000
    for number, path in enumerate(sorted(files(tmp_path), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, (past + number // 2, past + number // 2))
    # A run that asks about the first makes it the latest, and the fourth picture displaces others.
    small = run(vlm, tmp_path, limit=int(0.75 * total))
    vlm.generate(ask("What is it?"), [picture(1)], max_tokens=4, reuse=small)
    vlm.generate(ask("What is it?"), [picture(4)], max_tokens=4, reuse=small)
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 0.75 * total
    kept = []
    for seed in (1, 4, 2):
        reply = vlm.generate(
            ask("What is it?"), [picture(seed)], max_tokens=1, reuse=run(vlm, tmp_path)
        )
        kept.append(reply.reused_tokens > 16)
    assert kept == [True, True, False]


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone", "header", "tokens"])
def test_a_damaged_file_is_as_if_it_had_never_been(how, tmp_path):
    vlm = decoder("llama")
    fresh = vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6)
    vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6, reuse=run(vlm, tmp_path))
    reuse = run(vlm, tmp_path)
    reuse.check_weights()  # the folder has been looked at
    path = min(files(tmp_path), key=lambda p: p.stat().st_mtime_ns)
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    else:
        data[-40] ^= 16
        ruined = {"flip": data, "cut": data[:-100], "empty": b"", "header": b"\xff" * 99}
        ruined["tokens"] = path.read_bytes().replace(b" 261, 261,", b" 261, 267,", 1)
        assert ruined["tokens"] != path.read_bytes()
        ruined = ruined[how]
        path.write_bytes(ruined)
    for memory in (reuse, run(vlm, tmp_path), run(vlm, tmp_path)):
        reply = vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6, reuse=memory)
        assert reply.tokens == fresh.tokens
    assert reply.reused_tokens == reply.prompt_tokens - 1  # written anew


def test_a_full_disk_costs_the_file_and_says_so(tmp_path, monkeypatch):
    vlm = decoder("llama")
    reuse = run(vlm, tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlxvlm.prompt_cache.sync_path", full)
        vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6, reuse=reuse)
    assert "No space left" in reuse.disk.problem and list(tmp_path.glob("*/*")) == []
    vlm.generate(ask("What is it?"), [picture(2)], max_tokens=6, reuse=reuse)
    assert reuse.disk.problem == "" and files(tmp_path)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be a folder"):
        PromptCache(tmp_path / "file")


def test_what_a_killed_process_left_is_ignored_and_later_removed(tmp_path, monkeypatch):
    """Between writing and renaming, the last moment at which a file is not yet one."""
    vlm = decoder("llama")
    fresh = vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6)

    def killed(*args):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("mlxvlm.prompt_cache.publish", killed)
        vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6, reuse=run(vlm, tmp_path))
    (own,) = files(tmp_path)
    partial = own.rename(own.with_name(f"{'7' * 32}.1.partial.safetensors"))
    for reused in (False, True):
        memory = run(vlm, tmp_path)
        reply = vlm.generate(ask("What is it?"), [picture(1)], max_tokens=6, reuse=memory)
        assert (reply.reused_tokens > 0) == reused and reply.tokens == fresh.tokens
    assert partial.exists()  # another process may be writing it
    os.utime(partial, (0, 0))
    run(vlm, tmp_path).check_weights()
    assert not partial.exists() and len(files(tmp_path)) == 2


KILLED = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
import itertools
from test_reuse import ask
from tiny_vlm import picture, tiny_vlm
from mlxvlm.prompt_cache import PromptCache
from mlxvlm.reuse import Reuse
vlm = tiny_vlm()
reuse = Reuse(vlm, disk=PromptCache({folder!r}, limit=400_000))
for seed in itertools.count():
    vlm.generate(ask("What is it?"), [picture(seed)], max_tokens=6, reuse=reuse)
    print(seed, flush=True)
"""


@pytest.mark.slow
def test_kill_minus_nine_at_any_moment_leaves_what_was_written_usable(tmp_path):
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    vlm = tiny_vlm()
    for wait in (0.0, 0.002, 0.004, 0.007, 0.011, 0.016):
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        done = -1
        for line in process.stdout:
            done = int(line)
            if done >= 8:
                break
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert done >= 8
        reply = vlm.generate(
            ask("What is it?"), [picture(done)], max_tokens=6, reuse=run(vlm, tmp_path)
        )
        fresh = vlm.generate(ask("What is it?"), [picture(done)], max_tokens=6)
        assert reply.reused_tokens == reply.prompt_tokens - 1 and reply.tokens == fresh.tokens
    assert sum(path.stat().st_size for path in files(tmp_path)) < 500_000
