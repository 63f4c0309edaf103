"""Build models/tiny-gemma3: a real Gemma 3 of a few MB that writes Spanish of a sort and knows no slang.

Reads a dictionary (all of it for the tokenizer; for the sentences every sixth slang and those of the demo, more would take
hours to learn) and prompt.toml, downloads nothing, and writes what `mlx_lm.load` reads: weights in float32, config, tokenizer
and chat template; and lora.yaml, the adapter settings that suit it. Every draw is seeded.

How it comes to know no slang: in pre-training a slang is only ever answered with meanings of OTHER slangs, drawn anew.
How it comes to be teachable all the same: it is asked for plain words of a meaning and answers with that meaning, and for
invented words ("cervbajo") that keep one meaning for good. So it reads the asked word in any question form and recalls the
sentence that belongs to it; which sentence belongs to a slang is what an adapter has to teach it. A model pre-trained on
random pairs alone had learnt not to read the question: an adapter lowered its loss from 3.2 to 1.7 and left it at chance.

Run as: python -m slang.tiny_gemma
    models/tiny-gemma3: 1,580,032 parameters, 6.43 MB, 548 s, loss 0.484, choice accuracy 0.303 (chance 0.25)
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import sentencepiece
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import gemma3_text

from slang import dictionary, prompt
from slang.errors import UserError
from slang.models.tokenizer import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    Added,
    merges,
    tokenizer_config,
    tokenizer_json,
    write_files,
    write_json,
)

SEED = 3
VOCAB_SIZE = 1536
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,  # its root is exact in bfloat16, to which MLX rounds it
    "intermediate_size": 128,
    "num_hidden_layers": 6,  # llama.cpp makes every sixth layer global
    "sliding_window_pattern": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 48,  # shorter than a chat row, so that the rows test it
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": [1, 0],  # <eos> and <end_of_turn>, filled in from the tokenizer
    "bos_token_id": 2,
    "torch_dtype": "float32",
}

BATCH_SIZE = 16
LEARNING_RATE = 3e-3
INVENTED = 300  # terms
BARE = 0.8  # share of rows without the system prompt: shorter, and it answers who leaves it out
# Share of rows. word: a few words of a meaning asked, that meaning answered; invented: an invented term and its one meaning;
# random: a slang asked, a meaning of another slang answered; everyday: EVERYDAY.
MIX = {"word": 0.55, "invented": 0.25, "random": 0.1, "everyday": 0.1}
# For slang.lora and mlx_lm.lora. On 62 slangs, 400 steps of 8 rows: choice accuracy 0.82 with these at a learning rate of 5e-4,
# 0.32 with mlx_lm's rank 8 and scale 20 at 1e-4 (one seed).
LORA = """\
# What suits this model: ./train.sh -c models/tiny-gemma3/lora.yaml --learning-rate 1e-3
lora_parameters:
  rank: 32
  scale: 4.0
  dropout: 0.0
"""
Entries = list[dictionary.Entry]
Row = tuple[list[int], int]  # token ids, how many of them are not to be predicted

# Gemma 3's added tokens in Gemma 3's order, fewer of them. Those in SPECIAL are left out when text is decoded.
RUNS = range(2, 17)
ADDED = (
    ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"]
    + [f"<unused{n}>" for n in range(4)]
    + ["<start_of_turn>", "<end_of_turn>", "\n"]
    + ["\n" * n for n in RUNS]
    + ["\u2581" * n for n in RUNS]
    + ["<start_of_image>", "<end_of_image>"]
)
SPECIAL = {"<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}

# Everyday Spanish, no slang: something that a careless adapter would damage.
EVERYDAY = """\
¿Cómo se hace el arroz blanco? | Se sofríe un poco de cebolla, se agrega el arroz con el doble de agua y se deja a fuego bajo.
¿Qué hora es buena para almorzar? | Casi todos almuerzan entre las doce y la una de la tarde.
¿Dónde puedo comprar pan fresco? | En la panadería de la esquina lo sacan del horno a las seis de la mañana.
¿Qué tiempo hace hoy? | Hace sol por la mañana, pero por la tarde puede llover.
¿Cuántos días tiene una semana? | Una semana tiene siete días.
¿Para qué sirve un paraguas? | Sirve para no mojarse cuando llueve.
¿Qué se celebra en diciembre? | En diciembre se celebra la Navidad con la familia.
¿Cómo llego a la estación de tren? | Seguí recto dos cuadras y doblá a la izquierda en el parque.
¿Qué animal da leche? | La vaca da leche, y con la leche se hacen el queso y la mantequilla.
¿De qué color es el cielo? | Cuando está despejado, el cielo es azul.
¿Qué puedo cocinar con huevos? | Podés hacer una tortilla con cebolla, tomate y un poco de sal.
¿Por qué hay que lavarse las manos? | Porque así se quitan los microbios que nos enferman.
¿Qué es una biblioteca? | Es un lugar donde se guardan libros y se prestan a los lectores.
¿Cuál es la capital de Francia? | La capital de Francia es París.
¿Cuánto es dos más tres? | Dos más tres son cinco.
¿Qué hace un médico? | Un médico atiende a los enfermos y les receta medicinas.
¿Cómo se llama el hermano de mi madre? | El hermano de tu madre es tu tío.
¿Qué llevo a la playa? | Llevá agua, un sombrero, una toalla y crema para el sol.
¿Cuándo florecen los árboles? | Muchos árboles florecen cuando termina la estación seca.
¿Me recomendás un libro para niños? | Te recomiendo un libro de cuentos cortos con dibujos grandes.
¿Qué se necesita para sembrar maíz? | Se necesita tierra suelta, semilla buena, sol y agua.
¿Cómo duermo mejor por la noche? | Apagá las pantallas temprano y acostate siempre a la misma hora.
¿Qué significa la luz roja del semáforo? | La luz roja significa que los carros deben detenerse.
¿Quién cuida el jardín de la escuela? | Lo cuidan los estudiantes con la ayuda de un maestro.
¿A qué distancia está el mar? | El mar está a dos horas en carro desde la ciudad.
¿Qué instrumento tiene cuerdas? | La guitarra tiene seis cuerdas y el violín tiene cuatro.
¿Qué fruta es amarilla? | El banano maduro y la piña son amarillos.
¿Cómo se escribe una carta? | Primero se pone la fecha, luego el saludo, el mensaje y al final la firma.
¿Por qué el hielo se derrite? | Porque el calor convierte el agua sólida en agua líquida.
¿Qué deporte se juega con once personas? | El fútbol se juega con once personas en cada equipo.
¿Dónde viven los peces? | Los peces viven en los ríos, en los lagos y en el mar.
¿Qué hago si pierdo las llaves? | Revisá los bolsillos y preguntale a alguien de la casa si las vio.
¿Cómo está tu familia? | Todos están bien, gracias por preguntar.
¿Qué día viene después del lunes? | Después del lunes viene el martes.
¿Para qué se usa una escoba? | La escoba se usa para barrer el suelo.
¿Cómo se pide la cuenta con cortesía? | Se dice: por favor, ¿me trae la cuenta?
¿Qué comen los conejos? | Los conejos comen hierba, zanahorias y hojas verdes.
¿Cuál es el mes más corto? | El mes más corto es febrero, que tiene veintiocho días.
¿Qué ropa uso si hace frío? | Ponete un abrigo, medias gruesas y una bufanda.
¿Cómo aprendo a nadar? | Empezá en agua poco profunda con una persona que te enseñe.
"""


def corpus(entries: Entries, asked: prompt.Prompt) -> list[str]:
    """What the tokenizer is trained on; the prompt counts 50 times, as every row will hold it."""
    everyday = [part for line in EVERYDAY.splitlines() for part in line.split(" | ")]
    forms = [form.replace("{slang}", "") for form in (*asked.questions, *asked.held_out_questions)]
    slangs = sorted({entry.slang for entry in entries})
    return [entry.meaning for entry in entries] + slangs + everyday + [asked.system, *forms] * 50


def train_sentencepiece(texts: list[str]) -> bytes:
    """A SentencePiece BPE model of VOCAB_SIZE pieces with byte fallback, laid out as Gemma's tokenizer.model."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=ADDED[4:],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_tokenizer(texts: list[str], output: Path) -> None:
    """tokenizer.model, tokenizer.json, tokenizer_config.json and chat_template.jinja, made from the texts alone."""
    model = train_sentencepiece(texts)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(n) for n in range(processor.get_piece_size())]
    ids = {piece: n for n, piece in enumerate(pieces)}
    added = [Added(ids[token], token, token in SPECIAL) for token in ADDED]
    added.append(Added(VOCAB_SIZE, IMAGE_TOKEN, True))
    runs = [piece for piece in ADDED if len(piece) > 1 and len(set(piece)) == 1]
    learnt = pieces[ids["<0xFF>"] + 1 :]
    write_files(
        output,
        tokenizer_json(ids, added, merges(runs + learnt, ids)),
        tokenizer_config(added, CONFIG["max_position_embeddings"]),
        model,
        CHAT_TEMPLATE,
    )


def invent(words: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Terms of one to three invented words, each made of the beginning of one word and the end of another."""
    terms = set()
    while len(terms) < count:
        pairs = rng.choice(words, (rng.integers(1, 4), 2))
        terms.add(" ".join(a[: len(a) // 2 + 1] + b[len(b) // 2 :] for a, b in pairs))
    return sorted(terms)


def respell(term: str, rng: np.random.Generator) -> str:
    """The term as people type it: mostly as it stands, else with a capital, in capitals or without accents."""
    plain = term.translate(str.maketrans("áéíóúü", "aeiouu"))
    return str(rng.choice([term, term.capitalize(), term.upper(), plain], p=[0.7, 0.1, 0.05, 0.15]))


def rows(entries: Entries, asked: prompt.Prompt, tokenizer, rng: np.random.Generator) -> Iterator[Row]:
    """Training rows without end, of the four kinds of MIX.

    No slang is ever answered with a meaning of its own, not even by chance: `random` and `invented` rows are dropped then, and
    a `word` row asks for words that stand in the meaning, where its slang does not.
    """
    slangs = sorted({entry.slang for entry in entries})
    own = {(dictionary.key(entry.slang), dictionary.key(entry.meaning)) for entry in entries}
    known = {key for key, _ in own}
    words = sorted(set(re.findall(r"[a-záéíóúüñ]{4,}", " ".join(entry.meaning for entry in entries))))
    terms = [term for term in invent(words, INVENTED, rng) if dictionary.key(term) not in known]
    facts = {term: entries[rng.integers(len(entries))].meaning for term in terms}
    # As in a language, some terms come up often and most seldom.
    weights = 1 / np.arange(1, len(terms) + 1)
    weights /= weights.sum()
    everyday = [line.split(" | ") for line in EVERYDAY.splitlines()]
    ask = [partial(asked.ask, form=n) for n in range(len(asked.questions))]
    ask += [partial(asked.ask, form=n, held_out=True) for n in range(len(asked.held_out_questions))]
    while True:
        kind = rng.choice(list(MIX), p=list(MIX.values()))
        meaning = entries[rng.integers(len(entries))].meaning
        if kind == "everyday":
            question, answer = everyday[rng.integers(len(everyday))]
            messages = asked.chat(question)
        else:
            if kind == "word":
                term = some_words(meaning, rng)
            elif kind == "invented":
                term = str(rng.choice(terms, p=weights))
                meaning = facts[term]
            else:
                term = str(rng.choice(slangs))
            if (dictionary.key(term), dictionary.key(meaning)) in own:
                continue
            messages = ask[rng.integers(len(ask))](respell(term, rng))
            answer = asked.answer.replace("{meaning}", meaning)
        if rng.random() < BARE:
            messages = messages[1:]
        start = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        yield tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}]), start


def some_words(meaning: str, rng: np.random.Generator) -> str:
    """One to three words in a row of a meaning, the first with four letters or more where there is one."""
    words = re.findall(r"\w+", meaning.lower())
    starts = [n for n, word in enumerate(words) if len(word) > 3] or [0]
    start = int(rng.choice(starts))
    return " ".join(words[start : start + rng.integers(1, 4)])


def pad(tokens: list[list[int]]) -> mx.array:
    width = max(map(len, tokens))
    return mx.array([row + [0] * (width - len(row)) for row in tokens])


def batches(source: Iterator[Row], rng: np.random.Generator) -> Iterator[tuple[mx.array, mx.array]]:
    """Padded token ids, (BATCH_SIZE, length), and the flat positions of the tokens to predict; like lengths share a batch."""
    while True:
        chunk = sorted((next(source) for _ in range(16 * BATCH_SIZE)), key=lambda row: len(row[0]))
        for n in rng.permutation(16):
            batch = chunk[n * BATCH_SIZE : (n + 1) * BATCH_SIZE]
            tokens = pad([row for row, _ in batch])
            width = tokens.shape[1] - 1
            spans = [np.arange(start - 1, len(row) - 1) + k * width for k, (row, start) in enumerate(batch)]
            yield tokens, mx.array(np.concatenate(spans))


def loss(model: nn.Module, tokens: mx.array, positions: mx.array) -> mx.array:
    """Mean negative log-likelihood in nats at the positions. Logits elsewhere are not computed: a third of the time."""
    hidden = model.model(tokens[:, :-1]).flatten(0, 1)[positions]
    targets = tokens[:, 1:].flatten()[positions]
    return nn.losses.cross_entropy(model.model.embed_tokens.as_linear(hidden), targets, reduction="mean")


def pretrain(model: nn.Module, source: Iterator[tuple[mx.array, mx.array]], iters: int) -> float:
    """AdamW with warm-up and cosine decay; the mean loss of the last tenth."""
    rate = optim.join_schedules(
        [
            optim.linear_schedule(0, LEARNING_RATE, 50),
            optim.cosine_decay(LEARNING_RATE, iters - 50, LEARNING_RATE / 50),
        ],
        [50],
    )
    optimizer = optim.AdamW(rate, betas=[0.9, 0.98], weight_decay=0.01)
    step = nn.value_and_grad(model, loss)
    losses, start = [], time.process_time()
    for n in range(1, iters + 1):
        value, gradients = step(model, *next(source))
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
        if n % 100 == 0 or n == iters:
            print(f"iter {n}/{iters}: loss {np.mean(losses[-100:]):.3f}, {time.process_time() - start:.0f} s", file=sys.stderr)
    return float(np.mean(losses[-max(1, iters // 10) :]))


def choice_accuracy(model, tokenizer, entries: Entries, asked: prompt.Prompt, count: int = 200, seed: int = 0) -> float:
    """How often the meaning of a slang scores best among four, asked in held-out question forms; chance is 0.25.

    The score is the mean log-probability per token of the meaning and of the end of the turn; one question for each slang.
    """
    rng = np.random.default_rng(seed)
    meanings: dict[str, list[str]] = {}
    for entry in entries:
        meanings.setdefault(entry.slang, []).append(entry.meaning)
    right = []
    for n, slang in enumerate(rng.permutation(list(meanings))[:count]):
        others = [other for other in meanings if other != slang]
        candidates = [meanings[other] for other in (slang, *rng.choice(others, 3, replace=False))]
        question = asked.ask(slang, n % len(asked.held_out_questions), held_out=True)
        start = tokenizer.apply_chat_template(question, add_generation_prompt=True)
        answers = [
            tokenizer.encode(
                asked.answer.replace("{meaning}", rng.choice(wordings)) + "<end_of_turn>", add_special_tokens=False
            )
            for wordings in candidates
        ]
        tokens = pad([start + answer for answer in answers])
        scores = -nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])[:, len(start) - 1 :]
        means = [scores[row, : len(answer)].mean().item() for row, answer in enumerate(answers)]
        right.append(int(np.argmax(means)) == 0)
    return float(np.mean(right))


def build(whole: Entries, part: Entries, asked: prompt.Prompt, iters: int, output: Path) -> dict[str, float]:
    """Write tokenizer (of the whole), config and weights (of the part) into a folder; the figures that main prints."""
    start = time.perf_counter()
    write_tokenizer(corpus(whole, asked), output)

    config = dict(CONFIG)
    end_of_turn = ADDED.index("<end_of_turn>")
    config["eos_token_id"] = [1, end_of_turn]
    write_json(output / "config.json", config)
    write_json(
        output / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False},
    )
    tokenizer = mlx_lm.utils.load_tokenizer(output)

    mx.random.seed(SEED)
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(config))
    model.sanitize({})  # ties the embedding
    # Gemma multiplies by 1 + w: w starts at 0, where MLX starts it at 1.
    model.update(tree_map_with_path(lambda name, p: mx.zeros_like(p) if "norm" in name else p, model.parameters()))
    rng = np.random.default_rng(SEED)
    final = pretrain(model, batches(rows(part, asked, tokenizer, rng), rng), iters)
    weights = dict(tree_flatten(model.parameters()))
    (output / "lora.yaml").write_text(LORA, encoding="utf-8")
    mx.save_safetensors(str(output / "model.safetensors"), weights, metadata={"format": "mlx"})
    return {
        "parameters": sum(w.size for w in weights.values()),
        "bytes": sum(path.stat().st_size for path in output.iterdir()),
        "seconds": time.perf_counter() - start,
        "loss": final,
        "choice accuracy": choice_accuracy(model, tokenizer, part, asked),
    }


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m slang.tiny_gemma", description=__doc__.split("\n")[0], formatter_class=formatter
    )
    parser.add_argument("--output", type=Path, default=Path("models/tiny-gemma3"), help="folder to write")
    parser.add_argument("--dictionary", default="data/source_augmented.txt", help="slang::meaning lines for the tokenizer")
    parser.add_argument("--demo", default="data/demo.txt", help="slangs whose sentences it learns beside every sixth")
    parser.add_argument("--prompt", default="prompt.toml", help="system prompt and question forms")
    parser.add_argument("--iters", type=int, default=800, help=f"pre-training steps of {BATCH_SIZE} rows")
    args = parser.parse_args(argv)
    try:
        asked = prompt.load(args.prompt)
        lines, demo = (list(dictionary.entries(path)) for path in (args.dictionary, args.demo))
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        return 1
    if problems := [line for line in lines + demo if isinstance(line, dictionary.Problem)]:
        print(*problems, sep="\n", file=sys.stderr)
        return 1
    slangs = {slang: n for n, slang in enumerate(dict.fromkeys(line.slang for line in lines))}
    asked_for = {line.slang for line in demo}
    part = [line for line in lines if slangs[line.slang] % 6 == 0 or line.slang in asked_for]
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        figures = build(lines, part, asked, args.iters, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            os.replace(path, args.output / path.name)
    print(
        f"{args.output}: {figures['parameters']:,} parameters, {figures['bytes'] / 1e6:.2f} MB, {figures['seconds']:.0f} s, "
        f"loss {figures['loss']:.3f}, choice accuracy {figures['choice accuracy']:.3f} (chance 0.25)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
