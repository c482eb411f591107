import dataclasses
import pickle
import re
from pathlib import Path

import pytest

from studies.loader import (
    FOLDER,
    SAMPLERS,
    Choices,
    FinetuneStudy,
    LengthsStudy,
    Range,
    StudyFileError,
    built_in,
    load,
    load_finetune,
    load_lengths,
)

FINETUNE = (Path(__file__).parent / "sample_finetune.toml").read_text(encoding="utf-8")
LENGTHS = """
kind = "lengths"
name = "lengths"
[retention]
low = 0.2
high = 1.0
step = 0.05
[sampler]
name = "nsga2"
population_size = 50
crossover = "uniform"
crossover_prob = 0.9
swapping_prob = 0.5
# mutation_prob = 0.17
[early_stopping]
blocks = 4
confidence = 3.0
"""
EPOCHS = "epochs = { low = 2, high = 4 }"
BATCH_SIZES = "batch_size = { choices = [16, 32, 64] }"
RETENTION = "low = 0.2\nhigh = 1.0\nstep = 0.05"


def edited(text, old, new):
    assert text.count(old) >= 1, f"the file no longer says {old!r}"
    return text.replace(old, new, 1)


@pytest.fixture
def write(tmp_path):
    def write(content, name="my.toml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refusal(path):
    """The sentence that a file is refused with: it names the file, and stays on one line."""
    with pytest.raises(StudyFileError) as caught:
        load(path)
    sentence = str(caught.value)
    assert path in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert not re.search(r"__init__|unexpected keyword|not supported between|studies\.loader", sentence)
    return sentence


# The files that come with the tool


@pytest.mark.parametrize("name", built_in())
def test_a_definition_can_be_sent_to_another_process(name):
    definition = load(name)
    assert pickle.loads(pickle.dumps(definition)) == definition


def test_built_in_studies_are_those_of_the_folder():
    assert {"finetune", "lengths"} <= set(built_in())
    assert {f"{name}.toml" for name in built_in()} == {path.name for path in FOLDER.iterdir() if path.suffix == ".toml"}


@pytest.mark.parametrize("name", built_in())
def test_every_built_in_study_loads_by_its_name_and_by_its_path(name):
    assert load(name) == load(str(FOLDER / f"{name}.toml"))


def test_the_built_in_finetune_study_reads_as_written():
    study = load_finetune("finetune")
    assert (study.name, study.objective, study.multivariate) == ("finetune", "area", True)
    assert (study.startup_trials, study.pruner_startup_trials, study.pruner_warmup_epochs) == (8, 4, 2)
    assert study.space["learning_rate"] == Range(low=3e-5, high=1e-4, log=True)
    assert study.space["batch_size"] == Choices(choices=(16, 32))
    assert study.space["length_drop"] == Range(low=0.1, high=0.4)
    assert study.fixed["divergence"] == "forward"
    assert study.first[0]["learning_rate"] == 5e-5


def test_the_built_in_finetune_study_first_tries_a_value_for_every_parameter():
    study = load_finetune("finetune")
    assert [set(parameters) for parameters in study.first] == [set(study.space)]


@pytest.mark.parametrize("name", ["finetune", "finetune-demo", "distill"])
def test_trials_of_a_built_in_study_may_be_stopped_before_their_last_epoch(name):
    study = load_finetune(name)
    last = study.settings_of("lengthdrop", study.space) if study.kind == "distill" else {**study.fixed, **study.space}
    epochs = last["epochs"].low if isinstance(last["epochs"], Range) else last["epochs"]
    assert study.pruner_warmup_epochs < last["plain_epochs"] + epochs


def test_a_study_that_names_no_objective_searches_the_area(tmp_path):
    (tmp_path / "mine.toml").write_text('kind = "finetune"\n[space]\nepochs = { low = 1, high = 2 }')
    assert load_finetune(str(tmp_path / "mine.toml")).objective == "area"


def test_the_built_in_lengths_study_reads_as_written():
    assert load_lengths("lengths") == LengthsStudy(
        name="lengths",
        retention=Range(low=0.05, high=1.0, step=0.05),
        sampler="surrogate",
        population_size=25,
        brood=150,
        blocks=8,
        confidence=2.5,
    )


def test_a_lengths_study_reads_as_written(write):
    assert load_lengths(write(LENGTHS)) == LengthsStudy(
        name="lengths",
        retention=Range(low=0.2, high=1.0, step=0.05),
        sampler="nsga2",
        population_size=50,
        crossover="uniform",
        crossover_prob=0.9,
        swapping_prob=0.5,
        mutation_prob=None,
        blocks=4,
        confidence=3.0,
    )


def test_depth_is_searched_where_layers_are_listed(write):
    assert load_lengths(write(LENGTHS)).skippable == ()
    assert load_lengths(write(LENGTHS + "[depth]\n")).skippable == ()
    assert load_lengths(write(LENGTHS + "[depth]\nlayers = []\n")).skippable == ()
    assert load_lengths(write(LENGTHS + "[depth]\nlayers = [4, 1]\n")).skippable == (4, 1)


@pytest.mark.parametrize(
    ("depth", "says"),
    [
        ("depth = 3", "depth=3; write it as a table, [depth]"),
        ("[depth]\nskip = true", "[depth] has no setting skip; it takes layers"),
        ("[depth]\nlayers = 2", "[depth] layers=2; list the layers that may be skipped, from 0"),
        ("[depth]\nlayers = true", "[depth] layers=True; list the layers"),
        ('[depth]\nlayers = "all"', "[depth] layers='all'; list the layers"),
        ("[depth]\nlayers = [1.0]", "[depth] layers=[1.0]; list the layers"),
        ("[depth]\nlayers = [true]", "[depth] layers=[True]; list the layers"),
        ('[depth]\nlayers = ["1"]', "[depth] layers=['1']; list the layers"),
        ("[depth]\nlayers = [1, -1]", "[depth] layers=[1, -1]; list the layers"),
        ("[depth]\nlayers = [2, 1, 2]", "[depth] layers=[2, 1, 2] names a layer twice"),
    ],
)
def test_impossible_layers_are_refused(write, depth, says):
    assert says in refusal(write(LENGTHS + depth if depth.startswith("[") else f"{depth}\n{LENGTHS}"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_can_be_named_alone(write, sampler):
    text = f'kind = "lengths"\n[retention]\nlow = 0.4\nhigh = 1.0\n[sampler]\nname = "{sampler}"\n'
    assert load_lengths(write(text)).sampler == sampler


# Copies of one's own


def test_an_edited_copy_loads_by_its_path(write):
    study = load_finetune(write(edited(FINETUNE, "low = 3e-5, high = 3e-4, log = true", "low = 1e-5, high = 1e-3")))
    assert study.space["learning_rate"] == Range(low=1e-5, high=1e-3)
    path = write(edited(LENGTHS, "# mutation_prob = 0.17", "mutation_prob = 0.25"))
    assert load_lengths(path).mutation_prob == 0.25


def test_a_file_without_a_name_is_called_after_the_file(write):
    assert load(write(edited(LENGTHS, 'name = "lengths"', ""), "week-2.toml")).name == "week-2"


def test_only_space_and_objective_are_required_of_a_finetune_study(write):
    study = load(write('kind = "finetune"\nobjective = "metric"\n[space]\nepochs = { low = 1, high = 3 }\n'))
    assert study == FinetuneStudy(name="my", objective="metric", space={"epochs": Range(low=1, high=3)})


@pytest.mark.parametrize(
    ("declared", "whole"),
    [
        (Range(low=1, high=4), True),
        (Range(low=1, high=5, step=2), True),
        (Range(low=1.0, high=4), False),
        (Range(low=1, high=4.0), False),
        (Range(low=1, high=4, step=0.5), False),
    ],
)
def test_a_range_is_whole_only_where_all_its_numbers_are(declared, whole):
    assert declared.whole is whole


def test_a_stepped_range_holds_its_grid_alone():
    # 0.4 + k * 0.05 in decimal, which binary floating point only approximates
    inside = [value / 100 for value in range(40, 101, 5)]
    declared = Range(low=0.4, high=1.0, step=0.05)
    assert all(value in declared for value in inside)
    assert not any(value in declared for value in (0.35, 0.42, 0.975, 1.05, True, "0.5"))


def test_a_word_is_not_taken_for_a_list_of_letters(write):
    sentence = refusal(write(edited(FINETUNE, BATCH_SIZES, 'batch_size = { choices = "abc" }')))
    assert "choices='abc'" in sentence
    with pytest.raises(StudyFileError):
        Choices(choices="abc")


# The fingerprint: what makes the values of two studies comparable


def test_fingerprints_are_the_same_for_equal_declarations(write):
    built_in_text = (FOLDER / "finetune.toml").read_text(encoding="utf-8")
    assert load("finetune").space_fingerprint() == load(write(built_in_text)).space_fingerprint()
    as_built_in = edited(LENGTHS, "low = 0.2", "low = 0.05")
    assert load("lengths").space_fingerprint() == load(write(as_built_in)).space_fingerprint()


def test_a_retention_of_one_may_be_written_whole(write):
    whole = load_lengths(str(write(edited(LENGTHS, "high = 1.0", "high = 1"))))
    assert whole.space_fingerprint() == load_lengths(str(write(LENGTHS))).space_fingerprint()
    assert isinstance(whole.retention.high, float)


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (FINETUNE, EPOCHS, "epochs = { low = 2, high = 5 }"),
        (FINETUNE, BATCH_SIZES, "batch_size = { choices = [32, 64] }"),
        (FINETUNE, "low = 3e-5, high = 3e-4, log = true", "low = 3e-5, high = 3e-4"),
        (FINETUNE, "plain_epochs = 1", "plain_epochs = 2"),
        (FINETUNE, "max_grad_norm = 1.0", ""),
        (FINETUNE, 'objective = "area"', 'objective = "metric"'),
        (LENGTHS, "low = 0.2", "low = 0.5"),
        (LENGTHS, "step = 0.05", "step = 0.1"),
        (LENGTHS, "step = 0.05", ""),
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_values(write, text, old, new):
    assert load(write(edited(text, old, new))).space_fingerprint() != load(write(text)).space_fingerprint()


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (FINETUNE, 'name = "finetune"', 'name = "another"'),
        (FINETUNE, "startup_trials = 8", "startup_trials = 3"),
        (FINETUNE, "warmup_epochs = 2", "warmup_epochs = 1"),
        (FINETUNE, "learning_rate = 1e-4", "learning_rate = 2e-4"),
        (LENGTHS, 'name = "lengths"', 'name = "another"'),
        (LENGTHS, "population_size = 50", "population_size = 20"),
        (LENGTHS, 'crossover = "uniform"', 'crossover = "sbx"'),
    ],
)
def test_the_fingerprint_ignores_how_the_space_is_searched(write, text, old, new):
    study = load(write(edited(text, old, new)))
    assert study != load(write(text))
    assert study.space_fingerprint() == load(write(text)).space_fingerprint()


def test_the_fingerprint_without_depth_is_that_of_studies_made_before_there_was_any(write):
    """So that they can be continued."""
    before = "94f869380b2e4c718c4f313d7afccf8452b7d79e2f9ade4af74ce629a42b8c2f"
    assert load_lengths("lengths").space_fingerprint() == before


def test_the_fingerprint_depends_on_which_layers_may_be_skipped_in_any_order(write):
    texts = (LENGTHS, LENGTHS + "[depth]\nlayers = [1, 2]", LENGTHS + "[depth]\nlayers = [1, 3]")
    assert len({load(write(text)).space_fingerprint() for text in texts}) == 3
    reordered = load(write(LENGTHS + "[depth]\nlayers = [2, 1]"))
    assert reordered.space_fingerprint() == load(write(texts[1])).space_fingerprint()


# The wrong study for a command


def test_loading_finetune_for_lengths_says_which_command_runs_it():
    with pytest.raises(StudyFileError, match=r"run it with `hpo tune --study finetune`"):
        load_lengths("finetune")


def test_loading_lengths_for_tuning_says_which_command_runs_it():
    with pytest.raises(StudyFileError, match=r"run it with `hpo search-lengths --study lengths`"):
        load_finetune("lengths")


# Bad files


@pytest.mark.parametrize("name", ["nosuch", "", "../studies/finetune", "/etc"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(StudyFileError, match=f"There is no study {re.escape(repr(name))}") as caught:
        load(name)
    assert "choose distill or finetune or lengths, or give the path of a .toml file." in str(caught.value)


@pytest.mark.parametrize(("read", "known"), [(load_finetune, "distill or finetune"), (load_lengths, "lengths")])
def test_an_unknown_name_lists_those_that_the_command_runs(read, known):
    with pytest.raises(StudyFileError, match=f"There is no study 'nosuch'; choose {known}, or give the path"):
        read("nosuch")


def test_a_file_that_is_absent_or_a_folder_is_refused_with_a_place_to_copy_from(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    for name in ("absent.toml", "folder.toml"):
        assert f"copy one from {FOLDER}" in refusal(str(tmp_path / name))


def test_a_path_too_long_for_the_system_is_refused():
    with pytest.raises(StudyFileError, match="is no path of a study file"):
        load("x" * 5000 + ".toml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"name = '\xff'", "can't decode byte 0xff"),
        ("kind = ", "is not valid TOML"),
        ('kind = "finetune"\nkind = "finetune"', "is not valid TOML"),
        ("", "names no kind"),
        ('kind = "other"', "kind='other'"),
        ("kind = 3", "kind=3"),
        ('kind = ["finetune"]', "kind=['finetune']"),
        ('kind = "finetune"\nobjective = "area"', "[space] declares nothing"),
        ('kind = "finetune"\nobjective = "area"\nspace = 3', "space=3"),
        ('kind = "finetune"\nobjective = "area"\nfirst = [3]', "first=[3]"),
        ('kind = "lengths"', "lacks retention"),
        ('kind = "lengths"\nretention = 0.5', "retention=0.5"),
    ],
)
def test_a_file_that_declares_no_study_is_refused(write, content, says):
    assert says in refusal(write(content))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        # unknown settings
        ('kind = "finetune"', 'kind = "finetune"\nbogus = 1', "no setting bogus"),
        ("multivariate = true", "multivariat = true", "[sampler] has no setting multivariat"),
        ("multivariate = true", 'name = "x"', "[sampler] has no setting name"),
        ("warmup_epochs = 2", "bogus = 2", "[pruner] has no setting bogus"),
        (EPOCHS, "epochs = { low = 2, hihg = 4 }", "epochs: a range has no setting hihg"),
        (
            EPOCHS,
            "epochs = { low = 2, high = 4, choices = [1] }",
            "epochs: a parameter with choices has no setting high",
        ),
        # wrong types
        ("multivariate = true", 'multivariate = "yes"', "multivariate='yes'"),
        ("multivariate = true", "multivariate = 1", "multivariate=1"),
        ("startup_trials = 8", "startup_trials = 8.0", "startup_trials=8.0"),
        ("startup_trials = 8", "startup_trials = true", "startup_trials=True"),
        ("startup_trials = 8", "startup_trials = -1", "startup_trials=-1"),
        ("startup_trials = 4", "startup_trials = -4", "startup_trials=-4"),
        ("warmup_epochs = 2", 'warmup_epochs = "2"', "warmup_epochs='2'"),
        ('objective = "area"', 'objective = "speed"', "objective='speed'"),
        ('objective = "area"', 'objective = ["area"]', "objective=['area']"),
        # ranges
        (EPOCHS, "epochs = { low = 4, high = 2 }", "epochs: low=4 is above high=2"),
        (EPOCHS, f"epochs = {{ low = 2, high = 1{'0' * 400} }}", "is not a finite number"),
        (EPOCHS, f"epochs = {{ low = 2, high = 1{'0' * 5000} }}", "is not valid TOML"),
        (EPOCHS, "epochs = { low = 2 }", "epochs: a range lacks high"),
        (EPOCHS, "epochs = {}", "epochs: a range lacks low and high"),
        (EPOCHS, 'epochs = { low = "2", high = 4 }', "epochs: low='2'"),
        (EPOCHS, "epochs = { low = true, high = 4 }", "epochs: low=True"),
        (EPOCHS, "epochs = { low = nan, high = 4 }", "epochs: low=nan"),
        (EPOCHS, "epochs = { low = 2, high = inf }", "epochs: high=inf"),
        (EPOCHS, "epochs = { low = 0, high = 4, log = true }", "epochs: low=0"),
        (EPOCHS, "epochs = { low = -1, high = 4, log = true }", "epochs: low=-1"),
        (EPOCHS, 'epochs = { low = 2, high = 4, log = "yes" }', "epochs: log='yes'"),
        (EPOCHS, "epochs = { low = 2, high = 4, log = true, step = 1 }", "epochs: low=2 and step=1"),
        (EPOCHS, "epochs = { low = 2, high = 4, step = 0 }", "epochs: step=0"),
        (EPOCHS, "epochs = { low = 2, high = 4, step = -1 }", "epochs: step=-1"),
        (EPOCHS, 'epochs = { low = 2, high = 4, step = "1" }', "epochs: step='1'"),
        (EPOCHS, "epochs = { low = 2, high = 4, step = true }", "epochs: step=True"),
        (EPOCHS, "epochs = { low = 2, high = 4, step = inf }", "epochs: step=inf"),
        (EPOCHS, "epochs = { low = 2, high = 4, step = 3 }", "epochs: step=3 does not lead from low=2 to high=4"),
        # choices
        (BATCH_SIZES, "batch_size = { choices = [] }", "batch_size: choices=[]"),
        (BATCH_SIZES, "batch_size = { choices = 16 }", "batch_size: choices=16"),
        (BATCH_SIZES, "batch_size = { choices = [[16], [32]] }", "batch_size: choices=[[16], [32]]"),
        (BATCH_SIZES, "batch_size = { choices = { a = 1 } }", "batch_size: choices={'a': 1}"),
        (BATCH_SIZES, "batch_size = { choices = [16, nan] }", "batch_size: choices=[16, nan]"),
        (BATCH_SIZES, "batch_size = { choices = [32, 32] }", "batch_size: choices=[32, 32] holds a value twice"),
        (BATCH_SIZES, "batch_size = 32", "batch_size=32 needs low and high, or choices"),
        # what is fixed
        ("plain_epochs = 1", "epochs = 1", "epochs stands both in [space] and in [fixed]"),
        ("plain_epochs = 1", "plain_epochs = [1]", "[fixed] sets plain_epochs=[1]"),
        ("plain_epochs = 1", "plain_epochs = nan", "[fixed] sets plain_epochs=nan"),
        # what is tried first
        ("learning_rate = 1e-4", "learning_rate = 1.0", "[[first]] number 1 sets learning_rate=1.0"),
        ("learning_rate = 1e-4", 'learning_rate = "x"', "[[first]] number 1 sets learning_rate='x'"),
        ("batch_size = 32", "batch_size = 33", "[[first]] number 1 sets batch_size=33"),
        ("batch_size = 32", "batch_size = [32]", "[[first]] number 1 sets batch_size=[32]"),
        ("batch_size = 32", "bogus = 33", "[[first]] number 1 sets bogus, which [space] does not search"),
        ("epochs = 2\n", "epochs = 2.5\n", "[[first]] number 1 sets epochs=2.5"),
        ("epochs = 2\n", "epochs = true\n", "[[first]] number 1 sets epochs=True"),
        ("[[first]]", "[first]", "write one [[first]] table per parameter set"),
    ],
)
def test_a_finetune_study_that_declares_something_impossible_is_refused(write, old, new, says):
    assert says in refusal(write(edited(FINETUNE, old, new)))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('kind = "lengths"', 'kind = "lengths"\npopulation_size = 10', "no setting population_size"),
        ("population_size = 50", "bogus = 50", "[sampler] nsga2 has no setting bogus; it takes population_size"),
        ("population_size = 50", "brood = 50", "[sampler] nsga2 has no setting brood"),
        ('name = "nsga2"', 'name = "lat"', "[sampler] lat has no setting crossover, crossover_prob, swapping_prob"),
        ('name = "nsga2"', 'name = "nsga3"', "[sampler] name='nsga3'; choose one of surrogate, nsga2"),
        ('name = "nsga2"', 'name = "cmaes"\nsigma = 0.1', "[sampler] name='cmaes'; choose one of surrogate, nsga2"),
        ('name = "nsga2"', "name = 3", "[sampler] name=3"),
        ('name = "nsga2"', 'name = ["nsga2"]', "[sampler] name=['nsga2']; choose one of surrogate, nsga2"),
        ("[retention]", 'cost = "time"\n[retention]', "cost='time'; choose one of macs, latency, both"),
        ("[retention]", 'cost = ["macs"]\n[retention]', "cost=['macs']; choose one of macs, latency, both"),
        ("[retention]", "[latency]\nbatch_size = 0\n[retention]", "[latency] batch_size=0; choose a whole number"),
        ("[retention]", '[latency]\nprecision = "fp8"\n[retention]', "precision='fp8'; choose one of fp32, bf16"),
        ("[retention]", "[latency]\nthreads = 2\n[retention]", "[latency] has no setting threads"),
        ("blocks = 4", "blocks = 0", "blocks=0; choose a whole number from 1 up"),
        ("confidence = 3.0", "confidence = 0", "confidence=0; choose a number of standard errors above 0"),
        ("confidence = 3.0", "patience = 3", "[early_stopping] has no setting patience"),
        (RETENTION, "low = 0.2\nhigh = 0.9\nstep = 0.05", "[retention] runs from 0.2 to 0.9"),
        (RETENTION, f"low = 0.2\nhigh = 1.0\nstep = 1{'0' * 400}", "is not a finite number"),
        (RETENTION, "low = 0.2\nhigh = 1.5\nstep = 0.05", "[retention] runs from 0.2 to 1.5"),
        (RETENTION, "low = 0.0\nhigh = 1.0\nstep = 0.05", "[retention] runs from 0.0 to 1.0"),
        (RETENTION, "low = -0.5\nhigh = 1.0\nstep = 0.05", "[retention] runs from -0.5 to 1.0"),
        (RETENTION, "low = 1.0\nhigh = 1.0", "[retention] runs from 1.0 to 1.0"),
        (RETENTION, "low = 0.2\nhigh = 1.0\nlog = true", "[retention] cannot be logarithmic"),
        (
            RETENTION,
            "low = 0.2\nhigh = 1.0\nstep = 0.07",
            "retention: step=0.07 does not lead from low=0.2 to high=1.0",
        ),
        (
            RETENTION,
            "low = 0.3333333333\nhigh = 1.0\nstep = 0.1666666667",
            "retention: step=0.1666666667 does not lead from low=0.3333333333 to high=1.0",
        ),
        (RETENTION, "low = 0.2\nhigh = 1.0\nstep = 1e-30", "retention: step=1e-30 does not lead from low=0.2"),
        (RETENTION, "choices = [0.5, 1.0]", "[retention] lists choices"),
        (RETENTION, "low = 0.2", "retention: a range lacks high"),
        ("population_size = 50", "population_size = 3", "population_size=3"),
        ("population_size = 50", "population_size = 50.0", "population_size=50.0"),
        ("population_size = 50", 'population_size = "50"', "population_size='50'"),
        ('crossover = "uniform"', 'crossover = "two-point"', "crossover='two-point'"),
        ('crossover = "uniform"', 'crossover = ["uniform"]', "crossover=['uniform']"),
        *(
            (old, f"{key} = {value}", f"{key}={shown}")
            for key, old in (
                ("crossover_prob", "crossover_prob = 0.9"),
                ("swapping_prob", "swapping_prob = 0.5"),
                ("mutation_prob", "# mutation_prob = 0.17"),
            )
            for value, shown in (
                ("1.5", "1.5"),
                ("-0.1", "-0.1"),
                ('"0.5"', "'0.5'"),
                ("true", "True"),
                ("nan", "nan"),
            )
        ),
    ],
)
def test_a_lengths_study_that_declares_something_impossible_is_refused(write, old, new, says):
    assert says in refusal(write(edited(LENGTHS, old, new)))


@pytest.mark.parametrize(
    "name",
    ['"a/b"', "'a\"b'", '"a\'b"', '".."', '".hidden"', '""', '"a b"', '"é"', '"a\\n"', '"' + "x" * 65 + '"', "3"],
)
@pytest.mark.parametrize(("text", "old"), [(FINETUNE, 'name = "finetune"'), (LENGTHS, 'name = "lengths"')])
def test_a_name_that_could_not_be_a_folder_is_refused(write, text, old, name):
    assert "name=" in refusal(write(edited(text, old, f"name = {name}")))


def test_the_longest_name_is_accepted(write):
    assert load(write(edited(LENGTHS, 'name = "lengths"', f'name = "{"x" * 64}"'))).name == "x" * 64


def test_a_file_name_that_cannot_name_a_study_is_refused_where_the_file_names_none(write):
    assert "name='my study'" in refusal(write(edited(LENGTHS, 'name = "lengths"', ""), "my study.toml"))


# Distillation


DISTILL = """
kind = "distill"
name = "mine"
[space.logits]
temperature = { low = 1.0, high = 4.0 }
[fixed.intermediate]
epochs = 2
layer_map = [1, 3]
[fixed.logits]
epochs = 1
[[first]]
logits = { temperature = 2.0 }
"""


def test_settings_of_a_distillation_belong_to_its_stages(write):
    study = load_finetune(write(DISTILL))
    assert study.kind == "distill"
    assert study.space == {"logits.temperature": Range(low=1.0, high=4.0)}
    assert study.first == ({"logits.temperature": 2.0},)
    parameters = {"logits.temperature": 3.0}
    assert study.settings_of("intermediate", parameters) == {"epochs": 2, "layer_map": (1, 3)}
    assert study.settings_of("logits", parameters) == {"epochs": 1, "temperature": 3.0}
    assert study.settings_of("lengthdrop", parameters) == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[space.logits]", "[space.last]", r"\[space\] has no setting last; it takes intermediate, logits, lengthdrop"),
        ("[fixed.logits]\nepochs = 1", "[fixed]\nlogits = 1", r"logits=1; write it as a table, \[fixed.logits\]"),
        ("layer_map = [1, 3]", 'layer_map = ["a"]', r"sets intermediate.layer_map=\['a'\]; write a number"),
        ("temperature = 2.0", "temperature = 5.0", "sets logits.temperature=5.0, outside its range"),
        ('kind = "distill"', 'kind = "distil"', 'write kind = "finetune", "distill" or "lengths"'),
    ],
)
def test_a_distillation_that_declares_something_impossible_is_refused(write, old, new, message):
    assert re.search(message, refusal(write(edited(DISTILL, old, new))))


def test_time_as_a_cost_reads_as_written(write):
    assert load_lengths(write(LENGTHS)).costs == ("macs",)
    text = edited(LENGTHS, "[retention]", '[latency]\nbatch_size = 1\nprecision = "bf16"\n[retention]')
    study = load_lengths(write(edited(text, "[latency]", 'cost = "both"\n[latency]')))
    assert (study.cost, study.latency_batch_size, study.latency_precision) == ("both", 1, "bf16")
    assert study.costs == ("macs", "latency_ms")


def test_only_what_decides_the_costs_is_their_identity(write):
    assert load_lengths(write(LENGTHS)).cost_identity() == {}
    timed = load_lengths(write(edited(LENGTHS, "[retention]", 'cost = "latency"\n[retention]')))
    single = dataclasses.replace(timed, latency_batch_size=1)
    both = dataclasses.replace(timed, cost="both")
    assert len({study.cost_identity()["cost"] for study in (timed, single, both)}) == 3
    assert {study.space_fingerprint() for study in (timed, single, both)} == {
        load_lengths(write(LENGTHS)).space_fingerprint()
    }
