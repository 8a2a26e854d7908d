"""The CUDA kernel of a decode step: on a GPU where there is one, in Triton's interpreter anywhere.

The interpreter carries a kernel's operations out in NumPy, one program after another. It shows that
the arithmetic and the addresses are right, and nothing of the compiler or of the GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Query heads, their width, tokens of a block; programs wanted, which decide the parts of a context.
SHAPES = [(6, 16, 4, 512), (9, 64, 16, 16), (5, 24, 8, 1)]
LENGTHS = [1, 70, 333, 64]
BLOCKS = 120
LIMIT_S = 200


def compare(
    device: str, dtype: torch.dtype, heads: int, dim: int, size: int, programs: int
) -> None:
    from paged_engine import _attention_triton, _kernels_torch

    _attention_triton.PROGRAMS = programs
    kv_heads = 1 if heads == 5 else heads // 3
    q = torch.randn(len(LENGTHS), heads, dim).to(device, dtype)
    caches = torch.randn(2, BLOCKS, kv_heads, size, dim).to(device, dtype).unbind()
    own = [torch.randperm(BLOCKS)[: -(-max(LENGTHS) // size)] for _ in LENGTHS]
    tables = torch.stack(own).int().to(device)
    seen = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    mine = _attention_triton.paged_decode_attention(q, *caches, tables, seen, dim**-0.5)
    wide = (part.float() for part in (q, *caches))
    plain = _kernels_torch.paged_decode_attention(*wide, tables, seen, dim**-0.5)
    error = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(mine.float(), plain, rtol=error, atol=error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_on_cuda(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr("paged_engine._attention_triton.PROGRAMS", 512)  # put back at the end
    compare("cuda", dtype, *shape)


def test_the_kernel_in_the_interpreter(triton_packages: Path) -> None:
    path = os.pathsep.join([str(triton_packages), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    ran = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f"{shape} {dtype}" for shape in SHAPES for dtype in (torch.float32, torch.float16)
    ]


if __name__ == "__main__":
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):  # its products read bfloat16 as integers
            compare("cpu", dtype, *shape)
            print(shape, dtype)
