"""Networks that no one here wrote, against hooks and ordinary autograd; all of them in docs."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# At the end: an installed fadiag_fast stays the one under test.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import architectures
from benchmarks.architectures import ARCHITECTURES, CLASSES, batches, built, by_hooks, observe

BY_NAME = {architecture.name.partition(":")[2]: architecture for architecture in ARCHITECTURES}

# One of each kind that is found in its own way, and each in at most two seconds.
CHOSEN = {
    "resnet18": "chain of 8 BasicBlock in layer*.*",
    "swin_t": "chain of 12 SwinTransformerBlock in features.*.*",
    "densenet121": "chain of 4 _DenseBlock in features.denseblock*",
    "mobilenet_v3_small": "chain of 11 InvertedResidual in features.*",
    "googlenet": "chain of 9 Inception in inception*",
    "gmlp_ti16_224": "chain of 30 SpatialGatingBlock in blocks.*",
    "regnety_002": "chain of 13 Bottleneck in s*.b*",
    "levit_128s": "chain of 9 LevitBlock in stages.*.blocks.*",
    "edgenext_xx_small": "chain of 12 ConvBlock, SplitTransposeBlock in stages.*.blocks.*",
    "pvt_v2_b0": "chain of 8 Block in stages.*.blocks.*",
    "GPT2LMHeadModel": "chain of 4 GPT2Block in transformer.h.*",
    "BertForSequenceClassification": "chain of 4 BertLayer in bert.encoder.layer.*",
    "LlamaForCausalLM": "chain of 4 LlamaDecoderLayer in model.layers.*",
    "MambaForCausalLM": "chain of 4 MambaBlock in backbone.layers.*",
    "T5ForTokenClassification": "chain of 4 T5Block in transformer.encoder.block.*",
    "MixtralForCausalLM": "chain of 4 MixtralDecoderLayer in model.layers.*",
    "AlbertForSequenceClassification": "chain of 4 AlbertLayerGroup in "
    "albert.encoder.albert_layer_groups.0",
    "XLNetForSequenceClassification": "chain of 4 XLNetLayer in transformer.layer.*",
    "BloomForCausalLM": "chain of 4 BloomBlock in transformer.h.*",
}
OLD_STYLE_AUTOGRAD = {"BloomForCausalLM"}


@pytest.mark.parametrize("name", CHOSEN)
def test_states_and_gradients_equal_those_of_hooks(name):
    architecture = BY_NAME[name]
    for library in {"torchvision", architecture.name.partition(":")[0]}:
        if find_spec(library) is None:
            pytest.skip(f"needs {library}")
    seen = observe(architecture)
    taps = seen.probe.taps
    assert taps.chosen == CHOSEN[name]
    assert taps.unseen == ()
    # Float64 sums of a few thousand terms, done in another order.
    assert seen.difference < 1e-13
    if name in OLD_STYLE_AUTOGRAD:
        assert "setup_context" in seen.func_reason
    else:
        assert seen.func_difference < 1e-13


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
def test_the_oracle_would_see_a_wrong_figure():
    """Other taps' figures, and a state that was overwritten, are noticed."""
    architecture = BY_NAME["resnet18"]
    model = built(architecture)
    ((x, y),) = batches(architecture, 1, 2)
    places = [("layer1.0", "output", 0), ("layer1.1", "output", 0)]
    hiddens, grads = by_hooks(model, x, y, places)
    assert y.max() < CLASSES
    assert architectures.relative_difference(hiddens, hiddens[::-1]) > 0.1
    assert architectures.relative_difference(grads, grads[::-1]) > 0.1
    assert architectures.relative_difference(grads, [g * float("nan") for g in grads]) == torch.inf
    with pytest.raises(RuntimeError, match="a state was overwritten in place"):
        by_hooks(model, x, y, [("bn1", "output", 0)])
    by_hooks(architectures.without_in_place(model), x, y, [("bn1", "output", 0)])
