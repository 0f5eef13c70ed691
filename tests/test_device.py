"""What a launcher may ask for, who decides the precision, and `once` in a world of one.

Several processes are in `tests/numerics/test_processes.py` and, under real launchers, `tests/test_commands.py`.
"""

from __future__ import annotations

import pytest
import torch

from cytoclip import device
from cytoclip.device import World
from cytoclip.errors import ExitCode, UserError
from tests.group import started

ALONE = World(torch.device("cpu"))

# What accelerate 1.15 sets in a launched process for each thing that we don't do, and the word that names it.
REFUSED = {
    ("ACCELERATE_USE_DEEPSPEED", "true"): "DeepSpeed",
    ("ACCELERATE_USE_MEGATRON_LM", "true"): "Megatron",
    ("ACCELERATE_USE_FSDP", "true"): "FSDP",
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"): "parallelism",
    ("ACCELERATE_MIXED_PRECISION", "fp8"): "fp8",
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"): "INDUCTOR",
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"): "4 gradient accumulation steps",
}

HARMLESS = {
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_USE_CPU": "true",
}


def test_every_variable_that_is_looked_at_has_a_case() -> None:
    assert {variable for variable, _ in REFUSED} >= set(device._REFUSED)
    assert len(REFUSED) == 7


@pytest.mark.parametrize(("setting", "named"), REFUSED.items(), ids=str)
def test_what_a_launcher_asks_for_and_we_do_not_do_is_refused(setting: tuple[str, str], named: str) -> None:
    """Ignored, it would train something else than the user believes."""
    variable, value = setting
    for written in {value, value.upper(), value.lower()}:
        with pytest.raises(UserError, match=r"(?i)launcher asks for") as caught:
            device.refuse_launcher({**HARMLESS, variable: written})
        assert named.lower() in caught.value.message.lower()
        assert caught.value.code is ExitCode.SYSTEM
        assert ("train.shard=true" in caught.value.hint) == (named == "FSDP")
        assert "leave it out" in caught.value.hint or named in ("fp8", "4 gradient accumulation steps")


def test_what_a_launcher_sets_anyway_is_accepted() -> None:
    device.refuse_launcher({})
    device.refuse_launcher(HARMLESS)
    device.refuse_launcher({"ACCELERATE_USE_DEEPSPEED": "0", "ACCELERATE_DYNAMO_BACKEND": "no"})
    with pytest.raises(UserError):  # and the same dictionary can be refused
        device.refuse_launcher({**HARMLESS, "ACCELERATE_USE_FSDP": "1"})


def test_start_looks_at_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP"):
        device.start("cpu", "no")


def test_float32_convolutions_are_float32() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch before 2.9 has one switch for all of cuDNN")
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.deterministic = "tf32", False
    try:
        device.start("cpu", "no")
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.deterministic, "or a run with whole towers is not repeated bit for bit"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_precision_is_what_is_written_else_the_launchers_else_the_devices(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "best_precision", {"cpu": "no", "cuda": "bf16"}.get)
    launched = {"ACCELERATE_MIXED_PRECISION": "FP16"}
    assert device.settle_precision("no", launched, kind) == ("no", "the configuration")
    assert device.settle_precision("bf16", {}, kind) == ("bf16", "the configuration")
    assert device.settle_precision("auto", launched, kind) == ("fp16", "the launcher")
    assert device.settle_precision("auto", {"ACCELERATE_MIXED_PRECISION": "no"}, kind) == ("no", "the launcher")
    for nothing in ({}, {"ACCELERATE_MIXED_PRECISION": ""}):
        best = {"cpu": "no", "cuda": "bf16"}[kind]
        assert device.settle_precision("auto", nothing, kind) == (best, "the device")


@pytest.mark.parametrize(
    ("asked", "message", "hint"),
    [
        (("cpu", "bananas"), "precision 'bananas' is none of no, fp16, bf16, auto", "auto chooses"),
        (("cpu", "fp32"), "precision 'fp32' is none of", "did you mean no?"),
        (("cpu", torch.bfloat16), "precision torch.bfloat16 is none of", "did you mean bf16?"),
        (("cpu", None), "precision None is none of", "auto chooses"),
        (("gpu", "no"), "device 'gpu' is none of cuda, mps, cpu, auto", "did you mean cuda?"),
        (("cuda:1", "no"), "device 'cuda:1' is none of", "did you mean cuda?"),
        (("x" * 500, "no"), "device 'xxx", "auto chooses"),
    ],
)
def test_what_is_no_precision_or_device_is_refused(asked: tuple[str, str], message: str, hint: str) -> None:
    """A precision that is not understood was computed in float32, and recorded under its own name."""
    with pytest.raises(UserError) as caught:
        device.start(*asked)
    assert caught.value.message.startswith(message)
    assert len(caught.value.message) < 200
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("kind", "cuda_bf16", "avx512", "amx", "best"),
    [
        ("cuda", True, False, False, "bf16"),
        ("cuda", False, True, True, "fp16"),
        ("cpu", True, False, False, "no"),  # emulated, it is slower than float32
        ("cpu", False, True, False, "bf16"),
        ("cpu", False, False, True, "bf16"),
        ("mps", True, True, True, "no"),
    ],
)
def test_best_precision_is_what_the_hardware_multiplies(
    kind: str, cuda_bf16: bool, avx512: bool, amx: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return cuda_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert device.best_precision(kind) == best


def units(monkeypatch: pytest.MonkeyPatch, **there: bool) -> None:
    for precision, has in there.items():
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", lambda has=has: has)


def test_a_precision_without_units_is_said_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 on a processor with AVX2 alone is a hundred times slower than float32, and nothing shows why."""
    said: list[str] = []
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    units(monkeypatch, bf16=False, fp16=False)
    assert device.start("cpu", "bf16", warn=said.append).precision == "bf16"
    assert device.start("cpu", "auto", warn=said.append).precision == "fp16"
    assert device.start("cpu", "no", warn=said.append).precision == "no"
    assert [line.partition(": ")[0] for line in said] == [
        "this processor has no units for bf16 (from the configuration)",
        "this processor has no units for fp16 (from the launcher)",
    ]
    assert all("precision no" in line for line in said)
    units(monkeypatch, bf16=True)
    device.start("cpu", "bf16", warn=said.append)
    assert len(said) == 2
    with pytest.warns(UserWarning, match="no units for fp16"):  # in Python, where no console is
        device.start("cpu", "fp16")


def test_only_a_processor_imitates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    units(monkeypatch, bf16=False, fp16=True)
    asked = [("bf16", "cpu"), ("fp16", "cpu"), ("no", "cpu"), ("auto", "cpu"), ("bf16", "cuda")]
    assert [device.imitates(*one) for one in asked] == [True, False, False, False, False]
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    monkeypatch.setattr(type(torch.ops.mkldnn), "__getattr__", _refused)
    assert not device.imitates("bf16", "cpu"), "a torch without oneDNN does not say"


def _refused(*_: object) -> None:
    raise AttributeError


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"no {kind} device") as caught:
        device.start(kind)
    assert "cpu" in caught.value.hint
    assert kind not in caught.value.hint
    assert caught.value.code is ExitCode.SYSTEM


def test_auto_takes_the_fastest_there_and_the_cpu_where_the_launcher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device._device_kind("auto") == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert device._device_kind("auto") == "cpu"
    with pytest.raises(UserError, match=r"train\.device is cuda but the launcher asks for the CPU"):
        device._device_kind("cuda")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device._device_kind("auto") == "mps"


def test_start_alone_is_a_world_of_one() -> None:
    world = device.start("cpu", "no")
    assert (world.device.type, world.rank, world.size, world.first) == ("cpu", 0, 1, True)
    assert (world.precision, world.precision_from) == ("no", "the configuration")


def test_processes_that_did_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train a model of its own and overwrite the other's run folder."""
    device.start("cpu", "no")  # a world of one, which accelerate remembers for this process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes, but 1 found") as caught:
        device.start("cpu", "no")
    assert "torchrun" in caught.value.hint


def test_once_passes_results_and_errors() -> None:
    calls: list[int] = []
    assert ALONE.once(lambda: calls.append(1)) is None
    assert ALONE.once(lambda: "what it found") == "what it found"
    assert calls == [1]
    error = UserError("what", "do", ExitCode.DATA)

    def refuses() -> None:
        raise error

    def breaks() -> None:
        raise ZeroDivisionError

    with pytest.raises(UserError) as caught:
        ALONE.once(refuses)
    assert caught.value is error
    with pytest.raises(ZeroDivisionError):
        ALONE.once(breaks)


def test_alone_gathers_and_sums_what_it_has() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    gathered = ALONE.gather(rows)
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    ALONE.sum_gradients([parameter])
    assert parameter.grad.tolist() == [3.0, 3.0]
    assert ALONE.sum_(torch.ones(2)).tolist() == ALONE.max_(torch.ones(2)).tolist() == [1.0, 1.0]
    assert torch.equal(ALONE.sum_to_own(rows), rows)


SUMS = """
import torch
from cytoclip import device
world = device.start("cpu", "no")
used, unused, frozen = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
used.grad = torch.tensor([1.0, 10.0]) * (world.rank + 1)
frozen.requires_grad_(False)
world.sum_gradients([unused, used, frozen])
world.sum_gradients([unused, frozen])
assert world.max_(torch.tensor([world.rank, -world.rank])).tolist() == [1, 0]
own = world.sum_to_own(torch.arange(8.0).view(4, 2) * (world.rank + 1))
assert own.tolist() == (3 * torch.arange(8.0).view(4, 2))[2 * world.rank : 2 * world.rank + 2].tolist()
assert used.grad.tolist() == [3.0, 30.0], used.grad
assert unused.grad is None and frozen.grad is None
print("done")
"""


def test_a_parameter_without_gradient_keeps_none_on_several_processes() -> None:
    """As on one: filled with zeros, AdamW would decay it on several processes only."""
    with started(SUMS, []) as group:
        for process in group:
            out, said = process.communicate(timeout=100)
            assert (process.returncode, out) == (0, "done\n"), said


MEETS = """
import os, sys, time
from datetime import timedelta
from cytoclip import device
from cytoclip.errors import UserError
if os.environ["RANK"] == "{absent}":
    sys.exit()
device.MEETING = timedelta(seconds=4)
try:
    world = device.start("cpu", "no")
    time.sleep(6 * world.rank)
    world.wait()
except UserError as error:
    print(error.code.value, error.message, error.hint)
"""


@pytest.mark.slow  # processes that wait for each other: 10 s each
@pytest.mark.parametrize("absent", [0, 1])
def test_a_process_that_does_not_come_is_not_waited_for_long(absent: int) -> None:
    with started(MEETS.format(absent=absent), []) as group:
        out, said = group[1 - absent].communicate(timeout=100)
    assert out.startswith("7 the processes of this run did not meet: "), said
    assert "MASTER_ADDR" in out


@pytest.mark.slow  # processes that wait for each other: 15 s
def test_one_that_came_may_take_its_time() -> None:
    """Longer than they had to meet: the first process reads all data while the others wait."""
    with started(MEETS.format(absent=None), []) as group:
        for process in group:
            out, said = process.communicate(timeout=100)
            assert (process.returncode, out) == (0, ""), said


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_the_precision(precision: str, dtype: torch.dtype) -> None:
    with World(torch.device("cpu"), precision=precision).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


PARTS = """
import atexit, torch.distributed as dist
atexit.register(lambda: print("still there" if dist.is_initialized() else "ended before"))
from cytoclip import device
device.start("cpu", "no").wait()
"""


def test_the_group_ends_before_python_does() -> None:
    """Else its threads let go of tensors in a Python that shuts down, which aborts 1 process in 20."""
    with started(PARTS, []) as group:
        said = [process.communicate(timeout=120)[0] for process in group]
    assert [process.returncode for process in group] == [0, 0]
    assert said == ["ended before\n"] * 2


FORKS = """
import os, time
from cytoclip import device
slept, sleep = [], time.sleep
time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))
world = device.start("cpu", "no")
slept.clear()
for _ in range(2):
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)
print(slept)
"""


def test_a_group_settles_before_it_forks() -> None:
    """Else a thread of its own may hold Python's lock of all thread states in that moment, for good in the child."""
    with started(FORKS, []) as group:
        said = [process.communicate(timeout=120)[0] for process in group]
    assert said == [f"{[device._SETTLING] * 2}\n"] * 2
    with started(FORKS, [], 1) as alone:
        assert alone[0].communicate(timeout=120)[0] == "[]\n"
