"""The few collectives that the trainer needs; with one process each returns its input."""

import os
import pickle
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from axpo.rendezvous import meet

T = TypeVar("T")


def initialise(device: torch.device, timeout_s: float = 1800.0) -> None:
    """Joins the launcher's process group, or makes a group of one where there is none; NCCL on CUDA, gloo on the CPU.

    A launcher is torchrun, or whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Args:
        timeout_s: longest wait for another rank, here and in every later collective.

    Raises:
        ValueError: the group cannot be formed; the message says what to do.
    """
    if dist.is_initialized():
        return
    backend, timeout = ("nccl" if device.type == "cuda" else "gloo"), timedelta(seconds=timeout_s)
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError("this torch has CUDA but no NCCL: install a Linux CUDA build of torch from pytorch.org")
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        store, here, size = meet(timeout)
        dist.init_process_group(backend, store=store, rank=here, world_size=size, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address, port = (os.environ.get(name, "unset") for name in ("MASTER_ADDR", "MASTER_PORT"))
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"MASTER_PORT {port}: the port is in use on {socket.gethostname()}, by another run perhaps; set "
                "MASTER_PORT to a free one for all ranks, or let torchrun find one (torchrun --standalone)"
            ) from None
        raise ValueError(
            f"rank {os.environ['RANK']} on {socket.gethostname()} did not reach all {os.environ['WORLD_SIZE']} ranks "
            f"over MASTER_ADDR {address}, MASTER_PORT {port}, within run.timeout_s = {timeout_s:g} s "
            f"({str(error).splitlines()[0]}); check that every node was started and can reach that address"
        ) from None


def be_deterministic() -> None:
    """Only algorithms whose bits are the same in every run from here on; torch raises where an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)


def device() -> torch.device:
    """This rank's accelerator, by the launcher's LOCAL_RANK, or the CPU where there is none.

    Raises:
        ValueError: more ranks than GPUs on this node.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ValueError(
            f"local rank {local} has no GPU: {socket.gethostname()} shows {there}; start at most {there} ranks on it "
            f"(torchrun --nproc-per-node {there}), or check CUDA_VISIBLE_DEVICES"
        )
    chosen = torch.device("cuda", local)
    torch.cuda.set_device(chosen)
    return chosen


def finish() -> None:
    """Leaves the process group, so that torchrun ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def cpu_group(timeout_s: float) -> Any:
    """A new gloo group of all ranks: for another thread than the trainer's, or for numbers that are not on the GPU."""
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce(value: float, device: torch.device, op: Any = dist.ReduceOp.SUM, group: Any = None) -> float:
    """The sum (or `op`) of one number over all ranks, in fp64."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op, group=group)
    return tensor.item()


def gather_columns(tensor: Tensor) -> Tensor:
    """[C, M of this rank] -> [C, M of all ranks], in rank order, on every rank; M may differ between ranks."""
    if world_size() == 1:
        return tensor
    count = torch.tensor([tensor.shape[1]], device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = tensor.new_zeros(tensor.shape[0], max(sizes))
    padded[:, : tensor.shape[1]] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)


def gather_objects(items: Sequence[Any], group: Any = None) -> list[Any]:
    """Every rank's items in one list, in rank order, on every rank: small picklable records only."""
    if world_size() == 1:
        return list(items)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items), group=group)
    return [item for part in parts for item in part]


def from_rank_0(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; a ValueError or OSError that it raises there is raised on all."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if rank() == 0:
        try:
            outcome = (work(), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    result, error = gather_objects([outcome])[0]
    if error is not None:
        raise error
    return result


def exchange_objects(parcels: Sequence[Any]) -> list[Any]:
    """parcels[r] goes to rank r; returns what every rank sent here, in rank order. Anything picklable, of any size."""
    if world_size() == 1:
        return list(parcels)
    here = rank()
    where = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    payloads = [b"" if target == here else pickle.dumps(parcel) for target, parcel in enumerate(parcels)]
    lengths = [len(payload) for payload in payloads]
    sent = torch.frombuffer(bytearray(b"".join(payloads)) or bytearray(1), dtype=torch.uint8)[: sum(lengths)].to(where)
    counts = torch.empty(len(parcels), dtype=torch.int64, device=where)
    dist.all_to_all_single(counts, torch.tensor(lengths, device=where))
    received = sent.new_empty(int(counts.sum()))
    dist.all_to_all_single(received, sent, counts.tolist(), lengths)
    parts = received.cpu().split(counts.tolist())
    return [
        parcels[here] if source == here else pickle.loads(part.numpy().tobytes()) for source, part in enumerate(parts)
    ]


class Bulletin:
    """What ranks tell each other without waiting for each other: anybody posts, everybody reads what is there.

    It lives in torchrun's key-value store, so nothing that trains (a collective) is held up. Items are picklable and
    small. One board a topic; all ranks use the same topics, each once.
    """

    def __init__(self, topic: str):
        self._topic = f"axpo/bulletin/{topic}"
        self._store = shared_store()
        self._read = 0

    def post(self, item: Any) -> None:
        number = self._store.add(f"{self._topic}/count", 1)
        self._store.set(f"{self._topic}/{number}", pickle.dumps((rank(), item)))

    def read(self) -> list[Any]:
        """Items of other ranks that were posted since the last call, in one order for all ranks."""
        posted = self._store.add(f"{self._topic}/count", 0)
        new = [pickle.loads(self._store.get(f"{self._topic}/{number}")) for number in range(self._read + 1, posted + 1)]
        self._read = posted
        return [item for sender, item in new if sender != rank()]

    def clear(self) -> None:
        """Forgets the items, on one rank and after all have read them (behind a collective)."""
        for number in range(1, self._store.add(f"{self._topic}/count", 0) + 1):
            self._store.delete_key(f"{self._topic}/{number}")
        self._store.delete_key(f"{self._topic}/count")


def shared_store() -> Any:
    """The key-value store of this life's ranks; nothing of an earlier life is in it."""
    return dist.distributed_c10d._get_default_store()
