"""A doctor that finds what is wrong, names it, and says what to do."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_vlm import tiny_config, tiny_vlm
from typer.testing import CliRunner

from mlxvlm.cli.doctor import describe, page
from mlxvlm.cli.main import app
from mlxvlm.config import ProjectorConfig
from mlxvlm.machine import access, blas, device, doctor, limits, numerics, software
from mlxvlm.machine.finding import LEVELS, NOTE, OK, UNCHECKED, WRONG, Finding
from mlxvlm.machine.numerics import Difference
from mlxvlm.weights.save import save

FLOATS = (mx.float32, mx.bfloat16, mx.float16)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch):
    """A Mac as its tools describe it; each command's output, by its last words."""
    told = SimpleNamespace(
        version="26.3", says={}, machine="arm64", packages={"mlx": "0.32.4", "mlx-metal": "0.32.4"}
    )

    def run(command, **options):
        out = next((v for k, v in told.says.items() if " ".join(command).endswith(k)), None)
        return subprocess.CompletedProcess(command, 0 if out is not None else 1, out or "", "")

    real = software.installed
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(software.platform, "machine", lambda: told.machine)
    monkeypatch.setattr(software.platform, "mac_ver", lambda: (told.version, ("", "", ""), ""))
    monkeypatch.setattr(
        software,
        "installed",
        lambda name: told.packages.get(name) if name.startswith("mlx") else real(name),
    )
    return told


def wheel(monkeypatch, tag):
    text = f"Wheel-Version: 1.0\nTag: py3-none-{tag}\n"
    monkeypatch.setattr(
        software.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda f: text)
    )


# Versions


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("mlx", "0.32.2", OK),
        ("mlx", "0.40.0.dev20270101", OK),
        ("mlx", "0.32.1", WRONG),
        ("mlx", None, WRONG),
        ("mlx-lm", "0.32.9", OK),
        ("mlx-lm", "0.31.9", WRONG),
        ("mlx-lm", "0.33", WRONG),
        ("mlx-lm", "0.33.1rc1", WRONG),
    ],
)
def test_a_version_that_does_not_fit_is_wrong(monkeypatch, name, version, level):
    monkeypatch.setattr(software, "installed", lambda asked: version)
    found = software._package(name)
    assert found.level == level and bool(found.remedy) == (level == WRONG)
    if found.remedy:
        least, below = software.KNOWN[name]
        assert f"pip install '{name}>={least}{',<' + below if below else ''}'" in found.remedy


def test_versions_are_those_of_the_package_itself():
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    for name, (least, below) in software.KNOWN.items():
        assert f'"{name}>={least}{",<" + below if below else ""}' in text
    assert f'requires-python = ">={".".join(map(str, software.LEAST_PYTHON))}"' in text


@pytest.mark.parametrize(
    ("version", "chip", "level", "word"),
    [
        ("13.6", "Apple M1", WRONG, "macOS 14"),
        ("14.5", "Apple M2", NOTE, "macOS 15"),
        ("26.1", "Apple M4 Max", OK, ""),
        ("26.1", "Apple M5", NOTE, "26.2"),
        ("26.2", "Apple M5 Pro", OK, ""),
    ],
)
def test_the_system(mac, version, chip, level, word):
    mac.version, mac.says["machdep.cpu.brand_string"] = version, chip
    found = software._system()
    assert found.level == level and word in found.remedy


@pytest.mark.parametrize(
    ("tag", "version", "chip", "level"),
    [
        ("macosx_26_0_arm64", "26.3", "Apple M5", OK),
        ("macosx_26_0_arm64", "15.4", "Apple M5", WRONG),  # it would not even be imported
        ("macosx_15_0_arm64", "26.3", "Apple M5", NOTE),  # its matrix units lie idle
        ("macosx_15_0_arm64", "26.3", "Apple M4", OK),
    ],
)
def test_a_wheel_for_another_macos(mac, monkeypatch, tag, version, chip, level):
    wheel(monkeypatch, tag)
    mac.version, mac.says["machdep.cpu.brand_string"] = version, chip
    found = software._metal()
    assert found.level == level and (software.ANEW in found.remedy) == (level != OK)


def test_two_halves_of_mlx_of_different_versions(mac):
    mac.packages["mlx-metal"] = "0.32.3"
    found = software._metal()
    assert found.level == WRONG and "0.32.3, beside mlx 0.32.4" in found.says
    del mac.packages["mlx-metal"]
    assert software._metal().level == WRONG


def test_rosetta(mac):
    assert software._python().level == OK
    mac.machine, mac.says["sysctl.proc_translated"] = "x86_64", "1\n"
    found = software._python()
    assert found.level == WRONG and "Rosetta" in found.says and "arm64" in found.remedy


# The machine


@pytest.mark.parametrize(
    ("megabytes", "level"), [("0", OK), ("12288", OK), ("15800", WRONG), ("no number", None)]
)
def test_wired_limit(mac, monkeypatch, megabytes, level):
    monkeypatch.setattr(limits, "memory_size", lambda: 16 * 2**30)
    mac.says["iogpu.wired_limit_mb"] = megabytes
    found = [f for f in device.devices() if f.name == "wired limit"]
    assert [f.level for f in found] == ([level] if level else [])
    if level == WRONG:
        assert found[0].remedy.endswith("sudo sysctl iogpu.wired_limit_mb=13107")


def test_no_wired_limit_elsewhere():
    if sys.platform != "darwin":
        assert limits.wired_limit() is None


def test_a_mac_without_gpu_is_wrong_and_linux_with_one_unused_is_told(mac, monkeypatch, tmp_path):
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert device._device().level == WRONG
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(device, "NVIDIA", tmp_path / "version")
    assert device._device().level == OK
    (tmp_path / "version").touch()
    found = device._device()
    assert found.level == NOTE and "mlxvlm[cuda13]" in found.remedy


def test_swap(mac):
    told = "total = 4096.00M  used = {}M  free = 1.00M  (encrypted)\n"
    for used, level in (("12.25", OK), ("3000.00", NOTE)):
        mac.says["vm.swapusage"] = told.format(used)
        assert [f.level for f in device.devices() if f.name == "swap"] == [level]
    mac.says["vm.swapusage"] = "something else"
    assert not [f for f in device.devices() if f.name == "swap"]


def test_power(mac, monkeypatch):
    mac.says |= {"-g batt": "Now drawing from 'Battery Power'\n 81%;", "-g": " lowpowermode  1\n"}
    battery, low = doctor._power()
    assert battery.level == low.level == NOTE
    assert "81%" in battery.says and battery.remedy == "Plug it in."
    assert "Low Power" in low.says and low.remedy.startswith("Turn it off")
    mac.says |= {"-g batt": "Now drawing from 'AC Power'\n", "-g": " lowpowermode  0\n"}
    assert [f.level for f in doctor._power()] == [OK]


# BLAS

MAPS = """\
7f00-7f01 r-xp 00000000 00:00 1 /opt/x/mlx_cpu.libs/libblas-bd8a282c.so.3.10.0
7f01-7f02 r-xp 00000000 00:00 1 {}
"""


def test_a_loaded_blas_is_seen(tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(MAPS.format("/usr/lib/x/openblas-pthread/libopenblasp-r0.3.21.so"))
    assert blas.loaded(maps) == "libopenblasp-r0.3.21.so"
    maps.write_text(MAPS.format("/usr/lib/openblas-notes/libc.so.6"))
    assert blas.loaded(maps) is None
    assert blas.loaded(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("loaded", "path", "better", "level", "word"),
    [
        ("libopenblas.so.0", None, None, OK, ""),
        (None, "/usr/lib/a b/libopenblas.so.0", 80e9, NOTE, "LD_PRELOAD='/usr/lib/a b/libopen"),
        (None, "/usr/lib/libopenblas.so.0", 5e9, OK, ""),
        (None, "/usr/lib/libopenblas.so.0", None, NOTE, "does not load"),
        (None, None, None, NOTE, "apt install"),
    ],
)
def test_what_to_do_about_blas(monkeypatch, loaded, path, better, level, word):
    monkeypatch.setattr(blas, "matmul_rate", lambda seconds: 4e9)
    monkeypatch.setattr(blas, "loaded", lambda: loaded)
    monkeypatch.setattr(blas, "available", lambda: Path(path) if path else None)
    monkeypatch.setattr(blas, "rate_with", lambda path: better)
    found = blas.blas()
    assert found.level == level and word in found.remedy and "4 GFLOP/s" in found.says


def test_a_rate_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(blas, "MEASURE", "import os; print(os.environ['LD_PRELOAD'].count('no'))")
    assert blas.rate_with(Path("/no/such.so")) == 1.0
    monkeypatch.setattr(blas, "MEASURE", "raise SystemExit(1)")
    assert blas.rate_with(Path("/no/such.so")) is None


# Disk and hub


@pytest.mark.parametrize(("free", "level"), [(10**8, WRONG), (5 * 10**9, NOTE), (10**11, OK)])
def test_room(monkeypatch, tmp_path, free, level):
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(access.shutil, "disk_usage", lambda path: usage)
    models, here = access.disks({"models": tmp_path / "a" / "b", "here": tmp_path})
    assert models.level == here.level == level
    assert ("HF_HOME" in models.remedy) == (level != OK) and "HF_HOME" not in here.remedy
    assert not (tmp_path / "a").exists()


@pytest.fixture
def endpoint(monkeypatch):
    """A hub that answers with 404, and counts."""
    import huggingface_hub
    from huggingface_hub import constants

    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.command)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    yield SimpleNamespace(asked=asked, server=server, constants=constants)
    server.shutdown()
    server.server_close()


def test_a_hub_that_answers(endpoint, monkeypatch):
    folder, reach, account = access.Hub().findings()
    assert reach.level == OK and "answers" in reach.says and endpoint.asked == ["HEAD"]
    assert account.level == OK and "hf auth login" in account.remedy
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    found = access.Hub().findings()
    assert found[2].level == OK and not found[2].remedy
    assert "secret" not in str(found)


def test_a_hub_that_does_not_answer_is_a_calm_note(endpoint, monkeypatch):
    monkeypatch.setattr(endpoint.constants, "ENDPOINT", "http://127.0.0.1:1")
    reach = access.Hub().findings()[1]
    assert reach.level == NOTE and reach.says.startswith("offline (")
    # One that says nothing at all is not waited for.
    monkeypatch.setattr(access, "PATIENCE", 0.05)
    monkeypatch.setattr(access.Hub, "_ask", lambda self: threading.Event().wait(1))
    reach = access.Hub().findings()[1]
    assert reach.level == NOTE and "no answer in 0.05 s" in reach.says


def test_offline_mode_asks_nothing(endpoint, monkeypatch):
    monkeypatch.setattr(endpoint.constants, "HF_HUB_OFFLINE", True)
    reach = access.Hub().findings()[1]
    assert reach.level == OK and "HF_HUB_OFFLINE" in reach.says and not endpoint.asked


# Numbers


def spoilt(layer, change):
    """Loads the tiny model; from the second time on with one of its layers changed."""
    loads = []

    def load():
        vlm = tiny_vlm()
        loads.append(vlm)
        if len(loads) > 1:
            module = vlm
            for name in layer.split("."):
                module = module[int(name)] if isinstance(module, list) else module[name]
            module.weight = change(module.weight)
        return vlm

    return load


def test_a_sound_device_agrees_with_itself_everywhere():
    found = numerics.compare(tiny_vlm, mx.cpu)
    assert not [one for one in found if one.wrong]
    exact = [one for one in found if one.dtype == "float32"]
    assert max(one.relative for one in exact) == 0
    # Half precision is felt in every layer, and a tower is never run in float16.
    halves = [one for one in found if one.dtype == "bfloat16"]
    assert len(halves) == len(exact) and min(one.relative for one in halves) > 1e-5
    assert {one.part for one in found if one.dtype == "float16"} == {
        "projector",
        "language",
        "operations",
    }
    rows = numerics.by_layer(found)
    wanted = [("vision", "embeddings"), ("vision", "layers 0"), ("vision", "layers 1")]
    wanted += [("vision", "post_layernorm"), ("projector", "in_proj"), ("projector", "layers 0")]
    wanted += [("projector", "layers 1"), ("projector", "norm"), ("projector", "out_proj")]
    wanted += [("language", "embedding"), ("language", "layers 0"), ("language", "layers 1")]
    wanted += [("language", "norm"), ("language", "head")]
    assert list(rows)[: len(wanted)] == wanted
    assert [layer for part, layer in rows if part == "operations"] == [*numerics.OPERATIONS]


@pytest.mark.parametrize(
    ("layer", "part", "named"),
    [
        ("vision.encoder.layers.1.self_attn.v_proj", "vision", "layers 1"),
        ("vision.embeddings.patch_embedding", "vision", "embeddings"),
        ("projector.layers.0.mlp.fc1", "projector", "layers 0"),
        ("projector.out_proj", "projector", "out_proj"),
        ("language.model.layers.0.mlp.down_proj", "language", "layers 0"),
        ("language.model.norm", "language", "norm"),
        ("language.lm_head", "language", "head"),
    ],
)
def test_a_layer_whose_result_is_false_is_named_and_no_other(layer, part, named):
    load = spoilt(layer, lambda weight: 1.2 * weight)
    found = numerics.compare(load, mx.cpu, (mx.float32, mx.bfloat16))
    findings = doctor.judge(found)
    assert [(f.name, f.level) for f in findings] == [(f"{part} {named}", WRONG)]
    assert "float32" in findings[0].says and "bfloat16" in findings[0].says
    assert "MLX" in findings[0].remedy


def test_what_is_not_finite_or_fails_is_wrong(monkeypatch):
    found = numerics.compare(
        spoilt("projector.in_proj", lambda w: w * float("nan")), mx.cpu, (mx.float32,)
    )
    assert [f.name for f in doctor.judge(found)] == ["projector in_proj"]
    assert describe(doctor.Checkup(differences=found))["differences"]

    def fails(dtype):
        if dtype == mx.bfloat16:
            raise RuntimeError("[METAL] Command buffer execution failed: Internal Error\nmore")
        return mx.ones(3)

    monkeypatch.setattr(numerics, "OPERATIONS", {"attention": fails})
    found = numerics.compare(tiny_vlm, mx.cpu, (mx.bfloat16,))
    (finding,) = doctor.judge(found)
    assert finding.name == "operations attention" and "Internal Error" in finding.says
    text = json.dumps(describe(doctor.Checkup([finding], found)), allow_nan=False)
    assert [d for d in json.loads(text)["differences"] if d["relative"] is None]
    assert "none !" in page(doctor.Checkup([finding], found), 80)


@pytest.mark.parametrize("kind", ["mlp", "resampler", "c_abstractor"])
def test_other_projectors_have_layers_too(kind):
    size = {"hidden_size": 32} if kind == "c_abstractor" else {}
    tokens = {} if kind == "mlp" else {"num_query_tokens": 4}
    heads = {"num_attention_heads": 2} if kind == "resampler" else {}
    config = tiny_config(projector=ProjectorConfig(type=kind, **size, **tokens, **heads))
    found = numerics.compare(lambda: tiny_vlm_of(config), mx.cpu, (mx.float32,))
    assert len([one for one in found if one.part == "projector"]) >= 2
    assert max(one.relative for one in found) == 0


def tiny_vlm_of(config):
    from mlxvlm.model import VLM

    mx.random.seed(1)
    vlm = VLM(config, tiny_vlm().tokenizer)
    mx.eval(vlm.parameters())
    return vlm.eval()


def test_a_gpu_is_compared(monkeypatch, tmp_path):
    """On a machine whose GPU is its CPU, but for the name."""
    save(tiny_vlm(), tmp_path)
    real = numerics.compare
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(numerics, "compare", lambda load: real(load, mx.cpu, FLOATS[:2]))
    differences, (finding,) = doctor._compare(tmp_path, lambda what: None)
    assert finding.level == OK and "18 layers and operations agree" in finding.says
    assert "0 in float32" in finding.says and "in bfloat16" in finding.says
    assert {one.dtype for one in differences} == {"float32", "bfloat16"}


def test_recording_leaves_the_model_as_it_was():
    vlm = tiny_vlm()
    kinds = [type(module) for module in vlm.modules()]
    calls = numerics.record(vlm)
    assert [type(module) for module in vlm.modules()] == kinds
    args, _, out = calls["vision.encoder.layers.0.mlp"]
    assert np.array_equal(np.array(vlm.vision.encoder.layers[0].mlp(*args)), np.array(out))


# The command


@pytest.fixture
def quiet(monkeypatch):
    """No network, no library sought, and no token looked for."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(blas, "blas", lambda: Finding("Machine", "BLAS", OK, "4 GFLOP/s"))
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_nothing_wrong_is_exit_code_0(quiet):
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    assert "Nothing is wrong." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "  ok    mlx " in done.stdout
    if mx.default_device() == mx.cpu:
        assert "not checked: there is no GPU here" in " ".join(done.stdout.split())


def test_something_wrong_is_exit_code_1_and_json_says_it(quiet):
    quiet.setattr(software, "KNOWN", {"mlx": ("99", "")})
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["wrong"] == 1
    (bad,) = [f for f in told["findings"] if f["level"] == WRONG]
    assert bad["name"] == "mlx" and "pip install 'mlx>=99'" in bad["remedy"]
    assert {f["level"] for f in told["findings"]} <= set(LEVELS)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1 and "1 thing is wrong." in done.stdout and "WRONG" in done.stdout


def test_mlx_that_cannot_be_imported_is_a_finding(quiet, tmp_path):
    quiet.setitem(sys.modules, "mlx.core", None)
    quiet.setattr(doctor, "missing_backend", lambda error: "MLX is not installed. Install one.")
    found = doctor.examine(tmp_path, tmp_path)
    assert [(f.name, f.says) for f in found.wrong] == [("device", "MLX is not installed")]
    assert {"Software", "Machine", "Disk", "Hub"} == {f.area for f in found.findings}


def test_a_command_is_never_broken():
    command = "export LD_PRELOAD=" + "/usr/lib" * 12
    finding = Finding("Machine", "BLAS", NOTE, "slow " * 30, f"with it {'all ' * 30}:\n{command}")
    lines = page(doctor.Checkup([finding]), 80).splitlines()
    assert [line for line in lines if line.strip() == command]
    assert max(len(line) for line in lines if command not in line) <= 80


def test_the_table_of_layers_fits_80_columns():
    found = [
        Difference("vision", "encoder.layers.11.self_attn", dtype, 0.5, limit)
        for dtype, limit in (("float32", 1.0), ("bfloat16", 0.1))
    ]
    found += [Difference("operations", name, "bfloat16", 1e-3, 1) for name in numerics.OPERATIONS]
    text = page(doctor.Checkup([Finding("GPU", "demo", UNCHECKED, "no " * 60)], found), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "vision, layers 11" in text and "5e-01 !" in text and "not checked: no" in text
