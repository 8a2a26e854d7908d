"""Task 4: truncated files, flipped bits, and power cuts between any two operations on the disk."""

import random

from grader_disk import save_until_cut


def payload_of(step, size=2000):
    return random.Random(step).randbytes(size)


def shown(found):
    return "None" if found is None else f"step {found[0]} with {len(found[1])} bytes"


def assert_newest(student, folder, step, case):
    found = student.load_newest_checkpoint(folder)
    expected = None if step is None else (step, payload_of(step))
    assert found == expected, f"{case}: expected {shown(expected)}, got {shown(found)}" + (
        " of wrong content" if found and expected and found[0] == expected[0] else ""
    )


def test_the_newest_of_several_comes_back(student, tmp_path):
    assert_newest(student, tmp_path / "nowhere", None, "no such folder")
    folder = tmp_path / "deep" / "run"
    for step in (0, 9, 10, 100, 20):
        student.save_checkpoint(folder, step, payload_of(step))
        newest = max(s for s in (0, 9, 10, 100, 20)[: (0, 9, 10, 100, 20).index(step) + 1])
        assert_newest(student, folder, newest, f"saved the steps up to {step}, one after another")
    student.save_checkpoint(folder, 100, payload_of(100))
    assert_newest(student, folder, 100, "saved step 100 once more")
    (folder / "notes.txt").write_text("other people's files may lie here", encoding="utf-8")
    (folder / "a_folder").mkdir()
    assert_newest(student, folder, 100, "a text file and a folder lie there too")
    student.save_checkpoint(tmp_path / "empty", 3, b"")
    assert student.load_newest_checkpoint(tmp_path / "empty") == (3, b""), "a payload of no byte"


def files_of(student, folder, step):
    """Save `step`, and say which files are new."""
    before = {path.name for path in folder.rglob("*")} if folder.exists() else set()
    student.save_checkpoint(folder, step, payload_of(step))
    new = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in before]
    assert new, f"save of step {step} left no new file in its folder"
    return new


def test_damage_is_noticed_and_the_one_before_is_loaded(student, tmp_path):
    student.save_checkpoint(tmp_path, 1, payload_of(1))
    for path in files_of(student, tmp_path, 2):
        whole = path.read_bytes()
        for length in sorted({0, 1, len(whole) // 2, max(0, len(whole) - 1)}):
            if length == len(whole):
                continue
            path.write_bytes(whole[:length])
            case = f"the newest file is cut to {length} of its {len(whole)} bytes"
            assert_newest(student, tmp_path, 1, case)
        for place in range(0, len(whole), max(1, len(whole) // 60)):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert_newest(student, tmp_path, 1, f"a bit of byte {place} of the newest is flipped")
        path.write_bytes(whole + b"\0")
        assert_newest(student, tmp_path, 1, "the newest file is a byte too long")
        path.write_bytes(whole)
    assert_newest(student, tmp_path, 2, "the newest file is whole again")


def test_a_power_cut_at_any_moment_leaves_a_checkpoint(student, tmp_path):
    for moment in range(50):
        folder = tmp_path / str(moment)
        student.save_checkpoint(folder, 1, payload_of(1))
        done, finished = save_until_cut(
            student.save_checkpoint, folder, 2, payload_of(2), cut_before=moment
        )
        case = f"the power went after {', '.join(done) or 'nothing'} of the second save"
        found = student.load_newest_checkpoint(folder)
        assert found in ((1, payload_of(1)), (2, payload_of(2))), (
            f"{case}: expected step 1 or step 2, whole, got {shown(found)}"
        )
        student.save_checkpoint(folder, 3, payload_of(3))
        assert_newest(student, folder, 3, f"{case}, and step 3 was saved after it")
        done, _ = save_until_cut(student.save_checkpoint, folder, 3, payload_of(33), moment)
        found = student.load_newest_checkpoint(folder)
        assert found in ((3, payload_of(3)), (3, payload_of(33))), (
            f"the power went after {', '.join(done) or 'nothing'} of saving step 3 once more: "
            f"expected the old or the new step 3, whole, got {shown(found)}; new bytes need a new "
            "file, and its fsync before it gets the name"
        )
        if finished:
            assert "fsync" in done, "the whole save had no fsync"
            return
    raise AssertionError("a save has more than 50 operations on the disk")


def test_what_was_saved_survives_a_power_cut_afterwards(student, tmp_path):
    for size in (0, 10, 2_000_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        payload = payload_of(7, size)
        done, _ = save_until_cut(student.save_checkpoint, folder, 7, payload)
        found = student.load_newest_checkpoint(folder)
        assert found == (7, payload), (
            f"the power went when save had returned, after {', '.join(done) or 'no operation'}: "
            f"expected step 7 with {size} bytes, got {shown(found)}; a file needs its fsync, and "
            "its new name the folder's"
        )
