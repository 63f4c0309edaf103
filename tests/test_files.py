"""slang/files.py: files that are written whole or not at all, whoever else writes them."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from slang import files
from slang.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(*paths: Path, content: bytes = b"new") -> None:
    with files.replacing(*paths) as opened:
        for file in opened:
            file.write(content)


def test_the_line_that_is_not_utf_8_is_counted_behind_a_byte_order_mark():
    for mark in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(UserError, match=r"^a.toml:3: not UTF-8; save the file as UTF-8$"):
            files.text_of(mark + b"a: 1\nb: 2\n\xff\n", "a.toml")
        assert files.text_of(mark + b"uno\r\ndos\n", "a.toml") == "uno\ndos\n"


# ------------------------------------------------------------------------------- one file


def test_a_new_file_in_a_new_folder_has_the_usual_permissions(tmp_path):
    write(tmp_path / "a/b/x")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a/b/x").stat().st_mode & 0o777 == 0o666 & ~mask
    assert contents(tmp_path / "a/b") == {"x": b"new"}


def test_the_permissions_of_the_old_file_stay(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "x").chmod(0o640)
    write(tmp_path / "x")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_changes_nothing(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error), files.replacing(tmp_path / "x", tmp_path / "y") as (file, _):
        file.write(b"new")
        raise error
    assert contents(tmp_path) == {"x": b"old"}


def test_what_is_found_in_the_folder_is_not_obeyed(tmp_path):
    """Files of another's making beside the data: the journal of earlier versions, links."""
    folder, victim = tmp_path / "data", tmp_path / "victim"
    folder.mkdir()
    victim.write_bytes(b"mine")
    (folder / "n").write_bytes(b"evil")
    (folder / ".x.jsonl.commit").write_text('[["n", "../victim"]]')
    (folder / ".y.commit").write_bytes(b"")
    (folder / ".x.jsonl.part").symlink_to(victim)
    before = {name: (folder / name).read_bytes() for name in (".x.jsonl.commit", ".y.commit", "n")}
    write(folder / "x.jsonl")
    files.read(folder / "x.jsonl")
    assert (folder / "x.jsonl").read_bytes() == b"new" and victim.read_bytes() == b"mine"
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "x").symlink_to("victim")
    (tmp_path / "y").symlink_to("nowhere")
    (tmp_path / "z").symlink_to("z")
    write(*(tmp_path / name for name in "xyz"))
    assert contents(tmp_path) == {"victim": b"mine", "x": b"new", "y": b"new", "z": b"new"}
    assert not any(path.is_symlink() for path in tmp_path.iterdir())


def test_two_writers_end_with_one_whole_file(tmp_path):
    target = tmp_path / "x"
    with files.replacing(target) as (one,), files.replacing(target) as (other,):
        one.write(b"1" * 3_000_000)
        other.write(b"2" * 2_000_000)
    assert contents(tmp_path) == {"x": b"1" * 3_000_000}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "{}: a folder; name a file"),
        (lambda path: path.touch(0o444), "{}: write-protected; chmod u+w it or name another"),
    ],
)
def test_what_can_not_be_replaced(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(UserError) as error:
        write(tmp_path / "y", tmp_path / "x")
    assert str(error.value) == message.format(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_place_below_a_file_or_a_dangling_link(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(UserError) as error:
            write(tmp_path / name / "x")
        where = f"{tmp_path / name / 'x'}: {tmp_path / name}"
        assert str(error.value) == f"{where} is no folder; name another place"


def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}/.x.k3.part")

    with pytest.raises(OSError) as error, files.replacing(tmp_path / "x") as (file,):
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "x")
    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(PermissionError) as error:
        write(tmp_path / "x")
    assert error.value.filename == str(tmp_path / "x") and not list(tmp_path.iterdir())


def test_a_device_and_stdout_are_written_as_they_are(tmp_path):
    """/dev/stdout leads to a file here, which must not make it one to be replaced."""
    write(Path("/dev/null"))
    code = "from slang.files import replacing\nwith replacing('/dev/stdout') as (f,): f.write(b'x')"
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=out)
    assert done.returncode == 0 and contents(tmp_path) == {"out": b"x"}
    assert Path("/dev/stdout").exists() and not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [("folder", "not a regular file; name another"), ("pipe", "not a regular file; name another")],
)
def test_only_files_are_read(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as error:
        files.read(tmp_path / name)
    assert str(error.value) == f"{tmp_path / name}: {message}"


def test_an_empty_name_is_no_folder():
    with pytest.raises(FileNotFoundError):
        files.read("")


def test_the_same_file_under_another_name(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "soft").symlink_to("a")
    for same in ("a", "hard", "soft", "./a", "../" + tmp_path.name + "/a"):
        target = f"{tmp_path}/{same}"
        assert files.overwritten(tmp_path / "a", [tmp_path / "b", target]) == str(Path(target))
    assert files.overwritten(tmp_path / "a", [tmp_path / "b", tmp_path / "c"]) is None
    assert files.overwritten(tmp_path / "a", ["b", "b"]) == "b"


# -------------------------------------------------------------------------------- signals

KILLED = textwrap.dedent("""
    import os, signal, sys
    from slang import files

    left, sent, *targets = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    real, left = os.replace, int(left)

    def killing(*pair):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), int(sent))
        return real(*pair)

    os.replace = killing
    with files.replacing(*targets) as opened:
        for file in opened:
            file.write(b"new")
""")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moves", range(4))
def test_stopped_between_two_moves_all_are_new(tmp_path, moves, sent):
    targets = [tmp_path / name for name in "abcd"]
    for target in targets:
        target.write_bytes(b"old")
    command = [sys.executable, "-c", KILLED, str(moves), str(int(sent)), *targets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode
    assert contents(tmp_path) == dict.fromkeys("abcd", b"new")


def test_a_signal_that_another_thread_gets_waits_too():
    """A blocked signal would be taken by a thread that does not block it, such as those of MLX."""
    received, after = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with files.undisturbed():
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                after.append(len(received))
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert set(after) == {0} and received == [1]


# ------------------------------------------------------------------------ locks and folders


def test_a_lock_is_held_once_and_given_back(tmp_path):
    folder = tmp_path / "adapters"
    with files.locked(folder, "training"):
        with pytest.raises(UserError) as error, files.locked(folder, "training"):
            pass
        what = "another run is training there; wait for it or name another folder"
        assert str(error.value) == f"{folder}: {what}"
    with files.locked(folder, "training"):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / ".lock").symlink_to("made")
    with pytest.raises(OSError, match="symbolic link"), files.locked(tmp_path, "training"):
        pass
    assert not (tmp_path / "made").exists()


def test_a_folder_is_swapped_as_a_whole(tmp_path):
    folder = tmp_path / "fused"
    for content in (b"1", b"2"):
        with files.replacing_folder(folder) as part:
            (part / content.decode()).write_bytes(content)
        assert contents(folder) == {content.decode(): content}
    with pytest.raises(ValueError), files.replacing_folder(folder) as part:
        (part / "3").touch()
        raise ValueError
    assert contents(folder) == {"2": b"2"} and list(tmp_path.iterdir()) == [folder]


def test_the_old_folder_is_back_when_the_new_one_can_not_be_moved(tmp_path, monkeypatch):
    folder = tmp_path / "fused"
    folder.mkdir()
    (folder / "old").touch()
    real = os.replace

    def refuse(source, target):
        if str(source).endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError), files.replacing_folder(folder):
        pass
    assert list(tmp_path.iterdir()) == [folder] and [p.name for p in folder.iterdir()] == ["old"]


def test_a_folder_that_is_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x").touch()
    (tmp_path / "fused").symlink_to("mine")
    with files.replacing_folder(tmp_path / "fused") as part:
        (part / "y").touch()
    names = {path.name: path.is_symlink() for path in tmp_path.iterdir()}
    assert names == {"mine": False, "fused": False} and (tmp_path / "mine/x").exists()


def test_neither_a_file_nor_where_one_stands_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"mine")
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    for path, what in (
        (tmp_path / "x", "not a folder; name another"),
        (tmp_path / "a", "the folder that this runs in; name another"),
        (Path(), "the folder that this runs in; name another"),
    ):
        with pytest.raises(UserError) as error, files.replacing_folder(path):
            pass
        assert str(error.value) == f"{path}: {what}"
    assert (tmp_path / "x").read_bytes() == b"mine"
