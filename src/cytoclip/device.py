"""Where the work runs: device, precision, processes, and the few things that processes say to each other.

Letters: W processes, n rows of one process, D columns.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, distribute_tensor

from cytoclip import slurm
from cytoclip.errors import ExitCode, UserError, counted, nearest, shown

_SETTLING = 0.02  # seconds: a thousand times as long as it takes
T = TypeVar("T")
MEETING = timedelta(minutes=10)  # for all processes to be there
PATIENCE = timedelta(days=1)  # in a collective call; `liveness.py` sees much earlier that a process is gone
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("no", *DTYPES, "auto")

_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


@dataclass(frozen=True)
class World:
    """This process among all: its device, its rank, and the arithmetic of the towers.

    Parameters
    ----------
    device
        Where tensors live.
    rank, size
        Which process this is of how many.
    precision, precision_from
        `no`, `fp16` or `bf16`, and who said so.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    precision: str = "no"
    precision_from: str = "the configuration"

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def arithmetic(self) -> str:
        """For people: the precision, and who said so."""
        return f"precision {self.precision} (from {self.precision_from})"

    def autocast(self) -> torch.autocast:
        """The context in which the towers run; everything else is float32."""
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def loaders(self, wanted: int | None) -> int:
        """Processes that decode for this one: as wanted, else its share of the machine's cores, at most 4."""
        if wanted is not None:
            return wanted
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return min(4, max(1, (os.cpu_count() or 1) // here))

    def once(self, work: Callable[[], T]) -> T:
        """Do `work` in the first process; all processes get its result.

        A `UserError` ends all of them, and only the first one speaks.
        """
        if self.size == 1:
            return work()
        outcome: list[T | UserError | None] = [None]
        if self.first:
            try:
                outcome = [work()]
            except UserError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], UserError):
            raise outcome[0] if self.first else SystemExit(int(outcome[0].code))
        return outcome[0]  # type: ignore[return-value]  # None only where T is

    def gather(self, rows_nD: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, in the order of the ranks: (n, ...) → (W·n, ...). Without gradient."""
        if self.size == 1:
            return rows_nD.detach()
        parts = [torch.empty_like(rows_nD) for _ in range(self.size)]
        dist.all_gather(parts, rows_nD.detach().contiguous())
        return torch.cat(parts)

    def listed(self, own: list[T]) -> list[T]:
        """The objects of all processes, in the order of the ranks; for what is small and rare."""
        if self.size == 1:
            return own
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, own)
        return [each for part in parts for each in part]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_to_own(self, rows_BD: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of this process's rows of a batch: (B, ...) → (B / W, ...)."""
        if self.size == 1:
            return rows_BD
        own_bD = rows_BD.new_empty(len(rows_BD) // self.size, *rows_BD.shape[1:])
        dist.reduce_scatter_tensor(own_bD, rows_BD)
        return own_bD

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The largest of all processes' numbers at each place, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers, in each of them."""
        return number if self.size == 1 else int(self.max_(torch.tensor(number, device=self.device)))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in one message.

        One flat message instead of DDP's reducer: the encoder may then run as often and in whatever parts it likes,
        and the logit scale, whose gradient comes from the loss and not from a forward, is summed like the rest.

        A parameter without a gradient keeps none, as on one process (a zero would let AdamW decay it): all processes
        run the same forward, so they have the same ones. What is sharded (`shard.py`) was summed in the backward pass.
        """
        if self.size == 1:
            return
        own = [parameter.grad for parameter in parameters if parameter.grad is not None]
        gradients = [gradient for gradient in own if not isinstance(gradient, DTensor)]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@dataclass(frozen=True)
class RandomState:
    """Torch's random states that a forward pass may draw from: the CPU's, and a GPU's where the work is on one."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)


def placed(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of `whole` where `like` is, and sharded as it is: a DTensor is not filled from a plain tensor."""
    there = whole.to(like.device, copy=True)
    return distribute_tensor(there, like.device_mesh, like.placements) if isinstance(like, DTensor) else there


def start(
    device: str = "auto",
    precision: str = "auto",
    said_by: str = "the configuration",
    warn: Callable[[str], None] = warnings.warn,
) -> World:
    """Join the processes that the launcher started, and settle device and precision.

    `warn` is told of a precision that this processor only imitates; it is kept, since somebody asked for it.

    Raises
    ------
    UserError
        For what the launcher was told and we don't do, a precision or device that is none or not there, or processes
        that cannot meet.
    """
    _refuse_unknown("precision", precision, PRECISIONS)
    slurm.adopt(os.environ)
    refuse_launcher(os.environ)
    kind = _device_kind(device)
    wanted, here = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "cuda" and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on this machine, which has {counted(torch.cuda.device_count(), 'GPU')}",
            f"start {torch.cuda.device_count()} here, or set train.device=cpu",
            ExitCode.SYSTEM,
        )
    _plain_convolutions()
    state = _meet(kind)
    if state.num_processes != wanted:
        raise UserError(
            f"the launcher started {wanted} processes, but {state.num_processes} found each other",
            "start one process a device: torchrun --nproc_per_node N train.py …",
            ExitCode.SYSTEM,
        )
    chosen, source = settle_precision(precision, os.environ, kind)
    source = source if precision == "auto" else said_by
    if state.is_main_process and imitates(chosen, kind):
        slower = "it multiplies a hundred times slower than in float32, which is precision no"
        warn(f"this processor has no units for {chosen} (from {source}): {slower}")
    return World(state.device, state.process_index, state.num_processes, chosen, source)


def hardware(device: torch.device) -> dict[str, Any]:
    """What the numbers of speed were measured on: processor, cores and memory of this machine, and its GPU."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: dict[str, Any] = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9, 1)}
    return found


def _meet(kind: str) -> PartialState:
    """Find the other processes. Soon or not at all; but once met, the first may hash millions of pictures meanwhile."""
    try:
        # Without cpu=True, PartialState leaves several CPU processes of torchrun each in a world of its own.
        state = PartialState(cpu=kind == "cpu", timeout=MEETING)
        if state.num_processes > 1:
            dist.barrier()  # NCCL connects in its first exchange
            _set_pg_timeout(PATIENCE)
            atexit.register(_part)
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the processes of this run did not meet: {reason}",
            f"start them all within {MEETING.total_seconds() / 60:.0f} minutes, with the first one's MASTER_ADDR and "
            "MASTER_PORT; the message of one that ended says why",
            ExitCode.SYSTEM,
        ) from None
    return state


def _settle() -> None:
    """Before a loader process is forked, let the group's threads let go of what was just sent.

    One that drops the last reference to a message's tensor makes itself known to Python, under a lock that a fork in
    that moment leaves locked in the child for good: a worker that never reads, and a run that waits for it (seen once
    in some hundred groups, CPython 3.11.7, gloo; docs/log.md).
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        time.sleep(_SETTLING)


if hasattr(os, "register_at_fork"):  # where there are forks; once, however many runs this process has
    os.register_at_fork(before=_settle)


def _part() -> None:
    """End the group while Python still runs.

    Its threads hold the last message's tensors, and one that lets go of them while Python shuts down ends the process
    by SIGABRT ("terminate called without an active exception"): 1 exit in 20 with gloo, torch 2.13 (docs/log.md).
    """
    gc.collect()  # a sharded model that an error's traceback still holds keeps the group alive
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.1)  # for threads that have just handed over a message to let go of it while Python is there


def _plain_convolutions() -> None:
    """float32 convolutions in float32, as matrix products are, and the same bits each time.

    cuDNN may use TF32, of 10 bits, where nobody says so; and its weight gradient of the patch convolution was the one
    thing by which a run on a GPU was not repeated bit for bit (`bench/gpu.py --only repeats`; it cost no time there).
    """
    torch.backends.cudnn.deterministic = True
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    else:  # before torch 2.9, which raises for who mixes the two ways
        torch.backends.cudnn.allow_tf32 = False


def keep_memory() -> None:
    """Let freed memory stay with this process: a step of training wants the same amount again.

    glibc gives large tensors back to the system and asks for new, cleared pages at each allocation: 5 % of a step on a
    CPU (docs/log.md, 2026-11-26). Other C libraries have no `mallopt`, and are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def refuse_launcher(environment: Mapping[str, str]) -> None:
    """Raise `UserError` for a launcher setting that would otherwise be ignored silently."""
    leave_out = "leave it out of `accelerate config` or of the command"
    hint = f"{leave_out}; README, section Launchers, says what works"
    for variable, name in _REFUSED.items():
        if environment.get(variable, "false").lower() in ("true", "1"):
            hint = f"{leave_out}, and set train.shard=true, which does the same" if name == "FSDP" else hint
            raise UserError(f"the launcher asks for {name}, which is not supported here", hint, ExitCode.SYSTEM)
    if environment.get("ACCELERATE_MIXED_PRECISION", "no").lower() not in ("no", "fp16", "bf16"):
        asked = environment["ACCELERATE_MIXED_PRECISION"]
        raise UserError(f"the launcher asks for precision {asked}", "use no, fp16 or bf16", ExitCode.SYSTEM)
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower() != "no":
        asked = environment["ACCELERATE_DYNAMO_BACKEND"]
        raise UserError(f"the launcher asks for torch.compile with {asked}", hint, ExitCode.SYSTEM)
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        raise UserError(
            f"the launcher asks for {accumulation} gradient accumulation steps, which changes the contrastive batch",
            "set train.batch_size: it is the number of pairs contrasted in one step",
            ExitCode.SYSTEM,
        )


def settle_precision(written: str, environment: Mapping[str, str], kind: str) -> tuple[str, str]:
    """The precision and who decided it: the configuration, else the launcher, else what the device does best."""
    if written != "auto":
        return written, "the configuration"
    launched = environment.get("ACCELERATE_MIXED_PRECISION")
    if launched:
        return launched.lower(), "the launcher"
    return best_precision(kind), "the device"


def best_precision(kind: str) -> str:
    """bf16 where the device multiplies it in hardware; fp16 on older GPUs; float32 elsewhere."""
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if kind == "cpu":
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if has_bf16 else "no"
    return "no"


def imitates(precision: str, device: str = "auto") -> bool:
    """Whether `precision` has no units on `device`: products of 1024 columns were 140 times slower than in float32.

    That was with AVX2 alone (docs/log.md, 2026-11-26); with plain AVX-512 oneDNN has kernels of its own.
    """
    has_kernels = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return precision in DTYPES and _device_kind(device) == "cpu" and has_kernels is not None and not has_kernels()


def _refuse_unknown(what: str, given: object, known: Iterable[str]) -> None:
    """Raise `UserError` for a word that is none of the known ones: what is not understood would be ignored."""
    if given not in tuple(known):
        near = nearest(str(given).removeprefix("torch.").partition(":")[0], known)
        raise UserError(
            f"{what} {shown(given)} is none of {', '.join(known)}",
            f"did you mean {near}?" if near else "auto chooses the best that is here",
        )


def _device_kind(device: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    _refuse_unknown("device", device, (*there, "auto"))
    if device == "auto":
        launcher_wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        return "cpu" if launcher_wants_cpu else next(kind for kind, present in there.items() if present)
    if device != "cpu" and os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        raise UserError(
            f"train.device is {device} but the launcher asks for the CPU",
            "leave out one of train.device and --cpu",
            ExitCode.SYSTEM,
        )
    if not there[device]:
        usable = ", ".join(kind for kind, present in there.items() if present)
        raise UserError(f"there is no {device} device here", f"usable here: {usable}", ExitCode.SYSTEM)
    return device
