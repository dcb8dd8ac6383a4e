"""Files of strangers: opened without waiting, parsed without executing anything, in bounded memory.

    with open_regular(path) as file:
        check_zip(file)
    values = parse_json(text)

Each function raises ValueError with one line of what was got and expected, or OSError for a file
that cannot be opened; callers add the file's name and make a UserError of it.
"""

import errno
import io
import json
import math
import os
import pickletools
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAX_JSON = 2**22  # bytes; 21,000 class names take 2**19
MAX_DEPTH = 32  # of brackets in brackets
TOO_DEEP = f"got JSON of more than {MAX_DEPTH} levels, expected at most that"
MAX_HEADER = 2**24  # bytes of a safetensors file's header; 20,000 tensors take 2**22
MAX_PICKLE = 2**23  # bytes; 20,000 tensors with their optimizer's state take 2**22
MAX_DIRECTORY = 2**23  # bytes of a zip file's list of members
MAX_NPY_HEADER = 2**16

# What torch.save writes for tensors in dicts, and the arguments that published files hold.
PICKLED_GLOBALS = {
    "argparse Namespace",
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch Size",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Bool", "Byte")),
    *(f"torch {kind}Storage" for kind in ("Long", "Int", "Short", "Char", "ComplexFloat")),
}
# Opcodes that name, make or fetch an object in ways that torch.save does not use.
REFUSED_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a file to read; OSError for a folder, a device, or a pipe that one would wait on."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: Path | str) -> object:
    """Reads a JSON file, see `parse_json`."""
    with open_regular(path) as file:
        return parse_json(file.read(MAX_JSON + 1))


def parse_json(text: str | bytes) -> object:
    """Parses JSON of bounded size and depth, without repeated keys and with finite numbers."""
    if len(text) > MAX_JSON:
        raise ValueError(f"got more than {MAX_JSON} bytes of JSON, expected at most that")
    try:
        value = json.loads(
            text, object_pairs_hook=unique_keys, parse_constant=refuse, parse_float=finite
        )
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            item
            for container in containers
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"got {twice[:80]!r} twice, expected each name once")
    return values


def refuse(constant: str) -> None:
    raise ValueError(f"got {constant}, expected finite numbers")


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        refuse(text[:80])
    return value


def check_safetensors(path: Path) -> None:
    """Checks that the header of a safetensors file is of a size to parse."""
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ValueError(f"got a header of {size} bytes, expected at most {MAX_HEADER}")


def check_zip(file: BinaryIO, *, compressed: bool) -> dict[str, zipfile.ZipInfo]:
    """Lists the members of a zip file by name, its own words taken for nothing.

    compressed: whether members may be deflated. Without, they are together no larger than the file.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError("got an empty file, expected a zip file")
    check_directory(file, size)
    allowed = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} if compressed else {zipfile.ZIP_STORED}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception as error:  # a malformed file can raise anything
        raise ValueError(f"not a zip file, or a damaged one ({error})") from None
    by_name = {member.filename: member for member in members}
    if len(by_name) != len(members):
        raise ValueError("got a zip file with two members of one name, expected one of each")
    if any(member.compress_type not in allowed or member.flag_bits & 1 for member in members):
        kind = "stored or deflated" if compressed else "uncompressed"
        raise ValueError(f"got a zip file packed in another way, expected {kind} members")
    if not compressed and sum(member.file_size for member in members) > size:
        raise ValueError(f"got members of more bytes than the file's {size}, expected no more")
    return by_name


def check_directory(file: BinaryIO, size: int) -> None:
    """Checks how long the list of members is, for which Python takes ten times its size."""
    tail = min(size, 2**16 + 98)
    file.seek(size - tail)
    found = file.read(tail)
    end = found.rfind(b"PK\x05\x06")
    if end < 0 or len(found) < end + 22:
        raise ValueError("not a zip file, or a truncated one")
    length = int.from_bytes(found[end + 12 : end + 16], "little")
    locator = found[max(0, end - 20) : end]
    if locator.startswith(b"PK\x06\x07"):  # a zip64 file: another record has the true length
        file.seek(min(size, int.from_bytes(locator[8:16], "little")))
        records = [found[max(0, end - 76) : max(0, end - 20)], file.read(56)]
        lengths = [int.from_bytes(record[40:48], "little") for record in records]
        length = max(lengths + [length if length != 2**32 - 1 else 0])
    if length > MAX_DIRECTORY:
        raise ValueError(f"got a zip file whose list of members has {length} bytes, expected less")


def check_torch_zip(path: Path) -> None:
    """Checks that a file is what torch.save writes of tensors, before torch reads any of it.

    Nothing compressed, and no object in its pickle but tensors, plain values and Namespaces.
    """
    pickled = read_torch_pickle(path)
    try:
        names = list_globals(pickled)
    except Exception as error:  # a malformed pickle can raise anything
        raise ValueError(f"damaged ({error})") from None
    if foreign := sorted(names - PICKLED_GLOBALS):
        raise ValueError(
            f"refused: got pickled {foreign[0][:80]!r}, expected tensors and plain values"
        )


def read_torch_pickle(path: Path) -> bytes:
    """The pickle in a file of torch.save's, which is checked to be no larger than it looks."""
    with open_regular(path) as file:
        if file.read(2)[:1] == b"\x80":
            raise ValueError("refused: got a bare pickle, expected torch.save's zip file")
        members = check_zip(file, compressed=False)
        pickles = [name for name in members if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"got {len(pickles)} data.pkl in it, expected torch.save's zip file")
        if (size := members[pickles[0]].file_size) > MAX_PICKLE:
            raise ValueError(f"got a pickle of {size} bytes, expected at most {MAX_PICKLE}")
        with zipfile.ZipFile(file) as archive:
            return unpack(archive, members[pickles[0]])


def list_globals(pickled: bytes) -> set[str]:
    """The "module name" of all that a pickle wants imported; opcodes that hide it by their name."""
    names = set()
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            names.add(argument)
        elif opcode.name in REFUSED_OPCODES:
            names.add(opcode.name)
    return names


def read_npz(path: Path, names: set[str], max_bytes: int) -> dict[str, np.ndarray]:
    """Reads the named arrays of an .npz; none is pickled, and all have `max_bytes` together.

    An array's header has to promise as many bytes as its member holds.
    """
    with open_regular(path) as file:
        members = check_zip(file, compressed=True)
        if missing := names - {name.removesuffix(".npy") for name in members}:
            raise ValueError(f"got no {', '.join(sorted(missing))}")
        wanted = {name: members.get(f"{name}.npy") or members[name] for name in names}
        size = sum(member.file_size for member in wanted.values())
        if size > max_bytes:
            raise ValueError(f"got {size} bytes of arrays, expected at most {max_bytes}")
        with zipfile.ZipFile(file) as archive:
            return {name: parse_npy(name, unpack(archive, m)) for name, m in wanted.items()}


def unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except Exception as error:  # a malformed file can raise anything
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"damaged: {member.filename[:80]!r}: {reason}") from None


def parse_npy(name: str, content: bytes) -> np.ndarray:
    """Reads an array of numbers or text from the bytes of an .npy file."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read_header(file, max_header_size=MAX_NPY_HEADER)
    except Exception as error:  # numpy evaluates the header as a literal
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{name}: damaged, or not an array ({reason})") from None
    if dtype.hasobject:
        raise ValueError(f"{name}: got pickled objects, expected numbers or text")
    got, promised = len(content) - file.tell(), dtype.itemsize * math.prod(shape)
    if got != promised or any(side < 0 for side in shape):
        raise ValueError(f"{name}: got {got} bytes, expected {promised} for {dtype} {shape}")
    file.seek(0)
    try:
        return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # a dtype of fields can be as odd as it likes
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{name}: damaged, or not an array ({reason})") from None
