"""The CUDA kernel of a decode step, on a GPU where there is one, and in two ways without.

Triton's interpreter carries a kernel's operations out in NumPy, one program after another: the
arithmetic and the addresses are right. Its compiler makes machine code for a GPU that need not be
there: the types, the shapes and the memory suit it. Neither says anything about speed.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

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
    from paged_engine import attention_triton, torch_operators

    kv_heads = 1 if heads == 5 else heads // 3
    q = torch.randn(len(LENGTHS), heads, dim).to(device, dtype)
    caches = torch.randn(2, BLOCKS, kv_heads, size, dim).to(device, dtype).unbind()
    own = [torch.randperm(BLOCKS)[: -(-max(LENGTHS) // size)] for _ in LENGTHS]
    tables = torch.stack(own).int().to(device)
    seen = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    with patch.object(attention_triton, "PROGRAMS", programs):
        mine = attention_triton.paged_decode_attention(q, *caches, tables, seen, dim**-0.5)
    wide = (part.float() for part in (q, *caches))
    plain = torch_operators.paged_decode_attention(*wide, tables, seen, dim**-0.5)
    error = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(mine.float(), plain, rtol=error, atol=error)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_on_cuda(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare("cuda", dtype, *shape)


@pytest.mark.parametrize("part", ["interpret", "compile"])
def test_the_kernel_without_a_gpu(part: str, triton_packages: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(triton_packages), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    env["TRITON_INTERPRET"] = str(int(part == "interpret"))
    command = [sys.executable, __file__, part]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == 6, ran.stdout


def interpret() -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):  # its products read bfloat16 as integers
            compare("cpu", dtype, *shape)
            print("equal", shape, dtype)


def compile_for_gpus() -> None:
    """Down to the machine code of an A100 and an H100, which need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from paged_engine.attention_triton import _attend, _join

    sizes = {"GROUP": 4, "ROWS": 16, "DIM": 64, "WIDTH": 64, "BLOCK": 16, "PARTS": 32}
    sizes |= {"POSITIONS": 64, "SLOTS": 32}
    for capability in (80, 90):
        for number in ("fp32", "bf16", "fp16"):
            arrays = dict.fromkeys(("query", "k_cache", "v_cache", "out"), f"*{number}")
            arrays |= {"partial": "*fp32", "sums": "*fp32", "tables": "*i32", "lengths": "*i32"}
            fixed = {**sizes, "PRECISE": number == "fp32"}
            for kernel in (_attend, _join):
                types = {
                    name: "constexpr" if name in fixed else arrays.get(name, "i32")
                    for name in kernel.arg_names
                }
                types |= {"scale": "fp32"} if "scale" in types else {}
                constants = {name: fixed[name] for name in kernel.arg_names if name in fixed}
                source = ASTSource(kernel, types, constants)
                made = compile(source, target=GPUTarget("cuda", capability, 32))
                assert made.asm["cubin"]
            print("compiled", capability, number)


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_gpus}[sys.argv[1]]()
