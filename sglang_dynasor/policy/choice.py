"""Which option, or which of yes and no, a text settles on."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sglang_dynasor.policy.found import Found
from sglang_dynasor.policy.marks import boxes, find_boxed
from sglang_dynasor.policy.structured import find_tag

MAX_LETTERS = 128  # that may be said to be right, the last ones
ANSWER = r"(?:(?<![^\W_])(?i:answers?|réponse|reponse|antwort|respuesta|risposta|resposta|lösung|ответ)(?![^\W_])|答案|答え|正解|정답)"
_HEAD = r"(?=[A-DFJL-NRVa-dfjl-nrvОо答正정])"  # of what is looked for: most places are passed over at once
_FILLER = (
    r"(?:[\s*_:：=,;\"'`$()（）【】\[\]{}<>\\~-]++|[是为はが]"
    r"|\b(?i:is|was|are|be|would|should|must|will|has|to|has to be|est|ist|es|è|é|the|correct|right|best|final|option|choice|letter|number|likely|most|probably|clearly|therefore|"
    r"thus|definitely|indeed|then|simply|just|i think|i believe|i guess|i say|i choose|i would say|text|textbf|textrm|mathrm|mathbf|boxed|fbox|bf|rm)\b)*+"
)
_LETTER = r"([A-Za-z])(?![A-Za-z0-9])"
# "The answer is B" says it; "answer B" only names an option, which may be one that is ruled out.
_ANSWER = re.compile(
    rf"{_HEAD}(?:{ANSWER}|\b(?i:correct|right|best|final|chosen|my)\s+(?i:option|choice|one|letter|response|statement)\b|\b(?i:choice)\s*(?=:)"
    rf"|(?P<no>(?<=\? )(?i:no)[,:]\s*(?i:it is|it's)?))(?P<between>{_FILLER}){_LETTER}"
)
_SAYS = re.compile(r"[:：=>~-]|\b(?:is|was|are|be|has|est|ist|es|è|é)\b|[是为はが]", re.I)
_LINE_END = re.compile(r"[ \t*_`$)\].\"）】]*(?:\n|$)")
_WEAK = re.compile(rf"\b(?i:option|choice){_FILLER}{_LETTER}")
# "Therefore, C is correct.": where a sentence or a part of one begins, so no "statement C is correct".
_RIGHT = re.compile(
    r"([A-J])(?<![\w'’].)[*_)\]]{0,3} (?:is|must be|has to be|would be) (?:(?:therefore|thus|clearly|indeed|definitely|most likely) )?"
    r"(?:(?:the )?(?:only |most )?(?:correct|right|best|appropriate|accurate)(?: (?:answer|option|choice|one|response|letter))?|(?:the|my|our) (?:final )?(?:answer|choice))"
    r"(?=[*_]*(?:[.,;:!\n]|$)| (?:because|since|as|and|here)\b)"
)
_BEGINS = re.compile(
    r"(?:^|\n|[.,;:!] |\b(?:so|thus|hence|therefore|only|conclude that|means that) )[ \t>*_#•(\[-]*$", re.I
)
# "I choose C.", "So, C.": where the letter ends it.
_LAST = re.compile(r"([A-J])(?<![\w'’].)(?=[*_)\]]{0,3}(?:[.,;!\n]|$| (?:because|since)\b))")
_CHOSE = re.compile(
    r"\bI(?: would| will|'d|’d|'ll|’ll)? (?:choose|chose|pick|select|go with) (?:option |answer )?[*_(\[]*$"
)
_SO = re.compile(
    r"(?:^|\W)(?:so|thus|hence|therefore),? (?:(?:it is|it's|it’s|it must be|we choose|we pick) )?[*_(\[]*$", re.I
)
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
# ", C" where nothing but letters follows: no "B, A being too small".
_LISTED = re.compile(
    r"(?:[\s*_$)}\]]*[,;](?:\s*(?:and|or|&)\b)?[\s*_$({\[]*(?:\\[a-z]{4,8}\{)?(?:[A-J]|[a-j])(?![\w'’])){1,9}+"
    r"(?:[\s*_$)}\]]*(?:and|or|&)[\s*_$({\[]*[A-Ja-j](?![\w'’]))?+[*_$)}\]\\\"'`]*(?:\s*$|[ \t]*[\n<(]|\.(?:\s|$)|(?<=[)\]]):| (?:because|since)\b)"
)
_FORMULA = re.compile(r" *[=+^<>*/](?!\*)|_\{?\w|\(|'\w| *- *\d|\\[a-z]")
_WRONG = r"(?:wrong|incorrect|false|not\b(?! because\b| [*(\[]*[A-J]\b)|out\b|eliminated|excluded|ruled out|isn't|isn’t|aren't|fails?\b)"
_DENIED = re.compile(
    rf"[)\]*:]*[ \t]*[:–—-]?[ \t]*(?:is|was|are|seems|looks|must be|would be|can be)?[ \t]*(?:also )?{_WRONG}"
    r"|(?:[\s*)\]]*(?:[,/&]|and|or|nor)[\s*(\[]*(?:(?:and|or|nor) [*(\[]*)?[A-J]\b){1,8}+[)\]*]*"  # and B, or C
    rf"[ \t]*(?:are|were|seem|look|must be|would be|can be|can)[ \t]+(?:both |all |also )?(?:be )?{_WRONG}"
)
_REASON = re.compile(r"\s+(?:since|because|as|for|with|which|is|and|or|but|due|given|from|by|that)\b")
_YES_NO = r"(yes|no)(?![A-Za-z0-9])"
_SAID = re.compile(
    rf"{_HEAD}(?:{ANSWER}|\b(?i:verdict|conclusion|decision|judge?ment)\b)(?:[\s*_:：=\"'`$()\\{{}}-]++|[是为]|\b(?i:is|the|final|therefore|thus|clearly|text|boxed)\b)*+(?i:{_YES_NO})(?=\s*(?:$|[^\w\s]|\n)|\s+(?:since|because|as)\b)"
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

    In a box; in `<answer>`; after "answer is", "correct option:" and the like; "B is correct" or "I choose B", where no other letter is said
    to be; "answer B" and "option B"; alone on a line; in `**`, `( )` or `[ ]`; at the start of a line, or anywhere as `B)`, where no
    other letter stands so. None where several are the answer.
    """
    try:
        for letter, is_marked in _candidates(text):
            return Found(letter.upper(), is_marked)
    except _Several:
        pass
    return None


def _candidates(text: str) -> Iterator[tuple[str, bool]]:
    """Letters, the likeliest answer first, with whether a mark says that it is the answer, and all of it."""
    if box := boxes(text):
        listed = find_boxed(text)  # of several boxes all
        for inner in (listed.text if listed else "", box[-1].text):
            if (found := _BOX.match(inner)) and _stands(inner, found.end(), found[1], is_alone=found[1].islower()):
                yield found[1], box[-1].is_whole
                break
    if (
        (tag := find_tag(text, "answer"))
        and (found := _BOX.match(tag.text))
        and _stands(tag.text, found.end(), found[1])
    ):
        yield found[1], True
    mentions = list[re.Match[str]]()
    for found in reversed(list(_ANSWER.finditer(text))):
        if not _says(text, found):
            mentions.append(found)
        elif _stands(text, found.end(), found[found.lastindex or 0]):
            yield found[found.lastindex or 0], found.end() < len(text)
    if closing := _closing(text):
        yield closing, False
    for found in (*mentions, *reversed(list(_WEAK.finditer(text)))):
        letter = found[found.lastindex or 0]
        if _stands(text, found.end(), letter) and not _DENIED.match(text, found.end()):
            yield letter, False
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


def _says(text: str, found: re.Match[str]) -> bool:
    """Whether the letter after "answer" is said to be it: by a colon, a verb, or where "answer" is a heading or all of its line."""
    if found["no"] or _SAYS.search(found["between"]):
        return True
    if "\n" not in found["between"] and not _LINE_END.match(text, found.end()):
        return False
    return not any(c.isalnum() for c in text[text.rfind("\n", 0, found.start()) + 1 : found.start()])


def _closing(text: str) -> str | None:
    """The letter that a sentence says is right, or is chosen; None where several are."""
    letters = set[str]()
    for found in list(_RIGHT.finditer(text))[-MAX_LETTERS:]:
        before = text[max(0, found.start() - 24) : found.start()]
        if _BEGINS.search(before) and (found[1] != "I" or before[-1:] in ("(", "[", "*")):
            letters.add(found[1])
    for found in list(_LAST.finditer(text))[-MAX_LETTERS:]:
        before = text[max(0, found.start() - 40) : found.start()]
        is_end = _LINE_END.match(text, found.end()) is not None
        if (found[1] != "I" or before[-1:] in ("(", "[", "*")) and (
            _CHOSE.search(before) or (is_end and _SO.search(before))
        ):
            letters.add(found[1])
    return letters.pop() if len(letters) == 1 else None


def _stands(text: str, end: int, letter: str, *, is_alone: bool = False) -> bool:
    """Whether a letter that ends at `end` is an option and no word, variable or question.

    Raises:
        _Several: another option follows with "and", "or" or a comma.
    """
    after = text[end : end + 32]
    if (letter.isupper() and _MORE.match(after)) or _LISTED.match(text, end):
        raise _Several
    if after.startswith("?") or _FORMULA.match(after):
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
            return Found(found[1].lower(), box.is_whole)
        break
    if (tag := find_tag(text, "answer")) and (found := _YES_NO_BOX.fullmatch(tag.text)):
        return Found(found[1].lower(), True)
    for pattern in (_SAID, _YES_NO_LINE):
        for found in reversed(list(pattern.finditer(text))):
            return Found(found[1].lower(), pattern is _SAID and found.end(1) < len(text))
    found = _YES_NO_FIRST.match(text)
    return Found(found[1].lower(), False) if found else None
