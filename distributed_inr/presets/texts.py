"""Text-conditional models, by both families: the prior attends to the captions' embeddings."""

from collections.abc import Callable
from dataclasses import replace

from distributed_inr.data.reader import Data
from distributed_inr.domains import Image
from distributed_inr.experiment import Experiment
from distributed_inr.models.text import MiniLM, OpenCLIP
from distributed_inr.presets import ddmi, shapes


def ddmi_furniture_shape_text() -> Experiment:
    """Occupancy of 351 bundled pieces of furniture, drawn from words; 49 more, of other names, are held out.

    python jobs/train_ddmi.py furniture-shape-text
    python jobs/sample.py runs/ddmi/furniture-shape-text --text "a round table" --text "an armchair" --guidance 3

    A classifier finds the prompted one of six classes in 93 % of samples of class words at w = 3, and in 77 % of those
    of captions never seen (73 to 81 % in three other runs); by chance in 17 and 26 % (LOG.md).
    """
    return replace(shapes.ddmi_furniture_shape(), name="furniture-shape-text", text=MiniLM())


def ddmi_furniture_image_text() -> Experiment:
    """Pictures of chairs, cabinets, tables, sofas, beds and lamps, drawn from words.

    python jobs/train_ddmi.py furniture-image-text
    python jobs/sample.py runs/ddmi/furniture-image-text --text "a sofa" --text "a tall lamp" --guidance 3

    27.14 dB on held-out views; the rows of the grid are what their prompts say (LOG.md).
    """
    return replace(
        ddmi.furniture_image(),
        name="furniture-image-text",
        domain=Image(size=64, source_size=128, flip=False),
        data=Data(train="bundled:furniture-text/train", val="bundled:furniture-text/val", num_streams=8),
        text=MiniLM(),
    )


def ddmi_text2shape() -> Experiment:
    """ShapeNet's chairs and tables by Text2Shape's captions (DDMI, table 7: accuracy 91.30, CLIP-S 30.30, TMD 0.204).

    python jobs/prepare_data.py shape ShapeNet --layout occupancy-networks --only class=chair,table --points 10000 \\
        --metadata captions.tablechair.csv --out data/text2shape
    python jobs/train_ddmi.py text2shape --scale.num-workers 8

    Ours: not run.
    """
    return replace(
        shapes.shapenet("text2shape", shapes=shapes.CHAIRS_AND_TABLES),
        text=OpenCLIP(model="ViT-L-14-quickgelu", pretrained="openai"),
    )


def chinr_furniture_shape_text() -> Experiment:
    """Occupancy of 351 bundled pieces of furniture as layers of experts, drawn from words.

    python jobs/train_chinr.py furniture-shape-text
    python jobs/sample.py runs/chinr/furniture-shape-text --text "a chair" --fix-layers 2 --branches 4 --count 2

    The prompted one of six classes in 98 % of samples of class words at w = 3, and in 80 % of captions never seen; by
    chance in 17 and 20 % (LOG.md).
    """
    return replace(shapes.chinr_furniture_shape(), name="furniture-shape-text", text=MiniLM())


DDMI: dict[str, Callable[[], Experiment]] = {
    "furniture-shape-text": ddmi_furniture_shape_text,
    "furniture-image-text": ddmi_furniture_image_text,
    "text2shape": ddmi_text2shape,
}
CHINR: dict[str, Callable[[], Experiment]] = {"furniture-shape-text": chinr_furniture_shape_text}
