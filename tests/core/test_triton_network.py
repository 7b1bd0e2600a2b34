"""GIT's GPU kernels compute what torch computes: run by Triton's interpreter, on the CPU.

On a GPU `benchmarks/gpu.sh` compares the token ids of whole searches with those of `generate`.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from transformers import GitConfig, GitForCausalLM

pytest.importorskip("triton")

from captioner.config import ModelConfig
from captioner.models import load, resolve
from captioner.models.git import FastSearch, triton_kernels, triton_network
from captioner.models.git.captioner import has_triton
from captioner.models.git.network import GitNetwork
from captioner.models.git.triton_network import TritonGitNetwork, can_run
from captioner.starter.scenes import make_scenes

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # -inf - -inf, masked afterwards
]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_searches_with_the_kernels_find_the_same_captions(num_beams, tiny) -> None:
    images = np.stack([np.asarray(scene.render(32)) for scene in make_scenes(3, seed=5)])
    captioner = load(resolve(ModelConfig(name=str(tiny), num_beams=num_beams, max_new_tokens=3)), device="cpu")
    plain = GitForCausalLM.from_pretrained(tiny).eval()  # the captioner's own layers are packed for the CPU
    pixels = captioner.normalise(torch.from_numpy(images))
    expected_search = FastSearch(GitNetwork(plain), captioner.settings, captioner.prefix)
    search = FastSearch(TritonGitNetwork(plain), captioner.settings, captioner.prefix)
    with torch.inference_mode():
        expected = expected_search(pixels)
        first, second = search(pixels), search(pixels)

    assert len({tuple(row) for row in expected.tokens.tolist()}) >= 2
    assert torch.equal(first.tokens, expected.tokens)
    assert torch.equal(second.tokens, expected.tokens)
    torch.testing.assert_close(first.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)


def test_best_logprobs_ignore_the_padding_columns() -> None:
    logits = torch.randn(3, 5120, generator=torch.Generator().manual_seed(0))
    logits[:, 5000:] = 100.0
    logits[1, 70] = logits[1, 4500] = 9.0  # of equal values the lowest id comes first

    values, ids = triton_kernels.best_logprobs(logits, 5000, 4)

    expected = logits[:, :5000].log_softmax(-1).topk(4)
    torch.testing.assert_close(values, expected.values)
    assert ids[1, :2].tolist() == [70, 4500]
    assert torch.equal(ids[[0, 2]], expected.indices[[0, 2]])


def test_layer_norms_of_a_sum() -> None:
    torch.manual_seed(0)
    hidden, delta, shift = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)
    norm = torch.nn.LayerNorm(48, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)

    with torch.inference_mode():
        torch.testing.assert_close(triton_kernels.added_layer_norm(hidden, delta, norm), norm(hidden + delta))
        torch.testing.assert_close(triton_kernels.shifted_layer_norm(hidden, shift, norm), norm(hidden + shift))


def test_a_device_on_which_kernels_cannot_run_is_recognised(tiny, monkeypatch, caplog) -> None:
    def fail(values: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Failed to find C compiler")

    network = TritonGitNetwork(GitForCausalLM.from_pretrained(tiny).eval())
    assert can_run(network)
    monkeypatch.setattr(triton_network, "quick_gelu_", fail)

    assert not can_run(network)
    assert "Failed to find C compiler" in caplog.text


def test_a_model_with_heads_that_the_kernels_cannot_compute_is_recognised(tiny, caplog) -> None:
    config = GitConfig.from_pretrained(tiny, hidden_size=48, num_attention_heads=1)

    assert not can_run(TritonGitNetwork(GitForCausalLM(config).eval()))
    assert "power of 2" in caplog.text


def test_without_triton_a_line_names_the_extra(monkeypatch, caplog) -> None:
    assert has_triton()
    monkeypatch.setitem(sys.modules, "triton", None)

    assert not has_triton()
    [warning] = caplog.messages
    assert warning.endswith("; pip install 'captioner[cuda]'")


def test_quick_gelu_is_in_place() -> None:
    values = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    expected = values * torch.sigmoid(1.702 * values)

    assert triton_kernels.quick_gelu_(values) is values
    torch.testing.assert_close(values, expected)
