"""Ahead-of-time compilation: counting collectives in a compiled program, and wrong arguments."""

import importlib.util
import json
import re
import subprocess
import threading

import pytest

from moss_jax.cli import main
from moss_jax.compile import CompileRequest, compile_function
from moss_jax.compile.hlo import collectives

HLO = """HloModule jit_run, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%layer (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %all-reduce.1 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-reduce(%fusion), channel_id=1, to_apply=%add
  %start = (bf16[2,16]{1,0}, bf16[8,16]{1,0:T(8,128)}) all-gather-start(%x), dimensions={0}
  %done = bf16[8,16]{1,0} all-gather-done(%start)
}

%below (p: (s32[], bf16[8,16])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(32)
  %p = (s32[], bf16[8,16]) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %constant.1), direction=LT, metadata={op_name="while/cond"}
}

%row (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %pair = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add
  %while.1 = (s32[], bf16[8,16]) while(%p), condition=%below, body=%layer
}

%more (p: (s32[], bf16[8,16])) -> pred[] {
  %constant.2 = s32[] constant(500)
  %less = pred[] compare(%a, %constant.2), direction=LT
  ROOT %and = pred[] and(%less, %running)
}

%taken (p: s32[3]) -> s32[3] {
  %permuted = s32[3]{0} collective-permute(%p), source_target_pairs={{0,1}}
}

%beside (p: s32[3]) -> s32[5] {
  %all-gather.9 = s32[5]{0} all-gather(%p), dimensions={0}, frontend_attributes={chain_id="9"}
}

%beside2 (p: s32[3]) -> s32[5] {
  %all-to-all.9 = s32[5]{0} all-to-all(%p), dimensions={0}
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %while.2 = (s32[], bf16[8,16]) while(%p), condition=%more, body=%row
  %while.3 = (s32[], bf16[8,16]) while(%p), condition=%c, body=%taken, backend_config={"known_trip_count":{"n":"5"}}
  %sent = s32[5] async-start(%a), calls=%beside2
  %awaited = s32[5] async-done(%sent), calls=%beside2
  %begin = s32[5] fusion(%a), kind=kCustom, calls=%beside
  %middle = s32[5] fusion(%begin), kind=kCustom, calls=%beside
  %choice = s32[3] conditional(%which, %a, %b), branch_computations={%taken, %add}
}
"""


def test_collectives_are_counted_for_every_iteration_of_a_loop():
    assert collectives(HLO) == {
        "all-reduce": {"count": 33, "bytes": 32 * 256 + 40},
        "all-gather": {"count": 33, "bytes": 32 * 256 + 20},
        "collective-permute": {"count": 6, "bytes": 6 * 12},
        "all-to-all": {"count": 1, "bytes": 20},
    }


RING = """HloModule jit_step, is_scheduled=true

%body (p: (bf16[1,512,16], u32[], /*index=2*/u32[])) -> (bf16[1,512,16], u32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (bf16[1,512,16], u32[], u32[]) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p), index=1
  %one = (bf16[1,512,16], bf16[1,512,16], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %other = (bf16[1,512,16], bf16[1,512,16], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1}}
  %next = u32[]{:T(128)} add(%counter, STEP)
  ROOT %out = (bf16[1,512,16]{2,1,0:T(8,128)(2,1)}, u32[], u32[]) tuple(%done, %next, /*index=2*/%rest), metadata={}
}

%below (p: (bf16[1,512,16], u32[], u32[])) -> pred[] {
  %four = u32[]{:T(128)} constant(4)
  %p = (bf16[1,512,16], u32[], u32[]) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %lt = pred[]{:T(512)} compare(%counter, %four), direction=LT
}

ENTRY %main (p: bf16[8,16]) -> bf16[8,16] {
  %while = (bf16[1,512,16], u32[], u32[]) while(%p), condition=%below, body=%body
}
"""


@pytest.mark.parametrize(("step", "rounds"), [("%two", 2), ("%unknown", 4)])
def test_iterations_of_a_loop_with_a_counter_step_of_two(step, rounds):
    size = 512 * 16 * 2
    expected = {"collective-permute": {"count": 2 * rounds, "bytes": 2 * rounds * size}}
    assert collectives(RING.replace("STEP", step)) == expected


def test_progress_is_reported_during_compilation(monkeypatch):
    def slow(*arguments, **keywords):
        assert reported.wait(60)
        return subprocess.CompletedProcess(arguments, 0, stdout='{"fits": true}\n', stderr="")

    def say(line):
        lines.append(line)
        reported.set()

    lines = []
    reported = threading.Event()
    monkeypatch.setattr(CompileRequest, "check", lambda self: None)
    monkeypatch.setattr(subprocess, "run", slow)
    assert compile_function(CompileRequest("decode"), say, every=0.01) == {"fits": True}
    assert re.fullmatch(r"compiling decode for v5e:2x4: \d+ s so far", lines[0])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["train"], "unknown function 'train', expected one of prefill, decode"),
        (["decode", "--size", "9b"], "unknown model size '9b', expected one of 8b, tiny"),
        (["decode", "--batch", "0"], "batch is 0, expected at least 1"),
        (["stage1", "--accumulate", "0"], "accumulate is 0, expected at least 1"),
        (["stage1", "--remat", "some"], "remat is 'some', expected one of none, dots, full"),
        (["stage2", "--mfu", "0"], "mfu is 0.0, expected above 0 and at most 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, problem, capsys):
    assert main(["compile", *arguments]) == 2
    assert problem in capsys.readouterr().err.splitlines()[0]


def test_a_missing_libtpu_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["compile", "decode"]) == 2
    assert "libtpu is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_model_compiles_and_a_wrong_topology_is_refused(capsys, tmp_path):
    pytest.importorskip("libtpu")
    output = tmp_path / "decode.json"
    arguments = ["compile", "decode", "--size", "tiny", "--context", "64", "--batch", "2", "-o", str(output)]
    assert main([*arguments, "--topology", "v5e:2x2", "--data", "2"]) == 0
    result = json.loads(output.read_text())
    assert (
        result["fits"] and result["mesh"] == {"data": 2, "tensor": 2} and result["collectives"]["all-reduce"]["count"]
    )
    step = ["compile", "stage1", "--size", "tiny", "--context", "64", "--batch", "4", "--topology", "v5e:2x2", "-o"]
    assert main([*step, str(output), "--fsdp", "2", "--accumulate", "2"]) == 0
    result = json.loads(output.read_text())
    assert result["mesh"] == {"fsdp": 2, "sequence": 2} and result["tokens"] == 256 and result["step_flop"] > 0
    capsys.readouterr()
    assert main([*step, str(output), "--fsdp", "3"]) == 2
    assert "mesh data 1 x fsdp 3" in capsys.readouterr().err
    assert main([*arguments, "--topology", "v9:2x2"]) == 2
    assert "unknown topology 'v9:2x2'" in capsys.readouterr().err
