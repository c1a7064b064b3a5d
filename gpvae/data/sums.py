"""Published sums of the data files: "name kind:hexadecimal", under the name of the set.

Only sums that were published stand here: by the distributor, by a widely used loader that
enforces them, or in the SHA256SUMS list that comes with a file made for this project. "content"
is a sum of what a .gz file holds. A file that is not listed has no known sum.
"""

from __future__ import annotations

TABLE = """
[mnist] .gz: TensorFlow Datasets; content: the original distribution
train-images-idx3-ubyte.gz sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
train-images-idx3-ubyte.gz content-md5:6bbc9ace898e44ae57da46a324031adb
train-labels-idx1-ubyte.gz sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
train-labels-idx1-ubyte.gz content-md5:a25bea736e30d166cdddb491f175f624
t10k-images-idx3-ubyte.gz sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
t10k-images-idx3-ubyte.gz content-md5:2646ac647ad5339dbf082846283269ea
t10k-labels-idx1-ubyte.gz sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
t10k-labels-idx1-ubyte.gz content-md5:27ae3e4e09519cfbb04c329615203637

[fashion-mnist] TensorFlow Datasets (SHA-256), torchvision (MD5)
train-images-idx3-ubyte.gz sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
train-images-idx3-ubyte.gz md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d
train-labels-idx1-ubyte.gz sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
train-labels-idx1-ubyte.gz md5:25c81989df183df01b3e8a0aad5dffbe
t10k-images-idx3-ubyte.gz sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
t10k-images-idx3-ubyte.gz md5:bef4ecab320f06d8554ea6380940ec79
t10k-labels-idx1-ubyte.gz sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
t10k-labels-idx1-ubyte.gz md5:bb300cfdad3c16e7a12a480ee83cd310

[omniglot] one public loader of this address, which enforces it; the author gives none
chardata.mat md5:21ecaf34373511aa7691cf2e0802aa3d

[omniglot-28x28-rederived] the SHA256SUMS list that comes with the file
chardata.mat sha256:e6ec36c0078c7eb7c376410e6f770a119a7a30e331a168c52d89c8ac04db187d

[omniglot-images] TensorFlow Datasets (SHA-256), torchvision (MD5)
images_background.zip sha256:ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640
images_background.zip md5:68d2efa1b9178cc56df9314c21c6e718
images_evaluation.zip sha256:1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee
images_evaluation.zip md5:6b91aef0f799c5bb55b94e3f2daec811

[svhn] TensorFlow Datasets (SHA-256), torchvision (MD5)
train_32x32.mat sha256:435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8
train_32x32.mat md5:e26dedcc434d2e4c54c9b2d4a06d8373
test_32x32.mat sha256:cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b
test_32x32.mat md5:eb5a983be6a315427106f1b164d9cef3

[cifar10] the distributor (MD5), TensorFlow Datasets (SHA-256), torchvision-ruby (extracted files)
cifar-10-binary.tar.gz sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
cifar-10-binary.tar.gz md5:c32a1d4ab5d03f1284b67883e8d87530
data_batch_1.bin sha256:cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5
data_batch_2.bin sha256:a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed
data_batch_3.bin sha256:bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67
data_batch_4.bin sha256:014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48
data_batch_5.bin sha256:755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add
test_batch.bin sha256:8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b

[cifar10-subset] the SHA256SUMS list that comes with the file
cifar-10-subset-binary.tar.gz sha256:f8638dfbcbcee6246d97fd6fa880e14c07125c30c1e9520fd1690f44096e1088

[celeba] TensorFlow Datasets (SHA-256), torchvision (MD5)
img_align_celeba.zip sha256:46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74
img_align_celeba.zip md5:00d2c5bc6d35e252742224ab0c1e8fcb
list_eval_partition.txt sha256:fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7
list_eval_partition.txt md5:d32c9cbf5e040fd4025c592c306e6668

[frey] the SHA256SUMS list that comes with the .npy file
freyfaces.npy sha256:2177ea074dc1d5ce35294c687dfce79ced65db6d7b745d95a2e1757fcfbe41c0
"""  # noqa: E501


def parse(table: str) -> tuple[dict[str, dict[str, tuple[str, ...]]], dict[str, str]]:
    """{set: {file: sums}} and {set: who published them}."""
    sums: dict[str, dict[str, tuple[str, ...]]] = {}
    origins: dict[str, str] = {}
    current = ""
    for line in filter(None, table.splitlines()):
        if line.startswith("["):
            current, _, origin = line[1:].partition("] ")
            sums[current], origins[current] = {}, origin
        else:
            name, value = line.split()
            sums[current][name] = (*sums[current].get(name, ()), value)
    return sums, origins


SUMS, ORIGINS = parse(TABLE)
