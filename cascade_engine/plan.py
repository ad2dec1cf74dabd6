"""Cascade plans: which view ranks the candidates at each stage, and how many it keeps.

plan  := stage ("," stage)*
stage := score ":" keep ["@bank"]
score := VIEW | ("sum" | "min" | "max" | "zsum" | "rrf") "(" VIEW ("," VIEW)+ ")"
keep  := INT | DECIMAL "%" | "prev" DECIMAL "%"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Literal, get_args

from cascade_engine.errors import InvalidInput

Fusion = Literal["sum", "min", "max", "zsum", "rrf"]
FUSIONS: tuple[Fusion, ...] = get_args(Fusion)
RRF_OFFSET = 60  # reciprocal rank fusion's constant: Cormack, Clarke, Buettcher, SIGIR 2009

_VIEW = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_COUNT = re.compile(r"[0-9]+")
_LONGEST = 100  # digits of a number
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def _decimal(value: Fraction) -> str:
    """The shortest decimal text of a fraction that has one."""
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    text = str((value * 10**digits).numerator).rjust(digits + 1, "0")
    return text if digits == 0 else f"{text[:-digits]}.{text[-digits:]}"


def _share(value: float | str, name: str) -> Fraction:
    """A number in (0, 1] as the exact decimal it is written as."""
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not (0 < share <= 1 and _is_decimal(share)):
        raise InvalidInput(f"{name}: expected a decimal number in (0, 1], got {value!r}")
    return share


def _is_decimal(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


@dataclass(frozen=True)
class Keep:
    """How many candidates a stage keeps: a count, a share of the bank, or a share of the stage before.

    Args:
        amount: the count, or the percentage in (0, 100] as an exact decimal.
        of: ``"count"``, ``"bank"`` (``50%``) or ``"previous"`` (``prev50%``).
    """

    amount: Fraction
    of: Literal["count", "bank", "previous"]

    def __post_init__(self) -> None:
        """Refuse counts under 1 and shares outside (0, 100]."""
        if self.of == "count" and (self.amount < 1 or self.amount.denominator != 1):
            raise InvalidInput(f"keep: expected a whole count of at least 1, got {self.amount}")
        if self.of != "count" and not (0 < self.amount <= 100 and _is_decimal(self.amount)):
            raise InvalidInput(f"keep: expected a percentage in (0, 100], got {float(self.amount):g}%")

    def resolve(self, bank_size: int, previous: int) -> int:
        """The count, rounded down exactly, for a bank of `bank_size` keys after a stage that kept `previous`."""
        if self.of == "count":
            return self.amount.numerator
        base = bank_size if self.of == "bank" else previous
        return self.amount.numerator * base // (self.amount.denominator * 100)

    def __str__(self) -> str:
        """Plan text."""
        if self.of == "count":
            return str(int(self.amount))
        return f"{'prev' if self.of == 'previous' else ''}{_decimal(self.amount)}%"


@dataclass(frozen=True)
class Score:
    """What a stage ranks by: one view's similarity, or a fusion of several."""

    views: tuple[str, ...]
    fusion: Fusion | None = None

    def __post_init__(self) -> None:
        """Refuse a fusion of fewer than two views, a view named twice, and words that are no view names."""
        if self.fusion is None and len(self.views) != 1:
            raise InvalidInput(f"score: expected one view, got {len(self.views)}")
        if self.fusion is not None and (self.fusion not in FUSIONS or len(self.views) < 2):
            raise InvalidInput(f"score: expected {'|'.join(FUSIONS)} of two or more views, got {self}")
        if len(set(self.views)) != len(self.views):
            raise InvalidInput(f"score: expected each view once, got {self}")
        for view in self.views:
            if not _VIEW.fullmatch(view):
                raise InvalidInput(f"score: expected a view name (letters, digits, '_', '-', '.'), got {view!r}")

    def __str__(self) -> str:
        """Plan text."""
        return self.views[0] if self.fusion is None else f"{self.fusion}({','.join(self.views)})"


@dataclass(frozen=True)
class Stage:
    """Rank the candidates by `score` and keep the best.

    Args:
        score: what to rank by.
        keep: how many to keep.
        over_bank: ``@bank``: rank all eligible keys and keep those candidates that are among its best.
    """

    score: Score
    keep: Keep
    over_bank: bool = False

    def __str__(self) -> str:
        """Plan text."""
        return f"{self.score}:{self.keep}{'@bank' if self.over_bank else ''}"


PRESETS = ("coclr", "cpr", "cpr-paper", "patent", "mvcgc", "cma", "sum", "zsum", "rrf", "nnclr")


@dataclass(frozen=True)
class CascadePlan:
    """The stages of a cascade, in order; the last stage's survivors, best first, are the positives.

    Source: Wu et al., CVPRW 2022 (cascade positive retrieval), section 3; NEC, US 2023/0086023 A1, block 500.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Refuse an empty plan and absolute counts that grow from one stage to the next."""
        if not self.stages:
            raise InvalidInput("plan: expected at least one stage, got none")
        for number, (before, after) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=2):
            if before.keep.of == after.keep.of == "count" and after.keep.amount > before.keep.amount:
                raise InvalidInput(
                    f"plan: expected stage {number} ({after}) to keep at most the {before.keep} of the stage before"
                )

    @classmethod
    def parse(cls, text: str) -> CascadePlan:
        """The plan that `text` describes, such as ``flow:50%,rgb:25%,flow:5``.

        Raises:
            InvalidInput: with the position of the first character that does not fit, and what was expected there.
        """
        return cls(tuple(_Parser(text).stages()))

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        oracle: str,
        trainee: str,
        k: int = 5,
        stages: int = 7,
        ratio: float | str = "0.5",
        m: int | None = None,
    ) -> CascadePlan:
        """A named plan of the literature for one oracle view and one trainee view.

        Args:
            name: ``coclr``, ``cpr``, ``cpr-paper``, ``patent``, ``mvcgc``, ``cma``, ``sum``, ``zsum``, ``rrf``
                or ``nnclr``.
            oracle: the frozen view that helps to mine.
            trainee: the view being trained.
            k: positives per query (``patent`` fixes 3, ``nnclr`` 1; ``mvcgc`` with `m` keeps all that both share).
            stages: number of stages (``cpr``, ``cpr-paper``). The views alternate from the oracle and the last stage is
                the oracle's, so an even number makes the last two both the oracle's: it alone then ranks at the end.
            ratio: share kept by each stage (``cpr``, ``cpr-paper``), in (0, 1].
            m: neighbours per view before the intersection (``mvcgc``); `k` where not given.

        Raises:
            InvalidInput: unknown name, or a count or ratio out of range.
        """
        o, t = oracle, trainee
        if k < 1 or stages < 1 or (m is not None and m < 1):
            raise InvalidInput(f"preset: expected k, stages and m of at least 1, got k={k}, stages={stages}, m={m}")
        share = _share(ratio, "ratio")
        if name in ("cpr", "cpr-paper"):
            keeps = [
                f"{_decimal(share ** (s + 1) * 100)}%" if name == "cpr" else f"prev{_decimal(share * 100)}%"
                for s in range(stages - 1)
            ]
            views = [(o, t)[s % 2] for s in range(stages - 1)]
            return cls.parse(",".join([*(f"{v}:{keep}" for v, keep in zip(views, keeps, strict=True)), f"{o}:{k}"]))
        texts = {
            "coclr": f"{o}:{k}",
            "patent": f"{t}:1000,{o}:100,{t}:3",
            "mvcgc": f"{o}:{m or k},{t}:{m or k}@bank",
            "cma": f"min({o},{t}):{k}",
            "sum": f"sum({o},{t}):{k}",
            "zsum": f"zsum({o},{t}):{k}",
            "rrf": f"rrf({o},{t}):{k}",
            "nnclr": f"{t}:1",
        }
        if name not in texts:
            raise InvalidInput(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls.parse(texts[name])

    @cached_property
    def views(self) -> tuple[str, ...]:
        """The views the plan needs, in order of first use."""
        return tuple(dict.fromkeys(view for stage in self.stages for view in stage.score.views))

    def counts(self, bank_size: int) -> tuple[int, ...]:
        """What each stage keeps in a bank of `bank_size` keys (excluded ones included in the size).

        The last count k is at least 1 and at most `bank_size`; every earlier one is raised to at least k.
        """
        return _counts(self, bank_size)

    def explain(self, bank_size: int) -> str:
        """A table of the stages for a bank of `bank_size` keys: score, text, candidates ranked, kept, dot products.

        The cost is the number of similarities per query that the definition asks for: views not yet scored, times the
        keys that the stage ranks.
        """
        rows = [("stage", "score", "keep", "ranks", "keeps", "similarities/query")]
        alive, scored = bank_size, dict[str, int]()
        for number, (stage, count) in enumerate(zip(self.stages, self.counts(bank_size), strict=True), start=1):
            ranked = bank_size if stage.over_bank else alive
            cost = sum(max(0, ranked - scored.get(view, 0)) for view in stage.score.views)
            scored.update({view: max(ranked, scored.get(view, 0)) for view in stage.score.views})
            alive = min(alive, count)
            keep = f"{stage.keep}{'@bank' if stage.over_bank else ''}"
            rows.append((str(number), str(stage.score), keep, str(ranked), str(alive), str(cost)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        left = (0, 1, 2)
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )

    def __str__(self) -> str:
        """Canonical plan text, which parses back to an equal plan."""
        return ",".join(map(str, self.stages))

    def __hash__(self) -> int:
        """Of the stages, worked out once: what a plan comes to is looked up with every batch."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.stages)

    def __reduce__(self) -> tuple[type[CascadePlan], tuple[tuple[Stage, ...]]]:
        """As its stages alone: another process hashes text differently."""
        return CascadePlan, (self.stages,)


@lru_cache(maxsize=256)
def _counts(plan: CascadePlan, bank_size: int) -> tuple[int, ...]:
    raw: list[int] = []
    for stage in plan.stages:
        raw.append(stage.keep.resolve(bank_size, raw[-1] if raw else bank_size))
    k = min(max(raw[-1], 1), bank_size)
    return (*(max(count, k) for count in raw[:-1]), k)


class _Parser:
    """Recursive descent over the plan grammar; white space between tokens is skipped."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def fail(self, expected: str, at: int | None = None) -> InvalidInput:
        at = self.at if at is None else at
        got = repr(self.text[at]) if at < len(self.text) else "the end"
        return InvalidInput(f"plan: expected {expected} at position {at + 1}, got {got} in {self.text!r}")

    def skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def accept(self, word: str) -> bool:
        self.skip_space()
        if not self.text.startswith(word, self.at):
            return False
        self.at += len(word)
        return True

    def token(self, pattern: re.Pattern[str], expected: str) -> str:
        self.skip_space()
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self.fail(expected)
        self.at = match.end()
        return match.group()

    def stages(self) -> Sequence[Stage]:
        found = [self.stage()]
        while self.accept(","):
            found.append(self.stage())
        self.skip_space()
        if self.at < len(self.text):
            raise self.fail("',' or the end")
        return found

    def stage(self) -> Stage:
        score = self.score()
        if not self.accept(":"):
            raise self.fail("':'")
        keep = self.keep()
        over_bank = self.accept("@")
        if over_bank and not self.accept("bank"):
            raise self.fail("'bank'")
        return Stage(score, keep, over_bank)

    def score(self) -> Score:
        self.skip_space()
        start = self.at
        word = self.token(_VIEW, "a view or one of " + ", ".join(FUSIONS))
        if not self.accept("("):
            return Score((word,))
        if word not in FUSIONS:
            raise self.fail("one of " + ", ".join(FUSIONS), start)
        views = [self.token(_VIEW, "a view")]
        while not self.accept(")"):
            if not self.accept(","):
                raise self.fail("',' or ')'")
            self.skip_space()
            at, view = self.at, self.token(_VIEW, "a view")
            if view in views:
                raise self.fail("a view not named yet", at)
            views.append(view)
        if len(views) < 2:
            raise self.fail("a second view", self.at - 1)
        return Score(tuple(views), next(each for each in FUSIONS if each == word))

    def keep(self) -> Keep:
        self.skip_space()
        previous = self.accept("prev")
        self.skip_space()
        start = self.at
        number = self.token(_NUMBER, "a percentage" if previous else "a count, a percentage or 'prev'")
        share = self.accept("%")
        if not share and (previous or not _COUNT.fullmatch(number)):
            raise self.fail("'%'")
        if len(number) > _LONGEST:
            raise self.fail(f"a number of at most {_LONGEST} digits", start)
        amount = Fraction(number)
        if share and not 0 < amount <= 100:
            raise self.fail("a percentage in (0, 100]", start)
        if not share and amount < 1:
            raise self.fail("a count of at least 1", start)
        return Keep(amount, "previous" if previous else "bank" if share else "count")
