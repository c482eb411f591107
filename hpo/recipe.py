"""How a trial makes its model: fine-tuning with LengthDrop, or distillation in stages that outlive the process."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import transformers

from hpo.errors import HpoError
from hpo.runs import CACHE, StudyRuns
from hpo.workload import LoadedWorkload, differing_labels, listed_labels, load_encoder
from model.distill import DistillError, DistillSettings, check_pair, checked_layer_map, distil
from model.encoder import LengthAdaptiveModel
from model.evaluate import score
from model.length_config import LengthConfig
from model.processes import check_processes, train_in_processes
from model.students import cut_student
from model.tokenizer import load_tokenizer
from model.train import TrainingSettings, train
from model.training import Precision, TrainingReport
from studies.loader import STAGES, Choices, FinetuneStudy, Range, StudyFileError

logger = logging.getLogger(__name__)

SETTINGS_OF: Mapping[str, type[TrainingSettings] | type[DistillSettings]] = {
    "intermediate": DistillSettings,
    "logits": DistillSettings,
    "lengthdrop": TrainingSettings,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all trials of a study have in common.

    Attributes:
        definition: The study.
        loaded: Its data.
        teacher: A fine-tuned encoder to learn from; None where there is none.
        teacher_source: Its folder or hub id.
        student_layers: Layers of the workload's encoder that the student is made of; None for all.
        processes: How many train one model together.
        precision: What "auto" stands for in the settings; "auto" leaves it to each process.
    """

    definition: FinetuneStudy
    loaded: LoadedWorkload
    teacher: LengthAdaptiveModel | None
    teacher_source: str | None
    student_layers: tuple[int, ...] | None
    processes: int = 1
    precision: Precision = "auto"

    @classmethod
    def of(
        cls,
        definition: FinetuneStudy,
        loaded: LoadedWorkload,
        teacher_source: str | None,
        student_layers: Sequence[int] | None,
        processes: int = 1,
    ) -> "Recipe":
        """Load the teacher, and see that the student can learn from it.

        Raises:
            HpoError: A distillation lacks its teacher, the two do not go together, or there are too few GPUs.
            CheckpointError: The teacher cannot be loaded.
        """
        if teacher_source is None and definition.kind == "distill":
            raise HpoError(
                f"Study {definition.name!r} distils and has no teacher; name a fine-tuned one with --teacher."
            )
        try:
            check_processes(processes)
        except ValueError as error:
            raise HpoError(f"Training cannot be shared: {error}") from error
        teacher = None
        if teacher_source is not None:
            _check_vocabularies(loaded, teacher_source)
            teacher = load_encoder(teacher_source, loaded.corpus)
            if teacher.has_new_head:
                raise HpoError(
                    f"The teacher {teacher_source} has no head for {teacher.task}, so that there is nothing to learn "
                    "from it; choose one that was fine-tuned on this dataset."
                )
            _check_labels(loaded, teacher_source)
        layers = None if student_layers is None else tuple(student_layers)
        return cls(
            definition=definition,
            loaded=loaded,
            teacher=teacher,
            teacher_source=teacher_source,
            student_layers=layers,
            processes=processes,
        )

    def identity(self) -> dict[str, str]:
        """What a study may not change, beside what every study may not."""
        return {} if self.teacher is None else {"teacher": self.teacher.fingerprint()}

    def attributes(self) -> dict[str, Any]:
        """What is recorded with the study."""
        return {} if self.teacher is None else {"teacher": self.teacher_source}

    @property
    def chooses_precision(self) -> bool:
        """Whether the precision of any training is left open."""
        declared = {**self.definition.fixed, **self.definition.space}
        keys = ["precision"] if self.definition.kind == "finetune" else [f"{stage}.precision" for stage in STAGES]
        values = [declared.get(key, "auto") for key in keys]
        return any("auto" in value if isinstance(value, Choices) else value == "auto" for value in values)

    def new_student(self) -> LengthAdaptiveModel:
        """The encoder as training begins, its head drawn anew from torch's random state.

        Raises:
            HpoError: It has no such layers.
        """
        whole = load_encoder(self.loaded.workload.model, self.loaded.corpus)
        if self.student_layers is None:
            return whole
        try:
            return cut_student(whole, self.student_layers)
        except ValueError as error:
            raise HpoError(f"--student-layers {','.join(map(str, self.student_layers))}: {error}") from error

    def check_student(self, student: LengthAdaptiveModel) -> None:
        """Refuse a student that cannot learn from the teacher as the study's fixed settings ask.

        Before there is a study, since one would hold on to settings that nothing can be trained with.

        Raises:
            HpoError: The layer map does not fit the two, or they differ in labels, vocabulary or attention heads.
        """
        if self.teacher is None or self.definition.kind != "distill":
            return
        for stage in STAGES[:-1]:
            settings = DistillSettings(**self.definition.settings_of(stage, {}))
            try:
                check_pair(student, self.teacher, settings)
                checked_layer_map(settings.layer_map, student.num_layers, self.teacher.num_layers)
            except ValueError as error:
                raise self._cannot_distil(error) from error

    def last_settings(self, parameters: Mapping[str, Any], seed: int) -> TrainingSettings:
        """How a trial learns to drop tokens: all of a fine-tuning, the last stage of a distillation."""
        if self.definition.kind == "finetune":
            values = {**self.definition.fixed, **parameters}
        else:
            values = self.definition.settings_of(STAGES[-1], parameters)
        return TrainingSettings(**values, seed=seed).with_precision_settled(self.precision)

    def train(
        self,
        parameters: Mapping[str, Any],
        seed: int,
        runs: StudyRuns,
        name: str,
        *,
        on_epoch: Callable[[LengthAdaptiveModel, int], None],
        on_progress: Callable[[float], None],
    ) -> tuple[LengthAdaptiveModel, TrainingReport]:
        """Train the model of one trial.

        A distillation writes what it has after each of its stages; called again with the same name it goes on from
        there, to the result that an unbroken run has.

        Args:
            parameters: What the trial chose.
            seed: Of the head, dropout, batch order and length configs.
            runs: Where stages are kept.
            name: What the trial's folders are called.
            on_epoch: Called with the model and the number of epochs done with LengthDrop.
            on_progress: Called with the share of the work done.
        """
        if self.definition.kind == "finetune":
            transformers.set_seed(seed)
            model = self.new_student()
            return model, self._drop_lengths(model, self.last_settings(parameters, seed), on_epoch, on_progress)
        model, begun, steps = self._last_stage(runs, name, seed)
        report = None
        for number, stage in enumerate(STAGES):
            if number < begun:
                continue

            def report_share(share: float, number: int = number) -> None:
                on_progress((number + share) / len(STAGES))

            if stage == STAGES[-1]:
                report = self._drop_lengths(model, self.last_settings(parameters, seed), on_epoch, report_share)
            else:
                settings = DistillSettings(**self.definition.settings_of(stage, parameters), seed=seed)
                settings = settings.with_precision_settled(self.precision)
                steps += self._imitate(model, settings, runs, report_share).steps
                runs.write_model(runs.stage_place(name, stage).name, model, self.loaded.tokenizer, steps)
                logger.info("Stage %s of %s is done.", stage, name)
        assert report is not None
        return model, dataclasses.replace(report, steps=steps + report.steps)

    def _drop_lengths(
        self,
        model: LengthAdaptiveModel,
        settings: TrainingSettings,
        on_epoch: Callable[[LengthAdaptiveModel, int], None],
        on_progress: Callable[[float], None],
    ) -> TrainingReport:
        return self._in_processes(train)(
            model,
            self.loaded.train,
            self.loaded.tokenizer,
            settings,
            teacher=self.teacher,
            on_epoch=partial(on_epoch, model),
            on_progress=lambda step, steps: on_progress(step / steps),
        )

    def _imitate(
        self,
        model: LengthAdaptiveModel,
        settings: DistillSettings,
        runs: StudyRuns,
        on_progress: Callable[[float], None],
    ) -> TrainingReport:
        assert self.teacher is not None
        try:
            return self._in_processes(distil)(
                model,
                self.teacher,
                self.loaded.train,
                self.loaded.tokenizer,
                settings,
                cache_dir=runs.folder / CACHE,
                on_progress=lambda step, steps: on_progress(step / steps),
            )
        except DistillError as error:  # what it advises are arguments of our own
            reason = str(error).partition("; free some space")[0]
            raise HpoError(f"{reason}; free some space, or choose another folder with --runs.") from error
        except ValueError as error:  # layers, widths or heads of the two do not go together
            raise self._cannot_distil(error) from error

    def _cannot_distil(self, error: Exception) -> HpoError:
        return HpoError(f"Study {self.definition.name!r} cannot distil {self.teacher_source}: {error}")

    def _in_processes(self, training: Callable[..., TrainingReport]) -> Callable[..., TrainingReport]:
        """The same training, in as many processes as the recipe has."""
        return training if self.processes == 1 else partial(train_in_processes, training, self.processes)

    def _last_stage(self, runs: StudyRuns, name: str, seed: int) -> tuple[LengthAdaptiveModel, int, int]:
        """The model after the last stage that is kept, and the numbers of stages and steps done."""
        for number in reversed(range(len(STAGES) - 1)):
            stage = STAGES[number]
            place = runs.stage_place(name, stage)
            if place.is_dir():
                logger.info("Going on after stage %s of %s.", stage, name)
                return load_encoder(place, self.loaded.corpus), number + 1, runs.steps_after(name, stage)
        transformers.set_seed(seed)
        return self.new_student(), 0, 0

    def score_teacher(self, teacher: LengthAdaptiveModel) -> float:
        """The teacher's quality on the search split, with a warning where it knows nothing."""
        split, metric = self.loaded.search, self.loaded.metric
        quality = score(teacher, split, [LengthConfig.full(teacher.num_layers)], metric)[0]
        chance = 0.0
        if self.loaded.corpus.kind == "classification":
            classes = range(len(self.loaded.corpus.label_names))
            chance = max(split.quality(metric, np.full(len(split), label)) for label in classes)
        if quality <= chance:
            logger.warning(
                "The teacher %s is no better than chance on the search split: %s %.4f, and %.4f without looking.",
                self.teacher_source, metric.name, quality, chance,
            )  # fmt: skip
        return quality


def check_settings(definition: FinetuneStudy) -> None:
    """Refuse a definition that names settings training does not have, or gives impossible values.

    Raises:
        StudyFileError: With the name or the value.
    """
    if definition.kind == "finetune":
        _check_part(definition, TrainingSettings, definition.space, definition.fixed, "")
        return
    for stage in STAGES:
        space = {key.partition(".")[2]: value for key, value in definition.space.items() if key.startswith(f"{stage}.")}
        _check_part(definition, SETTINGS_OF[stage], space, definition.settings_of(stage, {}), f"{stage}.")


def _check_part(
    definition: FinetuneStudy,
    settings: type[TrainingSettings] | type[DistillSettings],
    space: Mapping[str, Any],
    fixed: Mapping[str, Any],
    prefix: str,
) -> None:
    def check(values: Mapping[str, Any]) -> None:
        try:
            settings(**{**fixed, **values})
        except (ValueError, TypeError) as error:
            raise StudyFileError(f"Study {definition.name!r}: {prefix}{error}") from error

    known = {field.name for field in dataclasses.fields(settings)} - {"seed"}
    if unknown := sorted((set(space) | set(fixed)) - known):
        raise StudyFileError(
            f"Study {definition.name!r} sets {', '.join(prefix + name for name in unknown)}, which training does not "
            f"have; choose from {', '.join(sorted(known))}."
        )
    for name, declared in space.items():
        for value in declared.choices if isinstance(declared, Choices) else _outermost(declared):
            check({name: value})
    check({})


def _outermost(declared: Range) -> list[int | float]:
    """The bounds of a range, and the second value where it has steps, which may be no whole number."""
    second = [] if declared.step is None else [min(declared.low + declared.step, declared.high)]
    return [declared.low, declared.high, *second]


def _check_vocabularies(loaded: LoadedWorkload, teacher_source: str) -> None:
    ours, theirs = loaded.tokenizer.get_vocab(), load_tokenizer(teacher_source).get_vocab()
    if ours == theirs:
        return
    differing = next(iter(sorted(set(ours.items()) ^ set(theirs.items()))))[0]
    raise HpoError(
        f"The teacher {teacher_source} and the student {loaded.workload.model} have different vocabularies of "
        f"{len(theirs)} and {len(ours)} tokens (first difference: {differing!r}); choose two of one tokenizer."
    )


def _check_labels(loaded: LoadedWorkload, teacher_source: str) -> None:
    names = loaded.corpus.label_names
    theirs = differing_labels(teacher_source, names)
    if not theirs:
        return
    known, found = listed_labels(theirs), listed_labels(names)
    if names != tuple(str(number) for number in range(len(theirs))):
        raise HpoError(
            f"The teacher {teacher_source} knows the labels {known}, the dataset has {found}; choose a teacher that "
            "was fine-tuned on this dataset."
        )
    logger.warning("The study takes %s for the teacher's labels %s, in this order.", found, known)
