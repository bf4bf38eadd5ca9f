"""From the two text files to token arrays: clean, split into tales, hold out, tokenize, build the chat tune.

Owns every rule about what the model may see. Never touches weights.

    python -m training.data --stories stories.jsonl.xz --fairytale-qa fairytale_qa.jsonl.xz --out DIR

Writes DIR/tokenizer.json, DIR/meta.json and uint16 arrays: {tales,children,novels}.npy and made.npy, stories from our plots (training),
val.npy (1 % of the training documents, for choosing settings), heldout_*.npy, tune.npy (chat; bit 15 = no loss).
"""

import argparse
import hashlib
import json
import lzma
import random
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from training.fables import PLOTS, POOLS, Made, article, make
from training.morals import MORALS
from training.tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, USER_ID, load_tokenizer, train_tokenizer

HELD_OUT_ORIGINS = ("norwegian-fairybook", "scottish-fairybook")
HELD_OUT_BOOKS = ("The Wind in the Willows", "The Jungle Book")
NO_LOSS = np.uint16(1 << 15)  # set on tune tokens that are prompt: read, never a target

# Folk collections whose text is what the title says, with the heading of the first tale and the paragraph that ends
# the last. The other folk entries are other books under a wrong title (French, Italian and theological works, a 1938
# novel marked "all rights reserved", a history of Sulu), verse, or OCR noise: left out, see DROPPED in meta.json.
# One Thousand and One Nights is Burton's: archaic and not for children.
FOLK_BODIES: dict[str, tuple[str, str]] = {
    "Australian Legendary Tales": ("1. DINEWAN", "GLOSSARY"),
    "Cuchulain Of Muirthemne": ("The Story of the Children of Lir", "NOTES ON THE SOURCES"),
    "Gods Fighting Men": ("CHAPTER I. THE FIGHT WITH THE FIRBOLGS", "NOTES"),
    "The Mabinogion": ("THE LADY OF THE FOUNTAIN", "FOOTNOTES"),
    "Mother Goose Tales": ("Little Red Riding-Hood", "Uniform with this Volume"),
    "Russian Fairy Tales": ("THE FIEND.", "INDEX"),
    "Grimms Fairy Tales": ("3 Our Lady", "The End"),
    "Aesops Fables": ("The Cock and the Pearl", "And this is the end"),
    "Joseph Jacobs Fairy Tales": ("TOM TIT TOT", "OYEZ-OYEZ-OYEZ"),
    "Hawaiian Legends Gods Ghosts": ("THE GHOST OF WAHAULA TEMPLE", "APPENDIX"),
    "Philippine Folk Tales": ("Aponibolinayen and the Sun", "NOTES"),
}
# Legends with a heavy apparatus of names train beside the children's books, not beside the plain tales.
LEGENDS = {"Cuchulain Of Muirthemne", "Gods Fighting Men", "The Mabinogion", "Russian Fairy Tales",
           "Hawaiian Legends Gods Ghosts", "Bulfinch's Mythology"}  # fmt: skip
TALE_BOOKS = {
    "Aesop's Fables", "Andersen's Fairy Tales", "The Little Mermaid", "Grimms' Fairy Tales", "Irish Fairy Tales",
    "Great Big Treasury of Beatrix Potter", "The Book of Dragons", "The Happy Prince & Other Tales", "Kwaidan",
    "Beauty and the Beast", "A Kidnapped Santa Claus", "The First Christmas Tree", "The Other Wise Man",
}  # fmt: skip
CHILDREN_AUTHORS = {
    "Abbie Farwell Brown", "Anna Sewell", "Carlo Collodi", "Edith Nesbit", "George MacDonald", "Howard Pyle",
    "Hugh Lofting", "J. M. Barrie", "Johann David Wyss", "Johanna Spyri", "L. Frank Baum", "Lewis Carroll",
    "Lucy Maud Montgomery", "Louisa May Alcott", "R.M. Ballantyne", "Robert Louis Stevenson", "Rudyard Kipling",
    "Lord Dunsany", "W.B. Yeats", "James Stephens", "Washington Irving", "Horatio Alger",
}  # fmt: skip
CHILDREN_BOOKS = {
    "A Little Princess", "The Secret Garden", "The Call of the Wild", "White Fang", "The Adventures of Tom Sawyer",
    "The Prince and the Pauper", "Gulliver's Travels", "The Canterville Ghost", "Phantastes",
} | LEGENDS  # fmt: skip
SLUR = re.compile(
    r"\bnigger|\bdarky\b|\bdarkies\b", re.I
)  # a book with more than 20 is dropped, else the paragraph

TYPOGRAPHY = str.maketrans({
    "“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u200b": "", "\ufeff": "",
    "\xa0": " ", "\t": " ", "_": "", "Æ": "Ae", "æ": "ae", "œ": "oe", "Œ": "Oe",
})  # fmt: skip
PEOPLES_AND_LABELS = re.compile(
    "Tinguian|Igorot|Bukidnon|Bagobo|Bilaan|Mandaya|Subanun|Moro|Ilocano|Tagalog|Visayan|The Moral|Another"
)  # lines of their own between a heading and its tale
EDITORIAL = re.compile(
    r"^(\[(Illustration|Footnote|Sidenote|Picture)|\[\d+\]|\d+\s*$|[*\s]+$|[-=\s]+$|Produced by|E-text|End of (the )?Project"
    r"|NOTE:|Source:|\(?_?From |PAGE$|CONTENTS|[IVXLC]+\.?$|[A-Z .]*ILLUSTRATIONS)", re.I)  # fmt: skip


@dataclass(frozen=True)
class Tale:
    """One document: a tale, or one chapter of a book."""

    title: str
    text: str
    source: str
    group: str  # tales | children | novels


def clean(text: str) -> str:
    """One typography, paragraphs split by one blank line, no markup, footnote marks or editors' paragraphs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(TYPOGRAPHY)
    text = re.sub(r"\[(?:FN#)?\d+\]|\{\d+\}", "", text)
    text = re.sub(r"\*+", "", text)
    paragraphs = []
    for raw in re.split(r"\n\s*\n", text):
        paragraph = re.sub(r" {2,}", " ", "\n".join(line.strip() for line in raw.split("\n"))).strip()
        if not paragraph or EDITORIAL.match(paragraph) or SLUR.search(paragraph):
            continue
        letters = sum(ch.isalpha() or ch in " ,.'\"!?;-" for ch in paragraph)
        if letters < 0.9 * len(paragraph) or sum(ord(ch) > 0x24F for ch in paragraph) > 2:
            continue  # tables, numbers, OCR noise, Greek
        paragraphs.append(paragraph)
    if paragraphs:  # printers set the first word or line of a chapter in capitals: "ONCE on a time"
        paragraphs[0] = re.sub(r"^[A-Z']{2,}( [A-Z']+)*(?= [a-z]|,)", lambda m: m[0].capitalize(), paragraphs[0])
    return "\n\n".join(paragraphs)


def is_heading(paragraph: str) -> bool:
    return (
        len(paragraph) < 75
        and "\n" not in paragraph
        and not re.search(r"[\"'”’,:;!?-]\s*$", paragraph)
        and not (paragraph.endswith(".") and not paragraph.rstrip(".").isupper())
        and bool(re.match(r"[A-Z0-9]", paragraph))
    )


def folk_tales(work: dict[str, Any]) -> list[Tale]:
    """The tales of one folk collection, cut at its headings."""
    title = work["title"]
    start, end = FOLK_BODIES[title]
    text = re.sub(r"\[\d+\]|_", "", work["text"])
    paragraphs = [re.sub(r" {2,}", " ", p).strip() for p in text.split("\n\n")]
    starts = [i for i, p in enumerate(paragraphs) if p.upper().startswith(start.upper()) and len(p) < 90]
    if not starts:
        raise ValueError(f"{title}: no paragraph starts with {start!r}")
    first = starts[min(len(starts) - 1, 1 if title == "Mother Goose Tales" else 0)]
    ends = [i for i, p in enumerate(paragraphs) if p.upper().startswith(end.upper()) and i > first + 50]
    paragraphs = paragraphs[first : ends[0] if ends else None]
    group = "children" if title in LEGENDS else "tales"
    tales: list[Tale] = []
    heading, body = "", []

    def flush() -> None:
        cleaned = clean("\n\n".join(body))
        if len(cleaned) > 250:
            tales.append(Tale(heading, cleaned, title, group))

    for index, paragraph in enumerate(paragraphs):
        following = paragraphs[index + 1] if index + 1 < len(paragraphs) else ""
        # a heading is followed by a paragraph of prose; a moral at the end of a fable is followed by a heading
        if PEOPLES_AND_LABELS.fullmatch(paragraph):
            continue
        if is_heading(paragraph) and (len(following) > 75 or PEOPLES_AND_LABELS.fullmatch(following)):
            flush()
            heading = re.sub(r"^(\d+\.?|[IVXLC]+\.|CHAPTER [IVXLC]+\.?)\s+", "", paragraph).rstrip(". ")
            body = []
        else:
            body.append(paragraph)
    flush()
    return tales


def book_chapters(work: dict[str, Any]) -> list[Tale]:
    """The chapters of one markdown book."""
    title, author = work["title"], work["author"]
    if title in TALE_BOOKS:
        group = "tales"
    else:
        group = "children" if author in CHILDREN_AUTHORS or title in CHILDREN_BOOKS else "novels"
    parts = re.split(r"(?m)^#+\s*(.*?)\s*$", "\n" + work["text"].replace("\r", ""))
    chapters = []
    for heading, body in zip(["", *parts[1::2]], parts[::2], strict=True):
        cleaned = clean(body)
        if len(cleaned) > (150 if title == "Aesop's Fables" else 250):
            chapters.append(Tale(re.sub(r"^[#\s]*([IVXLC]+\.|\d+\.)?\s*", "", heading), cleaned, title, group))
    return chapters


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def section_text(section: str) -> str:
    """One section of fairytale_qa, cleaned: its newlines are paragraph ends, or hard-wrapped lines to be joined."""
    lines = [line.strip() for line in section.split("\n") if line.strip()]
    wrapped = sum(not line.endswith((".", "!", "?", '"', "'", ":", ";", "”", "’", "-")) for line in lines)
    return clean((" " if wrapped > len(lines) / 2 and len(lines) > 2 else "\n\n").join(lines))


def qa_text(record: dict[str, Any]) -> str:
    return "\n\n".join(text for text in map(section_text, record["sections"]) if text)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def shingles(text: str, length: int = 8) -> set[int]:
    tokens = words(text)
    return {hash(tuple(tokens[i : i + length])) for i in range(len(tokens) - length + 1)}


def is_near_copy(text: str, held_out: set[int], threshold: float = 0.02) -> bool:
    """True when more than `threshold` of the 8-word shingles of `text` also occur in the held-out text.

    Unrelated tales share under 0.3 % ("once upon a time there was a king who"); a reprint shares over 20 %.
    """
    own = shingles(text)
    return len(own & held_out) > threshold * max(len(own), 50)


def split_documents(
    works: list[dict[str, Any]], records: list[dict[str, Any]]
) -> tuple[list[Tale], list[dict[str, Any]], dict[str, list[str]], dict[str, Any]]:
    """Training documents, training QA records, held-out documents by source, and a report of what was dropped."""
    held_out: dict[str, list[str]] = {}
    for origin in HELD_OUT_ORIGINS:
        held_out[origin] = [qa_text(r) for r in records if r["origin"] == origin]
    for title in HELD_OUT_BOOKS:
        held_out[title] = [c.text for w in works if w["title"] == title for c in book_chapters(w)]
    held_out_shingles: set[int] = set().union(*(shingles(t) for texts in held_out.values() for t in texts))
    held_out_titles = {" ".join(words(r["title"])) for r in records if r["origin"] in HELD_OUT_ORIGINS}

    tales: list[Tale] = []
    dropped: dict[str, Any] = {"works": [], "near_copies": [], "slurs": []}
    for work in works:
        if work["title"] in HELD_OUT_BOOKS:
            continue
        if work["kind"] == "folk" and work["title"] not in FOLK_BODIES:
            dropped["works"].append(work["title"])
        elif len(SLUR.findall(work["text"])) > 20:
            dropped["slurs"].append(work["title"])
        else:
            tales += folk_tales(work) if work["kind"] == "folk" else book_chapters(work)
    train_records = [r for r in records if r["origin"] not in HELD_OUT_ORIGINS]
    tales += [Tale(r["title"].title(), qa_text(r), "fairytale_qa", "tales") for r in train_records]

    def leaks(title: str, text: str) -> bool:
        bare = " ".join(w for w in words(title) if w not in ("the", "a", "an"))
        same_title = any(
            bare == " ".join(w for w in t.split() if w not in ("the", "a", "an")) for t in held_out_titles
        )
        return same_title or is_near_copy(text, held_out_shingles)

    kept = []
    for tale in tales:
        if leaks(tale.title, tale.text):
            dropped["near_copies"].append(f"{tale.source}: {tale.title}")
        else:
            kept.append(tale)
    train_records = [r for r in train_records if not leaks(r["title"], qa_text(r))]
    return kept, train_records, held_out, dropped


# ---------------------------------------------------------------------------------------------------- the chat tune

CHARACTERS = [
    "fox",
    "crow",
    "wolf",
    "lion",
    "mouse",
    "dog",
    "cat",
    "cock",
    "hen",
    "goose",
    "duck",
    "swan",
    "eagle",
    "hawk",
    "owl",
    "stork",
    "crane",
    "peacock",
    "jackdaw",
    "raven",
    "sparrow",
    "nightingale",
    "swallow",
    "frog",
    "toad",
    "snake",
    "viper",
    "serpent",
    "tortoise",
    "turtle",
    "hare",
    "rabbit",
    "bear",
    "boar",
    "pig",
    "sow",
    "sheep",
    "lamb",
    "ram",
    "goat",
    "kid",
    "ass",
    "donkey",
    "horse",
    "mule",
    "ox",
    "bull",
    "cow",
    "calf",
    "stag",
    "deer",
    "monkey",
    "ape",
    "camel",
    "elephant",
    "crab",
    "fish",
    "dolphin",
    "bee",
    "ant",
    "grasshopper",
    "fly",
    "gnat",
    "spider",
    "dragon",
    "giant",
    "troll",
    "witch",
    "fairy",
    "dwarf",
    "elf",
    "mermaid",
    "goblin",
    "ogre",
    "king",
    "queen",
    "prince",
    "princess",
    "knight",
    "soldier",
    "miller",
    "shepherd",
    "farmer",
    "fisherman",
    "hunter",
    "tailor",
    "shoemaker",
    "woodcutter",
    "merchant",
    "thief",
    "robber",
    "beggar",
    "priest",
    "doctor",
    "sailor",
    "grandmother",
    "stepmother",
    "magician",
    "wizard",
    "ghost",
    "devil",
    "angel",
    "tree",
    "oak",
    "rose",
    "river",
    "moon",
    "sun",
    "star",
    "wind",
]
TELL_ABOUT = (
    "Tell me a story about {}.", "Tell me a tale about {}.", "Please tell me a story about {}.", "tell me a story about {}",
    "I would like to hear a story about {}.", "Can you tell me a fairy tale about {}?", "A story about {}, please.",
    "Write a short story about {}.", "Tell us about {}.", "Do you know a story about {}?", "Tell me a bedtime story about {}.",
    "Could you tell a story about {}?", "I want a story about {}!", "Write a story about {}.", "Make up a story about {}.",
    "Tell me about {}.", "A tale of {}.", "story about {}", "Give me a short tale about {}.", "Once upon a time there was {}.",
    "Tell my daughter a story about {}.", "Tell my son a bedtime story about {}.", "Can I have a story about {}, please?",
)  # fmt: skip
FABLE_ABOUT = (
    "Tell me a fable about {}.", "Tell a fable about {} with a moral.", "Tell me a fable about {}, with a moral.",
    "Write a short fable about {}.", "Can you tell me a fable about {}?", "A fable about {}, please.", "fable about {}",
    "Tell me a story about {} with a moral.", "I would like a fable about {}.", "Please write a fable about {}.",
    "tell me a fable about {}", "Make up a fable about {}.", "Give me a fable with {}.", "Do you know a fable about {}?",
    "Write a story about {} that ends with a moral.", "Tell me a tale about {} and its moral.",
)  # fmt: skip
MORAL_ABOUT = (
    "Tell me a story with the moral: {}", "Tell me a fable that teaches: {}", "Write a fable with this moral: {}",
    "A fable, please, whose moral is: {}",
)  # fmt: skip
FABLE_ANY = ("Tell me a fable.", "Tell a fable with a moral.", "Tell me a fable with a moral.", "A fable, please.",
             "Can you tell me a short fable?", "Tell me a story with a moral.", "Another fable, please.", "Tell a fable")  # fmt: skip
STORY_ANY = ("Tell me a story.", "Tell me a fairy tale.", "Tell me a bedtime story.", "A story, please.",
             "Can you tell me a story?", "I want to hear a story.", "Once more, a story!", "Another story, please.",
             "Tell me a folk tale.", "tell me a story", "Tell me something.", "Surprise me.", "Tell me a story I do not know.",
             "Can you tell me a bedtime story?", "I cannot sleep. Tell me a story.", "Start a story.", "Go on, tell me one.")  # fmt: skip
TITLED = ("Tell me the story of {}.", "Do you know the tale of {}?", "Tell me {}.", "I would like to hear {}.")
BEGINS = ("Tell me a tale that begins: {}", "Continue this story: {}", "Continue: {}", "Go on with this story.\n\n{}",
          "What happens next?\n\n{}", "Finish this story: {}", "{}\n\nHow does it go on?")  # fmt: skip
ASK = ("{passage}\n\n{question}", "Read this passage and answer the question.\n\n{passage}\n\nQuestion: {question}",
       "{passage}\n\nQuestion: {question}", "Here is part of a story.\n\n{passage}\n\n{question}",
       "Question: {question}\n\n{passage}")  # fmt: skip
ASK_MORAL = (
    "What is the moral of this story?",
    "What is the moral?",
    "What does this story teach us?",
    "What can we learn from it?",
)
ASK_SHORT = ("Make it shorter.", "Tell it in one sentence.", "What is it about?", "Can you make it shorter?", "Shorter, please.",
             "Sum it up.", "What happens in the story?")  # fmt: skip
MORE = ("Another one, please.", "Another one!", "Tell me another.", "One more!", "And another?", "Again!", "More, please.",
        "Do you know another one?", "Yes, please.")  # fmt: skip
ADJECTIVES = ("little", "young", "old", "clever", "brave", "proud", "lonely", "hungry", "lazy", "kind", "small", "big", "happy",
              "sad", "friendly", "tiny", "magic", "funny", "poor", "shy", "wise", "foolish", "angry", "red", "white")  # fmt: skip
MADE_CHATS = 128_000  # conversations from our plots: every animal and thing of POOLS some hundred times
MADE_STORIES = 64_000  # of the same plots, without chat form, for base training
MADE_PARTS = 64
SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("Hello", "Hello!", "Hi", "Hi there!", "Good morning.", "Good evening.", "Good day to you.", "Hey", "hello", "hi", "Hello there",
      "Good afternoon!", "Hallo", "hey there", "Greetings"),
     ("Good day to you! Shall I tell you a story?", "Hello! I know fables and fairy tales. Which would you like?",
      "Good day! Would you like to hear a tale?", "Hello! Name two animals, and I will tell you a fable about them.",
      "Good day! I have a story ready, if you have a moment.", "Hello, and welcome to my fireside. What shall I tell you about?")),
    (("Who are you?", "What are you?", "What is your name?", "Are you a person?", "Are you an AI?", "Tell me about yourself.",
      "who are you", "Are you a robot?", "Are you ChatGPT?", "Are you human?", "What's your name?", "Who made you?",
      "Introduce yourself.", "What kind of model are you?", "How big are you?", "How old are you?"),
     ("I am the storyteller, a very small language model. I learned from old fairy tales and fables, and I tell new ones.",
      "I am a storyteller: a small machine that has read many old tales and likes to make up its own.",
      "I am the storyteller that comes with kvfold. I am very small, and stories are all I know.",
      "I am a little storyteller. I have read old tales all my life, and I can tell you one, with a moral or without.")),
    (("What can you do?", "Can you help me?", "What do you know?", "Help", "What can I ask you?", "help", "How can you help me?",
      "What are you good at?", "How does this work?", "What should I ask?", "What do you do?"),
     ("I can tell you a story, tell you a fable with a moral, or answer a question about a passage that you give me. "
      "Of other things I know very little.",
      "I can tell stories and fables, and I can answer a question about a short passage. Try: Tell me a fable about a fox.",
      "I tell stories. Name an animal or a thing, and I will make up a tale about it. I can also go on with a story that you begin.",
      "Only one thing, but I do it gladly: I tell stories. Try: Tell me a story about a lonely lighthouse.")),
    (("Thank you.", "Thank you!", "Thanks", "That was lovely.", "What a nice story!", "I liked that.", "Well done!", "thanks!",
      "Thank you! That was lovely.", "Great story!", "I love it!", "That was beautiful.", "Wonderful!", "Good story.", "Nice.",
      "That made me smile.", "Thank you very much.", "Thanks a lot!"),
     ("You are very welcome. Shall I tell you another?", "I am glad you liked it. Would you like another story?",
      "You are welcome! There are many more tales where that came from.", "That makes a small storyteller very happy.",
      "The pleasure is mine. Name two animals, and you shall have the next one.")),
    (("Goodbye.", "Bye!", "Good night.", "Farewell.", "bye", "See you tomorrow.", "I have to go now.", "Good night!", "I am tired."),
     ("Goodbye, and may all your days end happily!", "Good night, and sweet dreams!", "Farewell! Come back for another tale.",
      "Sleep well! The stories will still be here tomorrow.")),
    (("How are you?", "How do you do?", "Are you well?", "how are you", "How are you today?", "How do you feel?", "Are you happy?"),
     ("I am very well, thank you. Shall we have a story?", "As happy as a king's youngest son. Would you like a tale?",
      "Very well, thank you, for somebody has come to listen. What shall it be?")),
    (("That was a bad story.", "I did not like it.", "That makes no sense.", "That was boring.", "You are wrong.", "That is stupid."),
     ("I am sorry. I am a very small storyteller. Shall I try another one?",
      "Then let me tell you a better one. What shall it be about?", "Forgive me. Name an animal, and I will try again.")),
    (("What is the capital of France?", "Write me a program in Python.", "What is 23 times 17?", "Who won the game?",
      "What is the weather today?", "Explain quantum physics.", "What year is it?", "Translate this to German.", "What is 2 + 2?",
      "What is 2+2?", "Who is the president?", "Write some code.", "Write a Python function that sorts a list.", "What's the news?",
      "What time is it?", "Solve x + 3 = 5.", "Give me a recipe for pancakes.", "Who won the war?", "What is the meaning of life?",
      "How do I fix my computer?", "What is machine learning?", "Explain the theory of relativity.", "How far is the moon?",
      "Write an email to my boss.", "Can you do my homework?", "Which phone should I buy?", "What is a transformer?",
      "Summarize the news of today.", "Tell me the price of gold.", "How many people live in China?", "Fix this bug.",
      "What is the square root of 16?", "Who wrote Hamlet?", "When did the war end?", "Is it going to rain tomorrow?",
      "Can you speak French?", "Write a regular expression.", "How do I learn to program?", "What should I eat?", "Where is Berlin?",
      "What is the fastest car?", "Give me advice about my taxes.", "Am I ill?", "What is 7 times 8?", "Count to ten.",
      "Tell me a joke.", "Draw me a picture.", "Sing a song.", "Search the internet for cats.", "Remind me at five o'clock."),
     ("I am only a storyteller, and I do not know about that. Shall I tell you a tale instead?",
      "That is beyond a small storyteller like me. But I could tell you a fable.",
      "Of that I know nothing: I am only a storyteller. But name an animal, and I will tell you about it.",
      "I am afraid that I cannot help you there. Stories are all I know. Would you like one?",
      "That is not in any of my tales, so I do not know it. Shall I tell you a story?")),
)  # fmt: skip


def subjects(title: str, text: str, rng: random.Random) -> str:
    """'a fox and a crow': one to three characters that matter in the tale, those of its title first."""
    in_title = [w for w in dict.fromkeys(words(title)) if w in CHARACTERS or w.rstrip("s") in CHARACTERS]
    counts = Counter(w for w in words(text) if w in CHARACTERS and w != "kid")
    frequent = [w for w, n in counts.most_common(6) if n >= 3 or (len(text) < 1500 and n >= 2)]
    chosen = list(dict.fromkeys(w if w in CHARACTERS else w.rstrip("s") for w in in_title + frequent))
    chosen = chosen[: rng.choice((1, 2, 2, 2, 3))]
    if not chosen:
        return ""
    unique = {"moon", "sun", "wind", "devil"}
    named = [("the " if w in unique else "an " if w[0] in "aeiou" else "a ") + w for w in chosen]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]


def with_moral(tale: Tale) -> str | None:
    """The fable ending in 'The moral: ...', or None when it has none."""
    title = re.sub(r"^#\s*", "", tale.title).upper()
    paragraphs = tale.text.split("\n\n")
    if title in MORALS:
        return tale.text + f"\n\nThe moral: {MORALS[title]}"
    last = paragraphs[-1].strip("\"' ")
    if len(paragraphs) < 2 or len(last) > 130 or len(tale.text) > 4000:
        return None
    return "\n\n".join(paragraphs[:-1]) + f"\n\nThe moral: {last.rstrip('.')}."


def sentence(answer: str) -> str:
    answer = re.sub(r"\s+", " ", answer).strip()
    answer = answer[:1].upper() + answer[1:]
    return answer if answer[-1:] in ".!?\"'" else answer + "."


def small_talk(rng: random.Random) -> tuple[str, str]:
    questions, answers = rng.choice(SMALL_TALK)
    return rng.choice(questions), rng.choice(answers)


def cut(text: str, rng: random.Random) -> tuple[str, str]:
    """A text's opening, one or a few sentences or paragraphs, and the rest."""
    ends = [m.end() for m in re.finditer(r"[.!?]\"?(?=\s)", text) if m.end() < 0.6 * len(text)]
    end = rng.choice(ends[:3] if ends and rng.random() < 0.7 else ends) if ends else len(text) // 2
    return text[:end], text[end:].strip()


def finished(made: Made) -> str:
    return f"{made.text}\n\nThe moral: {made.moral}" if made.moral else made.text


WANTED = sorted(
    {w for pool in ("animal", "toy", "useful", "name", "girl", "trade") for w in POOLS[pool].split("|")}
)


def told(rng: random.Random, wanted: str = "") -> tuple[Made, tuple[str, str]]:
    """A made story and the turn that asks for it: what a request names occurs in the answer."""
    made = make(rng.choice(PLOTS), rng, wanted)
    draw = rng.random()
    fable = made.moral != "" and rng.random() < 0.6
    answer = finished(made) if fable or rng.random() < 0.5 else made.text
    if fable and draw < 0.07:
        return made, (rng.choice(MORAL_ABOUT).format(made.moral), answer)
    if draw < 0.17:
        return made, (rng.choice(FABLE_ANY if fable else STORY_ANY), answer)
    named = list(made.about)
    rng.shuffle(named)
    named = sorted(named[: rng.choice((1, 1, 2, 2, 3))], key=made.about.index)
    named = [f"{rng.choice(ADJECTIVES)} {n}" if rng.random() < 0.2 else n for n in named]
    the = rng.random() < 0.04
    phrases = [f"the {n}" if the else article(n) for n in named]
    about = phrases[0] if len(named) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return made, (rng.choice(FABLE_ABOUT if fable else TELL_ABOUT).format(about), answer)


def made_chat(rng: random.Random) -> list[tuple[str, str]]:
    """A conversation about one or two made stories: asked for, continued, asked about, shortened."""
    made, turn = told(rng, rng.choice(WANTED))
    draw = rng.random()
    if draw < 0.07:
        opening, rest = cut(finished(made), rng)
        return [(rng.choice(BEGINS).format(opening), rest)]
    if draw < 0.17:  # a passage of the asker's own
        asked = list(made.questions)
        if made.moral:
            asked.append((rng.choice(ASK_MORAL), f"The moral: {made.moral}"))
        if made.short:
            asked.append((rng.choice(ASK_SHORT), made.short))
        if asked:
            rng.shuffle(asked)
            return [(rng.choice(ASK).format(passage=made.text, question=asked[0][0]), asked[0][1]), *asked[1:3]]
    turns = [small_talk(rng)] if rng.random() < 0.06 else []
    turns.append(turn)
    if rng.random() < 0.5:
        return turns
    follow = list(made.questions[:2])
    if made.short:
        follow.append((rng.choice(ASK_SHORT), made.short))
    if made.moral:
        follow.append((rng.choice(ASK_MORAL), f"The moral: {made.moral}"))
    follow.append(small_talk(rng))
    again, second = told(rng)
    follow += [(rng.choice(MORE), finished(again)), second]
    return turns + rng.sample(follow, rng.choice((1, 1, 2, 3)))


def chat_examples(
    tales: list[Tale], records: list[dict[str, Any]], rng: random.Random
) -> list[list[tuple[str, str]]]:
    """Conversations as lists of (question, answer)."""
    chats: list[list[tuple[str, str]]] = []

    for tale in tales:
        if tale.group != "tales":
            continue
        fable = with_moral(tale) if tale.source in ("Aesop's Fables", "Aesops Fables") else None
        if fable is not None:
            for _ in range(3):
                about = subjects(tale.title, tale.text, rng)
                template = rng.choice(FABLE_ANY) if not about or rng.random() < 0.2 else rng.choice(FABLE_ABOUT)
                chats.append([(template.format(about), fable)])
        if len(tale.text) > 5000 or tale.source in ("Kwaidan", "Irish Fairy Tales", "The Other Wise Man"):
            continue  # 5,000 bytes are about 1,300 tokens: longer tales lose their way
        for _ in range(2):
            about, name = subjects(tale.title, tale.text, rng), tale.title.strip("# ")
            draw = rng.random()
            if draw < 0.25 and 3 < len(name) < 60:
                name = name.title().replace("'S", "'s") if name.isupper() else name
                prompt = rng.choice(TITLED).format(re.sub(r"^(The|A|An)\b", lambda m: m[0].lower(), name))
            elif draw < 0.4 or not about:
                prompt = rng.choice(STORY_ANY)
            else:
                prompt = rng.choice(TELL_ABOUT).format(about)
            if rng.random() < 0.4:
                opening, rest = cut(tale.text, rng)
                chats.append([(rng.choice(BEGINS).format(opening), rest)])
            else:
                chats.append([(prompt, tale.text)])
    for record in records:
        by_section: dict[int, list[tuple[str, str]]] = {}
        for question in record["questions"]:
            sections = re.findall(r"\d+", str(question["section"]))
            if len(sections) == 1 and 1 <= int(sections[0]) <= len(record["sections"]):
                pair = (question["question"].strip(), sentence(question["answer"]))
                by_section.setdefault(int(sections[0]), []).append(pair)
        for section, pairs in by_section.items():
            passage = section_text(record["sections"][section - 1])
            if not passage:
                continue
            rng.shuffle(pairs)
            turns = [(rng.choice(ASK).format(passage=passage, question=pairs[0][0]), pairs[0][1])]
            chats.append(turns + pairs[1:4])
            chats += [[(rng.choice(ASK).format(passage=passage, question=q), a)] for q, a in pairs[4:8]]
    rng.shuffle(chats)
    return chats


# ------------------------------------------------------------------------------------------------------------ arrays


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """BOS text EOS, one after the other."""
    pieces: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        pieces += [BOS_ID, *encoding.ids, EOS_ID]
    return np.array(pieces, dtype=np.uint16)


def encode_chats(tokenizer: Tokenizer, chats: list[list[tuple[str, str]]], max_tokens: int) -> np.ndarray:
    """BOS (User question Assistant answer EOS)*, with NO_LOSS on all but the answers and their EOS."""
    rows: list[np.ndarray] = []
    for chat in chats:
        ids, loss = [BOS_ID], [False]
        for question, answer in chat:
            q = tokenizer.encode(question, add_special_tokens=False).ids
            a = tokenizer.encode(answer, add_special_tokens=False).ids
            ids += [USER_ID, *q, ASSISTANT_ID, *a, EOS_ID]
            loss += [False] * (len(q) + 2) + [True] * (len(a) + 1)
        if len(ids) <= max_tokens:
            rows.append(np.array(ids, np.uint16) | np.where(loss, np.uint16(0), NO_LOSS))
    return np.concatenate(rows)


def made_part(tokenizer: Path, part: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Part `part` of MADE_PARTS: stories without chat form, conversations, and the stories' bytes."""
    rng, tokens = random.Random(1000 + part), load_tokenizer(tokenizer)
    stories = [finished(make(rng.choice(PLOTS), rng)) for _ in range(MADE_STORIES // MADE_PARTS)]
    chats = [made_chat(rng) for _ in range(MADE_CHATS // MADE_PARTS)]
    chats += [[small_talk(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))] for _ in range(len(chats) // 12)]
    rng.shuffle(chats)
    size = sum(len(s.encode()) for s in stories)
    return encode_documents(tokens, stories), encode_chats(tokens, chats, max_tokens=2048), size


def write_made(tokenizer: Path, out: Path, real: np.ndarray) -> dict[str, int]:
    """made.npy, and tune.npy: `real` (chats about the collected texts) and ours. Both in parallel, alike on any machine."""
    with ProcessPoolExecutor() as pool:
        parts = list(pool.map(made_part, [tokenizer] * MADE_PARTS, range(MADE_PARTS)))
    np.save(out / "made.npy", np.concatenate([stories for stories, _, _ in parts]))
    np.save(out / "tune.npy", np.concatenate([real, *(chats for _, chats, _ in parts)]))
    return {"made_bytes": sum(size for _, _, size in parts), "made_tokens": sum(s.size for s, _, _ in parts),
            "tune_tokens": real.size + sum(c.size for _, c, _ in parts)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--fairytale-qa", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(20)

    works, records = read_jsonl(args.stories), read_jsonl(args.fairytale_qa)
    tales, train_records, held_out, dropped = split_documents(works, records)
    rng.shuffle(tales)
    # validation: whole documents, about 1 % of tales and children's books; never of the chat tune's tales
    val = [
        t
        for t in tales
        if t.group != "novels" and t.source not in ("fairytale_qa", "Aesop's Fables", "Aesops Fables")
    ]
    val = [t for t in val if t.text and len(t.text) < 30000][:25]
    titles = {(t.source, t.title) for t in val}
    tales = [t for t in tales if (t.source, t.title) not in titles]

    groups = {g: [t.text for t in tales if t.group == g] for g in ("tales", "children", "novels")}
    tokenizer = train_tokenizer(groups["tales"] + groups["children"] + groups["novels"][::4], args.vocab_size)
    tokenizer.save(str(args.out / "tokenizer.json"))
    tokenizer = load_tokenizer(args.out / "tokenizer.json")

    meta: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "dropped": dropped,
        "bytes": {},
        "tokens": {},
        "documents": {},
    }
    meta["sources"] = sorted({(t.group, t.source) for t in tales})
    meta["inputs"] = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (args.stories, args.fairytale_qa)}
    named = {**groups, "val": [t.text for t in val]}
    named |= {"heldout_" + re.sub(r"[^a-z]+", "_", k.lower()): v for k, v in held_out.items()}
    for name, texts in named.items():
        array = encode_documents(tokenizer, texts)
        np.save(args.out / f"{name}.npy", array)
        meta["bytes"][name] = sum(len(t.encode()) for t in texts)
        meta["tokens"][name], meta["documents"][name] = int(array.size), len(texts)
    chats = chat_examples(tales, train_records, rng)
    real = encode_chats(tokenizer, chats, max_tokens=2048)
    meta["documents"] |= {"chats_real": len(chats), "chats_made": MADE_CHATS, "made": MADE_STORIES}
    meta["tokens"]["chats_real"] = int(real.size)
    meta |= write_made(args.out / "tokenizer.json", args.out, real)
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False))
    (args.out / "chats.sample.txt").write_text(
        "\n\n=====\n\n".join(f"U: {q}\nA: {a}" for c in chats[:60] for q, a in c)
    )


if __name__ == "__main__":
    main()
