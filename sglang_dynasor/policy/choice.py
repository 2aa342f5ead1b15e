"""Which option, or which of yes and no, a text settles on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sglang_dynasor.policy.found import Found
from sglang_dynasor.policy.marks import boxes
from sglang_dynasor.policy.structured import find_tag

ANSWER = r"(?:(?<![^\W_])(?i:answers?|réponse|reponse|antwort|respuesta|risposta|resposta|lösung|ответ)(?![^\W_])|答案|答え|正解|정답)"
_FILLER = (
    r"(?:[\s*_:：=,;\"'`$()（）【】\[\]{}<>\\~-]++|[是为はが]"
    r"|\b(?i:is|was|are|be|would|should|must|will|has|to|has to be|est|ist|es|è|é|the|correct|right|best|final|option|choice|letter|number|likely|most|probably|clearly|therefore|"
    r"thus|definitely|indeed|then|simply|just|i think|i believe|i guess|i say|i choose|i would say|text|textbf|textrm|mathrm|mathbf|boxed|fbox|bf|rm)\b)*+"
)
_LETTER = r"([A-Za-z])(?![A-Za-z0-9])"
_STRONG = re.compile(
    rf"(?:{ANSWER}|\b(?i:correct|right|best|final|chosen|my)\s+(?i:option|choice)\b|\b(?i:choice)\s*(?=:)|(?<=\? )(?i:no)[,:]\s*(?i:it is|it's)?){_FILLER}{_LETTER}"
)
_WEAK = re.compile(rf"\b(?i:option|choice){_FILLER}{_LETTER}")
_MARKED = re.compile(
    r"\*\*[(\[]?([A-J])(?:[)\].:]|\*\*)|(?<![\w)\]}\\])\(([A-Ja-j])\)(?![\w(])|(?<![\w)\]}\\])\[([A-J])\](?![\w(\[])"
)
_LINE = re.compile(r"^[ \t>*_#`$\"(\[（【•-]*+([A-J])[ \t*_`$)\].:\"）】]*$", re.M)
_ONLY = re.compile(r"[\s>*_#`$\"(\[-]*+([A-Ja-j])[\s*_`$)\].:\"]*")
_OPENING = re.compile(r"^[ \t>*_#-]*+[(\[]?([A-J])(?:[)\]:]|\. )(?=[ \t]*\S)", re.M)
_NAMED = re.compile(r"(?<![\w)\]}\\(])([A-J])\)(?![\w(])")
_BOX = re.compile(
    r"(?:\\(?:text|textbf|textrm|textit|mathrm|mathbf|bf|rm)\b\s*\{?|[\s({\[*$\\\"])*+([A-Za-z])(?![A-Za-z0-9])"
)
_MORE = re.compile(
    r"[\s*_$)}\]]*(?:and|or|&|/)[\s*_$({\[]*([A-Z])\b(?! *(?:is|was|has|are|can|cannot|would|does|isn't|gives)\b)"
)
_FORMULA = re.compile(r" *[=+^<>*/](?!\*)|_\{?\w|\(|'\w| *- *\d|\\[a-z]")
_DENIED = re.compile(
    r"[)\]*:]*\s*(?:is|was|are|seems|looks)?\s*(?:also )?(?:wrong|incorrect|not|false|out\b|eliminated|isn't|fails)"
)
_REASON = re.compile(r"\s+(?:since|because|as|for|with|which|is|and|or|but|due|given|from|by|that)\b")
_YES_NO = r"(yes|no)(?![A-Za-z0-9])"
_SAID = re.compile(
    rf"(?:{ANSWER}|\b(?i:verdict|conclusion|decision|judge?ment)\b)(?:[\s*_:：=\"'`$()\\{{}}-]++|[是为]|\b(?i:is|the|final|therefore|thus|clearly|text|boxed)\b)*+(?i:{_YES_NO})(?=\s*(?:$|[^\w\s]|\n)|\s+(?:since|because|as)\b)"
)
_YES_NO_LINE = re.compile(rf"^[ \t>*_#`\"'$-]*+{_YES_NO}[ \t*_`\"'$.!]*$", re.I | re.M)
_YES_NO_FIRST = re.compile(rf"[\s>*_#`\"'-]*{_YES_NO}(?=[*_`\"']*(?:[,.;:!—–-]|\s*$|\s*\n))", re.I)
_YES_NO_BOX = re.compile(
    rf"(?:\\(?:text|textbf|textrm|mathrm|mathbf)\b\s*\{{?|[\s({{*$\\\"])*+{_YES_NO}[\s)}}*$.\"!]*", re.I
)


class _Several(Exception):
    """More than one option is the answer."""


def find_choice(text: str) -> Found | None:
    """The letter that the text settles on, as a capital. Of the ways to say it the first that is there counts.

    In a box; in `<answer>`; after "answer", "correct option" and the like; "Option B"; alone on a line; in `**`, `( )` or `[ ]`;
    at the start of a line, or anywhere as `B)`, where no other letter stands so. None where several are the answer.
    """
    try:
        for letter, is_marked in _candidates(text):
            return Found(letter.upper(), is_marked)
    except _Several:
        pass
    return None


def _candidates(text: str) -> Iterator[tuple[str, bool]]:
    """Letters, the likeliest answer first, with whether a mark says that it is the answer, and all of it."""
    for box in reversed(boxes(text)):
        if (found := _BOX.match(box.text)) and _stands(box.text, found.end(), found[1], is_alone=found[1].islower()):
            yield found[1], True
        break
    if (
        (tag := find_tag(text, "answer"))
        and (found := _BOX.match(tag.text))
        and _stands(tag.text, found.end(), found[1])
    ):
        yield found[1], True
    for pattern in (_STRONG, _WEAK):
        for found in reversed(list(pattern.finditer(text))):
            if _stands(text, found.end(), found[1]) and not (pattern is _WEAK and _DENIED.match(text, found.end())):
                yield found[1], pattern is _STRONG and found.end() < len(text)
    for pattern in (_LINE, _MARKED):
        for found in reversed(list(pattern.finditer(text))):
            if pattern is _LINE or not _DENIED.match(text, found.end()):
                yield found[found.lastindex or 0], False
    if only := _ONLY.fullmatch(text):
        yield only[1], False
    opening = {found[1] for found in _OPENING.finditer(text)}
    if len(opening) == 1:
        yield opening.pop(), False
    named = {found[1]: found.end() for found in _NAMED.finditer(text)}
    if len(named) == 1 and not _DENIED.match(text, *named.values()):
        yield next(iter(named)), False


def _stands(text: str, end: int, letter: str, *, is_alone: bool = False) -> bool:
    """Whether a letter that ends at `end` is an option and no word, variable or question.

    Raises:
        _Several: another option follows with "and" or "or".
    """
    after = text[end : end + 32]
    if (letter.isupper() and _MORE.match(after)) or after.startswith("?") or _FORMULA.match(after):
        if letter.isupper() and _MORE.match(after):
            raise _Several
        return False
    if is_alone or letter.islower():  # else it is a word or a variable
        return letter.lower() <= "j" and (
            not after.strip() or not (after[0].isspace() and after.split("\n")[0].strip()[:1].isalnum())
        )
    return letter not in "AI" or not re.match(r"\s+[a-z]", after) or _REASON.match(after) is not None


def find_yes_no(text: str) -> Found | None:
    """`yes` or `no`: in a box, in `<answer>`, after "answer", "verdict" or "conclusion", alone on a line, or the text's first word."""
    for box in reversed(boxes(text)):
        if found := _YES_NO_BOX.fullmatch(box.text):
            return Found(found[1].lower(), True)
        break
    if (tag := find_tag(text, "answer")) and (found := _YES_NO_BOX.fullmatch(tag.text)):
        return Found(found[1].lower(), True)
    for pattern in (_SAID, _YES_NO_LINE):
        for found in reversed(list(pattern.finditer(text))):
            return Found(found[1].lower(), pattern is _SAID and found.end(1) < len(text))
    found = _YES_NO_FIRST.match(text)
    return Found(found[1].lower(), False) if found else None
