"""The page of a sweep, while it runs and at its end, and its lines for the terminal."""

import ast
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpm_jax.common import report
from cpm_jax.common.config import config_from_dict
from cpm_jax.common.figures import Series, bar_figure, human_seconds, line_figure, parallel_figure
from cpm_jax.common.report import Details, Figure, Headline, Page, Section, Table, Text
from cpm_jax.common.training_report import footer
from cpm_jax.scaling import study as studies
from cpm_jax.scaling import trials as results
from cpm_jax.scaling.extra import import_extra
from cpm_jax.scaling.runs import Run, merge_runs
from cpm_jax.scaling.trials import Setting, Trial
from experiments import sweep_trials

if TYPE_CHECKING:
    from experiments.sweep import SweepConfig

REPORT_FILE, SUMMARY_FILE = "report.html", "summary.json"
_MOST_CURVES = 6


class View:
    """What can be seen of a sweep in its database."""

    def __init__(self, config: "SweepConfig", base: sweep_trials.Base, study: Any, full_flops: float):
        self._config, self._base, self._study = config, base, study
        self._full_flops = full_flops
        self._resolved: dict[str, sweep_trials.Resolved] = {}
        self._frozen: list[Any] = []
        self.trials: list[Trial] = []

    def refresh(self) -> bool:
        """Reads everything again; whether no trial is left."""
        self._frozen = self._study.get_trials(deepcopy=False)
        self.trials = [self._read(frozen) for frozen in self._frozen]
        return studies.is_over(self._study, self._config.study, self._base.space, self._frozen)

    def _read(self, frozen: Any) -> Trial:
        state = import_extra("optuna").trial.TrialState
        about = frozen.user_attrs
        id = about.get(studies.ID, "")
        waiting = frozen.state == state.WAITING
        if waiting or (not id and about.get(studies.STATUS) != "failed"):
            return Trial(frozen.number, "", frozen.params, {}, "waiting" if waiting else "retried")
        if not id:  # its values do not go together
            bindings, error = ast.literal_eval(about[studies.BINDINGS]), about.get(studies.ERROR, "")
            return Trial(frozen.number, f"none {frozen.number}", frozen.params, bindings, "failed", error=error)
        if id not in self._resolved:
            self._resolved[id] = sweep_trials.resolve(self._base, ast.literal_eval(about[studies.BINDINGS]))
        resolved = self._resolved[id]
        curve = sorted(frozen.intermediate_values.items())
        progress = {"tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0} | about.get(studies.PROGRESS, {})
        status = about.get(studies.STATUS, "running")
        if studies.DUPLICATE_OF in about:
            status = "duplicate"
        elif frozen.state == state.FAIL and status not in ("failed", "diverged"):
            status = "retried"
        return Trial(
            number=frozen.number,
            id=id,
            choices=frozen.params,
            bindings=resolved.bindings,
            status=status,
            loss=frozen.value if status == "done" else curve[-1][1] if curve else None,
            tokens=resolved.tokens if status == "done" else progress["tokens"],
            planned_tokens=resolved.tokens,
            flops=float(progress["tokens"] * resolved.flops_per_token),
            planned_flops=float(resolved.tokens * resolved.flops_per_token),
            cpu_seconds=progress["cpu_seconds"],
            seconds=progress["seconds"],
            curve=curve,
            error=about.get(studies.ERROR, ""),
            log=about.get(studies.LOG, ""),
        )

    def runs(self) -> list[Run]:
        """The lines of runs.jsonl: of each training that has ended."""
        lines = [frozen.user_attrs[studies.RUN] for frozen in self._frozen if studies.RUN in frozen.user_attrs]
        return merge_runs([config_from_dict(Run, line) for line in lines])

    # ------------------------------------------------------------------------------------------ conclusions

    @property
    def _settings(self) -> list[Setting]:
        return results.settings(self.trials, group_by=self._config.group_by)

    def _bill(self) -> results.Bill:
        bound = [f"{name}={value!r}" for name, value in self._config.full_size_bindings.items()]
        named = ", ".join([*self._config.full_size_gin_files, *bound])
        return results.bill(self.trials, full_flops=self._full_flops, full_size=named)

    def counts(self) -> dict[str, int]:
        """How many trials there are of each status; attempts that went on elsewhere are left out."""
        found: dict[str, int] = {}
        for trial in [*results.trained(self.trials), *(t for t in self.trials if t.status == "waiting")]:
            found[trial.status] = found.get(trial.status, 0) + 1
        return found

    def seconds_left(self) -> float | None:
        """An estimate from the trials so far, by their FLOPs; None before the first has ended."""
        ended = [t for t in results.trained(self.trials) if t.status == "done" and t.seconds]
        rate = sum(t.flops for t in ended) / sum(t.seconds for t in ended) if ended else 0.0
        if not rate:
            return None
        running = [t for t in self.trials if t.status == "running"]
        mean = sum(t.planned_flops for t in ended) / len(ended)
        left = sum(max(0.0, t.planned_flops - t.flops) for t in running)
        waiting = sum(t.status == "waiting" for t in self.trials)
        if self._config.study.num_trials and self._config.study.sampler != "grid":
            waiting += max(0, self._config.study.num_trials - len(results.trained(self.trials)))
        at_once = math.ceil(len(running) / self._config.trials_per_program)  # seconds are shared within a program
        return (left + waiting * mean) / rate / max(1, at_once)

    def line(self) -> str:
        """How far it is, for the terminal."""
        counts = ", ".join(f"{number} {status}" for status, number in self.counts().items())
        found = self._settings
        best = f"; best {found[0].loss:.4f} with {self._say(found[0].bindings)}" if found else ""
        left = self.seconds_left()
        bill = self._bill()
        eta = f"; about {human_seconds(left)} left" if left else ""
        return f"{counts}{best}; {bill.flops:.3g} FLOPs, {bill.core_hours:.3f} core-hours{eta}"

    def summary(self) -> dict[str, Any]:
        """The recommendation and the bill, as JSON."""
        found, dimensions, group_by = self._settings, self._base.space.dimensions(), self._config.group_by
        best = [
            {
                **dataclasses.asdict(setting),
                "spread": setting.spread if setting.seeds > 1 else None,
                "one_step_wrong": [
                    dataclasses.asdict(step) for step in results.one_step_wrong(setting, found, dimensions, group_by)
                ],
                "at_the_edge": results.at_the_edge(setting, dimensions, group_by),
            }
            for setting in results.best_settings(found)
        ]
        shared = results.shared_setting(found, group_by)
        return {
            "best": best,
            "for_all_groups": dataclasses.asdict(shared) if shared else None,
            "trials": self.counts(),
            "bill": dataclasses.asdict(self._bill()),
        }

    def conclusion(self) -> str:
        """The recommendation and the bill, in sentences."""
        found, best = self._settings, results.best_settings(self._settings)
        if not found:
            return "No trial came to its end with a finite loss: there is nothing to recommend."
        lines = []
        dimensions = self._base.space.dimensions()
        labels = [label.rpartition("/")[2].split("+") for label in dimensions]
        of_group = {name for names in labels if self._config.group_by in names for name in names}  # what goes with it
        for setting in best:
            where = f"At {self._config.group_by} = {setting.group!r} take " if self._config.group_by else "Take "
            spread = f" ± {setting.spread:.4f} over {setting.seeds} seeds" if setting.seeds > 1 else ""
            chosen = {name: value for name, value in setting.bindings.items() if name not in of_group}
            lines.append(
                f"{where}{self._say(chosen)}: held-out loss {setting.loss:.4f}{spread} at {setting.tokens:,} tokens."
            )
            steps = results.one_step_wrong(setting, found, dimensions, self._config.group_by)
            if steps:
                said = "; ".join(f"{s.label.rpartition('/')[2]} = {_short(s.other)}: {s.cost:+.4f}" for s in steps)
                lines.append(f"  Wrong by one step: {said} nats per token.")
            for label in results.at_the_edge(setting, dimensions, self._config.group_by):
                lines.append(f"  {label} is best at the edge of the space: the optimum may lie beyond it.")
        if shared := results.shared_setting(found, self._config.group_by):
            named = ", ".join(f"{label.rpartition('/')[2]}={_short(value)}" for label, value in shared.choices.items())
            cost = f"at most {shared.regret:.4f} nats per token above" if shared.regret else "it is"
            lines.append(f"For every {self._config.group_by} take {named}: {cost} the best of each.")
        bill = self._bill()
        lines.append(
            f"It took {bill.flops:.3g} FLOPs and {bill.core_hours:.2f} core-hours. The same settings at full size "
            f"({bill.full_size}) would have taken {bill.naive_flops:.3g} FLOPs"
            + (f", {bill.naive_flops / bill.flops:.3g} times as much." if bill.flops else ".")
        )
        return "\n".join(lines)

    def _say(self, bindings: Mapping[str, Any]) -> str:
        """Bindings that differ between trials."""
        all_values = {name: {repr(t.bindings.get(name)) for t in self._resolved.values()} for name in bindings}
        said = [f"{name}={_short(value)}" for name, value in bindings.items() if len(all_values[name]) > 1]
        return ", ".join(said) or "the base"

    # ------------------------------------------------------------------------------------------------ the page

    def write(self, workdir: Path, *, finished: bool) -> Path:
        """Writes the page, whole or not at all; while the sweep runs it loads itself again."""
        bill, found, left = self._bill(), self._settings, self.seconds_left()
        tried = results.trained(self.trials)
        headlines = [
            Headline("Best held-out loss", f"{found[0].loss:.4f}" if found else "–", "nats/token"),
            Headline(
                "Trials", f"{sum(t.status == 'done' for t in tried)}", f"of {len(tried)} done", self._count_note()
            ),
            Headline("Compute", f"{bill.flops:.3g}", "FLOPs", f"{bill.core_hours:.2f} core-hours"),
            Headline("Time left", "none" if finished else human_seconds(left) if left else "unknown", ""),
        ]
        sections = [
            Section("Recommendation" if finished else "Best so far", [Text(t) for t in self.conclusion().split("\n")]),
            *self._figures(tried),
            self._table(tried),
            *self._marks(),
            Section("Settings", [Details("Base and space", self._about())]),
        ]
        page = Page(
            title="Sweep",
            subtitle=f"{', '.join(self._base.space.names)}; {self._config.study.sampler}, pruning: "
            f"{self._config.study.pruner}.",
            headlines=headlines,
            sections=sections,
            footer=footer(),
            refresh_seconds=None if finished else max(5, round(self._config.report_seconds)),
        )
        return report.write(page, workdir / REPORT_FILE)

    def _count_note(self) -> str:
        return ", ".join(f"{number} {status}" for status, number in self.counts().items() if status != "done")

    def _about(self) -> str:
        bindings = "\n".join(f"{name} = {value!r}" for name, value in self._base.bindings.items())
        return f"{chr(10).join(self._base.gin_files)}\n\n{bindings}\n\nspace = {self._config.space}"

    def _loss_figures(self) -> list[Figure]:
        """Loss over each dimension of numbers, a line for each group."""
        figures = []
        for label, what in self._base.space.dimensions().items():
            name = label.rpartition("/")[2]
            if name in ("SEED", self._config.group_by) or not results.is_numeric(what):
                continue
            curves = results.loss_over(self._settings, label)
            lines = {
                name if group is None else f"{self._config.group_by} = {group}": Series(
                    [x for x, _ in points], [loss for _, loss in points], markers=True
                )
                for group, points in curves.items()
                if len(points) > 1
            }
            x = [value for points in curves.values() for value, _ in points]
            if lines:
                log_x = min(x) > 0 and max(x) / min(x) > 4
                figures.append(line_figure(lines, xlabel=name, ylabel="held-out loss (nats per token)", log_x=log_x))
        return figures

    def _figures(self, tried: Sequence[Trial]) -> list[Section]:
        sections = []
        if figures := self._loss_figures():
            sections.append(Section("Loss by setting", figures))
        ranked = sorted((t for t in tried if t.curve), key=lambda t: (t.status != "done", _or_inf(t.loss)))
        if ranked:
            lines = {
                f"{self._say(t.bindings)}{'' if t.status == 'done' else f' ({t.status})'}": Series(
                    [n for n, _ in t.curve], [loss for _, loss in t.curve], markers=True
                )
                for t in ranked[:_MOST_CURVES]
            }
            caption = f"The best {len(lines)} of {len(ranked)} trials." if len(ranked) > len(lines) else ""
            sections.append(
                Section(
                    "Curves",
                    [line_figure(lines, xlabel="tokens", ylabel="held-out loss (nats per token)", caption=caption)],
                )
            )
        comparable = results.split_by_tokens(tried)[0]
        if len(comparable) > 1:
            # The parts of a chain have labels of their own, and may bind the same name.
            named = [{label.rpartition("/")[2]: value for label, value in t.choices.items()} for t in comparable]
            columns = {
                name: [values.get(name) for values in named] for name in dict.fromkeys(n for v in named for n in v)
            }
            drawing = parallel_figure(columns, [float(t.loss or math.nan) for t in comparable], value="held-out loss")
            sections.append(Section("Parallel coordinates", [drawing]))
        if shares := self._importance():
            caption = "PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255), of trials that are done, as Optuna has it."
            sections.append(
                Section("Importance", [bar_figure(shares, ylabel="share of the loss's variation", caption=caption)])
            )
        return sections

    def _importance(self) -> dict[str, float]:
        """Importance of each dimension, by Optuna; {} where there is too little to tell."""
        optuna = import_extra("optuna")
        numbers = {t.number for t in results.split_by_tokens(self.trials)[0]}
        chosen = [f for f in self._frozen if f.number in numbers]
        if len(chosen) < 4 or len({f.value for f in chosen}) < 2:
            return {}
        part = optuna.create_study(direction="minimize")
        part.add_trials(chosen)
        try:
            found = optuna.importance.get_param_importances(part)
        except (ValueError, RuntimeError):  # a single value of each parameter, or conditional ones
            return {}
        shares: dict[str, float] = {}
        for label, share in found.items():
            if math.isfinite(share):
                name = label.rpartition("/")[2]
                shares[name] = shares.get(name, 0.0) + share
        return shares

    def _table(self, tried: Sequence[Trial]) -> Section:
        ranked = sorted(tried, key=lambda t: (t.status != "done", _or_inf(t.loss)))
        others = {t.number for t in results.split_by_tokens(tried)[1]}
        rows = [
            [
                str(t.number),
                t.id[:8],
                self._say(t.bindings),
                t.status + (" (other tokens: not compared)" if t.number in others else ""),
                "–" if t.loss is None or not math.isfinite(t.loss) else f"{t.loss:.4f}",
                f"{t.tokens:,} of {t.planned_tokens:,}",
                f"{t.flops:.3g}",
                human_seconds(t.seconds),
            ]
            for t in ranked
        ]
        header = ["trial", "id", "bindings", "status", "loss", "tokens", "FLOPs", "time"]
        return Section("Trials", [Table(header, rows, number_columns=(0, 4, 5, 6, 7))])

    def _marks(self) -> list[Section]:
        """Trials that failed or diverged, with the ends of their logs, and attempts that went on elsewhere."""
        bad = [t for t in results.trained(self.trials) if t.status in ("failed", "diverged")]
        blocks: list[Any] = [Details(f"trial {t.number} {t.status}: {t.error}", t.log or "(no log)") for t in bad]
        retried = [t for t in self.trials if t.status == "retried"]
        if retried:
            numbers = ", ".join(str(t.number) for t in retried)
            blocks.append(Text(f"Workers of trials {numbers} died or were stopped; later trials went on from there."))
        twins = [t for t in self.trials if t.status == "duplicate"]
        if twins:
            blocks.append(Text(f"{len(twins)} proposals were trials that were there already, and were not trained."))
        if others := results.split_by_tokens(self.trials)[1]:
            numbers = ", ".join(f"{t.number} ({t.tokens:,})" for t in others)
            blocks.append(Text(f"Trials of another number of tokens, not compared: {numbers}."))
        return [Section("Failures and marks", blocks)] if blocks else []


def _or_inf(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
