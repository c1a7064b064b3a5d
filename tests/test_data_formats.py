"""Every original format: small files written here, known pixels, one clear error for bad input.

`FORMATS` serves the fuzzing test as well.
"""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import scipy.io
from PIL import Image

from gpvae.data import celeba, cifar, frey, idx, matlab, omniglot, user
from gpvae.data.files import reading, refuse_outside
from gpvae.data.resize import area_mean
from gpvae.errors import DataError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (5, 28, 28), np.uint8)
COLOUR = RNG.integers(0, 256, (4, 3, 32, 32), np.uint8)
FRAMES = RNG.integers(0, 256, (6, 28, 20), np.uint8)
DRAWINGS = RNG.random((3, 105, 105)) < 0.1  # True = ink
FACE = RNG.integers(0, 256, (218, 178, 3), np.uint8)
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def idx_bytes(array: np.ndarray, magic: int = 0x800) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", magic + array.ndim, *array.shape) + array.tobytes()


def mat_bytes(compress: bool = True, **variables: object) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, variables, do_compression=compress)
    return file.getvalue()


def chardata_bytes(compress: bool = True) -> bytes:
    columns = (GREY / 255).swapaxes(1, 2).reshape(len(GREY), 784).T
    return mat_bytes(compress, data=columns, testdata=columns[:, :2])


def cifar_bytes(labels: tuple[int, ...] = (3, 0, 9, 1)) -> bytes:
    return b"".join(
        bytes([y]) + x.tobytes() for y, x in zip(labels, COLOUR[: len(labels)], strict=True)
    )


def tar_bytes(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def cifar_archive() -> bytes:
    folder = "cifar-10-batches-bin/"
    return tar_bytes(
        {
            f"{folder}test_batch.bin": cifar_bytes((7,)),
            f"{folder}data_batch_2.bin": cifar_bytes((5, 6)),
            f"{folder}data_batch_1.bin": cifar_bytes(),
            f"{folder}batches.meta.txt": b"airplane\n",
        }
    )


def zip_bytes(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def image_bytes(pixels: np.ndarray, kind: str, mode: str | None = None, **options: int) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def drawing_bytes(ink: np.ndarray) -> bytes:
    return image_bytes(np.where(ink, 0, 255).astype(np.uint8), "PNG", "1")


def drawings_zip() -> bytes:
    names = ["B/character01/2.png", "A/character01/1.png", "A/character02/1.png"]
    return zip_bytes(
        {f"images_background/{n}": drawing_bytes(x) for n, x in zip(names, DRAWINGS, strict=True)}
    )


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz_bytes(compress: bool = True, **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **arrays)
    return file.getvalue()


def read_face_zip(path: Path) -> np.ndarray:
    from contextlib import ExitStack

    with ExitStack() as stack:
        return celeba.open_source(path, stack)("000001.jpg")


def read_own(path: Path) -> object:
    return user.load_path(path, {}, train_size=1).train.pixels


class Format(NamedTuple):
    """A file name, its bytes, and what reads it."""

    name: str
    data: bytes
    read: Callable[[Path], object]


def read_cifar(path: Path) -> object:
    return cifar.read_set({path.name: path}).train


FORMATS = {
    "idx": Format("images-idx3-ubyte", idx_bytes(GREY), idx.read_images),
    "idx.gz": Format("images.gz", gzip.compress(idx_bytes(GREY)), idx.read_images),
    "chardata": Format(
        "chardata.mat",
        chardata_bytes(),
        lambda path: matlab.read_chardata({"chardata.mat": path}).train,
    ),
    "chardata, not compressed": Format(
        "chardata.mat",
        chardata_bytes(compress=False),
        lambda path: matlab.read_chardata({"chardata.mat": path}).train,
    ),
    "svhn": Format(
        "train_32x32.mat",
        mat_bytes(X=COLOUR.transpose(2, 3, 1, 0), y=np.arange(4)[:, None]),
        matlab.read_svhn_part,
    ),
    "frey.mat": Format(
        "frey_rawface.mat",
        mat_bytes(compress=False, ff=FRAMES.reshape(len(FRAMES), -1).T),
        frey.read_original,
    ),
    "frey.npy": Format("freyfaces.npy", npy_bytes(FRAMES), frey.read_array),
    "cifar.tar.gz": Format("cifar-10-binary.tar.gz", cifar_archive(), read_cifar),
    "cifar.bin": Format("data_batch_1.bin", cifar_bytes(), cifar.read_batch),
    "omniglot.zip": Format("images_background.zip", drawings_zip(), omniglot.read_zip),
    "celeba.zip": Format(
        "img_align_celeba.zip",
        zip_bytes({"img_align_celeba/000001.jpg": image_bytes(FACE, "JPEG")}, zipfile.ZIP_STORED),
        read_face_zip,
    ),
    "celeba.jpg": Format(
        "000001.jpg",
        image_bytes(FACE, "JPEG"),
        lambda path: celeba.decode(path, lambda: path.open("rb")),
    ),
    "partition": Format(
        "list_eval_partition.txt",
        b"000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n",
        lambda path: celeba.read_partition(path)[1],
    ),
    "own.npy": Format("own.npy", npy_bytes(COLOUR / np.float32(255)), read_own),
    "own.npz": Format("own.npz", npz_bytes(images=COLOUR, test=COLOUR[:2]), read_own),
    "own.png": Format("own.png", image_bytes(GREY[0], "PNG"), user.read_image),
    "own.jpg": Format("own.jpg", image_bytes(FACE, "JPEG"), user.read_image),
}


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def error_of(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(DataError) as info:
        read(path)
    return str(info.value)


# --- known pixels -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["idx", "idx.gz"])
def test_idx_keeps_pixels_and_order(tmp_path: Path, kind: str) -> None:
    case = FORMATS[kind]
    images = case.read(write(tmp_path, case.name, case.data))
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, GREY[:, None])


def test_idx_labels(tmp_path: Path) -> None:
    labels = np.array([5, 0, 4, 1, 9], np.uint8)
    path = write(tmp_path, "labels.gz", gzip.compress(idx_bytes(labels)))
    assert idx.read_idx(path, 1).tolist() == [5, 0, 4, 1, 9]


@pytest.mark.parametrize("kind", ["chardata", "chardata, not compressed"])
def test_chardata_is_upright_and_exact(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, "chardata.mat", FORMATS[kind].data)
    raw = matlab.read_chardata({"chardata.mat": path})
    assert raw.train.dtype == np.uint8
    np.testing.assert_array_equal(raw.train, GREY[:, None])
    np.testing.assert_array_equal(raw.test, GREY[:2, None])


def test_chardata_with_other_intensities_stays_float(tmp_path: Path) -> None:
    columns = np.linspace(0, 1, 784 * 3).reshape(784, 3)
    path = write(tmp_path, "chardata.mat", mat_bytes(data=columns, testdata=columns))
    train = matlab.read_chardata({"chardata.mat": path}).train
    assert train.dtype == np.float32
    np.testing.assert_allclose(train[1, 0, 2, 5], columns[5 * 28 + 2, 1], rtol=1e-6)


def test_chardata_of_zeros_and_ones_is_stored_as_bytes_and_read_right(tmp_path: Path) -> None:
    columns = np.zeros((784, 2))
    columns[3, 1] = 1
    path = write(tmp_path, "chardata.mat", mat_bytes(data=columns, testdata=columns))
    train = matlab.read_chardata({"chardata.mat": path}).train
    assert train.sum() == 255
    assert train[1, 0, 3, 0] == 255


def test_svhn(tmp_path: Path) -> None:
    case = FORMATS["svhn"]
    np.testing.assert_array_equal(case.read(write(tmp_path, case.name, case.data)), COLOUR)


@pytest.mark.parametrize("kind", ["frey.mat", "frey.npy"])
def test_frey_is_the_same_from_both_files(tmp_path: Path, kind: str) -> None:
    case = FORMATS[kind]
    path = write(tmp_path, case.name, case.data)
    np.testing.assert_array_equal(case.read(path), FRAMES[:, None])
    np.testing.assert_array_equal(frey.read_set({case.name: path}).train, FRAMES[:, None])


def test_cifar_archive_and_extracted_files_agree(tmp_path: Path) -> None:
    path = write(tmp_path, "cifar-10-binary.tar.gz", cifar_archive())
    packed = cifar.read_set({path.name: path})
    np.testing.assert_array_equal(packed.train, np.concatenate([COLOUR, COLOUR[:2]]))
    np.testing.assert_array_equal(packed.test, COLOUR[:1])
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            if member.isfile():
                target = tmp_path / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
    found = {p.name: p for p in (tmp_path / "cifar-10-batches-bin").glob("*.bin")}
    extracted = cifar.read_set(found)
    np.testing.assert_array_equal(extracted.train, packed.train)
    np.testing.assert_array_equal(extracted.test, packed.test)


def test_omniglot_zip_is_sorted_inverted_and_averaged(tmp_path: Path) -> None:
    path = write(tmp_path, "images_background.zip", drawings_zip())
    whole = omniglot.read_zip(path, size=105)
    np.testing.assert_array_equal(whole[:, 0] > 0, DRAWINGS[[1, 2, 0]])
    assert set(np.unique(whole)) == {0, 255}
    small = omniglot.read_zip(path)
    assert small.shape == (3, 1, 28, 28)
    # each small pixel covers 3.75 x 3.75 drawn ones, the first one wholly the first three rows
    ink = DRAWINGS[1].astype(float)
    weight = np.array([1, 1, 1, 0.75])
    assert small[0, 0, 0, 0] == round(255 * (weight @ ink[:4, :4] @ weight) / 3.75**2)


def test_celeba_image_is_cut_and_averaged(tmp_path: Path) -> None:
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[35:183, 15:163] = (10, 100, 200)  # exactly the centre that is kept
    path = write(tmp_path, "1.jpg", image_bytes(pixels, "JPEG", quality=100, subsampling=0))
    image = celeba.decode(path, lambda: path.open("rb"))
    assert image.shape == (3, 64, 64)
    middle = image[:, 8:-8, 8:-8].reshape(3, -1)
    assert np.abs(middle - np.array([[10], [100], [200]])).max() <= 2
    assert np.abs(image.reshape(3, -1).mean(1) - np.array([10, 100, 200])).max() < 3


def test_area_mean_is_exact() -> None:
    pixels = RNG.integers(0, 256, (3, 12, 12), np.uint8)
    blocks = pixels.reshape(3, 4, 3, 4, 3).mean((2, 4))
    np.testing.assert_array_equal(area_mean(pixels, 4), np.floor(blocks + 0.5))
    np.testing.assert_array_equal(area_mean(pixels, 12), pixels)
    assert (area_mean(np.full((148, 148), 255, np.uint8), 64) == 255).all()


# --- the user's own ---------------------------------------------------------------------------


def test_own_npy_npz_and_folder(tmp_path: Path) -> None:
    npy = write(tmp_path, "a.npy", npy_bytes(COLOUR))
    npz = write(tmp_path, "a.npz", npz_bytes(images=COLOUR, test=COLOUR[:2], labels=np.arange(4)))
    single = write(tmp_path, "b.npz", npz_bytes(compress=False, x=COLOUR))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k, image in enumerate(COLOUR):
        write(folder, f"{k}.png", image_bytes(image.transpose(1, 2, 0), "PNG"))
    write(folder, "readme.txt", b"not an image")
    np.testing.assert_array_equal(user.read_npy(npy), COLOUR)
    np.testing.assert_array_equal(user.read_npz(npz)["test"], COLOUR[:2])
    np.testing.assert_array_equal(user.read_npz(single)["images"], COLOUR)
    np.testing.assert_array_equal(user.read_folder(folder), COLOUR)


def test_own_folder_resized_and_converted(tmp_path: Path) -> None:
    write(tmp_path, "a.png", image_bytes(np.full((8, 6), 40, np.uint8), "PNG"))
    write(tmp_path, "b.png", image_bytes(np.full((10, 4, 3), 90, np.uint8), "PNG"))
    assert "resize" in error_of(user.read_folder, tmp_path)
    images = user.read_folder(tmp_path, resize=(4, 3), channels=1)
    assert images.shape == (2, 1, 4, 3)
    assert images[0].max() == 40
    assert images[1].min() == 90


def test_own_folder_with_a_damaged_image(tmp_path: Path) -> None:
    for k in range(3):
        write(tmp_path, f"{k}.jpg", image_bytes(FACE, "JPEG"))
    write(tmp_path, "1.jpg", image_bytes(FACE, "JPEG")[:400])
    message = error_of(user.read_folder, tmp_path)
    assert "1.jpg" in message and "skip_corrupt=True" in message
    said: list[str] = []
    images = user.read_folder(tmp_path, skip_corrupt=True, log=said.append)
    assert images.shape == (2, 3, 218, 178)
    assert "1.jpg" in said[0]


def test_an_image_of_16_bits_is_not_cut_to_8(tmp_path: Path) -> None:
    path = write(tmp_path, "a.png", image_bytes(np.full((4, 4), 60000, np.uint16), "PNG"))
    assert "8-bit" in error_of(user.read_image, path)
    assert "8-bit" in error_of(lambda p: user.read_image(p, channels=1), path)


def test_folder_without_images(tmp_path: Path) -> None:
    assert "no images" in error_of(user.read_folder, tmp_path)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_a_web_page_instead_of_data(tmp_path: Path, kind: str) -> None:
    case = FORMATS[kind]
    assert "HTML page" in error_of(case.read, write(tmp_path, case.name, HTML))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("data", [b"", b"\0", b"x" * 3000])
def test_empty_or_foreign_bytes(tmp_path: Path, kind: str, data: bytes) -> None:
    case = FORMATS[kind]
    message = error_of(case.read, write(tmp_path, case.name, data))
    assert case.name in message


@pytest.mark.parametrize("kind", sorted(set(FORMATS) - {"partition"}))
def test_truncated(tmp_path: Path, kind: str) -> None:
    case = FORMATS[kind]
    error_of(case.read, write(tmp_path, case.name, case.data[: len(case.data) * 2 // 3]))


@pytest.mark.parametrize("kind", FORMATS)
def test_missing_file(tmp_path: Path, kind: str) -> None:
    case = FORMATS[kind]
    assert case.name in error_of(case.read, tmp_path / case.name)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (idx_bytes(GREY, 0xD00), "magic number"),
        (idx_bytes(GREY[0]), "magic number"),
        (idx_bytes(GREY)[:-1], "claims 3,920 values"),
        (idx_bytes(GREY) + b"\0", "holds more"),
        (struct.pack(">4I", 0x803, 2**31, 2**31, 2**31), "cannot be right"),
        (struct.pack(">4I", 0x803, 0, 28, 28), "cannot be right"),
    ],
)
def test_bad_idx(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in error_of(idx.read_images, write(tmp_path, "x", data))
    assert words in error_of(idx.read_images, write(tmp_path, "x.gz", gzip.compress(data)))


def test_gzip_with_a_wrong_check_sum(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(idx_bytes(GREY)))
    data[-8] ^= 1
    assert "CRC" in error_of(idx.read_images, write(tmp_path, "x.gz", bytes(data)))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"other": np.zeros((784, 3))}, "no variable 'data'"),
        ({"data": np.zeros((783, 3)), "testdata": np.zeros((784, 3))}, "expected 784 x N"),
        ({"data": np.full((784, 3), 2.5), "testdata": np.zeros((784, 3))}, "outside [0, 1]"),
        ({"data": np.full((784, 3), np.nan), "testdata": np.zeros((784, 3))}, "outside [0, 1]"),
        ({"data": {"a": 1}, "testdata": np.zeros((784, 3))}, "struct"),
        ({"data": np.array([1, "a"], object), "testdata": np.zeros((784, 3))}, "cell"),
        ({"data": "text", "testdata": np.zeros((784, 3))}, "char"),
        ({"data": np.zeros((784, 3), complex), "testdata": np.zeros((784, 3))}, "complex"),
    ],
)
def test_bad_chardata(tmp_path: Path, variables: dict, words: str) -> None:
    path = write(tmp_path, "chardata.mat", mat_bytes(**variables))
    assert words in error_of(lambda p: matlab.read_chardata({"chardata.mat": p}), path)


def test_hdf5_matlab_file(tmp_path: Path) -> None:
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    path = write(tmp_path, "train_32x32.mat", header + b"\x89HDF\r\n\x1a\n")
    assert "version 7.3" in error_of(matlab.read_svhn_part, path)


def test_bad_cifar(tmp_path: Path) -> None:
    assert "label 200" in error_of(
        cifar.read_batch, write(tmp_path, "a.bin", cifar_bytes((3, 200)))
    )
    assert "multiple of 3073" in error_of(
        cifar.read_batch, write(tmp_path, "b.bin", cifar_bytes()[:-5])
    )
    lone = write(tmp_path, "c.tar.gz", tar_bytes({"test_batch.bin": cifar_bytes()}))
    assert "expected data_batch_1.bin" in error_of(read_cifar, lone)


def test_archives_that_reach_outside(tmp_path: Path) -> None:
    for name in ("../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:/e.png"):
        bad = write(tmp_path, "bad.zip", zip_bytes({name: drawing_bytes(DRAWINGS[0])}))
        assert "outside its folder" in error_of(omniglot.read_zip, bad)
        assert "outside its folder" in error_of(read_face_zip, bad)
        tar = write(tmp_path, "bad.tar.gz", tar_bytes({name: cifar_bytes()}))
        assert "outside its folder" in error_of(read_cifar, tar)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar.gz", "bad.zip"]
    refuse_outside(tmp_path, ["a/b..c.png", "a/.png"])  # dots within a name are harmless


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        info = tarfile.TarInfo("data_batch_1.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    assert "not a batch" in error_of(read_cifar, write(tmp_path, "x.tar.gz", file.getvalue()))


def test_damaged_drawing_is_named(tmp_path: Path) -> None:
    members = {f"A/c/{k}.png": drawing_bytes(x) for k, x in enumerate(DRAWINGS)}
    members["A/c/1.png"] = members["A/c/1.png"][:60]
    path = write(tmp_path, "x.zip", zip_bytes(members))
    assert "A/c/1.png" in error_of(omniglot.read_zip, path)
    members["A/c/1.png"] = image_bytes(GREY[0], "PNG")
    path = write(tmp_path, "x.zip", zip_bytes(members))
    assert "expected 105 x 105" in error_of(omniglot.read_zip, path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "sprung",))

    objects = np.empty(3, object)
    objects[:] = Trap()
    file = io.BytesIO()
    np.save(file, objects, allow_pickle=True)
    message = error_of(user.read_npy, write(tmp_path, "a.npy", file.getvalue()))
    assert "a.npy" in message
    error_of(user.read_npz, write(tmp_path, "a.npz", zip_bytes({"images.npy": file.getvalue()})))
    error_of(frey.read_array, tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()


def test_npz_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 1, 1000, 1000)}
    )
    path = write(tmp_path, "a.npz", zip_bytes({"images.npy": header.getvalue() + b"abc"}))
    assert "a.npz" in error_of(user.read_npz, path)


def test_npz_without_images(tmp_path: Path) -> None:
    path = write(tmp_path, "a.npz", npz_bytes(x=COLOUR, y=COLOUR))
    assert "expected 'images'" in error_of(user.read_npz, path)


def test_bad_partition(tmp_path: Path) -> None:
    def message(text: str) -> str:
        path = write(tmp_path, "list_eval_partition.txt", text.encode())
        return error_of(celeba.read_partition, path)

    assert "line 2" in message("a.jpg 0\nb.jpg 3\n")
    assert "line 1" in message("../a.jpg 0\n")
    assert "twice" in message("a.jpg 0\na.jpg 1\n")
    assert "empty" in message("\n\n")


def test_an_interrupt_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), reading(tmp_path, "anything"):
        raise KeyboardInterrupt
