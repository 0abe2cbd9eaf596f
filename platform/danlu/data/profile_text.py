"""A profile for the terminal, and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from danlu.data.cells import left, widest
from danlu.data.page import bars, heading, page, table, tiles
from danlu.data.profile import Found, Profile, SplitProfile, Spread

MAX_LABELS = 30


def _figures(split: SplitProfile, profile: Profile) -> Iterator[tuple[str, str]]:
    yield "rows", f"{split.rows:,}"
    for name, found in _findings(split, profile):
        yield name, f"{found.rows:,}"
    yield "characters p50 / p90", f"{split.characters.p50:,} / {split.characters.p90:,}"
    yield "characters p99 / max", f"{split.characters.p99:,} / {split.characters.max:,}"
    if split.tokens is not None:
        yield "tokens p50 / p90", f"{split.tokens.p50:,} / {split.tokens.p90:,}"
        yield "tokens p99 / max", f"{split.tokens.p99:,} / {split.tokens.max:,}"
    if split.truncated is not None:
        yield f"longer than {profile.max_length} tokens", f"{split.truncated:.1%}"
    for label, count in list(split.labels.items())[:MAX_LABELS]:
        yield f"label {label}", f"{count:,}"
    if len(split.labels) > MAX_LABELS:
        yield "other labels", f"{len(split.labels) - MAX_LABELS}"
    for language, count in split.languages.items():
        yield f"language {language}", f"{count:,}"


def _findings(split: SplitProfile, profile: Profile) -> Iterator[tuple[str, Found]]:
    yield "broken rows", split.broken
    yield "without text", split.empty
    if "label" in split.roles:
        yield "without label", split.unlabelled
    yield "exact duplicates", split.exact
    if "label" in split.roles:
        yield "  with another label", split.conflicting
    if split.near is not None:
        yield f"near duplicates ({profile.near_threshold:g})", split.near
    if split.in_train is not None:
        yield "also in train", split.in_train
    for kind, found in split.personal.items():
        yield f"suspected {kind}", found


def text(profile: Profile) -> str:
    """For the terminal."""
    lines = []
    for name, split in profile.splits.items():
        files = split.sources[0] if len(split.sources) == 1 else f"{len(split.sources)} files, {split.sources[0]} the first"
        roles = ", ".join(f"{role} = {column!r}" for role, column in split.roles.items()) or "every text of a row counts"
        lines += [f"  {name:<6} {files}", f"         read as {split.format}; {roles}"]
        for column, kept in split.columns.items():
            types = ", ".join(f"{kind} {count:,}" for kind, count in kept.types.items())
            missing = f", missing {kept.missing:,}" if kept.missing else ""
            distinct = "over 1,000 values" if kept.distinct is None else f"{kept.distinct:,} values"
            lines.append(f"         {column!r}: {types}{missing}; {distinct}")
    lines.append("")
    figures = {name: dict(_figures(split, profile)) for name, split in profile.splits.items()}
    rows = dict.fromkeys(row for cells in figures.values() for row in cells)
    width = widest(rows)
    lines.append(f"  {'':<{width}} " + " ".join(f"{name:>14}" for name in figures))
    lines += [f"  {left(row, width)} " + " ".join(f"{cells.get(row, ''):>14}" for cells in figures.values()) for row in rows]
    for name, split in profile.splits.items():
        for told, found in _findings(split, profile):
            if found.rows and told != "  with another label":
                shown = ", ".join(line + (f" ({said})" if told in ("broken rows",) else "") for line, said in found.examples[:5])
                lines.append(f"  {name}: {told} in line{'s' if found.rows > 1 else ''} {shown}{' ...' if found.rows > 5 else ''}")
    if profile.example is not None and profile.example.text is not None:
        lines += ["", "  the first row as the model reads it; it learns what stands between ⟦ and ⟧:", ""]
        lines += [f"    {line}" for line in profile.example.text.split("\n")]
    elif profile.example is not None:
        lines += ["", "  the first row as the model reads it", "    " + " ".join(profile.example.tokens[:60])]
        if len(profile.example.tokens) > 60:
            lines[-1] += f" ... ({len(profile.example.tokens)} tokens)"
        lines.append(f"    target: {profile.example.target}")
    return "\n".join(lines + [f"  warning: {warning}" for warning in profile.warnings])


def html(profile: Profile, title: str) -> str:
    """One page that needs nothing else."""
    first = next(iter(profile.splits.values()))
    parts = [tiles([(f"{split.rows:,}", f"rows in {name}") for name, split in profile.splits.items()])]
    if profile.warnings:
        parts += [heading("What to look at"), table(("warning",), [(warning,) for warning in profile.warnings], text=(0,))]
    for name, split in profile.splits.items():
        parts += _split(name, split, profile)
    if profile.example is not None:
        ids = " ".join(map(str, profile.example.input_ids))
        parts += [heading("The first row as the model reads it")]
        rows = [("tokens", " ".join(profile.example.tokens)), ("ids", ids), ("target", profile.example.target)]
        if profile.example.text is not None:
            rows[2] = ("learned", profile.example.text)
        parts.append(table(("what", "value"), rows, text=(1,)))
    return page(title, f"Danlu data report · read as {first.format}", parts)


def _split(name: str, split: SplitProfile, profile: Profile) -> Iterator[str]:
    yield heading(f"{name}: columns of {', '.join(split.sources)}")
    names = {column: role for role, column in split.roles.items()}
    rows = []
    for column, found in split.columns.items():
        types = ", ".join(f"{kind} {count:,}" for kind, count in found.types.items())
        distinct = "over 1,000" if found.distinct is None else f"{found.distinct:,}"
        rows.append((column, names.get(column, ""), types, f"{found.missing:,}", distinct, *_spread(found.characters)))
    yield table(("column", "taken for", "types", "missing", "values", "characters p50", "p90", "p99", "max"), rows)
    yield heading(f"{name}: lengths")
    lengths: list[tuple[str, ...]] = [("characters", *_spread(split.characters))]
    if split.tokens is not None:
        lengths.append(("tokens", *_spread(split.tokens)))
    yield table(("of a row", "p50", "p90", "p99", "max"), lengths)
    if split.truncated is not None:
        yield f"<p>{split.truncated:.1%} of the rows are longer than {profile.max_length} tokens.</p>"
    for told, counts in (("labels", split.labels), ("languages", split.languages)):
        if counts:
            yield heading(f"{name}: {told}")
            yield bars([(label, float(count)) for label, count in list(counts.items())[:100]])
    yield heading(f"{name}: findings")
    findings = [
        (told.strip(), f"{found.rows:,}", "; ".join(f"{line}{f' ({said})' if said else ''}" for line, said in found.examples))
        for told, found in _findings(split, profile)
    ]
    yield table(("what", "rows", "lines"), findings, text=(2,))


def _spread(found: Spread | None) -> tuple[str, ...]:
    show: Callable[[int], str] = "{:,}".format
    return ("", "", "", "") if found is None else (show(found.p50), show(found.p90), show(found.p99), show(found.max))
