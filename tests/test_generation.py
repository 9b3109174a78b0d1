"""Generation against transformers' on the same weights, and its own laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models import TINYLM
from jaxquant.models.generation import Sampling, choose, generate
from jaxquant.models.model import Model
from jaxquant.numerics.kv_cache import CacheSpec

rng = np.random.default_rng(0)
PROMPTS = [rng.integers(5, 900, n).tolist() for n in (3, 17, 9)]
SMALL = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 200,
    "use_sliding_window": True,
    "sliding_window": 7,
    "max_window_layers": 1,
}


@functools.cache
def packaged():
    return jq.load_pretrained("tinylm", dtype="float32")


@functools.cache
def small(stacked=True):
    model = Model.from_hf(SMALL)
    model = Model(model.config, model.dtype, model.hf_config, stacked)
    params = model.init(jax.random.key(1))
    return model, jax.tree.map(lambda a: 4 * a, params)  # far from equal logits


def by_hand(model, params, prompt, count):
    """Greedy tokens from whole passes over the text so far."""
    text, whole = list(prompt), jnp.zeros((1, 64), jnp.int32)
    for _ in range(count):
        logits = model.apply(params, whole.at[0, : len(text)].set(jnp.array(text)))
        text.append(int(jnp.argmax(logits[0, len(text) - 1])))
    return text[len(prompt) :]


def test_greedy_tokens_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(TINYLM, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = [
            theirs.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False)[0, len(p) :].tolist()
            for p in PROMPTS
        ]
    end = theirs.generation_config.eos_token_id
    found = generate(*packaged(), PROMPTS, max_new_tokens=24, stop_tokens=[] if end is None else [end])
    assert found == wanted
    assert len(set(map(tuple, wanted))) == len(wanted)


def test_sequences_that_outgrow_their_rotation_are_as_in_transformers(tmp_path):
    """LongRoPE: from the 21st token on, all positions are rotated otherwise, those of the prompt too."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 6.0, 8.0, 10.0]}
    config = Phi3Config(
        **{key: SMALL[key] for key in SMALL if key.startswith(("vocab", "hidden", "inter", "num"))},
        max_position_embeddings=100, original_max_position_embeddings=20, initializer_range=0.3, pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors}, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    theirs = Phi3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    prompts = [rng.integers(5, 97, n).tolist() for n in (12, 30, 2, 20)]
    with torch.no_grad():
        wanted = [
            theirs.generate(torch.tensor([p]), max_new_tokens=16, do_sample=False)[0, len(p) :].tolist()
            for p in prompts
        ]
    model, params = jq.load_pretrained(tmp_path)
    assert generate(model, params, prompts, max_new_tokens=16) == wanted
    seen = []
    generate(model, params, prompts, max_new_tokens=16, on_tokens=lambda new: seen.append(new.tolist()))
    assert [list(row) for row in zip(*seen, strict=True)] == wanted


@pytest.mark.parametrize("stacked", [True, False])
def test_windows_and_long_texts(stacked):
    model, params = small(stacked)
    prompts = [rng.integers(0, 97, n).tolist() for n in (12, 2)]
    found = generate(model, params, prompts, max_new_tokens=20)
    assert found == [by_hand(model, params, prompt, 20) for prompt in prompts]


def test_quantized_weights():
    model, params = small()
    qparams, _ = jq.quantize_params(params, None, model.recipe(jq.RTN(jq.int4(group_size=16))))
    prompt = [t % 97 for t in PROMPTS[0]]
    assert generate(model, qparams, [prompt], max_new_tokens=10) == [by_hand(model, qparams, prompt, 10)]


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        (CacheSpec(8), 0.05),
        (CacheSpec(4, keys="per_channel", group_size=8, residual=8), 0.5),
        (CacheSpec(2), np.inf),
    ],
)
def test_logits_with_a_quantized_cache(spec, most):
    model, params = small()
    tokens = jnp.asarray(rng.integers(0, 97, (1, 40)), jnp.int32)

    def logits(spec):
        past = model.empty_past(spec, jnp.zeros(1, jnp.int32), 64)
        found, past = model.decode(params, tokens[:, :30], past)
        rows = [found]
        for t in range(30, 40):
            found, past = model.decode(params, tokens[:, t : t + 1], past)
            rows.append(found)
        return jnp.stack(rows, 1)

    exact = model.apply(params, tokens)[:, 29:]
    np.testing.assert_allclose(logits(CacheSpec()), exact, atol=1e-4)
    error = jnp.linalg.norm(logits(spec) - exact, axis=-1) / jnp.linalg.norm(exact, axis=-1)
    assert float(error[0, 0]) < 1e-5  # the prompt itself is read before it is rounded
    assert 1e-4 < float(error[0, 1:].mean()) < most


def test_tokens_as_they_come_and_stop_tokens():
    model, params = small()
    prompts = [[1, 2, 3], [50]]
    whole = generate(model, params, prompts, max_new_tokens=12)
    stop = whole[0][4]
    seen = []
    found = generate(model, params, prompts, max_new_tokens=12, stop_tokens=[stop], on_tokens=lambda t: seen.append(t))
    first = whole[0].index(stop) + 1
    assert found[0] == whole[0][:first]
    assert found == generate(model, params, prompts, max_new_tokens=12, stop_tokens=[stop])
    columns = np.stack(seen, 1)
    assert [[t for t in row if t >= 0] for row in columns.tolist()] == found
    assert (columns[0, first:] == -1).all()
    assert generate(model, params, prompts, max_new_tokens=12, on_tokens=lambda t: True) == [w[:1] for w in whole]


def test_draws():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))

    def shares(**fields):
        keys = jax.random.split(jax.random.key(0), 4000)
        drawn = choose(jnp.broadcast_to(logits, (4000, 4)), keys, Sampling(**fields))
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.25, 0.15, 0.1], atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345, atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.8), np.array([50, 25, 15, 0]) / 90, atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(), [1, 0, 0, 0])


def test_draws_depend_on_the_seed_and_not_on_the_other_prompts():
    model, params = small()
    draw = functools.partial(generate, model, params, max_new_tokens=8, sampling=Sampling(temperature=1.0))
    alone, beside = draw([[1, 2]], seed=3), draw([[1, 2], [4, 5, 6]], seed=3)
    assert alone[0] == beside[0]
    assert alone != draw([[1, 2]], seed=4)


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 1, "prompts is empty"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([[1] * 190], 11, "prompt 0 has 190 tokens, with max_new_tokens=11 more than the model's context of 200"),
        ([[1, 97]], 1, "token 97 at position \\[1\\] is outside the vocabulary"),
        ([[1]], 0, "max_new_tokens=0 must be"),
    ],
)
def test_refuses(prompts, count, message):
    with pytest.raises(ValueError, match=message):
        generate(*small(), prompts, max_new_tokens=count)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"top_k": 3}, "give a temperature above 0"),
    ],
)
def test_refuses_samplings(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)


def test_fills_its_context():
    model, params = small()
    assert len(generate(model, params, [[1] * 190], max_new_tokens=10)[0]) == 10
