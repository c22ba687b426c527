# SPDX-License-Identifier: Apache-2.0
"""Table 4 of Lester et al. (2021), recomputed from the sizes of T5 1.1.

Three of the table's printed numbers are misprints; the test holds both the number that
the sizes give and the one that is printed.
"""

import flax.linen as nn
import pytest

from prompt_tuning import trees
from prompt_tuning.methods import registry
from prompt_tuning.network.model import Model
from prompt_tuning.network.prompts import Prompt
from prompt_tuning.network.transformer import T5Config, Transformer

LENGTHS = (1, 5, 20, 50, 100, 150)
# heads, layers of either side, emb_dim, mlp_dim; then the frozen parameters.
SIZES = {
    "small": ((6, 8, 512, 1024), 76_961_152),
    "base": ((12, 12, 768, 2048), 247_577_856),
    "large": ((16, 24, 1024, 2816), 783_150_080),
    "xl": ((32, 24, 2048, 5120), 2_849_757_184),
    "xxl": ((64, 24, 4096, 10240), 11_135_332_352),
}
TRAINABLE = {
    "small": (512, 2_560, 10_240, 25_600, 51_200, 76_800),
    "base": (768, 3_840, 15_360, 38_400, 76_800, 115_200),
    "large": (1_024, 5_120, 20_480, 51_200, 102_400, 153_600),
    "xl": (2_048, 10_240, 40_960, 102_400, 204_800, 307_200),
    "xxl": (4_096, 20_480, 81_920, 204_800, 409_600, 614_400),
}
# At 100 positions.
TOTALS = {
    "small": (77_012_352, 0.06648),
    "base": (247_654_656, 0.03101),
    "large": (783_252_480, 0.01307),
    "xl": (2_849_961_984, 0.00719),
    "xxl": (11_135_741_952, 0.00368),
}
# (size, length, column): what the paper prints.
ERRATA = {
    ("small", 20, "trainable"): 10_420,
    ("large", 100, "percent"): 0.01907,
    ("xxl", 50, "total"): 11_137_380_352,
}


def counts(size: str, length: int) -> dict[str, float]:
    heads, layers, width, mlp = SIZES[size][0]
    config = T5Config(
        vocab_size=32128,
        emb_dim=width,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        head_dim=64,
        mlp_dim=mlp,
    )
    model = Model(Transformer(config, (Prompt("task", length),)))
    shapes = nn.meta.unbox(model.abstract_params())
    tuned, frozen = registry.split(shapes, registry.rules_of("prompt_tuning"))
    trainable, total = trees.count(tuned), trees.count(shapes)
    return {
        "frozen": trees.count(frozen),
        "trainable": trainable,
        "total": total,
        "percent": round(100 * trainable / total, 5),
    }


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_table_4(size, length):
    found = counts(size, length)
    frozen = SIZES[size][1]
    trainable = TRAINABLE[size][LENGTHS.index(length)]
    assert found["frozen"] == frozen
    assert found["trainable"] == trainable
    assert found["total"] == frozen + trainable
    if length == 100:
        assert (found["total"], found["percent"]) == TOTALS[size]


def test_the_misprints_of_table_4():
    correct = {key: counts(*key[:2])[key[2]] for key in ERRATA}
    assert correct == {
        ("small", 20, "trainable"): 10_240,
        ("large", 100, "percent"): 0.01307,
        ("xxl", 50, "total"): 11_135_537_152,
    }
    assert all(correct[key] != printed for key, printed in ERRATA.items())
