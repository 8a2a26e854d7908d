"""Task 4: damage to any byte, and power cuts between any two operations on the disk."""

import shutil

import pytest
from grader_disk import save_until_cut
from grader_elsewhere import told_elsewhere

LONGEST_SAVE = 60  # operations on the disk


def shown(found):
    return "None" if found is None else f"step {found[0]} with {len(found[1])} bytes"


def assert_found(found, expected, case):
    """`found` is one of the checkpoints `expected`, or None where that is one of them."""
    form = tuple(map(type, found)) if isinstance(found, tuple) else type(found)
    assert found is None or form == (int, bytes), (
        f"{case}: load_newest returned {form}, and neither (step, payload), an int and bytes, nor "
        "None"
    )
    same_step = found is not None and found[0] in [one[0] for one in expected if one]
    assert found in expected, (
        f"{case}: expected {' or '.join(map(shown, expected))}, got {shown(found)}"
        + (" of wrong content" if same_step else "")
    )


def assert_newest(student, folder, saved, case):
    """`saved` maps the steps that are whole to their payloads."""
    newest = max(saved, default=None)
    expected = None if newest is None else (newest, saved[newest])
    assert_found(student.load_newest_checkpoint(folder), [expected], case)


def random_steps(chance, count):
    """Different ones, of 1 to 19 digits."""
    return list({int(2 ** chance.uniform(0, 63)) for _ in range(2 * count)})[:count]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_newest_of_several_comes_back(student, tmp_path, chance):
    assert_newest(student, tmp_path / "nowhere", {}, "no such folder")
    folder, saved = tmp_path / "deep" / "run", {}
    steps = [9, 10, 100, 20, 0, *random_steps(chance, 6)]
    for step in [*steps, int(chance.choice(steps)), max(steps)]:
        again = " once more" if step in saved else ""
        saved[step] = chance.bytes(int(chance.integers(1, 3000)))
        student.save_checkpoint(folder, step, saved[step])
        assert_newest(student, folder, saved, f"saved the steps {list(saved)}, {step} last{again}")
    told = told_elsewhere(
        student.load_newest_checkpoint,
        f"adapters.load_newest_checkpoint(pathlib.Path({str(folder)!r}))",
    )
    assert told == repr((max(saved), saved[max(saved)])), (
        f"another Python process, which has saved nothing: expected step {max(saved)}, got "
        f"{told[:80]}"
    )
    (folder / "notes.txt").write_text("other people's files may lie here", encoding="utf-8")
    for path in contents(folder):
        neighbour = path.with_name(path.name.translate(str.maketrans("0123456789", "abcdefghij")))
        neighbour.write_bytes(chance.bytes(50))
        path.with_name(f"{path.name}.part").write_bytes(chance.bytes(50))
    (folder / "a_folder").mkdir()
    before = contents(folder)
    assert_newest(student, folder, saved, "other files, files of like names, a folder lie there")
    assert contents(folder) == before, "load_newest changed the folder"
    saved[step := max(steps) + 1] = chance.bytes(100)
    student.save_checkpoint(folder, step, saved[step])
    assert_newest(student, folder, saved, f"saved step {step} among other people's files")
    now = contents(folder)
    gone = sorted(path.name for path in before if now.get(path) != before[path])
    assert not gone and (folder / "a_folder").is_dir(), (
        f"saving step {step} removed or changed what was there before: {gone or ['a_folder']}"
    )
    for step, payload in enumerate((b"", b"\0", b"\r\n \0")):
        student.save_checkpoint(tmp_path / "blank", step, payload)
        assert_newest(student, tmp_path / "blank", {step: payload}, f"the payload {payload!r}")


def saved_file(student, folder, step, payload):
    """Save `step`, and say which file is new."""
    before = contents(folder)
    student.save_checkpoint(folder, step, payload)
    new = [path for path in contents(folder) if path not in before]
    assert len(new) == 1, f"save of step {step} left {len(new)} new files in its folder, not one"
    return new[0]


@pytest.fixture
def files(student, tmp_path, chance):
    """(step, payload, file) of three checkpoints, the oldest first."""
    steps = sorted(random_steps(chance, 3))
    payloads = [chance.bytes(int(chance.integers(60, 200))) for _ in steps]
    return [
        (step, payload, saved_file(student, tmp_path, step, payload))
        for step, payload in zip(steps, payloads, strict=True)
    ]


def damages(whole, older, chance):
    """(what was done, the newest file afterwards)."""
    size = len(whole)
    for length in {0, 1, size // 2, size - 1, *map(int, chance.integers(0, size, 8))}:
        yield f"it is cut to {length} of its {size} bytes", whole[:length]
    for place in range(size):
        for bit in chance.choice(8, 3, replace=False):
            flipped = changed(whole, {place: whole[place] ^ 1 << int(bit)})
            yield f"a bit of byte {place} is flipped", flipped
    for number in range(40):
        # 8 apart as often as not: that is how sums of words add them up
        first = int(chance.integers(0, size - 8))
        second = first + 8 if number % 2 else int(chance.integers(first + 1, size))
        one, other, bit = whole[first], whole[second], 1 << number % 8
        pair = f"bytes {first} and {second}"
        yield f"{pair} are exchanged", changed(whole, {first: other, second: one})
        yield f"a bit of {pair} is flipped", changed(whole, {first: one ^ bit, second: other ^ bit})
        if one < 255 and other > 0:
            yield (
                f"{pair} are one more and one less",
                changed(whole, {first: one + 1, second: other - 1}),
            )
    yield "it is all zeros", bytes(size)
    yield "it is a byte too long", whole + b"\0"
    yield "it holds the bytes of the checkpoint before it", older


def changed(whole, new):
    content = bytearray(whole)
    for place, value in new.items():
        content[place] = value
    return bytes(content)


def test_damage_is_noticed_and_the_one_before_is_loaded(student, tmp_path, files, chance):
    (step, payload, newest), (before, its_payload, older) = files[:0:-1]
    whole = newest.read_bytes()
    for done, content in damages(whole, older.read_bytes(), chance):
        if content != whole:
            newest.write_bytes(content)
            case = f"the file of step {step}, the newest, is damaged: {done}"
            assert_newest(student, tmp_path, {before: its_payload}, case)
    newest.write_bytes(whole)
    assert_newest(student, tmp_path, {step: payload}, "the newest file is whole again")
    left = {step: payload for step, payload, _ in files}
    for step, _, file in reversed(files):
        file.unlink()
        if chance.random() < 0.5:
            file.mkdir()
        else:
            file.write_bytes(chance.bytes(100))
        del left[step]
        assert_newest(student, tmp_path, left, f"the newest {3 - len(left)} of 3 are damaged")


def kinds_of_cut(chance):
    """(cut before this operation, whether changes of names are kept, the part of a torn file)."""
    for moment in range(LONGEST_SAVE):
        for names_kept in (False, True):
            yield moment, names_kept, float(chance.choice([0.0, 0.5, 0.99]))


def test_a_power_cut_at_any_moment_leaves_a_checkpoint(student, tmp_path, chance):
    first, second, third = sorted(random_steps(chance, 3))
    one, two, three, other = (chance.bytes(int(size)) for size in chance.integers(300, 2000, 4))
    for moment, names_kept, torn in kinds_of_cut(chance):
        folder = tmp_path / "run"
        student.save_checkpoint(folder, first, one)
        done, finished = save_until_cut(
            student.save_checkpoint, tmp_path, folder, second, two, moment, names_kept, torn
        )
        case = f"the power went after {', '.join(done) or 'nothing'} of the second save"
        found = student.load_newest_checkpoint(folder)
        assert_found(found, [(first, one), (second, two)], case)
        student.save_checkpoint(folder, third, three)
        case += f", and step {third} was saved after it"
        assert_newest(student, folder, {third: three}, case)
        done, _ = save_until_cut(
            student.save_checkpoint, tmp_path, folder, third, other, moment, names_kept, torn
        )
        assert_found(
            student.load_newest_checkpoint(folder),
            [(third, three), (third, other)],
            f"the power went after {', '.join(done) or 'nothing'} of saving step {third} once "
            "more: new bytes need a new file, and its fsync before it gets the name",
        )
        shutil.rmtree(folder)
        if finished and names_kept:
            assert "fsync" in done, "the whole save had no fsync"
            break
    else:
        raise AssertionError(f"a save has more than {LONGEST_SAVE} operations on the disk")
    for moment, names_kept, torn in kinds_of_cut(chance):
        folder = tmp_path / "new" / "run"
        done, finished = save_until_cut(
            student.save_checkpoint, tmp_path, folder, first, one, moment, names_kept, torn
        )
        case = f"the power went after {', '.join(done) or 'nothing'} of the first save of all"
        found = student.load_newest_checkpoint(folder)
        assert_found(found, [(first, one), None], case)
        student.save_checkpoint(folder, second, two)
        case += f", and step {second} was saved after it"
        assert_newest(student, folder, {second: two}, case)
        shutil.rmtree(folder.parent)
        if finished and names_kept:
            return


def test_what_was_saved_survives_a_power_cut_afterwards(student, tmp_path, chance):
    for number, size in enumerate((0, 10, int(chance.integers(1000, 9000)), 2_000_000)):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        assert_survives(student, tmp_path, folder, chance.bytes(size), "a folder that was there")
    for depth in (1, int(chance.integers(2, 5))):
        folder = tmp_path.joinpath(*(f"made{depth}_{number}" for number in range(depth)))
        assert_survives(student, tmp_path, folder, chance.bytes(500),
                        f"{depth} new folders, one in the other")  # fmt: skip


def assert_survives(student, root, folder, payload, place):
    done, _ = save_until_cut(student.save_checkpoint, root, folder, 7, payload)
    found = student.load_newest_checkpoint(folder)
    assert found == (7, payload), (
        f"{place}: the power went when save had returned, after {', '.join(done) or 'no operation'}"
        f": expected step 7 with {len(payload)} bytes, got {shown(found)}; a file needs its fsync, "
        "its new name the folder's, and a new folder that of the one around it"
    )
