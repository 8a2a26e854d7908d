"""The CPU operators' compilation: once a machine, and told where it fails. Their memory."""

import shutil
import subprocess

import pytest
import torch

from distlab.errors import UsageError
from paged_engine import kernels, native
from paged_engine.packing import ALIGNMENT, CHUNK, Room


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.native.cache_clear()
    try:
        assert kernels.describe() == (
            "plain torch kernels (no C++ compiler (no-such-compiler) is there)"
        )
        assert kernels.pack(torch.eye(3))(torch.ones(2, 3)).tolist() == [[1.0] * 3] * 2
    finally:
        native.native.cache_clear()


def test_a_compiler_that_fails_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no cstring' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(native.BuildError, match="fatal error: no cstring"):
        native.load()


@pytest.mark.parametrize(
    "named",
    [
        "{0} -DMINE=7",
        "env {0} -DMINE=7",
        "'{1}/a folder/c++' -DMINE=7",
        "{1}/a folder/c++",
        " {0} ",
    ],
)
def test_cxx_is_a_command_or_a_path(monkeypatch, tmp_path, named):
    """A wrapper, flags, and a path with a space, quoted or not."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler is there")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "c++").symlink_to(compiler)
    monkeypatch.setenv("CXX", named.format(compiler, tmp_path))
    macros = native._machine_flags(native._compiler())[1]
    assert ("#define MINE 7" in macros) == ("MINE" in named)


def test_cxx_with_an_open_quote_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "'g++")
    with pytest.raises(
        native.BuildError, match="CXX='g\\+\\+ cannot be read: No closing quotation"
    ):
        native.load()


def test_what_is_not_there_is_refused_and_not_replaced(monkeypatch):
    for name in set(native.WIDTHS) - set(native.available()):
        monkeypatch.setenv(native.VARIABLE, name)
        with pytest.raises(UsageError, match=f"={name}: this processor has no .*; use one of nat"):
            native.load()
    monkeypatch.setenv(native.VARIABLE, "mmx")
    with pytest.raises(UsageError, match="=mmx is unknown; use one of native, sse2, avx2, avx512"):
        native.choice()


@pytest.mark.parametrize(("name", "lanes"), [("sse2", 4), ("avx2", 8), ("avx512", 16), ("neon", 4)])
def test_a_width_that_is_asked_for_is_used(monkeypatch, name, lanes):
    monkeypatch.setenv(native.VARIABLE, name)
    try:
        assert native.load().columns == 2 * lanes
    except UsageError as lacking:
        pytest.skip(str(lacking))


def test_a_second_process_compiles_nothing(monkeypatch):
    if native.native()[0] is None:
        pytest.skip("no compiler is there")
    commands = []
    really = subprocess.run

    def watched(command, **options):
        commands.append(command)
        return really(command, **options)

    monkeypatch.setattr(subprocess, "run", watched)
    native.load()
    assert len(commands) == 1 and "-E" in commands[0]  # asks for the instructions, no more


def test_packed_weights_share_chunks_and_no_bytes():
    room = Room()
    pieces = [
        room.take((rows, 3), dtype)
        for rows in (1, 5, 7)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % ALIGNMENT == 0
        piece.fill_(number)
    assert [int(piece.min()) for piece in pieces] == [0, 1, 2, 3, 4, 5]
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
    assert room.take((CHUNK + 1, 1), torch.bfloat16).shape == (CHUNK + 1, 1)
