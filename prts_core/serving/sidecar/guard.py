"""Runs a server's script in the server's own Python: it ends with us, and holds its weights in few bits where asked.

`python guard.py --parent PID --quantization none --keep HEAD SCRIPT [its own arguments]`. Only the standard library is
here, of Python 3.10 and later, and nothing of PRTS. Neither of the known servers has an option for quantisation, so
that it is laid over transformers' one function that loads models.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # Linux: the signal that comes when the thread which started this process is gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--keep", default="", help="module whose weights stay as they are")
    parser.add_argument("script")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    end_with(args.parent)
    if args.quantization == "none":
        os.execv(sys.executable, [sys.executable, args.script, *args.rest])  # the signal above stays set
    quantize(args.quantization, args.keep)
    sys.argv = [args.script, *args.rest]
    sys.path[0] = str(Path(args.script).parent)
    runpy.run_path(args.script, run_name="__main__")


def end_with(parent: int) -> None:
    """SIGKILL for this process when `parent` is gone, however that ends. On Linux only; elsewhere a line says so."""
    if sys.platform != "linux":
        print("guard: this system cannot end the server together with the process that started it", flush=True)
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it went in between
        os.kill(os.getpid(), signal.SIGKILL)


def quantize(kind: str, keep: str) -> None:
    """Every model that AutoModel loads from now on has its linear layers in NF4 or int8, but for those of the module
    `keep`, the vocabulary and the embeddings. Ends the process where a weight of `keep` was quantised all the same."""
    import torch
    from transformers import AutoModel, BitsAndBytesConfig

    skipped = [name for name in (keep, "lm_head", "embed_tokens") if name]
    options: dict[str, Any] = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    )
    config = BitsAndBytesConfig(llm_int8_skip_modules=skipped, **options)
    load = AutoModel.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **{"quantization_config": config} | kwargs)
        small = [name for name, weight in model.named_parameters() if weight.dtype in (torch.uint8, torch.int8)]
        print(f"guard: {len(small)} weights are held in {kind}", flush=True)
        wrong = [name for name in small if keep and keep in name.split(".")]
        if wrong or not small:
            sys.exit(f"guard: {kind} was asked for all but {keep!r}; it holds {wrong[:3] or 'no weights'}")
        return model

    AutoModel.from_pretrained = from_pretrained  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
