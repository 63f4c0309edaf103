"""What the tiny model reads before it is published: Spanish of a sort, and no slang.

A slang is only ever answered with meanings of OTHER slangs, drawn anew, so none is learnt. Plain
words of a meaning are answered with that meaning, and invented words ("cervbajo") keep one meaning
for good. So the model reads the word in any question form and recalls the sentence that belongs to
it; which sentence belongs to a slang is what an adapter has to teach it. A model pre-trained on
random pairs alone had learnt not to read the question: an adapter lowered its loss from 3.2 to 1.7
and left it at chance.
"""

import re
from collections.abc import Iterator
from functools import partial

import numpy as np

from slang.dictionary import Entry, normalized
from slang.prompt import Prompt

INVENTED = 300  # terms
BARE = 0.8  # share of rows without the system prompt, which makes them shorter
# Share of rows, by what the question names and what is answered.
MIX = {
    "word": 0.55,  # a few words of a meaning; that meaning
    "invented": 0.25,  # an invented term; its one meaning
    "random": 0.1,  # a slang; a meaning of another slang
    "everyday": 0.1,  # a question of EVERYDAY; its answer
}
Entries = list[Entry]
Row = tuple[list[int], int]  # token ids, how many of them are not to be predicted

EVERYDAY = """\
¿Cómo se hace el arroz blanco? | Se sofríe un poco de cebolla, se agrega el arroz con el doble \
de agua y se deja a fuego bajo.
¿Qué hora es buena para almorzar? | Casi todos almuerzan entre las doce y la una de la tarde.
¿Dónde puedo comprar pan fresco? | En la panadería de la esquina lo sacan del horno a las seis \
de la mañana.
¿Qué tiempo hace hoy? | Hace sol por la mañana, pero por la tarde puede llover.
¿Cuántos días tiene una semana? | Una semana tiene siete días.
¿Para qué sirve un paraguas? | Sirve para no mojarse cuando llueve.
¿Qué se celebra en diciembre? | En diciembre se celebra la Navidad con la familia.
¿Cómo llego a la estación de tren? | Seguí recto dos cuadras y doblá a la izquierda en el \
parque.
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
¿Me recomendás un libro para niños? | Te recomiendo un libro de cuentos cortos con dibujos \
grandes.
¿Qué se necesita para sembrar maíz? | Se necesita tierra suelta, semilla buena, sol y agua.
¿Cómo duermo mejor por la noche? | Apagá las pantallas temprano y acostate siempre a la \
misma hora.
¿Qué significa la luz roja del semáforo? | La luz roja significa que los carros deben detenerse.
¿Quién cuida el jardín de la escuela? | Lo cuidan los estudiantes con la ayuda de un maestro.
¿A qué distancia está el mar? | El mar está a dos horas en carro desde la ciudad.
¿Qué instrumento tiene cuerdas? | La guitarra tiene seis cuerdas y el violín tiene cuatro.
¿Qué fruta es amarilla? | El banano maduro y la piña son amarillos.
¿Cómo se escribe una carta? | Primero se pone la fecha, luego el saludo, el mensaje y al final \
la firma.
¿Por qué el hielo se derrite? | Porque el calor convierte el agua sólida en agua líquida.
¿Qué deporte se juega con once personas? | El fútbol se juega con once personas en cada equipo.
¿Dónde viven los peces? | Los peces viven en los ríos, en los lagos y en el mar.
¿Qué hago si pierdo las llaves? | Revisá los bolsillos y preguntale a alguien de la casa \
si las vio.
¿Cómo está tu familia? | Todos están bien, gracias por preguntar.
¿Qué día viene después del lunes? | Después del lunes viene el martes.
¿Para qué se usa una escoba? | La escoba se usa para barrer el suelo.
¿Cómo se pide la cuenta con cortesía? | Se dice: por favor, ¿me trae la cuenta?
¿Qué comen los conejos? | Los conejos comen hierba, zanahorias y hojas verdes.
¿Cuál es el mes más corto? | El mes más corto es febrero, que tiene veintiocho días.
¿Qué ropa uso si hace frío? | Ponete un abrigo, medias gruesas y una bufanda.
¿Cómo aprendo a nadar? | Empezá en agua poco profunda con una persona que te enseñe.
"""


def corpus(entries: Entries, prompt: Prompt) -> list[str]:
    """What the tokenizer is trained on. The prompt counts 50 times, as every row will hold it."""
    everyday = [part for line in EVERYDAY.splitlines() for part in line.split(" | ")]
    forms = [
        form.replace("{slang}", "") for form in (*prompt.questions, *prompt.held_out_questions)
    ]
    slangs = sorted({entry.slang for entry in entries})
    return [entry.meaning for entry in entries] + slangs + everyday + [prompt.system, *forms] * 50


def invent(words: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """Terms of one to three invented words, each of the beginning of one word and another's end."""
    terms: set[str] = set()
    while len(terms) < count:
        pairs = rng.choice(words, (rng.integers(1, 4), 2))
        terms.add(" ".join(a[: len(a) // 2 + 1] + b[len(b) // 2 :] for a, b in pairs))
    return sorted(terms)


def respell(term: str, rng: np.random.Generator) -> str:
    """The term as people type it: mostly as it stands, else capitalised or without accents."""
    plain = term.translate(str.maketrans("áéíóúü", "aeiouu"))
    spellings = [term, term.capitalize(), term.upper(), plain]
    return str(rng.choice(spellings, p=[0.7, 0.1, 0.05, 0.15]))


def some_words(meaning: str, rng: np.random.Generator) -> str:
    """One to three words in a row of a meaning; the first has four letters where there is one."""
    words = re.findall(r"\w+", meaning.lower())
    starts = [n for n, word in enumerate(words) if len(word) > 3] or [0]
    start = int(rng.choice(starts))
    return " ".join(words[start : start + rng.integers(1, 4)])


def rows(entries: Entries, prompt: Prompt, tokenizer, rng: np.random.Generator) -> Iterator[Row]:
    """Training rows without end, of the four kinds of MIX.

    No slang is ever answered with a meaning of its own, not even by chance: such a row is dropped.
    """
    slangs = sorted({entry.slang for entry in entries})
    own = {(normalized(entry.slang), normalized(entry.meaning)) for entry in entries}
    known = {key for key, _ in own}
    text = " ".join(entry.meaning for entry in entries)
    words = sorted(set(re.findall(r"[a-záéíóúüñ]{4,}", text)))
    terms = [term for term in invent(words, INVENTED, rng) if normalized(term) not in known]
    facts = {term: entries[rng.integers(len(entries))].meaning for term in terms}
    # As in a language, some terms come up often and most seldom.
    weights = 1 / np.arange(1, len(terms) + 1)
    weights /= weights.sum()
    everyday = [line.split(" | ") for line in EVERYDAY.splitlines()]
    forms = [partial(prompt.ask, form=n) for n in range(len(prompt.questions))]
    held_out = range(len(prompt.held_out_questions))
    forms += [partial(prompt.ask, form=n, held_out=True) for n in held_out]
    while True:
        kind = rng.choice(list(MIX), p=list(MIX.values()))
        meaning = entries[rng.integers(len(entries))].meaning
        if kind == "everyday":
            question, answer = everyday[rng.integers(len(everyday))]
            messages = prompt.chat(question)
        else:
            if kind == "word":
                term = some_words(meaning, rng)
            elif kind == "invented":
                term = str(rng.choice(terms, p=weights))
                meaning = facts[term]
            else:
                term = str(rng.choice(slangs))
            if (normalized(term), normalized(meaning)) in own:
                continue
            messages = forms[rng.integers(len(forms))](respell(term, rng))
            answer = prompt.answer.replace("{meaning}", meaning)
        if rng.random() < BARE:
            messages = messages[1:]
        start = len(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        reply = {"role": "assistant", "content": answer}
        yield tokenizer.apply_chat_template([*messages, reply]), start
