"""The data sets as records: files, addresses, counts, citations. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from gpvae.data.sums import ORIGINS, SUMS


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Args:
        name: path under the set's folder; a trailing "/" marks a folder.
        urls: addresses to fetch it from, in order of preference.
        sums: "kind:hexadecimal" with a kind of `files.file_sum`; one match is enough, and
            without any the file is judged by its content alone.
        also: other names under which the same content is accepted.
        needed: whether the images can be read only with it.
    """

    name: str
    urls: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    needed: bool = True


@dataclass(frozen=True)
class Source:
    """One data set as its distributor gives it.

    Args:
        name: name in the catalog.
        title: what it is, in one line.
        folder: its folder under the data root.
        layouts: alternative sets of files; the first that is wholly present is read.
        reader: "module:function"; the function takes {file name: path} and gives a `Raw`.
        shape: (C, H, W).
        train, test, valid: numbers of images; 0 where there is no such standard part.
        citation: whom to cite.
        levels: number of grey levels.
        licence: as stated by the distributor.
        note: what a user should know before comparing numbers.
        cached: the reader keeps resized images on disk, and so checks the sums of its files
            only when it makes them.
    """

    name: str
    title: str
    folder: str
    layouts: tuple[tuple[File, ...], ...]
    reader: str
    shape: tuple[int, int, int]
    train: int
    test: int
    citation: str
    valid: int = 0
    levels: int = 256
    licence: str = "none stated"
    note: str = ""
    cached: bool = False

    @property
    def sums_from(self) -> str:
        """Who published the sums."""
        return ORIGINS.get(self.name, "")


def file(source: str, name: str, *mirrors: str, **options: object) -> File:
    """A file with its published sums; a mirror that ends in "/" is completed by the name."""
    urls = tuple(f"{mirror}{name}" if mirror.endswith("/") else mirror for mirror in mirrors)
    sums = SUMS[source].get(PurePosixPath(name).name, ())
    return File(name, urls, sums, **options)


def idx_layout(source: str, *mirrors: str) -> tuple[tuple[File, ...], ...]:
    """The four files of MNIST and its successors; the images can be read without the labels."""
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in IDX_KINDS]
    return (
        tuple(
            file(source, f"{name}.gz", *mirrors, also=(name,), needed="images" in name)
            for name in names
        ),
    )


IDX_KINDS = ("images-idx3", "labels-idx1")
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
LAKE = (
    "B. M. Lake, R. Salakhutdinov, J. B. Tenenbaum, Human-level concept learning through "
    "probabilistic program induction, Science 350, 2015"
)
KRIZHEVSKY = (
    "A. Krizhevsky, Learning multiple layers of features from tiny images, tech. report, "
    "University of Toronto, 2009"
)
PARTITION = file("celeba", "list_eval_partition.txt", f"{DRIVE}0B7EVK8r0v71pY0NSMzRuSXJEVkk")

RECORDS = (
    Source(
        name="digits",
        title="handwritten digits, part of scikit-learn",
        folder="",
        layouts=(),
        reader="gpvae.data.catalog:read_digits",
        shape=(1, 8, 8),
        train=1797,
        test=0,
        levels=17,
        citation="E. Alpaydin, C. Kaynak, Optical recognition of handwritten digits, UCI, 1998",
    ),
    Source(
        name="mnist",
        title="handwritten digits",
        folder="mnist",
        layouts=idx_layout(
            "mnist",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        reader="gpvae.data.idx:read_set",
        shape=(1, 28, 28),
        train=60000,
        test=10000,
        citation="Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-based learning applied "
        "to document recognition, Proc. IEEE 86(11), 1998",
        licence="rights with Y. LeCun and C. Cortes; often listed as CC BY-SA 3.0",
        note="a recompressed .gz or an uncompressed file is accepted by the sum of its content",
    ),
    Source(
        name="fashion-mnist",
        title="articles of clothing",
        folder="fashion-mnist",
        layouts=idx_layout(
            "fashion-mnist",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ),
        reader="gpvae.data.idx:read_set",
        shape=(1, 28, 28),
        train=60000,
        test=10000,
        citation="H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017",
        licence="MIT",
        note="only the original .gz files have published sums; recompressed ones are refused",
    ),
    Source(
        name="omniglot",
        title="handwritten characters, Burda et al.'s 28 x 28 resize and split",
        folder="omniglot",
        layouts=(
            (
                file(
                    "omniglot",
                    "chardata.mat",
                    "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/",
                    "https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/",
                ),
            ),
        ),
        reader="gpvae.data.matlab:read_chardata",
        shape=(1, 28, 28),
        train=24345,
        test=8070,
        citation=f"{LAKE}; Y. Burda, R. Grosse, R. Salakhutdinov, Importance weighted "
        "autoencoders, ICLR 2016",
        licence="MIT (original drawings)",
    ),
    Source(
        name="omniglot-28x28-rederived",
        title="handwritten characters, own 28 x 28 area average and random split",
        folder="omniglot",
        layouts=((file("omniglot-28x28-rederived", "chardata.mat"),),),
        reader="gpvae.data.matlab:read_chardata",
        shape=(1, 28, 28),
        train=24345,
        test=8070,
        citation=LAKE,
        licence="MIT (original drawings)",
        note="layout and sizes of Burda et al.'s file but another split and resize: likelihoods "
        "are not comparable with published ones. Not distributed online",
    ),
    Source(
        name="omniglot-images",
        title="handwritten characters, the official 105 x 105 drawings averaged to 28 x 28",
        folder="omniglot",
        layouts=(
            tuple(
                file(
                    "omniglot-images",
                    f"images_{part}.zip",
                    "https://github.com/brendenlake/omniglot/raw/master/python/",
                    "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",
                )
                for part in ("background", "evaluation")
            ),
        ),
        reader="gpvae.data.omniglot:read_set",
        shape=(1, 28, 28),
        train=19280,
        test=13180,
        citation=LAKE,
        licence="MIT",
        note="official split by alphabet: 30 background alphabets train, 20 evaluation ones test",
    ),
    Source(
        name="svhn",
        title="street view house numbers, cropped digits",
        folder="svhn",
        layouts=(
            tuple(
                file("svhn", f"{part}_32x32.mat", "http://ufldl.stanford.edu/housenumbers/")
                for part in ("train", "test")
            ),
        ),
        reader="gpvae.data.matlab:read_svhn",
        shape=(3, 32, 32),
        train=73257,
        test=26032,
        citation="Y. Netzer et al., Reading digits in natural images with unsupervised feature "
        "learning, NIPS workshop, 2011",
        licence="non-commercial use",
        note="without the 531,131 'extra' images",
    ),
    Source(
        name="cifar10",
        title="tiny photographs of ten classes",
        folder="cifar10",
        layouts=(
            (file("cifar10", "cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/"),),
            tuple(
                file("cifar10", f"cifar-10-batches-bin/{name}.bin")
                for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")
            ),
        ),
        reader="gpvae.data.cifar:read_set",
        shape=(3, 32, 32),
        train=50000,
        test=10000,
        citation=KRIZHEVSKY,
        note="the binary version; the Python version is a pickle and is not read",
    ),
    Source(
        name="cifar10-subset",
        title="the first 8,000 training and 1,000 test images of CIFAR-10",
        folder="cifar10",
        layouts=((file("cifar10-subset", "cifar-10-subset-binary.tar.gz"),),),
        reader="gpvae.data.cifar:read_set",
        shape=(3, 32, 32),
        train=8000,
        test=1000,
        citation=KRIZHEVSKY,
        note="not the standard set: results are not comparable with CIFAR-10. Not distributed "
        "online",
    ),
    Source(
        name="celeba",
        title="celebrity faces, centre 148 x 148 averaged to 64 x 64",
        folder="celeba",
        layouts=(
            (
                file("celeba", "img_align_celeba.zip", f"{DRIVE}0B7EVK8r0v71pZjFTYXZWM3FlRnM"),
                PARTITION,
            ),
            (file("celeba", "img_align_celeba/"), PARTITION),
        ),
        reader="gpvae.data.celeba:read_set",
        shape=(3, 64, 64),
        train=162770,
        valid=19867,
        test=19962,
        citation="Z. Liu, P. Luo, X. Wang, X. Tang, Deep learning face attributes in the wild, "
        "ICCV 2015",
        licence="non-commercial research only, http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        cached=True,
        note="Google Drive often refuses; then download both files by hand from the project's page",
    ),
    Source(
        name="frey",
        title="1,965 consecutive video frames of one face",
        folder="freyfaces",
        layouts=(
            (file("frey", "freyfaces.npy"),),
            (
                file(
                    "frey",
                    "frey_rawface.mat",
                    "https://cs.nyu.edu/~roweis/data/",
                    "http://www.cs.nyu.edu/~roweis/data/",
                ),
            ),
        ),
        reader="gpvae.data.frey:read_set",
        shape=(1, 28, 20),
        train=1965,
        test=0,
        citation="S. T. Roweis, L. K. Saul, Nonlinear dimensionality reduction by locally linear "
        "embedding, Science 290, 2000; images by B. Frey",
        note="no standard split; no published sum for the .mat file, whose address has been "
        "refusing downloads",
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in RECORDS}
