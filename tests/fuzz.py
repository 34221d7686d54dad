"""Damaged files of all formats: right data or a clear error, no crash, no hang, and no more memory than a file can hold.

    python tests/fuzz.py --cases 5000 --seed 1

damages samples of every format in ways that a seed decides, and has another process read them. The tests run a few hundred cases.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECONDS = 30
# Beyond what the file can hold, twice: what a reader takes for itself.
SPARE_BYTES = 96 * 2**20
GREATEST_RATIO = 1032
NIBABEL_SAMPLES = ("small.mnc", "minc2_1_scale.mnc", "phantom_varscale.PAR", "scaled+tlrc.HEAD", "example4d+orig.HEAD")


@dataclass(frozen=True)
class Sample:
    """An intact image, in a folder of its own."""

    name: str
    folder: Path
    opened: str
    """What is given to `Image`, relative to the folder."""
    checked: tuple[str, ...] = ()
    """Files that have checksums, so that damaged ones give the right values or an error."""


def make_samples(folder: Path) -> list[Sample]:
    """Write small files of all formats."""
    import nibabel as nib
    import numpy as np
    import SimpleITK
    import torch

    import voxloom as vx
    from dicom_samples import frames, write_enhanced, write_segments, write_slices

    values = np.random.default_rng(0).integers(0, 500, (14, 12, 10), dtype=np.int16)
    values[3:9, 2:8] = 7
    affine = np.array([[-0.8, 0.1, 0, 12], [0.1, 0.9, 0.2, -30], [0, -0.2, 2.5, 7], [0, 0, 0, 1]])
    image = vx.ScalarImage(torch.from_numpy(values)[None], affine=affine)
    samples = []

    def add(name: str, opened: str, write: Callable[[Path], object], checked: tuple[str, ...] = ()) -> None:
        place = folder / name
        place.mkdir()
        write(place)
        samples.append(Sample(name, place, opened, checked))

    for ending in (".nii", ".nii.gz", ".mgh", ".mgz", ".nrrd", ".mha"):
        is_packed = ending in (".nii.gz", ".mgz")
        add(
            f"saved{ending}",
            f"x{ending}",
            lambda place, e=ending: image.save(place / f"x{e}"),
            (f"x{ending}",) if is_packed else (),
        )
    add("nii.bz2", "x.nii.bz2", lambda place: nib.save(nib.Nifti1Image(values, affine), place / "x.nii.bz2"), ("x.nii.bz2",))
    add("pair", "x.hdr", lambda place: nib.save(nib.Nifti1Pair(values, affine), place / "x.hdr"))
    add("analyze", "x.img", lambda place: nib.save(nib.Spm2AnalyzeImage(values, np.diag([-1, 1, 2, 1])), place / "x.img"))
    scaled = nib.Nifti1Image(values.astype(np.float32), affine)
    scaled.header.set_data_dtype(np.int16)
    add("scaled", "x.nii", lambda place: nib.save(scaled, place / "x.nii"))

    whole = SimpleITK.GetImageFromArray(values)
    plane = SimpleITK.GetImageFromArray((values[0] // 2).astype(np.uint8))
    for ending in ("nrrd", "nhdr", "mha", "mhd", "tif", "gipl", "vtk", "mrc", "h5"):
        for packed in (False, True):
            if packed and ending in ("gipl", "vtk", "mrc"):
                continue
            name = f"x.{ending}"
            add(
                f"itk.{ending}{'.packed' if packed else ''}",
                name,
                lambda place, n=name, p=packed: SimpleITK.WriteImage(whole, str(place / n), useCompression=p),
            )
    for ending in ("png", "jpg", "bmp", "jp2"):
        add(f"itk.{ending}", f"x.{ending}", lambda place, e=ending: SimpleITK.WriteImage(plane, str(place / f"x.{e}")))

    def metaimage(place: Path) -> None:
        (place / "x.zraw").write_bytes(zlib.compress(values.tobytes()))
        (place / "x.mhd").write_text(
            "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = True\n"
            "ElementSpacing = 1 1 1\nDimSize = 10 12 14\nElementType = MET_SHORT\nElementDataFile = x.zraw\n"
        )

    def nrrd(place: Path) -> None:
        (place / "x.raw.gz").write_bytes(gzip.compress(values.tobytes()))
        (place / "x.nhdr").write_text(
            "NRRD0004\ntype: short\ndimension: 3\nsizes: 10 12 14\nendian: little\nencoding: gzip\ndata file: x.raw.gz\n\n"
        )

    add("mhd.zraw", "x.mhd", metaimage, ("x.zraw",))
    add("nhdr.gz", "x.nhdr", nrrd, ("x.raw.gz",))
    add("enhanced", "x.dcm", lambda place: write_enhanced(place / "x.dcm", [2, 0, 1, 3, 4, 5, 6], frames()))
    add("unnamed", "x", lambda place: write_enhanced(place / "x", range(7), frames()))
    add("segments", "x.dcm", lambda place: write_segments(place / "x.dcm", [(1, 0), (1, 1), (2, 1)], frames(3) % 2))
    add("series", ".", write_slices)
    add("series.rle", ".", lambda place: write_slices(place, "RGB", _run_lengths(), samples=3))
    data = Path(nib.__file__).parent / "tests" / "data"
    for name in NIBABEL_SAMPLES:
        stem = name.split(".")[0]
        add(name, name, lambda place, s=stem: [shutil.copy(path, place) for path in data.glob(f"{s}.*")])
    return samples


def _run_lengths() -> str:
    from pydicom.uid import RLELossless

    return RLELossless


# Damage


def damage(content: bytes, rng: random.Random) -> bytes:
    """Damage a file in one of the ways in which files are damaged, or in which one would do harm."""
    out = bytearray(content)
    kinds = [_flip, _replace, _cut, _zero, _insert, _remove, _number, _digits, _repeat]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if out:
            rng.choice(kinds)(out, rng)
    return bytes(out)


def _place(out: bytearray, rng: random.Random) -> int:
    """A place, mostly in the header."""
    return rng.randrange(min(len(out), rng.choice((64, 400, 2000, len(out)))))


def _flip(out: bytearray, rng: random.Random) -> None:
    out[_place(out, rng)] ^= 1 << rng.randrange(8)


def _replace(out: bytearray, rng: random.Random) -> None:
    out[_place(out, rng)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def _cut(out: bytearray, rng: random.Random) -> None:
    del out[rng.randrange(len(out)) :]


def _zero(out: bytearray, rng: random.Random) -> None:
    start = _place(out, rng)
    stop = min(len(out), start + rng.choice((4, 64, 512)))
    out[start:stop] = bytes(stop - start)


def _insert(out: bytearray, rng: random.Random) -> None:
    start = _place(out, rng)
    out[start:start] = rng.randbytes(rng.choice((1, 2, 16)))


def _remove(out: bytearray, rng: random.Random) -> None:
    start = _place(out, rng)
    del out[start : start + rng.choice((1, 2, 16, 512))]


def _number(out: bytearray, rng: random.Random) -> None:
    """Put a number in where readers may take it for a size."""
    numbers = (0, 1, -1, 255, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 60000, 2**40)
    value = rng.choice(numbers) & (2**64 - 1)
    code = rng.choice("HIQ")
    size = struct.calcsize(code)
    packed = struct.pack(rng.choice("<>") + code, value % 2 ** (8 * size))
    start = _place(out, rng)
    out[start : start + size] = packed


def _digits(out: bytearray, rng: random.Random) -> None:
    """Put another number into a text."""
    places = [number for number, byte in enumerate(out[:4000]) if 48 <= byte <= 57]
    if places:
        start = rng.choice(places)
        out[start : start + 1] = rng.choice((b"0", b"9", b"-1", b"99999", b"4294967296", b"1e300", b"nan", b"2147483648", b".5"))


def _repeat(out: bytearray, rng: random.Random) -> None:
    start = _place(out, rng)
    out[start:start] = out[start : start + rng.choice((8, 128, 1000))]


# Reading, in another process


def read(path: Path) -> dict[str, object]:
    """Read an image, and say what happened; in the worker."""
    import voxloom as vx
    from voxloom.errors import VoxloomError

    started = time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result: dict[str, object]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = vx.ScalarImage(path)
            repr(image)
            data = image.data
            assert tuple(data.shape) == image.shape, "the data have another shape than the image"
            assert data.dtype == image.dtype, "the data have another type than the image"
            result = {"outcome": "data", "hash": hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()}
            del image, data
        except VoxloomError as error:
            result = {"outcome": "error", "type": type(error).__name__, "message": str(error)}
        except BaseException as error:  # noqa: BLE001 - what is looked for
            result = {"outcome": "surprise", "type": type(error).__name__, "message": str(error)}
    return result | {"bytes": _status("VmHWM") - before, "seconds": time.monotonic() - started}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def work() -> None:
    """Read the paths that come in, one after the other."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    for line in sys.stdin:
        answers.write(json.dumps(read(Path(line.rstrip("\n")))) + "\n")
        answers.flush()


class Reader:
    """A process that reads images, and is made anew when it ends or hangs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, path: Path) -> dict[str, object]:
        """Have a path read."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, str(Path(__file__).resolve()), "--work"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1
            )
            self(path.parent)  # what is imported and set up at first is not counted
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], SECONDS)[0]:
            process.kill()
            process.wait()
            return {"outcome": "hang"}
        answer = process.stdout.readline()
        if not answer:
            return {"outcome": f"crash {process.wait()}"}
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


def faults(sample: Sample, touched: str, damaged: Path, answer: dict[str, object], intact: object) -> Iterator[str]:
    """Name what is wrong with an answer."""
    outcome = answer["outcome"]
    if outcome not in ("data", "error"):
        yield f"{outcome}: {answer.get('type', '')} {answer.get('message', '')}"
        return
    if outcome == "error" and damaged.name not in str(answer["message"]) and touched not in str(answer["message"]):
        yield f"an error that does not name the file: {answer['message']}"
    if "Success" in str(answer.get("message")):
        yield f"an error that says nothing: {answer['message']}"
    if outcome == "data" and touched in sample.checked and answer["hash"] != intact:
        yield "wrong values, though there is a checksum"
    held = sum(path.stat().st_size for path in damaged.rglob("*")) if damaged.is_dir() else damaged.stat().st_size
    held += 0 if damaged.is_dir() else sum(path.stat().st_size for path in damaged.parent.iterdir() if path != damaged)
    if int(answer["bytes"]) > 2 * held * GREATEST_RATIO + SPARE_BYTES or int(answer["bytes"]) > 2**31:
        yield f"{answer['bytes']} bytes of memory for files of {held}"


def fuzz(cases: int, seed: int, only: str = "", keep: Path | None = None) -> Iterator[tuple[str, str]]:
    """Damage and read; give the name of each case, and what is wrong with it or else what came of it."""
    reader = Reader()
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        (root / "samples").mkdir()
        samples = [sample for sample in make_samples(root / "samples") if only in sample.name]
        try:
            intact = {}
            for sample in samples:
                answer = reader(sample.folder / sample.opened)
                if answer["outcome"] != "data":
                    yield f"{sample.name} intact", f"FAULT {answer}"
                intact[sample.name] = answer.get("hash")
            for number in range(cases):
                rng = random.Random(f"{seed}.{number}")
                sample = samples[number % len(samples)]
                folder = root / "case"
                shutil.copytree(sample.folder, folder)
                touched = rng.choice(sorted(path.name for path in folder.iterdir()))
                (folder / touched).write_bytes(damage((folder / touched).read_bytes(), rng))
                path = (folder / sample.opened).resolve()
                answer = reader(path)
                found = list(faults(sample, touched, path, answer, intact[sample.name]))
                name = f"{sample.name} seed {seed} case {number} {touched}"
                if found and keep is not None:
                    shutil.copytree(folder, keep / name.replace(" ", "_"), dirs_exist_ok=True)
                yield name, "FAULT " + "; ".join(found) if found else str(answer.get("type", answer["outcome"]))
                shutil.rmtree(folder)
        finally:
            reader.close()


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="samples whose names hold this")
    parser.add_argument("--keep", type=Path, help="folder for files that showed a fault")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    counts: Counter[str] = Counter()
    for name, what in fuzz(arguments.cases, arguments.seed, arguments.only, arguments.keep):
        counts[what.split(" ")[0]] += 1
        if what.startswith("FAULT"):
            print(f"{name}: {what}", flush=True)
    print(dict(counts))
    sys.exit(counts["FAULT"] > 0)


if __name__ == "__main__":
    main()
