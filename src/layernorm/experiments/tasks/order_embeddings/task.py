"""Order-embeddings of images and captions: the paper's §6.1, figure 1 and table 2.

The model of Vendrov et al. (2016, arXiv 1511.06361): a caption is the last state of a GRU, an image a linear
function of its features; both are made non-negative and of length 1. A caption is more general than its
image, so it should lie nearer to the origin in every coordinate: what stands out is the order violation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from layernorm.experiments.data.words import Vocabulary
from layernorm.experiments.networks.sentence_encoder import NORMS, SentenceEncoder, Sentences
from layernorm.experiments.results import judging
from layernorm.experiments.run import processes
from layernorm.experiments.section import Card, Table
from layernorm.experiments.task import Batch, Loss, Metric, Preset, Problem, Task
from layernorm.experiments.tasks.order_embeddings import captioned_images

_SECTION: Final = "§6.1, figure 1, table 2"
#: Images that are searched at a time.
_GALLERY: Final = 1000
#: Vendrov et al.'s limit of each parameter's gradient of a batch's sum.
_CLIP: Final = 2.0
#: Elements of the largest table that an order violation fills at once.
_ELEMENTS: Final = 2**24

MEAN_RECALL: Final = Metric("mean_recall", "mean of the recalls (%)", higher=True, form="{:.1f}")
METRICS: Final = (
    MEAN_RECALL,
    *(
        metric
        for side, what in (("caption", "caption retrieval"), ("image", "image retrieval"))
        for metric in (
            *(
                Metric(f"{side}_recall_{k}", f"{what} R@{k} (%)", higher=True, form="{:.1f}")
                for k in (1, 5, 10)
            ),
            Metric(f"{side}_mean_rank", f"{what} mean rank", form="{:.1f}", log=True),
        )
    ),
)
#: The same of the test images.
TEST_METRICS: Final = tuple(
    replace(metric, name=f"test_{metric.name}", label=f"{metric.label}, test images", is_test=True)
    for metric in METRICS
)
TEST_MEAN_RECALL: Final = TEST_METRICS[0]
#: Table 2 of the paper, on test images of COCO; the columns are ``METRICS`` without the first.
PAPER: Final = {
    "Sym (Vendrov et al. 2016)": ("45.4", "", "88.7", "5.8", "36.3", "", "85.8", "9.0"),
    "OE (Vendrov et al. 2016)": ("46.7", "", "88.9", "5.7", "37.9", "", "85.9", "8.1"),
    "OE (the paper's)": ("46.6", "79.3", "89.1", "5.2", "37.8", "73.6", "85.7", "7.9"),
    "OE + LN (the paper's)": ("48.5", "80.6", "89.8", "5.1", "38.9", "74.3", "86.3", "7.6"),
}


def order_violations(captions: Tensor, images: Tensor) -> Tensor:
    """Return how far each caption (N, D) is from being more general than each image (M, D): (N, M).

    ‖max(0, caption - image)‖², Vendrov et al. equation 2.

    Examples:
        >>> import torch
        >>> from layernorm.experiments.tasks.order_embeddings.task import order_violations
        >>> order_violations(torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([[0.],
                [4.]])
    """
    at_once = max(1, _ELEMENTS // max(1, images.numel()))
    parts = [F.relu(part.unsqueeze(1) - images).square().sum(-1) for part in captions.split(at_once)]
    return torch.cat(parts)


def ranking_loss(captions: Tensor, images: Tensor, owners: Tensor, margin: float) -> Tensor:
    """Return the sum over matching pairs of how far wrong pairs come within the margin: a scalar.

    Vendrov et al. equation 4: for caption i and its image, every image in the batch that is not its own, and
    for the image every caption that is not of it, costs max(0, margin + E(its own) - E(wrong)).
    In several processes the wrong ones are those of all.

    Args:
        captions: (N, D).
        images: the image of each caption, (N, D).
        owners: the number of the image of each caption, (N,).
        margin: by which a wrong pair should violate the order more than the right one.
    """
    right = F.relu(captions - images).square().sum(-1)
    all_images, all_owners, all_right = map(processes.gather, (images, owners, right))
    # Each process has its captions with all images: together that is every pair once.
    violations = order_violations(captions, all_images)
    near = F.relu(margin + right.unsqueeze(1) - violations) + F.relu(margin + all_right - violations)
    return (near * (owners.unsqueeze(1) != all_owners)).sum()


def retrieval(violations: Tensor, owners: Tensor) -> dict[str, float]:
    """Return recalls in percent and mean ranks, from 1, of captions by image and images by caption.

    Args:
        violations: of each caption with each image, (captions, images).
        owners: the image of each caption, (captions,); every image has one.

    Returns:
        The values of ``METRICS`` by name.
    """
    images = torch.arange(violations.shape[1], device=owners.device)
    wrong = owners.unsqueeze(1) != images
    own = violations.gather(1, owners.unsqueeze(1))
    # The best placed caption of an image counts.
    nearest = violations.new_full(images.shape, torch.inf).scatter_reduce(0, owners, own.squeeze(1), "amin")
    # A tie, or no number at all, is no success.
    image_ranks = (~(violations > own) & wrong).sum(1)
    caption_ranks = (~(violations > nearest) & wrong).sum(0)
    values: dict[str, float] = {}
    for side, ranks in (("caption", caption_ranks), ("image", image_ranks)):
        for k in (1, 5, 10):
            values[f"{side}_recall_{k}"] = 100.0 * (ranks < k).float().mean().item()
        values[f"{side}_mean_rank"] = ranks.float().mean().item() + 1
    recalls = [value for name, value in values.items() if "recall" in name]
    return {MEAN_RECALL.name: sum(recalls) / len(recalls)} | values


class OrderEmbedding(nn.Module):
    """Captions and images as points on the non-negative part of the unit sphere.

    Args:
        norm: of the GRU, one of ``NORMS``; the images' linear layer has none.
        words: the number of indices of words.
        features: of an image.
        embedding: features of a word.
        units: of the GRU, and of the common space, D.
    """

    def __init__(self, norm: str, words: int, features: int, embedding: int, units: int) -> None:
        super().__init__()
        self.captions = SentenceEncoder(norm, words, embedding, units)
        self.images = nn.Linear(features, units)
        nn.init.xavier_uniform_(self.images.weight)
        nn.init.zeros_(self.images.bias)

    def forward(self, captions: PackedSequence, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map packed captions and the features (N, F) of their images to points (N, D) and (N, D)."""
        return _point(self.captions(captions)), self.image_points(features)

    def caption_points(self, captions: Sentences) -> Tensor:
        """Compute all captions' points (N, D)."""
        return _point(self.captions.encode(captions, after=True))

    def image_points(self, features: Tensor) -> Tensor:
        """Map features (M, F) to points (M, D)."""
        return _point(self.images(features))


def _point(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.abs(), dim=-1)


class OrderEmbeddings(Problem):
    """Finding an image by a caption, and a caption by an image.

    Of COCO an image is what a convolutional network makes of it. Flickr8k's images cannot be passed on, its
    captions can: there the words of another caption stand for the image. In training every two captions of
    an image take these parts; of one held out the first caption stands for it, to be found by the others.

    Args:
        source: "coco" or "flickr8k".
        images: the greatest number of training images.
        held_out: the greatest number of validation images, and of test images, that are searched. More than a
            thousand are searched a thousand at a time, as in the paper, and the results averaged.
        vocabulary: the greatest number of indices of words.
        embedding: features of a word.
        units: of the GRU, and of the common space.
        margin: of the loss.

    Raises:
        ExperimentError: there is no such source, or not enough images are asked for.
        MissingData: the source is not here.
    """

    def __init__(
        self,
        source: str,
        images: int,
        held_out: int,
        vocabulary: int,
        embedding: int,
        units: int,
        margin: float,
    ) -> None:
        features, captions = captioned_images.load(source, "train", images)
        words = Vocabulary((words for of in captions for words in of), vocabulary)
        self._train = (
            captioned_images.described(captions, words)
            if features is None
            else captioned_images.featured(features, captions, words)
        )
        self._held_out = {}
        for part in ("dev", "test"):
            features, captions = captioned_images.load(source, part, held_out)
            self._held_out[part] = (
                captioned_images.described_once(captions, words)
                if features is None
                else captioned_images.featured(features, captions, words)
            )
        self.cases = len(self._train)
        self._sizes = (len(words), self._train.features.shape[1], embedding, units)
        self._margin = margin

    def to(self, device: torch.device) -> None:
        """Move captions and features to a device."""
        self._train.to(device)
        for pairs in self._held_out.values():
            pairs.to(device)

    def network(self, norm: str) -> OrderEmbedding:
        """Make the model with this norm in the GRU."""
        return OrderEmbedding(norm, *self._sizes)

    def loss(self, network: nn.Module, batch: Batch) -> Loss:
        """Compute the ranking loss of the batch's pairs, all others of the batch being wrong."""
        pairs, cases = self._train, batch.cases
        captions, images = network(
            pairs.captions.packed(pairs.caption[cases], after=True), pairs.features[pairs.row[cases]]
        )
        total = ranking_loss(captions, images, pairs.owner[cases], self._margin)
        return Loss(total, len(cases), is_summed=True)

    def evaluate(self, network: nn.Module) -> Mapping[str, float]:
        """Compute recalls and mean ranks on the validation images, and the same on the test images."""
        if not isinstance(network, OrderEmbedding):
            raise TypeError(f"network must be an OrderEmbedding, got {type(network).__name__}")
        found = self._retrieved(network, self._held_out["dev"])
        test = self._retrieved(network, self._held_out["test"])
        return found | {f"test_{name}": value for name, value in test.items()}

    def _retrieved(self, network: OrderEmbedding, pairs: captioned_images.Pairs) -> dict[str, float]:
        captions, owner = network.caption_points(pairs.captions), pairs.owner
        images = int(owner[-1]) + 1
        found = []
        for start in range(0, max(1, images - images % _GALLERY), _GALLERY):
            gallery = torch.arange(start, min(start + _GALLERY, images), device=owner.device)
            inside = (owner >= start) & (owner < start + _GALLERY)
            points = network.image_points(pairs.features[gallery])
            found.append(retrieval(order_violations(captions[inside], points), owner[inside] - start))
        return {name: sum(values[name] for values in found) / len(found) for name in found[0]}


def judge(results: pd.DataFrame) -> Sequence[Card]:
    """Judge layer norm against none: its updates, and its best."""
    return (
        judging.fewer_updates(
            results,
            MEAN_RECALL,
            claim="Order-embeddings with layer norm converge in 60 % of the time that the baseline takes.",
            section=_SECTION,
            at_most=0.6,
        ),
        judging.better(
            results,
            TEST_MEAN_RECALL,
            curve=MEAN_RECALL,
            claim="Layer norm generalizes better: its recalls are higher.",
            section=_SECTION,
        ),
    )


def tables(results: pd.DataFrame) -> Sequence[Table]:
    """Return the paper's table 2 and, below, each run's test images where its validation images are best."""
    rows: list[tuple[str, ...]] = [(name, *values) for name, values in PAPER.items()]
    for (norm, size), runs in results.groupby(["norm", "batch_size"], sort=False):
        best = runs.loc[runs.groupby("seed")[MEAN_RECALL.name].idxmax()]
        values = [metric.form.format(best[metric.name].mean()) for metric in TEST_METRICS[1:]]
        rows.append((f"here: {norm}, batch {size}", *values))
    return (
        Table(
            "Retrieval: the paper's table 2, and here",
            ("model", *(metric.label for metric in METRICS[1:])),
            rows,
            note=(
                "The paper's are means over five times a thousand test images of COCO; those here are of "
                "test images too, at the evaluation with the best mean recall of validation images. With "
                "Flickr8k the words of another caption stand for an image: compare norms, not data sets."
            ),
        ),
    )


TASK = Task(
    name="order-embeddings",
    title="Order-embeddings of images and captions",
    section=_SECTION,
    summary=(
        "images and captions as points whose order says which belong together; GRU over the words with or "
        "without layer norm, Adam (small: captions of Flickr8k, images by another caption's words; "
        "paper: COCO, images by features of a convolutional network)"
    ),
    problem=OrderEmbeddings,
    metrics=(*METRICS, *TEST_METRICS),
    norms=NORMS,
    presets={
        "small": Preset(
            epochs=2,
            batch_sizes=(128,),
            norms=("none", "layer"),
            seeds=tuple(range(5)),
            clip=_CLIP,
            clip_each=True,
            evaluate_every=100,
            sizes={
                "source": "flickr8k",
                "images": 6000,
                "held_out": 300,
                "vocabulary": 3000,
                "embedding": 64,
                "units": 128,
                "margin": 0.05,
            },
        ),
        # Figure 1 shows some 220 evaluations.
        "paper": Preset(
            epochs=15,
            batch_sizes=(128,),
            norms=("none", "layer"),
            optimizer="adam-uncorrected",
            clip=_CLIP,
            clip_each=True,
            evaluate_every=300,
            sizes={
                "source": "coco",
                "images": 200_000,
                "held_out": 5000,
                "vocabulary": 10_000,
                "embedding": 300,
                "units": 1024,
                "margin": 0.05,
            },
        ),
    },
    judge=judge,
    tables=tables,
)
