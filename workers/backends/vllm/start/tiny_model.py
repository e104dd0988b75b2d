"""A tiny random Llama, built locally, so that real vLLM runs where no model can be downloaded.

The demo and the tests need the real engine (its scheduler, prefix cache, tokenizer, grammars), not real answers. So the
weights are random numbers from a fixed seed, and the text is noise. Writing the weights, instead of using vLLM's
``load_format="dummy"``, gives the model four properties that a dummy model lacks.

1. The output is English words, not broken UTF-8, so that a terminal or a dashboard can show it.
2. The end-of-sequence token is practically never sampled, so ``max_tokens`` decides how long a call runs.
3. Under a JSON grammar, strings and numbers end after one word or digit, so that structured output and forced tool
   calls come to an end.
4. Every engine that loads the folder gives the same greedy output, and the output depends on the whole prompt, so that
   a wrong KV-cache hit is noticed.

How 1 to 3 work without a bias in Llama's output layer: some channels of the residual stream are reserved for the *kind*
of the current token (one-hot). No layer writes to them, so they reach the output layer unchanged, where each row has
the logit of its token after a token of that kind.
"""

from __future__ import annotations

import json
import shutil
import string
import tempfile
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]
    Noise = Callable[[int, int, float], Matrix]
    Weights = dict[str, Matrix]

from rsm.broker.settings import Settings

__all__ = ["RECIPE", "ensure_tiny_model", "tiny_model_folder"]

RECIPE = 1
"""Part of the folder's name. Raise it with any change to the model, or an old folder is used as the new one."""

HIDDEN, HEADS, LAYERS, FEED_FORWARD, MAX_TOKENS = 128, 4, 2, 256, 8192
"""Head size is 32, the smallest for vLLM's CPU attention kernels (a smaller one fails at the first call)."""

HEAD = HIDDEN // HEADS
ROPE_THETA = 10_000.0
SEED = 20_260_101
KIND_CHANNEL = 24.0
"""Size of the one-hot channels: much larger than the random ones, so that the last norm divides by a near constant."""

KIND_AT_OUTPUT = 6.0
"""Roughly the size of these channels after that norm; the desired logits are divided by it to get the weights."""

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIALS = (PAD, IM_START, IM_END)

JSON_WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa"
"""Used only inside JSON strings, without a leading space; different from the words of ordinary text."""

TEXT_WORDS = """
    a about above across act add after again agent air all almost alone along also always among an and animal
    another answer any appear are area around as ask at away back base be became because been before began begin
    behind being best better between big black blue boat body book both box boy bring brought build but by cache
    call came can car carry case cause change check city clear close cold color come common complete consider
    contain cook could count country course cover cross cut dark day decide deep design did differ direct do does
    dog done door down draw drive dry during each early earth ease east eat end engine enough even ever every
    example explain eye face fact fall family far farm fast father feel feet few field figure fill final find fine
    fire first fish five fly follow food foot for force form found four free friend from front full game gave get
    girl give go gold good got govern great green ground group grow had half hand happen hard has have he head hear
    heat help her here high him his hold home horse hot hour house how hundred idea if in inch interest into is
    island it just keep kind king knew know land language large last late laugh lay lead learn leave left less let
    letter life light like line list listen little live long look love low machine made main make man many map mark
    may me mean measure men might mile mind minute model money moon more morning most mother mountain move much
    music must my name near need never new next night no north not note nothing notice now number numeral object of
    off often old on once one only open or order other our out over own page paper part pass pattern people perhaps
    person picture piece place plain plan plane plant play point port possible power press problem produce program
    prompt pull put quantum question queue quick rain ran reach read ready real record red remember rest result
    right river road rock room round router rule run said same saw say school science sea second see seem self send
    sentence serve session set several shape she ship short should show side simple since sing sit six size sleep
    slow small snow so some song soon sound south special spell stand star start state stay step still stood stop
    story street strong study such sun sure surface system table take talk teach tell ten test than that the their
    them then there these they thing think this those though thought thousand three through time to together token
    told too took tool top toward town travel tree true try turn two under unit until up upon us use usual very
    voice wait walk want war warm was watch water way we week weight well went were west what wheel when where which
    while white who whole why will wind with wonder wood word work world would write year you young your
"""

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'Tools, one JSON schema a line:\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
{{- 'Call one with:\\n<tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if not (tools and loop.first and message.role == 'system') %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function if call.function else call %}
{{- '\\n<tool_call>\\n{"name": ' + function.name | tojson + ', "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


class Kind(IntEnum):
    """The kind of a token, which influences the choice of the next one; also the number of its residual channel."""

    PLAIN = 0
    QUOTE = 1
    JSON_WORD = 2
    DIGIT = 3
    TAG_END = 4


RECENT = slice(len(Kind), len(Kind) + HEAD)
"""The residual channels, right after those of the kinds, that encode the most recent tokens."""


def tiny_model_folder(path: Path | None = None) -> Path:
    """The folder of the model that :func:`ensure_tiny_model` builds; its name has the recipe."""
    return (path or Settings.cache_dir()) / f"tiny-llama-{RECIPE}"


def ensure_tiny_model(path: Path | None = None) -> Path:
    """Builds the model unless it exists, and returns its folder.

    Safe to call from many processes at once: each builds in a folder of its own, and the first rename wins. So a folder
    with the final name is always complete.

    Args:
        path: the parent folder. Default: one in the user's cache.
    """
    folder = tiny_model_folder(path)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _build(draft)
        draft.chmod(0o755)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _publish(draft: Path, folder: Path) -> None:
    """Renames the folder, unless another process was first (POSIX does not replace a folder that has files)."""
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _build(folder: Path) -> None:
    from safetensors.numpy import save_file

    vocabulary = _vocabulary()
    _write_tokenizer(folder, vocabulary)
    _write_json(folder / "config.json", _config(vocabulary))
    _write_json(folder / "generation_config.json", _special_ids(vocabulary))
    weights = folder / "model.safetensors"
    save_file(_weights(list(vocabulary)), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors creates it with 0600, unlike the other files


def _vocabulary() -> dict[str, int]:
    """Maps tokens to ids, in byte-level BPE's alphabet: each byte is one printable character, and a space is Ġ."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [
        *SPECIALS,
        *sorted(ByteLevel.alphabet()),
        *JSON_WORDS.split(),
        *(f"Ġ{word}" for word in TEXT_WORDS.split()),
    ]
    return {token: number for number, token in enumerate(tokens)}


def _write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> None:
    """Writes a BPE without merges: a word of the vocabulary is one token, anything else is one token per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_TOKENS,
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
    }


def _special_ids(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {"bos_token_id": None, "eos_token_id": vocabulary[IM_END], "pad_token_id": vocabulary[PAD]}


def _config(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "max_position_embeddings": MAX_TOKENS,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
        **_special_ids(vocabulary),
    }


def _weights(tokens: list[str]) -> Weights:
    """All tensors, with the names of Hugging Face's Llama."""
    import numpy as np

    # The legacy generator is the only one whose stream numpy promises never to change.
    random = np.random.RandomState(SEED)

    def noise(rows: int, columns: int, gain: float) -> Matrix:
        values: Matrix = random.standard_normal((rows, columns)).astype(np.float32)
        return values * np.float32(gain / columns**0.5)

    weights = _embedding_and_output(tokens, noise)
    for number in range(LAYERS):
        weights |= {f"model.layers.{number}.{name}.weight": tensor for name, tensor in _layer(number, noise).items()}
    return weights


def _embedding_and_output(tokens: list[str], noise: Noise) -> Weights:
    import numpy as np

    kinds = len(Kind)
    embedding = noise(len(tokens), HIDDEN, HIDDEN**0.5)
    embedding[:, :kinds] = KIND_CHANNEL * np.eye(kinds, dtype=np.float32)[[_kind(token) for token in tokens]]
    words = np.array([len(token) > 1 and token.startswith("Ġ") for token in tokens])
    output = noise(len(tokens), HIDDEN, 1.6) * np.where(words, 1.0, 0.3).astype(np.float32)[:, None]
    output[words, RECENT] += 0.5 * embedding[words, RECENT]
    output[:, :kinds] = np.array([_logits(token) for token in tokens], dtype=np.float32) / KIND_AT_OUTPUT
    norm = np.ones(HIDDEN, dtype=np.float32)
    return {"model.embed_tokens.weight": embedding, "model.norm.weight": norm, "lm_head.weight": output}


def _layer(number: int, noise: Noise) -> Weights:
    import numpy as np

    layer = {f"self_attn.{name}_proj": noise(HIDDEN, HIDDEN, 1.2) for name in "qkvo"}
    (_attend_to_last_tokens if number == 0 else _attend_to_all_tokens)(layer)
    layer |= {f"mlp.{name}_proj": noise(FEED_FORWARD, HIDDEN, 1.5) for name in ("gate", "up")}
    layer["mlp.down_proj"] = noise(HIDDEN, FEED_FORWARD, 1.5)
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # these write to the residual stream, but not to the kinds
        layer[name][: len(Kind)] = 0.0
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer[name] = np.ones(HIDDEN, dtype=np.float32)
        if (number, name) != (0, "input_layernorm"):  # its queries need the kinds; elsewhere they would favour words
            layer[name][: len(Kind)] = 0.0
    return layer


def _attend_to_last_tokens(attention: Weights) -> None:
    """Makes head h of the first layer attend to the token h positions back, and subtract it from the channels `RECENT`.

    The output layer reads those channels with each token's own embedding, so the last few tokens are not repeated, and
    the next one depends on all of them: greedy text does not end in "word word word".

    Query and key are constants (the sum of the kind channels is one). The distance comes from the rotary embedding,
    which rotates the pair of channels (i, i + half) by position x frequency i. A query that is rotated back by h times
    the frequencies matches the key best at distance h.
    """
    import numpy as np

    angle = ROPE_THETA ** (-np.arange(0, HEAD, 2) / HEAD)
    for name, steps in (("self_attn.q_proj", range(HEADS)), ("self_attn.k_proj", [0] * HEADS)):
        attention[name][:] = 0.0
        rows = [4.0 * np.concatenate([np.cos(back * angle), -np.sin(back * angle)]) for back in steps]
        attention[name][:, : len(Kind)] = np.concatenate(rows)[:, None]
    attention["self_attn.v_proj"][:] = 0.0
    attention["self_attn.o_proj"][:] = 0.0
    for head in range(HEADS):
        rows_of_head = slice(head * HEAD, (head + 1) * HEAD)
        attention["self_attn.v_proj"][rows_of_head, RECENT] = np.eye(HEAD)
        attention["self_attn.o_proj"][RECENT, rows_of_head] = -3.0 * np.eye(HEAD)


def _attend_to_all_tokens(attention: Weights) -> None:
    """Makes the last layer's first head the mean of `RECENT` over all tokens, amplified.

    That is the negative frequency of each token: frequent tokens become unlikely. So greedy text does not loop, and a
    change far back in a long prompt still has an effect.
    """
    import numpy as np

    attention["self_attn.q_proj"][:HEAD] = 0.0
    attention["self_attn.v_proj"][:HEAD] = 0.0
    attention["self_attn.v_proj"][:HEAD, RECENT] = np.eye(HEAD)
    attention["self_attn.o_proj"][:, :HEAD] = 0.0
    attention["self_attn.o_proj"][RECENT, :HEAD] = 8.0 * np.eye(HEAD)


def _kind(word: str) -> Kind:
    if word in JSON_WORDS.split():
        return Kind.JSON_WORD
    if word in string.digits:
        return Kind.DIGIT
    return {'"': Kind.QUOTE, ">": Kind.TAG_END}.get(word, Kind.PLAIN)


def _logits(word: str) -> list[float]:
    """The logit of ``word`` after a token of each kind, before the noise.

    Only the order matters. In free text words win everywhere; their noise is about ±4, that of all else ±1. Under a
    JSON grammar, which masks words, JSON's own characters win over white space (which a grammar allows without end),
    and closing characters win over continuing ones.
    """
    usual, after = _preference(word)
    return [after.get(kind, usual) for kind in Kind]


def _preference(word: str) -> tuple[float, dict[Kind, float]]:
    """A token's usual logit, and the kinds after which it differs."""
    if word == IM_END:  # wins over another tool call after a closing tag, and over nothing in free text
        return -40.0, {Kind.TAG_END: -4.0}
    if word in SPECIALS or not word.removeprefix("Ġ").isascii():
        return -40.0, {}
    if word == "Ġ":
        return -24.0, {}
    if word.startswith("Ġ") or word in ".,":
        return 0.0, {}
    if word == '"':
        return -10.0, {Kind.JSON_WORD: 26.0}
    if word in JSON_WORDS.split():
        return -14.0, {Kind.QUOTE: 26.0}
    if word in "]}":
        return -10.0, {Kind.QUOTE: 10.0, Kind.DIGIT: 14.0}
    return -12.0, {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
