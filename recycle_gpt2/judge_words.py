"""The words on the judges' form, in the reader's language, and which languages are written from right to left."""

from __future__ import annotations

from typing import NamedTuple

from common.words import base_language


class FormWords(NamedTuple):
    """What the form says."""

    title: str
    question: str
    yes: str
    no: str
    name: str
    """Before the field for the judge's name, which comes first."""
    save: str
    scripts: str
    """Where JavaScript is off."""


WORDS = {
    "en": FormWords(
        "Human or machine?",
        "Could this text have been written by a human?",
        "Human",
        "Machine",
        "First, your name or number:",
        "Save answers",
        "This form needs JavaScript.",
    ),
    "nl": FormWords(
        "Mens of machine?",
        "Zou een mens deze tekst geschreven kunnen hebben?",
        "Mens",
        "Machine",
        "Eerst uw naam of nummer:",
        "Antwoorden opslaan",
        "Dit formulier heeft JavaScript nodig.",
    ),
    "it": FormWords(
        "Persona o macchina?",
        "Questo testo potrebbe essere stato scritto da una persona?",
        "Persona",
        "Macchina",
        "Per cominciare, il tuo nome o numero:",
        "Salva le risposte",
        "Questo modulo richiede JavaScript.",
    ),
    "de": FormWords(
        "Mensch oder Maschine?",
        "Könnte ein Mensch diesen Text geschrieben haben?",
        "Mensch",
        "Maschine",
        "Zuerst Ihr Name oder Ihre Nummer:",
        "Antworten speichern",
        "Dieses Formular braucht JavaScript.",
    ),
    "fr": FormWords(
        "Humain ou machine ?",
        "Ce texte pourrait-il avoir été écrit par un humain ?",
        "Humain",
        "Machine",
        "D'abord, votre nom ou numéro :",
        "Enregistrer les réponses",
        "Ce formulaire nécessite JavaScript.",
    ),
    "es": FormWords(
        "¿Persona o máquina?",
        "¿Podría haber escrito este texto una persona?",
        "Persona",
        "Máquina",
        "Primero, su nombre o número:",
        "Guardar las respuestas",
        "Este formulario necesita JavaScript.",
    ),
}
CODES = {
    "eng": "en",
    "nld": "nl",
    "dut": "nl",
    "ita": "it",
    "deu": "de",
    "ger": "de",
    "fra": "fr",
    "fre": "fr",
    "spa": "es",
}
"""Three letters -> two."""
RIGHT_TO_LEFT = frozenset("ar ara arz ary fa fas per he heb iw ps pus ur urd ug uig sd snd yi yid ckb dv div".split())


def form_words(language: str) -> FormWords:
    """The words of a language by its code (nl, nld, pt-BR); English ones where they are not known."""
    code = base_language(language)
    return WORDS.get(CODES.get(code, code), WORDS["en"])


def direction(language: str) -> str:
    """rtl or ltr: the way in which a language's usual script is written; a code may name another (az-Arab, ur-Latn)."""
    parts = language.lower().replace("_", "-").split("-")
    if "latn" in parts or "cyrl" in parts:
        return "ltr"
    return "rtl" if parts[0] in RIGHT_TO_LEFT or {"arab", "hebr"} & set(parts) else "ltr"
