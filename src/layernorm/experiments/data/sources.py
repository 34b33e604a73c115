"""The data sets: their authors, licences, addresses, and the places where each is looked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Origin:
    """An official place of a file.

    Attributes:
        addresses: of the file, plain or gzipped, or of an archive that holds it; mirrors of one another.
        member: the file's path in the archive; empty where the file stands alone.

    Examples:
        >>> from layernorm.experiments.data import Origin
        >>> Origin(("https://example.org/all.zip",), "folder/one.txt").archive
        'all.zip'
    """

    addresses: tuple[str, ...]
    member: str = ""

    @property
    def archive(self) -> str:
        """The archive's name; empty where the file stands alone."""
        return self.addresses[0].rsplit("/", 1)[1] if self.member else ""


@dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
        name: as it is called when it stands alone; ``name.gz`` is found too.
        sha256: of the content in the normal form that its loader gives it, since copies of one data set
            differ in compression, in line ends and in encoding.
        origins: where it can be downloaded, tried in turn.
        aliases: other names of it.
    """

    name: str
    sha256: str
    origins: tuple[Origin, ...]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        folder: where its files lie, within the folder that the user names and within the cache.
        title: its name.
        what: is in it, in a few words.
        by: whose work it is.
        licence: in a few words.
        size: of what is downloaded or read.
        used_by: the experiments.
        page: the address of who hands it out.
        layout: the files that are looked for.
        files: those that can be downloaded; none where a registration or a licence forbids it.
    """

    folder: str
    title: str
    what: str
    by: str
    licence: str
    size: str
    used_by: tuple[str, ...]
    page: str
    layout: str
    files: tuple[File, ...] = ()


def _mnist(name: str, sha256: str) -> File:
    hosts = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    return File(name, sha256, (Origin(tuple(f"{host}{name}.gz" for host in hosts)),))


MNIST: Final = Source(
    folder="mnist",
    title="MNIST",
    what="60,000 + 10,000 images of digits, 28 by 28",
    by="LeCun, Cortes, Burges 1998",
    licence="CC BY-SA 3.0, as commonly stated",
    size="11 MB",
    used_by=("mnist", "convnet", "sequential-mnist", "permuted-mnist"),
    page="https://github.com/cvdfoundation/mnist",
    layout="`{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`",
    files=(
        _mnist("train-images-idx3-ubyte", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
        _mnist("train-labels-idx1-ubyte", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
        _mnist("t10k-images-idx3-ubyte", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
        _mnist("t10k-labels-idx1-ubyte", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
    ),
)


def _cifar(name: str, sha256: str) -> File:
    archive = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    return File(name, sha256, (Origin((archive,), f"cifar-10-batches-bin/{name}"),))


CIFAR10: Final = Source(
    folder="cifar10",
    title="CIFAR-10",
    what="50,000 + 10,000 colour images of 10 classes, 32 by 32",
    by="Krizhevsky 2009",
    licence="none stated; research",
    size="170 MB",
    used_by=("convnet",),
    page="https://www.cs.toronto.edu/~kriz/cifar.html",
    layout="`cifar-10-binary.tar.gz`, or from it `{data_batch_1,…,data_batch_5,test_batch}.bin`",
    files=(
        _cifar("data_batch_1.bin", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
        _cifar("data_batch_2.bin", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
        _cifar("data_batch_3.bin", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
        _cifar("data_batch_4.bin", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
        _cifar("data_batch_5.bin", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        _cifar("test_batch.bin", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
    ),
)


def _binarized(part: str, sha256: str) -> File:
    name = f"binarized_mnist_{part}.amat"
    address = f"https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/{name}"
    return File(name, sha256, (Origin((address,)),))


BINARIZED_MNIST: Final = Source(
    folder="binarized_mnist",
    title="Binarized MNIST",
    what="MNIST with every pixel drawn once as 0 or 1: 50,000 + 10,000 + 10,000 images",
    by="Salakhutdinov and Murray 2008; files by Larochelle",
    licence="that of MNIST",
    size="110 MB as text",
    used_by=("draw",),
    page="https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
    layout="`binarized_mnist_{train,valid,test}.amat`, as text or as MATLAB files",
    files=(
        _binarized("train", "43490d4d6ac9002727af4426d8748609fdb7e4094fa65ad8d681ea60082a7a5a"),
        _binarized("valid", "069b4f0beb389b776478c3e872b4df71c95ac4be64d7cbe6d32e24ebac8e6d5e"),
        _binarized("test", "ca0294c3b8d984c7a1dc891015a8eea6f37bae59a34e35ea0fc8c47110a8dd86"),
    ),
)

OMNIGLOT: Final = Source(
    folder="strokes",
    title="Omniglot strokes",
    what="2,720 drawings of 136 characters of 5 alphabets by 20 people each, as pen strokes",
    by="Lake, Salakhutdinov, Tenenbaum 2015",
    licence="MIT",
    size="3 MB",
    used_by=("handwriting",),
    page="https://github.com/brendenlake/omniglot",
    layout="`strokes_background_small1.zip`",
    files=(
        File(
            "strokes_background_small1.zip",
            "dd1c6a3611afc553628731a64087b0426d9087003b0f909bed114dce2cc824d0",
            (
                Origin(
                    (
                        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
                        "strokes_background_small1.zip",
                    )
                ),
            ),
            aliases=("omniglot_strokes_background_small1.zip",),
        ),
    ),
)

IAM_ONDB: Final = Source(
    folder="iam_ondb",
    title="IAM-OnDB",
    what="12,179 lines of English handwriting as pen strokes, with their texts",
    by="Liwicki and Bunke 2005",
    licence="non-commercial research, after registration",
    size="40 MB",
    used_by=("handwriting",),
    page="https://fki.tic.heia-fr.ch/databases/iam-on-line-handwriting-database",
    layout="`lineStrokes-all.tar.gz` and `ascii-all.tar.gz`, or their folders `lineStrokes/` and `ascii/`; "
    "where wanted `original-xml-all.tar.gz` or `original/` (writers), `trainset.txt`, `testset_{v,t,f}.txt`",
)

TINY_SHAKESPEARE: Final = Source(
    folder="text",
    title="Tiny Shakespeare",
    what="1.1 million characters of Shakespeare's plays",
    by="Karpathy 2015",
    licence="the text is in the public domain",
    size="1 MB",
    used_by=("skip-thoughts", "attentive-reader", "transformer"),
    page="https://github.com/karpathy/char-rnn",
    layout="`tinyshakespeare.txt`",
    files=(
        File(
            "tinyshakespeare.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            (
                Origin(
                    (
                        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                        "input.txt",
                    )
                ),
            ),
        ),
    ),
)

_FLICKR8K_ARCHIVES: Final = (
    "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_text.zip",
    "https://nlp.cs.illinois.edu/HockenmaierGroup/Framing_Image_Description/Flickr8k_text.zip",
)


def _flickr8k(name: str, sha256: str) -> File:
    return File(name, sha256, (Origin(_FLICKR8K_ARCHIVES, name),))


FLICKR8K: Final = Source(
    folder="captions",
    title="Flickr8k captions",
    what="8,000 images with 5 captions each, 6,000 + 1,000 + 1,000, the texts alone",
    by="Hodosh, Young, Hockenmaier 2013",
    licence="research and education",
    size="2 MB",
    used_by=("order-embeddings",),
    page="https://hockenmaier.cs.illinois.edu/8k-pictures.html",
    layout="`Flickr8k_text.zip`, or from it `Flickr8k.token.txt` and `Flickr_8k.{train,dev,test}Images.txt`",
    files=(
        _flickr8k("Flickr8k.token.txt", "ef3c5d97b4b719586f5d1c50fbf72fa7dfe47c3254f58cdec1752150212b965a"),
        _flickr8k(
            "Flickr_8k.trainImages.txt", "1350b91ed1ff0062ddae239123d8fc3949ab6e5d490293b2eedb02c4df7aa5ef"
        ),
        _flickr8k(
            "Flickr_8k.devImages.txt", "1a602de5700452f5d869790e4d310c0e9d97d07d7be5601e524419331ef99b0e"
        ),
        _flickr8k(
            "Flickr_8k.testImages.txt", "6461ca86cf5d4c810cbbc3a7dd5a4ef0900b7306aba17dfa9b96e93f3afc452d"
        ),
    ),
)

COCO_FEATURES: Final = Source(
    folder="coco",
    title="COCO features",
    what="features of a VGG network (10 crops, 4,096 numbers) of 123,287 images, with 5 captions each",
    by="Lin et al. 2014 (images, captions), Karpathy 2015 (parts), Vendrov et al. 2016 (features)",
    licence="captions CC BY 4.0, images under the terms of Flickr",
    size="1 GB",
    used_by=("order-embeddings",),
    page="https://github.com/ivendrov/order-embedding",
    layout="what `coco.zip` holds: `{train,val,test}.txt`, a caption a line, five an image, and "
    "`images/10crop/{train,val,test}.npy`",
)

CNN_QUESTIONS: Final = Source(
    folder="cnn",
    title="CNN questions",
    what="380,298 + 3,924 + 3,198 cloze questions on news of CNN",
    by="Hermann et al. 2015",
    licence="the articles are CNN's; not to be passed on",
    size="3 GB",
    used_by=("attentive-reader",),
    page="https://github.com/google-deepmind/rc-data",
    layout="`questions/{training,validation,test}/*.question`, or `cnn.tgz` with them",
)


def _sentences(name: str, sha256: str, folder: str, archive: str = "", member: str = "") -> File:
    """Return a file by itself, in Wang and Manning's collection, and in its authors' archive if any."""
    copy = f"https://raw.githubusercontent.com/harvardnlp/sent-conv-torch/master/data/raw/{name}"
    collection = "https://dl.fbaipublicfiles.com/senteval/senteval_data/datasmall_NB_ACL12.zip"
    origins = [Origin((copy,)), Origin((collection,), f"data/{folder}/{name}")]
    if archive:
        address = f"https://www.cs.cornell.edu/people/pabo/movie-review-data/{archive}"
        origins.append(Origin((address,), member))
    return File(name, sha256, tuple(origins))


SENTENCE_SETS: Final = Source(
    folder="sentences",
    title="MR, CR, SUBJ, MPQA",
    what="sentences of two classes: 10,662 of film reviews, 3,771 of product reviews, 10,000 subjective or "
    "not, 10,603 opinions",
    by="Pang and Lee 2005 and 2004, Hu and Liu 2004, Wiebe et al. 2005; collected by Wang and Manning 2012",
    licence="research",
    size="3 MB",
    used_by=("skip-thoughts",),
    page="https://github.com/harvardnlp/sent-conv-torch",
    layout="`rt-polarity.{pos,neg}`, `custrev.{pos,neg}`, `subj.{subjective,objective}`, `mpqa.{pos,neg}`, "
    "or the archives `datasmall_NB_ACL12.zip`, `rt-polaritydata.tar.gz`, `rotten_imdb.tar.gz`",
    files=(
        _sentences(
            "rt-polarity.pos",
            "cef73a2cffbcc97bfc4b14a7974e05f8a932877f2d2220de9aa53953aa275db2",
            "rt10662",
            "rt-polaritydata.tar.gz",
            "rt-polaritydata/rt-polarity.pos",
        ),
        _sentences(
            "rt-polarity.neg",
            "5181768838fa0f19aa440e8247ca520ba45e7d439e5ec7a308098fe91f4f24b4",
            "rt10662",
            "rt-polaritydata.tar.gz",
            "rt-polaritydata/rt-polarity.neg",
        ),
        _sentences(
            "custrev.pos", "95630e6f27123bd038c09feb43ef06ff205e81a594993d15726491daed1b3e39", "customerr"
        ),
        _sentences(
            "custrev.neg", "e355e29de4d1b2a2dfb7de9f05307c21c052cdcb0762d941437cdc9501475397", "customerr"
        ),
        _sentences(
            "subj.subjective",
            "4a3883db68784a0267bffb8d57d529f02f0a72ce5ba143f9f2136e182e69f091",
            "subj",
            "rotten_imdb.tar.gz",
            "quote.tok.gt9.5000",
        ),
        _sentences(
            "subj.objective",
            "fda2f9309704d92e31ca60cdafa81281c35a7feb855cd9d854121abc6495f7ad",
            "subj",
            "rotten_imdb.tar.gz",
            "plot.tok.gt9.5000",
        ),
        _sentences("mpqa.pos", "5100ba12f639d6a9707673652543f3a70f9365ab6f7b211047164588d9fe1370", "mpqa"),
        _sentences("mpqa.neg", "5c5d22a7dd2108ab08c1137a9d49ad72171735d63459dc3a3b130955376e3fa8", "mpqa"),
    ),
)


def _sick(part: str, sha256: str) -> File:
    name = f"SICK_{part}.txt"
    address = f"https://alt.qcri.org/semeval2014/task1/data/uploads/sick_{part}.zip"
    return File(name, sha256, (Origin((address,), name),))


SICK: Final = Source(
    folder="sentences",
    title="SICK",
    what="4,500 + 500 + 4,927 pairs of sentences with their relatedness, as in SemEval 2014",
    by="Marelli et al. 2014",
    licence="CC BY-NC-SA 3.0",
    size="0.4 MB",
    used_by=("skip-thoughts",),
    page="https://alt.qcri.org/semeval2014/task1/",
    layout="`sick_{train,trial,test_annotated}.zip`, or from them `SICK_{train,trial,test_annotated}.txt`",
    files=(
        _sick("train", "c6ca936b568a1eee245bc80efa98a80817cbac4e842c30ada9daba29a490c6f2"),
        _sick("trial", "3289034a4e28d381e3a8f1740de4c253f9874bef12fd6bdb8b329c4eae70878d"),
        _sick("test_annotated", "da198eedae2556f40f25eee716ad95d19175d4820b700e59a206218b32321f1f"),
    ),
)

BOOKS: Final = Source(
    folder="books",
    title="A collection of books",
    what="running text, a sentence a line, such as BookCorpus",
    by="the user; BookCorpus: Y. Zhu, R. Kiros and others, Aligning books and movies, 2015",
    licence="that of the books",
    size="any",
    used_by=("skip-thoughts",),
    page="https://yknzhu.wixsite.com/mbweb",
    layout="any number of files `*.txt`",
)

#: All data sets.
SOURCES: Final = (
    MNIST,
    CIFAR10,
    BINARIZED_MNIST,
    OMNIGLOT,
    IAM_ONDB,
    TINY_SHAKESPEARE,
    BOOKS,
    FLICKR8K,
    COCO_FEATURES,
    CNN_QUESTIONS,
    SENTENCE_SETS,
    SICK,
)


def table() -> str:
    """Return all data sets as a table in Markdown, as in the documentation."""
    head = "| data set | what | by | licence | size | experiments | downloaded |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for source in SOURCES:
        name = f"[{source.title}]({source.page})"
        downloaded = "yes" if source.files else "never"
        cells = (
            name,
            source.what,
            source.by,
            source.licence,
            source.size,
            ", ".join(source.used_by),
            downloaded,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def layouts() -> str:
    """Return the folder and the files of every data set as a list in Markdown, as in the documentation."""
    return "".join(f"- {source.title}, in `{source.folder}/`: {source.layout}.\n" for source in SOURCES)
