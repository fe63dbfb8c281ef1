"""The text embeddings of a run's captions: written once as a table by the frozen text encoder.

Another encoder makes this table anew; the autoencoder and the latents stay as they are, the prior does not.
"""

import logging
from collections.abc import Iterator

import torch

from distributed_inr.data import storage
from distributed_inr.data.reader import Data
from distributed_inr.data.shards import OpenShard, ShardDamaged, ShardIndex
from distributed_inr.data.text_table import write_table
from distributed_inr.domains.domain import caption, captions
from distributed_inr.experiment import Experiment
from distributed_inr.launch import Worker
from distributed_inr.run_folder import Stage

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
            raise ValueError(
                f"data.train={data.train!r} has no captions to condition on (text.kind={experiment.text.kind}); "
                "prepare it with captions (see docs/data.md), or leave text out: --text.kind none"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = experiment.text.build().to(device)
    try:
        table = write_table(stage.folder, found, encoder)
    except OSError as error:
        raise storage.explain(error, str(stage.folder)) from None
    logger.info("text: %d captions by %s", table.captions, table.identity)


def read_captions(data: Data, index: ShardIndex) -> Iterator[str]:
    """Every caption of a set, those of several samples again."""
    cache = data.cache()
    for shard in index.shards:
        opened = OpenShard(shard, cache)
        for sample in range(len(opened)):
            try:
                yield from captions(caption(opened.record(sample, only=("txt",))))
            except ShardDamaged:
                raise
            except ValueError as error:  # such a sample is counted as a bad one where it is read
                logger.warning("%s", error)
        opened.close()
