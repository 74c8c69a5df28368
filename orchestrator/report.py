"""Figures and tables next to the paper's numbers, as Markdown and PNG, computed from the rows each time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from math import hypot, isfinite
from pathlib import Path
from statistics import mean

import pyarrow.compute as pc
from scipy.stats import kendalltau

from dt.files import write_atomically
from orchestrator.answers import ABOUT, Answer, Cell, among, answers, shown_labels
from orchestrator.estimates import LEVEL, Sample, reach
from orchestrator.experiment import Claim, Experiment, Figure, Label, Measure, Setting, Table
from orchestrator.figures import draw, spell
from orchestrator.paper import ALL_TASKS, NUMBERS, PaperNumber
from orchestrator.recipes import closure
from orchestrator.store import Store
from orchestrator.tables import Tables

NAME = "README.md"
APART = "≠"
_KINDS = ("recording", "pretrain", "train", "train-together", "fine-tune", "fisher", "evaluate")  # of runs


def write_report(experiments: Sequence[Experiment], setting: Setting, store: Store, folder: Path, command: str) -> Path:
    """Render the experiments at a setting into `folder` and return the Markdown's path.

    command: the options that repeat this setting, for the sentence that says what to run.
    """
    tables = store.open_tables()
    found = answers(experiments, setting, tables)
    for each in found:
        if isinstance(each.experiment.show, Figure) and each.begun:
            draw(each, each.experiment.show, folder / f"{each.experiment.name}.png")
    sections = [_header(found, setting, tables), _summary(found), *(_section(each, command) for each in found)]
    path = folder / NAME
    write_atomically(path, "\n\n".join(sections).encode() + b"\n")
    return path


# --- text -----------------------------------------------------------------------


def number(sample: Sample | None, measure: Measure, error: float | None = None) -> str:
    """A value with its standard error over runs, if given, and its interval: `0.98 ± 0.02 [0.95, 1.01]`.

    A dash where there is none.
    """
    if sample is None:
        return "–"
    low, high = (plain(each, measure) for each in sample.interval)
    return f"{with_error(sample.value, error, measure)} [{low}, {high}]"


def measured(cell: Cell, measure: Measure) -> str:
    """What a cell holds of a measure, as `number` writes it."""
    return number(cell.estimates.get(measure), measure, cell.errors.get(measure))


def with_error(value: float, error: float | None, measure: Measure) -> str:
    """`0.98 ± 0.02`, or the value alone."""
    return plain(value, measure) if error is None else f"{plain(value, measure)} ± {plain(error, measure)}"


def plain(value: float, measure: Measure) -> str:
    """A number alone, in the digits of its measure."""
    return f"{value:.{_digits(measure)}f}"


def _digits(measure: Measure) -> int:
    return {"score": 1, "return": 0}.get(measure, 2)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _header(found: Sequence[Answer], setting: Setting, tables: Tables) -> str:
    profile = setting.profile
    optimisation = profile.optimisation
    architecture = profile.architecture
    return f"""# Results: profile `{profile.name}`

Written by `mergedt report` from the rows in the tables. Nothing is typed by hand but the paper's numbers, what was
expected, what differs, and the likely reasons where ours disagree, which are guesses.

* **Data:** {setting.data.describe(profile)}
* **Single-task policies:** {architecture.layers} layers, {architecture.heads} head(s), {architecture.width} wide,
  `{architecture.activation}`; {optimisation.steps:,} steps of {optimisation.batch_size} windows at learning
  rate {optimisation.learning_rate:g} ({optimisation.schedule}; dropout {optimisation.dropout:g}; products in
  {optimisation.precision}). Always the last checkpoint.
* **Evaluation:** {profile.evaluation_episodes} episodes each, from the same starts for all policies of a task;
  acting in {profile.evaluation_precision}.
* **Score:** 100·(R − random)/(expert − random), normalised with D4RL's reference returns, in Gymnasium's v5
  environments (the paper: v3 environments, D4RL's data). **Retention:** score / score of that policy before merging.
* **Intervals:** in brackets, {LEVEL:.0%}, stratified bootstrap over episodes. They cover the noise of evaluating the
  trained policies at hand, not that of training again. Of that, ± tells: the standard error of the mean over training
  seeds, or, where there is one, over instances: what is fine-tuned or trained together again with another seed.
* **Verdicts:** a claim agrees when all that its number may be (its interval, and two standard errors either way where
  there are several runs) lies on the claimed side of the bound, disagrees when all of it lies on the other, and is
  inconclusive else; ≈ agrees within {ABOUT:g}. Bounds such as 0.95, 0.5 and 0.1 are our readings of the paper's words.
{_hardware(found, tables)}"""


def _hardware(found: Sequence[Answer], tables: Tables) -> str:
    points = [point for each in found for point in each.points if point.evaluation.id in each.rows]
    evaluated = {point.evaluation.id: point.evaluation for point in points}
    rows = tables.some("runs", where=among("recipe", closure(iter(evaluated.values()))))
    if not rows.num_rows:
        return "* **Ran on:** no rows yet."
    versions = ", ".join(
        f"{name} {' / '.join(sorted(filter(None, set(rows[name].to_pylist()))))}"
        for name in ("mergedt", "torch", "ray", "gymnasium", "mujoco")
    )
    machines = Counter(
        f"{row['cpus']} cores ({row['processor'] or 'of which kind was not noted'}), {row['gpu'] or 'no GPU'}"
        for row in rows.to_pylist()
    )
    where = "; ".join(f"{machine}: {count} runs" for machine, count in machines.most_common())
    time = {
        kind: (pc.sum(part["seconds"]).as_py() or 0.0, part.num_rows)
        for kind in _KINDS
        if (part := rows.filter(pc.equal(rows["kind"], kind))).num_rows
    }
    spent = ", ".join(f"{count} × {kind} {seconds / 60:.0f} min" for kind, (seconds, count) in time.items())
    return f"* **Ran on:** {where}. {versions}. Wall time added up: {spent}."


def _summary(found: Sequence[Answer]) -> str:
    rows = [
        (
            f"[{each.experiment.name}](#{_anchor(each.experiment)})",
            each.experiment.paper or "our own",
            each.experiment.question,
            f"{len(each.asked) - len(each.missing)} of {len(each.asked)}",
            _tally(each),
        )
        for each in found
    ]
    return markdown_table(("experiment", "paper", "question", "evaluations there", "agreement"), rows)


def _tally(each: Answer) -> str:
    judged = [found.verdict for claim in _claims(each) if (found := each.judge(claim))]
    parts = [f"{judged.count(v)} {v}" for v in ("agrees", "disagrees", "inconclusive") if v in judged]
    return ", ".join(parts) or "–"


def _claims(each: Answer, *, ours: bool = False) -> list[Claim]:
    """The paper's claims, or our own beside them; all are, of an experiment that is not the paper's."""
    return [claim for claim in each.experiment.claims if (claim.ours and bool(each.experiment.paper)) == ours]


def _anchor(experiment: Experiment) -> str:
    kept = "".join(c for c in _heading(experiment).lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


def _heading(experiment: Experiment) -> str:
    return f"{experiment.paper}: {experiment.title}" if experiment.paper else experiment.title


def _section(each: Answer, command: str) -> str:
    experiment = each.experiment
    parts = [f"## {_heading(experiment)}", experiment.question]
    if each.missing:
        run = f"mergedt run {experiment.name} {command}".rstrip()
        parts.append(f"**{len(each.missing)} of {len(each.asked)} evaluations are missing:** `{run}`")
        if not each.begun:
            return "\n\n".join(parts)
    if isinstance(experiment.show, Figure):
        parts.append(f"![{experiment.title}]({experiment.name}.png)")
        parts.append(f"Bars: the {LEVEL:.0%} intervals over episodes; of training again, ± in the numbers below tells.")
        parts.append(f"<details><summary>The numbers</summary>\n\n{_long_table(each)}\n\n</details>")
    else:
        if experiment.show.column is not None:
            parts.append(_wide_table(each, experiment.show))
            parts.append(f"<details><summary>With retention and sizes</summary>\n\n{_long_table(each)}\n\n</details>")
        else:
            parts.append(_long_table(each))
    if claims := _claims(each):
        title = "Agreement with the paper" if experiment.paper else "Expected"
        parts.append(f"### {title}\n\n{_agreement(each, claims)}{_order(each)}")
    if claims := _claims(each, ours=True):
        parts.append(f"### Beyond the paper\n\n{_agreement(each, claims)}")
    if experiment.differences:
        parts.append("What differs from the paper:\n\n" + "\n".join(f"* {text}" for text in experiment.differences))
    return "\n\n".join(parts)


def _long_table(each: Answer) -> str:
    """One line a cell."""
    labels = shown_labels(each.experiment)
    measures: tuple[Measure, ...] = ("score", "retention")
    if each.experiment.show.value == "of_data":
        measures = ("return", "score", "of_data")
    shown = each.experiment.show.value
    papers = [paper_value(each.experiment, cell) for cell in each.cells]
    with_paper = any(value is not None for value in papers)
    with_size = any(cell.size is not None and cell.size != 1 for cell in each.cells)
    paper_sizes = [paper_size(each.experiment, cell) for cell in each.cells]
    with_paper_size = any(paper_sizes)
    header = [*labels, *(m.replace("of_data", "of the data's mean return") for m in measures)]
    header += [f"paper's {shown}"] * with_paper + ["transformer size", "parameters in all"] * with_size
    header += ["paper's transformer size"] * with_paper_size + ["episodes", "runs"]
    rows = [
        [
            *(spell(name, cell.labels[name]) for name in labels),
            *(measured(cell, measure) for measure in measures),
            *([plain(value, shown) if value is not None else "–"] * with_paper),
            *([f"{cell.size:.2%}" if cell.size else "–"] * with_size),
            *([f"{cell.parameters:,.0f}" if cell.parameters else "–"] * with_size),
            *([f"{size:.2%}" if size else "–"] * with_paper_size),
            str(cell.episodes),
            str(cell.runs),
        ]
        for cell, value, size in zip(each.cells, papers, paper_sizes, strict=True)
    ]
    return markdown_table(header, rows)


def _wide_table(each: Answer, show: Table) -> str:
    """Laid out like the paper's: ours with its interval, the paper's in bold beneath."""
    assert show.column is not None
    columns = list(dict.fromkeys(cell.labels[show.column] for cell in each.cells))
    # By the labels that are not averaged over, so that an average follows what it is of.
    blocks: dict[tuple[Label, ...], dict[tuple[str, ...], dict[Label, str]]] = {}
    compared: list[bool] = []  # with the paper's number: whether that lies outside our interval
    for cell in each.cells:
        paper, outside = paper_value(each.experiment, cell), apart(each.experiment, cell)
        ours = measured(cell, show.value)
        if paper is not None:
            printed = with_error(paper, paper_error(each.experiment, cell), show.value)
            ours += f"<br>**paper {printed}**{' ' + APART if outside else ''}"
        if outside is not None and not cell.averaged:
            compared.append(outside)
        block = blocks.setdefault(tuple(cell.labels[name] for name in show.rows if name != show.average), {})
        line = block.setdefault(tuple(spell(name, cell.labels[name]) for name in show.rows), {})
        line[cell.labels[show.column]] = ours
    lines = chain.from_iterable(block.items() for block in blocks.values())
    header = [*show.rows, *(spell(show.column, column) for column in columns)]
    written = markdown_table(header, ([*key, *(line.get(column, "–") for column in columns)] for key, line in lines))
    if not compared:
        return written
    why = f" The likely reason: {each.experiment.likely}" if any(compared) and each.experiment.likely else ""
    many = f"{sum(compared)} of {len(compared)} cells"
    apart_by = "outside our interval, and further than two standard errors where ± tells them"
    return f"{written}\n\n{APART}: the paper's number lies {apart_by} ({many}).{why}"


def _agreement(each: Answer, claims: Sequence[Claim]) -> str:
    rows: list[tuple[str, str, str, str, str]] = []
    reasons: dict[str, list[str]] = {}
    for claim in claims:
        found = each.judge(claim)
        said = ("–", "–", "cannot be computed")
        if found:
            said = (number(found.sample, claim.value, found.error), str(found.runs), f"**{found.verdict}**")
        rows.append((claim.statement, expected(claim), *said))
        if found and found.verdict == "disagrees" and (likely := claim.likely or each.experiment.likely):
            reasons.setdefault(likely, []).append(claim.statement)
    why = "".join(f"\n* {'; '.join(statements)}: {reason}" for reason, statements in reasons.items())
    why = f"\n\nWhere ours disagree, the likely reason:\n{why}" if why else ""
    return markdown_table(("claim", "read as", "observed", "runs", "verdict"), rows) + why


def _order(each: Answer) -> str:
    """A sentence, where there is an order to compare."""
    order = ordering(each.experiment, each.cells)
    if order is None:
        return ""
    groups: dict[tuple[Label | None, ...], list[Cell]] = {}
    for cell in each.cells:
        groups.setdefault((cell.labels.get("quality"), cell.labels.get("task")), []).append(cell)
    within = [found[0] for cells in groups.values() if (found := ordering(each.experiment, cells))]
    inside = f"; within a robot and dataset **{mean(within):.2f}** on average" if within else ""
    return f"\n\nKendall's τ between the paper's order and ours: **{order[0]:.2f}** over all {order[1]} cells{inside}."


def expected(claim: Claim) -> str:
    """How a claim was turned into a number.

    >>> expected(Claim(statement="", terms=((1, {}),), expected="at least", bound=0.95))
    'retention ≥ 0.95'
    """
    quantity = claim.value.replace("of_data", "share of the data's mean return")
    if len(claim.terms) > 1:
        quantity = f"difference in {quantity}"
    sign = {"at least": "≥", "at most": "≤", "about": "≈"}[claim.expected]
    return f"{quantity} {sign} {claim.bound:g}"


def paper_value(experiment: Experiment, cell: Cell) -> float | None:
    """What the paper prints for a cell, in the measure that the experiment shows; of an average, that of its cells."""
    printed = _printed(experiment, cell, experiment.show.value)
    return mean(number.value for number in printed) if printed else None


def paper_error(experiment: Experiment, cell: Cell) -> float | None:
    """The standard error that the paper prints with it."""
    errors = [number.standard_error for number in _printed(experiment, cell, experiment.show.value)]
    return errors[0] if len(errors) == 1 else None


def paper_size(experiment: Experiment, cell: Cell) -> float | None:
    """The size that the paper prints for a cell's configuration."""
    printed = _printed(experiment, cell, "trunk size")
    return printed[0].value if printed else None


def _printed(experiment: Experiment, cell: Cell, metric: str) -> list[PaperNumber]:
    """The paper's numbers of a cell: several where it is an average."""
    values = {str(value) for value in cell.labels.values()}

    def fits(number: PaperNumber) -> bool:
        place = {number.configuration}
        if number.task != ALL_TASKS and not cell.averaged:
            place.add(number.task)
        if number.dataset is not None and "quality" in cell.labels:
            place.add(number.dataset)
        return (number.experiment, number.metric) == (experiment.name, metric) and place <= values

    return [number for number in NUMBERS if fits(number)]


def apart(experiment: Experiment, cell: Cell) -> bool | None:
    """Whether the paper's number lies outside what ours may be, by the interval over episodes and two standard errors
    of the difference, as far as they are known, and by rounding; None where one of them is missing."""
    measure = experiment.show.value
    paper, ours = paper_value(experiment, cell), cell.estimates.get(measure)
    if paper is None or ours is None:
        return None
    error = hypot(cell.errors.get(measure, 0.0), paper_error(experiment, cell) or 0.0)
    low, high = reach(ours, error)
    rounding = 0.5 * 10.0 ** -_digits(measure)
    return not low - rounding <= paper <= high + rounding


def ordering(experiment: Experiment, cells: Iterable[Cell]) -> tuple[float, int] | None:
    """Kendall's τ between the paper's and our numbers over all cells that have both, and how many those are.

    1: the same order; 0: unrelated; −1: reversed. None where there is no order: below two cells, or of equal numbers.
    """
    pairs = [
        (paper, ours.value)
        for cell in cells
        if not cell.averaged
        and (paper := paper_value(experiment, cell)) is not None
        and (ours := cell.estimates.get(experiment.show.value)) is not None
    ]
    if len(pairs) < 2:
        return None
    papers, ours_all = zip(*pairs, strict=True)
    tau = float(kendalltau(papers, ours_all).statistic)
    return (tau, len(pairs)) if isfinite(tau) else None
