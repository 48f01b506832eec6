"""Metal text as tokens: enough of C++'s lexer for the lint and the rewriting, and no grammar."""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["comment", "directive", "string", "number", "name", "space", "symbol"]

_TOKEN = re.compile(
    r"""
      (?P<comment>   //[^\n]* | /\*.*?\*/ )
    | (?P<directive> ^[ \t]*\#(?:[^\n\\]|\\.|\\\n)* )
    | (?P<string>    "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' )
    | (?P<number>    (?:0[xX][0-9a-fA-F]+ | \d+\.?\d*(?:[eE][+-]?\d+)? | \.\d+(?:[eE][+-]?\d+)?)[A-Za-z_]* )
    | (?P<name>      [A-Za-z_]\w* )
    | (?P<space>     \s+ )
    | (?P<symbol>    :: | -> | \+\+ | -- | <<= | >>= | <= | >= | == | != | && | \|\| | [-+*/%&|^]= | \[\[ | \]\] | . )
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    kind: Kind
    text: str
    line: int

    @property
    def is_code(self) -> bool:
        return self.kind not in ("comment", "space")


def tokenize(text: str) -> list[Token]:
    """All tokens of `text`, blanks and comments included: their texts joined are `text`."""
    tokens, line = [], 1
    for match in _TOKEN.finditer(text):
        kind: Kind = match.lastgroup  # type: ignore[assignment]
        tokens.append(Token(kind, match.group(), line))
        line += match.group().count("\n")
    return tokens
