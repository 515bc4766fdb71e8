"""Text for recordings of a model, and the input of every layer's feed-forward on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...runtime.base.progress import Progress

if TYPE_CHECKING:
    from ...runtime.backends.engine import LoadedModel


_WINDOW = 256  # tokens of a sequence
# A model with a chat template is asked these questions, so that its text includes conversations.
_TOPICS = (
    "What is the capital of France?",
    "Explain how a steam engine works.",
    "Write a short story about a lighthouse.",
    "How do I sort a list in Python?",
    "Give me a recipe for vegetable soup.",
    "What causes the seasons?",
    "Translate 'good morning' into Spanish and German.",
    "Summarize the plot of Romeo and Juliet.",
    "If a train travels 60 miles in 90 minutes, how fast is it?",
    "List five tips for a job interview.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite email that declines an invitation.",
    "Who invented the telephone?",
    "Describe the rules of chess.",
    "Why is the sky blue?",
    "Name three rivers in Asia.",
)


def own_text(model: LoadedModel, n: int, seed: int, progress: Progress | None) -> list[list[int]]:
    """Lets the model write about n tokens (never fewer), in sequences of at most 256 tokens.

    Half of the sequences start from nothing; half answer a question if there is a chat template.
    They are sampled at temperature 1, top-p 0.95; the seed determines the text.
    """
    from ...runtime._core import Sampler

    tokenizer, n_vocab = model.tokenizer, model.n_vocab
    rng = np.random.default_rng([seed, 0])
    sequence = model.engine.sequence()
    window = min(_WINDOW, sequence.context)
    sequences: list[list[int]] = []
    total = 0
    while total < n:
        i = len(sequences)
        tokens = [int(rng.integers(n_vocab)) if tokenizer.bos_id is None else tokenizer.bos_id]
        if model.chat_template is not None and i % 2:
            question = {"role": "user", "content": _TOPICS[i // 2 % len(_TOPICS)]}
            tokens = model._render([question], None)[: window // 2]
        sequence.truncate(0)
        sequence.eval(tokens)
        sampler = Sampler(n_vocab, temperature=1.0, top_p=0.95, seed=seed * 65_537 + i)
        while len(tokens) < min(window, n - total):
            token = sequence.step(sampler)
            tokens.append(token)
            if token in tokenizer.eog_ids:
                break
            if progress is not None and len(tokens) % 16 == 0:
                progress("writing text", min(total + len(tokens), n), n)
        sequences.append(tokens)
        total += len(tokens)
    return sequences


def of_text(model: LoadedModel, text: str, n: int) -> list[list[int]]:
    """Returns the first n tokens of a text, in sequences of at most 256 tokens."""
    ids = model.tokenizer.encode(text, add_special=False, parse_special=False)[:n]
    window = min(_WINDOW, model.engine.sequence().context)
    return [ids[i : i + window] for i in range(0, len(ids), window)]


def feed_forward_inputs(
    model: LoadedModel, sequences: list[list[int]], progress: Progress | None
) -> npt.NDArray[np.float16]:
    """Returns every layer's feed-forward inputs, [n_layer, tokens of all sequences, n_embd]."""
    sequence = model.engine.sequence()
    n = sum(map(len, sequences))
    states = np.empty((model.config["n_layer"], n, model.config["n_embd"]), dtype=np.float16)
    done = 0
    for tokens in sequences:
        sequence.truncate(0)
        taps = sequence.eval_taps(tokens)
        # float16 holds 65504 at most; only the direction of such a state matters.
        states[:, done : done + len(tokens)] = np.clip(taps, -65504, 65504)
        done += len(tokens)
        if progress is not None:
            progress("hidden states", done, n)
    return states
