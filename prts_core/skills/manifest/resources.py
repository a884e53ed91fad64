"""Say what a skill needs of a computer: runtime, quantization, GPU memory, time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from prts_core.config.checks import Lenient
from prts_core.skills.manifest.values import Positive

Runtime = Literal["pytorch", "onnx", "tensorrt", "trt_llm", "vllm", "gguf", "mlx", "jax"]
Dtype = Literal["fp32", "fp16", "bf16", "int8", "int4", "fp4_nvfp4"]
"""Of the weights as loaded. NF4 is written int4, with extra.scheme nf4 where one wants to be told."""


@dataclass(frozen=True)
class Quantization(Lenient):
    """How weights are held. Keys that the schema does not have are ignored here, as it does; `extra` takes any."""

    dtype: Dtype = "fp32"
    backend: Literal["pytorch", "onnx", "tensorrt", "gguf", "mlx"] = "pytorch"
    per_channel: bool = False
    calibration_dataset: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LatencyBudget(Lenient):
    """Upper bounds in ms (s where the name says so). per_chunk_ms: one inference, which brings one chunk.
    max_execution_s: of one attempt at a task. Keys that the schema does not have are ignored here, as it does."""

    per_chunk_ms: Positive
    warmup_ms: Positive | None = None
    load_ms: Positive | None = None
    max_execution_s: Positive | None = None


def _above_zero(memory: dict[Dtype, float] | None) -> dict[Dtype, float] | None:
    wrong = [f"{dtype}: {gb:g} GB is not above 0" for dtype, gb in (memory or {}).items() if not gb > 0]
    if wrong:
        raise ValueError("; ".join(wrong))
    return memory


MemoryByDtype = Annotated[dict[Dtype, float] | None, AfterValidator(_above_zero)]
"""dtype -> GB of GPU memory that the skill takes when loaded so."""
