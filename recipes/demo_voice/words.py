"""The words that the demo voice can say, by the places they take in a sentence.

No two of them sound alike: where English has homophones ("two", "to", "too"), one is here. Each is in the
CMU pronouncing dictionary, by which a recogniser can be told to expect these words alone.
"""

from __future__ import annotations

from collections.abc import Mapping

# A word may stand in several groups. The names are those of the slots in `text.TEMPLATES`.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "number": (
        *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
        *("eighteen", "nineteen", "twenty"),
    ),
    "colour": ("red", "blue", "green", "yellow", "black", "white", "brown", "orange", "purple"),
    "weekday": (*("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),),
    "when": ("today", "tomorrow", "tonight", "again"),
    "part": ("morning", "evening", "afternoon"),
    "season": ("summer", "winter"),
    "how_often": ("always", "never"),
    "name": ("david", "maria", "oscar", "sophia"),
    "person": (*("mother", "father", "sister", "brother", "friend", "teacher", "doctor", "child"),),
    "job": ("teacher", "doctor", "friend"),
    "animal": ("dog", "cat", "bird", "horse", "fish"),
    "thing": (
        *(
            "letter",
            "picture",
            "window",
            "table",
            "flower",
            "apple",
            "computer",
            "guitar",
            "garden",
        ),
    ),
    "opens": ("window", "letter", "garden"),
    "sound": ("voice", "story", "music", "language", "song", "answer"),
    "tells": ("story", "question", "answer", "number", "word", "time"),
    "food": ("water", "coffee", "chocolate"),
    "makes": ("coffee", "chocolate", "music"),
    "place": ("school", "city", "village", "market", "station", "garden"),
    "view": ("river", "mountain", "city", "village", "garden"),
    "sky": ("rain", "snow", "moon", "summer", "winter"),
    "look": (*("small", "big", "old", "young", "beautiful", "little", "wonderful", "simple"),),
    "kind": ("wonderful", "good", "young", "beautiful", "happy"),
    "feeling": ("happy", "ready", "tired", "hungry", "quiet", "warm", "cold"),
    "air": ("warm", "cold", "quiet", "beautiful"),
    "do": (
        *("speak", "talk", "sing", "walk", "dance", "listen", "sleep", "learn", "play", "work"),
    ),
    "do_together": ("talk", "sing", "walk", "dance", "learn", "play", "work"),
    "do_to": ("see", "like", "love", "need", "find", "remember"),
    "do_to_sound": ("hear", "understand", "remember", "like", "love"),
    "do_to_person": ("see", "hear", "help", "remember", "find", "understand"),
    "may": ("can", "will", "should"),
    "we": ("i", "you", "we", "they"),
    "he": ("he", "she"),
    "ask": ("where", "when", "why"),
    "the": ("the", "my", "your", "this"),
    "my": ("my", "your", "the"),
    "very": ("very", "really"),
    # Said by the templates themselves.
    "rest": (
        *("hello", "welcome", "goodbye", "please", "thank", "sorry", "yes", "no", "good"),
        *("name", "say", "tell", "me", "open", "give", "make", "come", "go", "home", "have"),
        *("is", "are", "am", "was", "do", "not", "don't", "let's", "what", "it", "that"),
        *("a", "and", "with", "in", "on", "from", "day", "night", "word", "number", "time"),
        *("world", "everyone", "together", "think", "maybe", "there", "about", "machine"),
    ),
}

VOCABULARY: tuple[str, ...] = tuple(sorted({word for group in GROUPS.values() for word in group}))
"""Every word once, sorted."""
