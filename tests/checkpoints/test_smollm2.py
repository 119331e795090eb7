"""Published weights give the published outputs: SmolLM2-135M-Instruct against transformers, in float32."""

import copy
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from benchmarks.pretrained import smollm2_path
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.data.chat import Conversation
from cpm_jax.inference.decode_loop import extend, start
from cpm_jax.inference.generate import Generator, collect
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GPL3 = Path("/usr/share/common-licenses/GPL-3")
PARAGRAPH = (
    "The mitochondrion is a membrane-bound organelle found in the cytoplasm of almost all eukaryotic cells. Its "
    "primary function is to generate large quantities of energy in the form of adenosine triphosphate (ATP), which is "
    "used to power the cell."
)
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper who befriends a storm.",
    "Explain the difference between a list and a tuple in Python.",
    "How do I bake sourdough bread? Give me the steps.",
    "What are the causes of the French Revolution?",
    "Translate 'good morning' into French, German and Spanish, and explain each word.",
    "Plan a three-day trip to Kyoto.",
)
CODE = (
    "def fibonacci(n):\n",
    "import numpy as np\n\n\ndef softmax(x):\n",
    "class Stack:\n    def __init__(self):\n",
    "SELECT name, COUNT(*) FROM orders\n",
    "#include <stdio.h>\n\nint main() {\n",
    "// Returns the n-th prime number.\nfunction nthPrime(n) {\n",
    "def test_parse_date():\n    assert parse_date('2024-01-31') ==",
)
PROSE = (
    "Once upon a time, there was a little girl who",
    "The history of the Roman Empire begins with",
    "In physics, the second law of thermodynamics states that",
    "It was the best of times, it was the worst of times,",
    "La capitale de la France est",
    "The recipe calls for two cups of flour, and",
    "Dear Sir or Madam,\n\nI am writing to",
)
NEW_TOKENS = 200
GREEDY = SamplingConfig(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Ours:
    config: ModelConfig
    params: Params
    tokenizer: object

    @functools.cached_property
    def logits(self):
        @jax.jit
        def run(params, tokens):
            decoder = bind(self.config, params)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            return decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens)))

        return lambda ids: np.asarray(run(self.params, jnp.asarray([ids])))[0]


@pytest.fixture(scope="module")
def source():
    return open_source(smollm2_path())


@pytest.fixture(scope="module")
def ours(source):
    config, params = import_params(source)
    return Ours(config, params, source.tokenizer())


@pytest.fixture(scope="module")
def theirs():
    path = smollm2_path()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompts(ours):
    """21 prompts: chat, code, prose."""
    chats = [
        ours.tokenizer.apply_chat_template(
            Conversation([{"role": "user", "content": question}]), add_generation_prompt=True
        )
        for question in QUESTIONS
    ]
    return [ours.tokenizer.encode(text) for text in (*chats, *CODE, *PROSE)]


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def perplexity(logits, ids):
    log_probabilities = torch.from_numpy(logits[:-1].astype(np.float64)).log_softmax(-1)
    return float(torch.exp(-log_probabilities[range(len(ids) - 1), ids[1:]].mean()))


def test_every_tensor_is_as_transformers_dequantises_it(source, theirs):
    expected = theirs.state_dict()
    assert set(expected) - set(source.names()) == {"lm_head.weight"}  # tied
    for name in source.names():
        np.testing.assert_array_equal(source.read(name), expected[name].numpy(), err_msg=name)


class _ExactAngles(torch.nn.Module):
    """Rotary embedding of the transformers model in float64; its own is in float32 whatever the model is."""

    def forward(self, hidden, position_ids):
        frequencies = 100_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
        angles = torch.cat([position_ids[..., None].double() * frequencies] * 2, -1)
        return angles.cos(), angles.sin()


def test_logits_on_real_text(ours, theirs):
    """As near to transformers as float32 allows: either side is about as far from the truth, computed in float64."""
    ids = ours.tokenizer.encode((ROOT / "LICENSE").read_text("utf-8"))[:512]
    logits, expected = ours.logits(ids), their_logits(theirs, ids)
    largest = np.abs(expected).max()
    assert np.abs(logits - expected).max() <= 1e-5 * largest  # a tenth of 1e-4, as logits reach 40
    assert np.abs(logits - expected).mean() <= 1e-4
    exact = copy.deepcopy(theirs).double()
    exact.model.rotary_emb = _ExactAngles()
    truth = their_logits(exact, ids)
    our_error, their_error = np.abs(logits - truth).max(), np.abs(expected - truth).max()
    print(f"largest logit {largest:.1f}; largest error: ours {our_error:.2e}, transformers {their_error:.2e}")
    assert our_error <= 2 * their_error


@functools.cache
def _greedy(config):
    return functools.partial(extend, num_tokens=NEW_TOKENS, config=config, sampling=GREEDY)


def greedy(ours, prompts):
    """What is most probable, token by token; an end-of-sequence token does not stop it."""
    state = start(
        ours.params,
        prompts,
        config=ours.config,
        sampling=GREEDY,
        max_new_tokens=NEW_TOKENS,
        seed=0,
        indices=range(len(prompts)),
    )
    _, tokens = _greedy(ours.config)(ours.params, state, jnp.zeros(0, jnp.int32))
    return np.asarray(tokens).tolist()


@pytest.fixture(scope="module")
def batch(ours, prompts):
    """All prompts continued together."""
    return greedy(ours, prompts)


def test_greedy_text_of_a_batch(ours, theirs, prompts, batch):
    """transformers reads prompt and continuation at once: at every place its most probable token is the next of ours.

    By induction that is its own greedy continuation, at a fraction of the time.
    """
    assert len(prompts) >= 20
    for prompt, tokens in zip(prompts, batch, strict=True):
        logits = their_logits(theirs, prompt + tokens[:-1])[len(prompt) - 1 :]
        assert len(tokens) == len(logits) == NEW_TOKENS
        chosen = logits.argmax(-1)
        wrong = np.flatnonzero(chosen != tokens)
        if len(wrong):
            place = wrong[0]
            gap = logits[place, chosen[place]] - logits[place, tokens[place]]
            pytest.fail(f"{ours.tokenizer.decode(prompt)!r}: token {place} differs; their logits differ by {gap:.2g}")


def test_greedy_text_alone_is_that_in_a_batch(ours, prompts, batch):
    for index in (0, 9, 16):
        assert greedy(ours, [prompts[index]]) == [batch[index]]


def test_known_answers(ours):
    """What the model is known to say (shared by several programs that run it), through the chat template too."""
    generator = Generator(ours.config, ours.params, ours.tokenizer)
    question = [{"role": "user", "content": "What is the capital of France? Explain in one sentence."}]
    chat = ours.tokenizer.apply_chat_template(Conversation(question), add_generation_prompt=True)
    story = "Once upon a time, there was a little girl who"
    answer, continued = collect(
        generator.stream([ours.tokenizer.encode(text) for text in (chat, story)], sampling=GREEDY, max_new_tokens=48)
    )
    assert (answer.text, answer.finish_reason, len(answer.token_ids)) == ("The capital of France is Paris.", "eos", 8)
    assert continued.text.startswith(
        " loved to play with her toys. She had a big imagination and loved to create her own stories."
    )


def test_perplexities(ours, theirs):
    ids = ours.tokenizer.encode(GPL3.read_text("utf-8"))[:1024]
    assert perplexity(ours.logits(ids), ids) == pytest.approx(19.28, abs=0.005)
    ids = ours.tokenizer.encode(PARAGRAPH)
    expected = perplexity(their_logits(theirs, ids), ids)
    assert perplexity(ours.logits(ids), ids) == pytest.approx(expected, rel=1e-5)
    assert expected < 10
    shuffled = np.random.default_rng(0).permutation(ids).tolist()
    expected = perplexity(their_logits(theirs, shuffled), shuffled)
    assert perplexity(ours.logits(shuffled), shuffled) == pytest.approx(expected, rel=1e-5)
    assert expected > 1000


def test_token_ids_and_chat_template(ours):
    path = smollm2_path()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers 5.23 does not know the rule "smollm", by which digits are cut off before words are; in SmolLM2's own
    # tokenizer.json it reads so. The rest is transformers' own.
    rules = tokenizers.pre_tokenizers
    theirs.backend_tokenizer.pre_tokenizer = rules.Sequence(
        [rules.Digits(individual_digits=True), rules.ByteLevel(add_prefix_space=False)]
    )
    question = [{"role": "user", "content": "光合作用是什么？ 請用中文回答 42 × 17."}]
    chat = theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert chat == ours.tokenizer.apply_chat_template(Conversation(question), add_generation_prompt=True)
    texts = [
        chat,
        *((ROOT / name).read_text("utf-8") for name in ("README.md", "LICENSE", "experiments/run.py", "Makefile")),
        "混合 text, 1234567 Größe naïve\t\r\n  café — “quotes” 🙂👍🏽 한국어 العربية हिन्दी <|im_end|> <|endoftext|>",
    ]
    for text in texts:
        ids = ours.tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.tokenizer.decode(ids) == text
    assert (ours.tokenizer.bos_id, ours.tokenizer.eos_id, ours.tokenizer.pad_id) == (1, 2, 2)
    assert not ours.tokenizer.add_bos
