"""The data sets of the experiments: found in a folder that the user names, in a cache, or downloaded."""

from layernorm.experiments.data.captions import coco_features, flickr8k
from layernorm.experiments.data.cifar import cifar10
from layernorm.experiments.data.finding import VARIABLE
from layernorm.experiments.data.mnist import binarized_mnist, mnist
from layernorm.experiments.data.pens import Drawing, WrittenLine, iam_ondb, omniglot_strokes
from layernorm.experiments.data.questions import Question, cnn_questions
from layernorm.experiments.data.sentences import Pair, sentence_set, sick
from layernorm.experiments.data.sources import SOURCES, File, Origin, Source
from layernorm.experiments.data.text import tiny_shakespeare

__all__ = [
    "SOURCES",
    "VARIABLE",
    "Drawing",
    "File",
    "Origin",
    "Pair",
    "Question",
    "Source",
    "WrittenLine",
    "binarized_mnist",
    "cifar10",
    "cnn_questions",
    "coco_features",
    "flickr8k",
    "iam_ondb",
    "mnist",
    "omniglot_strokes",
    "sentence_set",
    "sick",
    "tiny_shakespeare",
]
