"""The text embeddings of a run's captions: written once as a table by the frozen text encoder.

Another encoder makes this table anew; the autoencoder and the latents stay as they are, the prior does not.
"""

import logging
from collections.abc import Iterator

import torch

from distributed_inr.config import from_json
from distributed_inr.data import storage
from distributed_inr.data.reader import Data
from distributed_inr.data.shards import ShardIndex, records
from distributed_inr.data.text_table import TextTable, identity, write_table
from distributed_inr.domains.domain import caption, captions
from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker
from distributed_inr.models.text import NoWeights
from distributed_inr.run_folder import Stage
from distributed_inr.training import checkpoint

logger = logging.getLogger(__name__)


def write_texts(worker: Worker, *, experiment: Experiment, stage: Stage) -> None:
    """Embed the distinct captions of the latents, which the prior trains on, of the held-out set, and no caption."""
    stage.check_shared()
    stage.clear()
    assert experiment.text is not None
    data = experiment.data
    found: set[str] = set()
    latents = str(experiment.folder / "latents")
    for number, url in enumerate(url for url in (latents, data.val) if url is not None):
        found.update(read_captions(data, data.index(url)))
        if number == 0 and not found:
            raise _no_captions(experiment)
    encoder = experiment.text.build().to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        table = write_table(stage.folder, found, encoder, progress=lambda done, count: worker.progress(done, count, {}))
    except OSError as error:
        raise storage.explain(error, str(stage.folder)) from None
    logger.info("text: %d captions by %s", table.captions, table.identity)


def weights_of(experiment: Experiment, stage: Stage) -> str:
    """The sha256 of the text encoder's weights, downloaded if need be. Once the stage is finished they may be gone.

    Raises ValueError where they cannot be had.
    """
    cfg, is_finished = experiment.text, stage.is_current(stage.made_from) and TextTable.is_whole(stage.folder)
    assert cfg is not None
    try:
        found = cfg.local_sha256
    except NoWeights:
        if not is_finished:
            raise
        found = None
    if found is not None:
        return found
    return TextTable.open(stage.folder).sha256 if is_finished else cfg.fetched_sha256


def check_captions(experiment: Experiment, index: ShardIndex) -> None:
    """Raises ValueError where no sample of the training set has a caption; reads up to the first one that has."""
    if next(read_captions(experiment.data, index), None) is None:
        raise _no_captions(experiment)


def _no_captions(experiment: Experiment) -> ValueError:
    assert experiment.text is not None
    return ValueError(
        f"data.train={experiment.data.train!r} has no captions to condition on (text.kind={experiment.text.kind}); "
        "prepare it with captions (see docs/data.md), or leave text out: --text.kind none"
    )


def refuse_other_encoder(experiment: Experiment, fit_prior: Stage, encoder: str) -> None:
    """A prior, finished or in checkpoints, understands the embeddings of one text encoder alone.

    Args:
        encoder: identity of the one that `text` means.
    """
    found = {str(fit_prior.folder): fit_prior.made_from.get("encoder")}
    if experiment.checkpoints is not None:
        place = experiment.checkpoints_of(fit_prior.folder.name)
        written = checkpoint.read_config(place)
        other = None if written is None else from_json(Experiment, written).text
        if other is not None and other.sha256 is not None:
            found[place] = identity(other.label, other.sha256)
    for place, trained_with in found.items():
        if trained_with not in (None, encoder):
            raise ValueError(
                f"{place} was trained on captions embedded by {trained_with}, and `text` is {encoder}: bring that one "
                f"back, choose another --name (with --autoencoder-from {experiment.folder}), or delete "
                f"{' and '.join(found)} to train it again"
            )


def read_captions(data: Data, index: ShardIndex) -> Iterator[str]:
    """Every caption of a set, those of several samples again."""
    for _, record in records(index, data.cache(), only=("txt",)):
        try:
            yield from captions(caption(record))
        except ValueError as error:  # such a sample is counted as a bad one where it is read
            logger.warning("%s", error)
