"""The few collectives that the trainer needs; with one process each returns its input."""

import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]


def initialise(device: torch.device) -> None:
    """Joins torchrun's process group, or makes a group of one where there is none; NCCL on CUDA, gloo on the CPU."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def be_deterministic() -> None:
    """Only algorithms whose bits are the same in every run from here on; torch raises where an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)


def device() -> torch.device:
    """This rank's accelerator, by torchrun's LOCAL_RANK, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(local)
    return local


def finish() -> None:
    """Leaves the process group, so that torchrun ends without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def all_reduce(value: float, device: torch.device, op: Any = dist.ReduceOp.SUM) -> float:
    """The sum (or `op`) of one number over all ranks, in fp64."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
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


def gather_objects(items: Sequence[Any]) -> list[Any]:
    """Every rank's items in one list, in rank order, on every rank: small picklable records only."""
    if world_size() == 1:
        return list(items)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


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
        self._store = _store()
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


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
