"""What each way to train buys: the front of every recipe, all with the same number of training examples.

Usage: python benchmarks/recipes.py --teacher DIR --dataset DATA [--student DIR | --student-layers 0,2,4] [--image FILE]

The recipes read the training split `--epochs` times in all:

- `plain`: fine-tuning at full length; its front is that of constant-rate shortening, for which nothing is searched.
- `lengthdrop`: one plain epoch, then LengthDrop.
- `distilled`: the first stage of `hpo distill` for `--intermediate-epochs`, then its second, the teacher's answers.
- `distilled-lengthdrop`: the first stage for as long, then LengthDrop with the teacher.
- `power-bert`: plain fine-tuning, then the retention of one penalty and re-training with it, a third of the epochs
  each, and that for every penalty: a model per budget.

Prints a JSON line per recipe and seed: its points on the search and the report split (share of the cost at full length,
quality), the area (quality above 0.5 against that share) on both and, where plain fine-tuning of that seed came before,
the least share whose report quality is within 0.01 of it at full length, and the point that a user would get who asks
the search split for that.

With `--seeding`, also a line per seed on PoWER-BERT's configs as seeds of a search, of the model that the recipe
`lengthdrop` trains: how far below the front of a search without them each lies, and the area of a search with them.

A last line per recipe has the mean, the least and the most over the seeds. With `--image`, draws the fronts on the
report split, one line per seed; `--lines FILE` takes lines that were printed before instead of training anything.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
import transformers
from search import above_half, where

from hpo.plot import BLUE, GREEN, GREY, ORANGE, SKY, lay_out, write_image
from hpo.recipe import Recipe
from hpo.search_lengths import SEEDS, config_of, constant_rates, search_loaded
from hpo.seeds import MASK_LEARNING_RATE, POWER_BERT, UPDATES
from hpo.storage import open_storage
from hpo.workload import LoadedWorkload, Workload, load_workload
from model.data import DataSpec
from model.distill import (
    CACHE_LIMIT_BYTES,
    DistillSettings,
    LiveTeacher,
    TeacherCache,
    checked_layer_map,
    distil,
    teacher_pieces,
)
from model.encoder import LengthAdaptiveModel
from model.evaluate import Evaluator, choose_precision, predict
from model.hardware import compute_device
from model.length_config import LengthConfig
from model.macs import mean_macs
from model.power_bert import PowerBertSettings, learn_retention, retrain
from model.train import TrainingSettings, train
from model.training import uses_bf16
from studies.loader import load_finetune, load_lengths

UNSEARCHED = ("plain", "power-bert")
PENALTIES = (0.03, 0.1, 0.3, 1.0)
WITHIN = 0.01
Point = tuple[float, float]
"""Share of the cost at full length, and quality."""
STYLE = {
    "plain": (GREY, "plain fine-tuning, constant rates"),
    "lengthdrop": (ORANGE, "LengthDrop"),
    "distilled": (SKY, "distilled"),
    "distilled-lengthdrop": (BLUE, "distilled + LengthDrop"),
    "power-bert": (GREEN, "PoWER-BERT, a model per budget"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What all recipes share."""

    recipe: Recipe
    loaded: LoadedWorkload
    arguments: argparse.Namespace
    trained: dict[str, LengthAdaptiveModel] = dataclasses.field(default_factory=dict)

    def new_student(self, seed: int) -> LengthAdaptiveModel:
        transformers.set_seed(seed)
        return self.recipe.new_student()

    def settings(self, seed: int, plain_epochs: int, epochs: int) -> TrainingSettings:
        return TrainingSettings(
            learning_rate=self.arguments.learning_rate,
            batch_size=self.arguments.batch_size,
            dropout=self.arguments.dropout,
            plain_epochs=plain_epochs,
            epochs=epochs,
            length_drop=0.25,
            seed=seed,
        )

    def fine_tune(
        self, student: LengthAdaptiveModel, settings: TrainingSettings, teacher: LengthAdaptiveModel | None = None
    ) -> None:
        train(student, self.loaded.train, self.loaded.tokenizer, settings, teacher=teacher)

    def imitate(self, student: LengthAdaptiveModel, seed: int, stage: str, epochs: int) -> None:
        """A stage of `hpo distill`, of so many epochs; of none, nothing."""
        if not epochs:
            return
        assert self.recipe.teacher is not None
        study = load_finetune("distill")
        given = {"batch_size": self.arguments.batch_size, "dropout": self.arguments.dropout, "epochs": epochs}
        settings = DistillSettings(**{**study.settings_of(stage, study.first[0]), **given, "seed": seed})
        self.remember(student, settings)
        distil(
            student,
            self.recipe.teacher,
            self.loaded.train,
            self.loaded.tokenizer,
            settings,
            cache_dir=self.arguments.cache,
        )

    def remember(self, student: LengthAdaptiveModel, settings: DistillSettings) -> None:
        """Keep on disk what the teacher says of the training split, since every seed and recipe hears it again."""
        assert self.recipe.teacher is not None
        layer_map = checked_layer_map(settings.layer_map, student.num_layers, self.recipe.teacher.num_layers)
        pieces = teacher_pieces(settings, layer_map)
        live = LiveTeacher(
            self.recipe.teacher,
            self.loaded.train,
            pieces,
            bf16=uses_bf16(settings.precision),
            device=compute_device(),
        )
        cache = TeacherCache(live, self.arguments.cache)
        if cache.size_bytes <= CACHE_LIMIT_BYTES:
            cache.fill()

    def scored(self, model: LengthAdaptiveModel, configs: Sequence[LengthConfig]) -> tuple[list[Point], list[Point]]:
        """Where configs of a model stand, on the search and on the report split."""
        points = []
        for split in (self.loaded.search, self.loaded.report):
            full = mean_macs(model.shape, split.num_tokens)
            answers_CX = predict(model, split, configs)
            points.append(
                [
                    (
                        mean_macs(model.shape, split.num_tokens, config) / full,
                        split.quality(self.loaded.metric, answers_X),
                    )
                    for config, answers_X in zip(configs, answers_CX, strict=True)
                ]
            )
        return points[0], points[1]

    def searched(self, model: LengthAdaptiveModel, seed: int) -> tuple[list[Point], list[Point]]:
        """Where the front of a search stands, on the search and on the report split."""
        study = self.search(model, seed)
        configs = [config_of(trial.params) for trial in study.best_trials]
        return self.scored(model, [LengthConfig.full(model.num_layers), *configs])

    def search(
        self, model: LengthAdaptiveModel, seed: int, seed_with: str | None = None, engine: Evaluator | None = None
    ) -> optuna.Study:
        """A search over a model's length configs, kept in memory."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder) / "model"
            model.save_pretrained(checkpoint)
            self.loaded.tokenizer.save_pretrained(checkpoint)
            storage = open_storage(f"sqlite:///{folder}/hpo.db")
            search = search_loaded(
                load_lengths("lengths"),
                self.loaded,
                checkpoint,
                self.arguments.trials,
                storage,
                Path(folder),
                seed,
                evaluator=engine or self.engine(model, seed),
                seed_with=seed_with,
            )
            in_memory = optuna.create_study(directions=search.study.directions)
            in_memory.add_trials(search.study.get_trials())
            for key, value in search.study.user_attrs.items():
                in_memory.set_user_attr(key, value)
        return in_memory

    def engine(self, model: LengthAdaptiveModel, seed: int) -> Evaluator:
        precision = choose_precision(model, self.loaded.search, self.loaded.metric)
        blocks = load_lengths("lengths").blocks if self.loaded.metric.per_example else 1
        return Evaluator(model, self.loaded.search, precision=precision, num_blocks=blocks, seed=seed)


def plain(bench: Bench, seed: int) -> tuple[list[Point], list[Point]]:
    student = bench.new_student(seed)
    bench.fine_tune(student, bench.settings(seed, bench.arguments.epochs, 0))
    rates = sorted(constant_rates(load_lengths("lengths"), most=20), reverse=True)
    return bench.scored(student, [LengthConfig.from_retention([rate] * student.num_layers) for rate in rates])


def lengthdrop(bench: Bench, seed: int) -> tuple[list[Point], list[Point]]:
    student = bench.new_student(seed)
    bench.fine_tune(student, bench.settings(seed, 1, bench.arguments.epochs - 1))
    bench.trained["lengthdrop"] = student
    return bench.searched(student, seed)


def distilled(bench: Bench, seed: int) -> tuple[list[Point], list[Point]]:
    student, first = bench.new_student(seed), bench.arguments.intermediate_epochs
    bench.imitate(student, seed, "intermediate", first)
    bench.imitate(student, seed, "logits", bench.arguments.epochs - first)
    return bench.searched(student, seed)


def distilled_lengthdrop(bench: Bench, seed: int) -> tuple[list[Point], list[Point]]:
    student, first = bench.new_student(seed), bench.arguments.intermediate_epochs
    bench.imitate(student, seed, "intermediate", first)
    bench.fine_tune(student, bench.settings(seed, 0, bench.arguments.epochs - first), bench.recipe.teacher)
    return bench.searched(student, seed)


def power_bert(bench: Bench, seed: int) -> tuple[list[Point], list[Point]]:
    search: list[Point] = []
    report: list[Point] = []
    third = max(1, bench.arguments.epochs // 3)
    steps_per_epoch = -(-len(bench.loaded.train) // PowerBertSettings().batch_size)
    for penalty in PENALTIES:
        student = bench.new_student(seed)
        student.token_score = TrainingSettings().token_score
        bench.fine_tune(student, bench.settings(seed, bench.arguments.epochs - 2 * third, 0))
        settings = PowerBertSettings(
            penalty=penalty,
            mask_learning_rate=MASK_LEARNING_RATE * max(1.0, UPDATES / (third * steps_per_epoch)),  # as far in fewer
            epochs=third,
            dropout=bench.arguments.dropout,
            seed=seed,
        )
        config = learn_retention(student, bench.loaded.train, bench.loaded.tokenizer, settings)
        again = bench.settings(seed, third, 0)
        retrain(student, bench.loaded.train, bench.loaded.tokenizer, again, config)
        for points, found in zip((search, report), bench.scored(student, [config]), strict=True):
            points += found
    return search, report


RECIPES = {
    "plain": plain,
    "lengthdrop": lengthdrop,
    "distilled": distilled,
    "distilled-lengthdrop": distilled_lengthdrop,
    "power-bert": power_bert,
}


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """A line per recipe and seed."""
    for seed in map(int, bench.arguments.seeds.split(",")):
        for name in bench.arguments.recipes.split(","):
            start = time.perf_counter()
            search, report = RECIPES[name](bench, seed)
            yield {
                "recipe": name,
                "seed": seed,
                "epochs": bench.arguments.epochs,
                "intermediate_epochs": bench.arguments.intermediate_epochs if name.startswith("distilled") else None,
                "training_examples": len(bench.loaded.train),
                "trials": None if name in UNSEARCHED else bench.arguments.trials,
                "area": round(above_half(search), 5),
                "area_on_report": round(above_half(report), 5),
                "front": rounded(search),
                "front_on_report": rounded(report),
                "s": round(time.perf_counter() - start, 1),
            }
        if bench.arguments.seeding:
            yield seeding(bench, seed)


def compared(line: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A recipe's line beside plain fine-tuning of its seed, where that is among the lines."""
    plain = [other for other in lines if other.get("recipe") == "plain" and other["seed"] == line["seed"]]
    if "recipe" not in line or not plain:
        return line
    # The costliest point of plain fine-tuning is full length.
    wanted, enough = (round(max(plain[0][front])[1] - WITHIN, 5) for front in ("front", "front_on_report"))
    search, report = line["front"], line["front_on_report"]
    near = [share for share, quality in report if quality >= enough]
    good = [(share, point) for (share, quality), point in zip(search, report, strict=True) if quality >= wanted]
    return {
        **line,
        "quality_wanted": enough,
        "least_share_within": min(near) if near else None,
        "chosen_on_search": min(good)[1] if good else None,
    }


def seeding(bench: Bench, seed: int) -> dict[str, Any]:
    """What PoWER-BERT's configs, learned from one model, are worth beside a search over it, and in one."""
    start = time.perf_counter()
    if "lengthdrop" not in bench.trained:
        lengthdrop(bench, seed)
    model = bench.trained.pop("lengthdrop")
    engine = bench.engine(model, seed)
    without, seeded = bench.search(model, seed, engine=engine), bench.search(model, seed, POWER_BERT, engine)
    fronts = [
        bench.scored(model, [config_of(trial.params) for trial in study.best_trials]) for study in (without, seeded)
    ]
    shares_CL = seeded.user_attrs[SEEDS]["shares"]
    learned = bench.scored(model, [LengthConfig.from_shares(shares) for shares in shares_CL])
    return {
        "part": "seeding",
        "seed": seed,
        "training_examples": len(bench.loaded.train),
        "trials": bench.arguments.trials,
        "area": [round(above_half(search), 5) for search, _ in fronts],
        "area_on_report": [round(above_half(report), 5) for _, report in fronts],
        "learned": rounded(learned[0]),
        "learned_on_report": rounded(learned[1]),
        "below_front": below(learned[0], fronts[0][0]),
        "below_front_on_report": below(learned[1], fronts[0][1]),
        "s": round(time.perf_counter() - start, 1),
    }


def below(points: Sequence[Point], front: Sequence[Point]) -> list[float]:
    """How far each point's quality is below the best of a front that costs no more; negative where it is above."""
    best = [max((quality for cost, quality in front if cost <= share), default=0.0) for share, _ in points]
    return [round(other - quality, 5) for other, (_, quality) in zip(best, points, strict=True)]


def rounded(points: Sequence[Point]) -> list[Point]:
    return [(round(share, 5), round(quality, 5)) for share, quality in points]


def summaries(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Over the seeds of each recipe: the mean, the least and the most of what a line says."""
    for name in RECIPES:
        own = [line for line in lines if line.get("recipe") == name]
        figures = {
            "area_on_report": [line["area_on_report"] for line in own],
            "full_length_on_report": [dict(map(tuple, line["front_on_report"])).get(1.0) for line in own],
            "least_share_within": [line.get("least_share_within") for line in own],
            "chosen_share": [(line.get("chosen_on_search") or (None, None))[0] for line in own],
            "chosen_quality": [(line.get("chosen_on_search") or (None, None))[1] for line in own],
        }
        if own:
            yield {
                "summary": name,
                "seeds": [line["seed"] for line in own],
                **{
                    figure: None
                    if None in values
                    else [round(value, 5) for value in (sum(values) / len(values), min(values), max(values))]
                    for figure, values in figures.items()
                },
            }


def draw(lines: Sequence[dict[str, Any]]) -> go.Figure:
    """The fronts on the report split; what a point dominates is left out."""
    figure = go.Figure()
    for name, (colour, title) in STYLE.items():
        for number, line in enumerate(line for line in lines if line.get("recipe") == name):
            best, points = -1.0, []
            for share, quality in sorted(map(tuple, line["front_on_report"])):
                if quality > best:
                    best = quality
                    points.append((share, quality))
            figure.add_trace(
                go.Scatter(
                    x=[share for share, _ in points],
                    y=[quality for _, quality in points],
                    name=f"{title}, {line['epochs']} epochs",
                    legendgroup=name,
                    showlegend=number == 0,
                    mode="lines+markers",
                    line={"color": colour, "shape": "hv", "width": 1.5},
                    marker={"color": colour, "size": 6},
                )
            )
    lay_out(figure, "What each recipe buys", "report split, one line per seed")
    figure.update_xaxes(title_text="FLOPs per sequence, share of full length", tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(title_text="quality")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="fine-tuned encoder")
    parser.add_argument("--student", help="encoder that learns; without it, cut from the teacher")
    parser.add_argument("--student-layers", help="as in 0,2,4")
    parser.add_argument("--dataset")
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--search-size", type=int)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--intermediate-epochs", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dropout", type=float, help="of the student; left out: as its checkpoint has it")
    parser.add_argument("--cache", type=Path, help="where the teacher's outputs are kept; left out: while this runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seeding", action="store_true", help="measure PoWER-BERT's configs as seeds too")
    parser.add_argument("--lines", type=Path, nargs="+", help="printed before; nothing is trained")
    parser.add_argument("--image", type=Path)
    arguments = parser.parse_args()
    if arguments.lines is None and None in (arguments.teacher, arguments.dataset):
        parser.error("give --teacher and --dataset, or --lines")
    lines: list[dict[str, Any]] = []
    if arguments.lines is None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with tempfile.TemporaryDirectory() as folder:
            arguments.cache = arguments.cache or Path(folder)
            for line in measure(make_bench(arguments)):
                lines.append(line)
                print(json.dumps({"benchmark": "recipes", **compared(line, lines), **where()}), flush=True)
    else:
        lines += [
            json.loads(text) for file in arguments.lines for text in file.read_text(encoding="utf-8").splitlines()
        ]
    for line in summaries([compared(line, lines) for line in lines if "seed" in line]):
        print(json.dumps({"benchmark": "recipes", **line}), flush=True)
    if arguments.image is not None:
        write_image(draw(lines), arguments.image)


def make_bench(arguments: argparse.Namespace) -> Bench:
    """Load what the recipes share."""
    spec = DataSpec(
        dataset=arguments.dataset, train_limit=arguments.train_limit, search_size=arguments.search_size, seed=0
    )
    source = arguments.student or arguments.teacher
    loaded = load_workload(Workload(model=source, data=spec), source)
    layers = None if arguments.student_layers is None else [int(part) for part in arguments.student_layers.split(",")]
    recipe = Recipe.of(load_finetune("finetune"), loaded, arguments.teacher, layers)
    return Bench(recipe=recipe, loaded=loaded, arguments=arguments)


if __name__ == "__main__":
    main()
