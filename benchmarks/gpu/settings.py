"""Settings of report.py, their CPU twin, and the model that fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LARGE_FROM = 40  # GiB: the reference runs the model in fp32


@dataclass(frozen=True)
class Settings:
    """What is measured. preset: of tools/random_checkpoint.py, or tiny-FAMILY. tokens_per_forward: rate of
    the fixed schedule. repeats: timed calls of each kind."""

    work: str
    out: str
    device: str = "cuda"
    preset: str = "llada-8b"
    dtype: str = "bf16"
    canvases: tuple[int, ...] = (512, 1280)
    batches: tuple[int, ...] = (1, 8)
    block_length: int = 32
    gen_length: int = 256
    tokens_per_forward: float = 2.77
    repeats: int = 15
    vocabularies: tuple[int, ...] = (126_464, 152_064)
    tensorrt86: str = ""

    @property
    def is_twin(self) -> bool:
        return self.device == "cpu"

    @property
    def checkpoint(self) -> Path:
        return Path(self.work) / "checkpoint"

    @property
    def artifact(self) -> Path:
        return Path(self.work) / "artifact"

    @property
    def forwards_per_block(self) -> int:
        """Whole forwards of a block in a run of the loop: the schedule's, rounded up."""
        return -(-self.block_length * 100 // round(100 * self.tokens_per_forward))


TWIN = {
    "device": "cpu",
    "preset": "tiny-llada",
    "dtype": "fp32",
    "canvases": (48, 64),
    "batches": (1, 2),
    "block_length": 8,
    "gen_length": 16,
    "repeats": 2,
    "vocabularies": (1000,),
}


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_properties(0).name)


def memory_gib() -> float:
    """Memory of the GPU in GiB; 0 without a GPU."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def preset_for(gib: float) -> str:
    """The model that fits a GPU with this much memory, PyTorch's fp32 copy included: 8 B parameters take 32
    GB, 1.5 B take 6 GB (where not even these fit, the parity reference runs on the host:
    torch_stages.torch_eager)."""
    return "llada-8b" if gib >= LARGE_FROM else "llada-1.5b"
