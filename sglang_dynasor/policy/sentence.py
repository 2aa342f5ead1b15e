"""Where a sentence ends that tells an answer; a point in a name or after an abbreviation is no end."""

from __future__ import annotations

import re

_END = re.compile(r"[.。!](?=[*_$`\"')}\]]*(?:\s|$))|,? (?:since|because|so that|which means|where)\b")
# Words that begin a sentence of their own, so that they are no part of the name before them.
STARTER = (
    r"(?:So|Thus|Therefore|Hence|Then|However|Also|Note|Because|Since|This|That|These|There|It|The|We|You|If|In|As|For|And|But|Or|To|Of|On|At|By|From|With|When|While|Finally|"
    r"Yes|No|Not|Done|Ok|Okay|Indeed|Check|Why|How|Let|Hope|Thanks?|Good|Please|Feel|Here|Happy|Glad|He|She|They|Explanation|Reason|Option|Answer|QED|Cheers|Verified|Verification|Verify|Solution|Proof)"
)
# One more word of a name: nothing follows that would make it the first word of a sentence.
_NAME = rf"(?!{STARTER}\b)[A-Z][\w'’-]+(?=[*_\"')\]]*(?:$|[.,;:!?])| [A-Z]| (?:of|and|for|the|de|van|von) [A-Z])"
# What a letter may label, as in "Option B. Paris".
_LABEL = (
    r"(?:Option|Choice|Answer|Letter|Statement|Response|Vitamin|Hepatitis|Type|Class|Group|Team|Plan|Point|Part|Case|Grade|Figure|Set|Box|Line|Player|Person|Step|City|Town|Car|"
    r"Train|Angle|Side|Vertex|Company|Event|Model|Method|Scenario|Section|Equation|Column|Row|Table|Image|Graph|Diagram|Item|Number|The|And|Or|Is)"
)
# What is no end, from the first character of a word on.
_ABBREVIATION = re.compile(
    r"(?:Dr|Mr|Mrs|Ms|Prof|St|Mt|[Aa]pprox|ca|vs|cf|viz|e\.g|i\.e)\."
    r"|(?:Nos?|Nr|Figs?|Eqs?|Vol|pp)\.(?= ?[\d$\\(])(?! ?\d+ (?:is|are|was|were|has|can)\b)|c\.(?= ?\d{3})"
    r"|[AaPp]\.[Mm]\.(?=\W*$|\s+(?:[a-z(]|[A-Z]{2,4}\b|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day))"
    rf"|(?:Jr|Sr)\.(?=\W*$| {_NAME})"
    rf"|(?:[A-Z]\.){{2,5}}(?=\W*$| [a-z]| ?{_NAME})|(?:[A-Z]\. ){{2,4}}(?={_NAME})"  # U.S., J. K. Rowling
)
_FIRST = re.compile(rf"[K-Z]\.(?= {_NAME})")  # S. Ramanujan: up to J it is an option
_MIDDLE = re.compile(rf"(?!{_LABEL}\b)[A-Z][a-z]{{1,20}} [A-Z]\.(?= {_NAME})")  # George W. Bush


def sentence_end(line: str) -> int | None:
    """Where the first sentence of a line ends, before its full stop or before "because" and the like; None: with the line."""
    known = 0  # up to where points are no ends
    for end in _END.finditer(line):
        at = end.start()
        if line[at] == "." and (at < known or (known := _no_end(line, at))):
            continue
        return at
    return None


def _no_end(line: str, at: int) -> int:
    """Where the abbreviation or the initials end that the point at `at` is of; 0: it ends a sentence."""
    start = line.rfind(" ", 0, at) + 1
    word = start + len(line[start:at]) - len(line[start:at].lstrip("*_(\"'`$["))
    found = _ABBREVIATION.match(line, word)
    if found is None and at - word == 1:
        found = _MIDDLE.match(line, line.rfind(" ", 0, start - 1) + 1) if start else _FIRST.match(line, word)
    return found.end() if found and found.end() > at else 0
