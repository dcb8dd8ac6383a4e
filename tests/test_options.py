"""Components as words: their options, their errors, and what a word takes from the word beneath."""

import re
from dataclasses import dataclass

import pytest
import yaml
from helpers import ROOT, SMALL, config_of_command

import sample
from checkpoints import config_of
from diffusion import OBJECTIVES
from models import DiT, DiT_models
from moe import SparseMoEBlock
from options.parts import Component, Config, Option, Word, option, options_of
from options.settings import flags_of, over, read
from routers import ROUTERS
from runtime.errors import UserError
from training.auxiliary import AUXILIARY_LOSSES
from training.config import training_flags
from training.ema import EMAS
from training.lr_schedule import SCHEDULES
from training.optimizers import OPTIMIZERS


class Sample(Component):
    """A component with options of all types."""

    number: float = option(0.5, ge=0, help="a number")
    count: int = option(3, ge=1, le=9, help="an integer")
    is_wide: bool = option(False, help="on or off")
    path: str = option("a", help="text")
    pair: tuple[float, float] = option((0.9, 0.99), lt=1, help="two numbers")
    names: tuple[str, ...] = option((), help="any number of words")
    limit: float | None = option(None, gt=0, help="a number, or none")
    file: str | None = option(None, help="text, or none")
    numbers: tuple[float, ...] | None = option(None, help="any number of numbers, or none")


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    sample: Word = option("sample", table={"sample": Sample}, help="one")
    several: tuple[Word, ...] = option((), table={"sample": Sample}, help="any number")


def read_word(word) -> Word:
    return Word.parse(word, {"sample": Sample})


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("sample", {}),
        ("sample:number=2,count=4", {"number": 2.0, "count": 4}),
        ("sample:number=1e-3, count = 4", {"number": 1e-3, "count": 4}),
        ("sample:is-wide=True", {"is_wide": True}),
        ("sample:is_wide=0,limit=None,file=None", {"is_wide": False, "limit": None, "file": None}),
        ("sample:limit=2", {"limit": 2.0}),
        ("sample:pair=0.5,0.6,count=2", {"pair": (0.5, 0.6), "count": 2}),
        ("sample:names=a,b,path=c", {"names": ("a", "b"), "path": "c"}),
        ("sample:names=,path=", {"names": (), "path": ""}),
        ("sample:path=C:/data", {"path": "C:/data"}),
        ("sample:path='a,b=c:d',names=\"it's\",x", {"path": "a,b=c:d", "names": ("it's", "x")}),
    ],
)
def test_a_word_gives_options_their_types(word, options):
    read = read_word(word)
    assert read == Word("sample", options)
    assert list(map(type, read.options.values())) == list(map(type, options.values()))


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("other", "got 'other', expected one of sample"),
        ("sample:speed=2", "sample:speed, but sample has number, count"),
        ("sample:count=2.5", "sample:count: got '2.5', expected an integer"),
        ("sample:count=10", "sample:count: got 10, expected an integer at least 1 and at most 9"),
        ("sample:number=nan", "sample:number: got 'nan'"),
        ("sample:number=1,2", "sample:number: got"),
        ("sample:pair=0.5", "sample:pair: got '0.5', expected 2 numbers"),
        ("sample:is_wide=maybe", "sample:is_wide: got 'maybe', expected True or False"),
        ("sample:count=1,count=2", "count twice"),
        ("sample:path='a", "a quote without its end"),
        ("sample:3", "expected sample:OPTION=VALUE"),
        ({"sample": {"count": 2}}, "expected a word such as sample:OPTION=VALUE"),
    ],
)
def test_a_wrong_word_is_an_error_that_names_the_option(word, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        read_word(word)
    with pytest.raises(ValueError, match="^sample: "):
        SampleConfig(sample=word)


AWKWARD = ("", " x ", "a,b", "a=b", "a:b", "it's", '"', "None ", "0", "True", "x\ny")


@pytest.mark.parametrize(
    "options",
    [
        {"pair": (0.0, 0.25), "names": (), "limit": 1e-8, "number": 1 / 3, "is_wide": True},
        *({"path": text, "file": text, "names": (text, "b", text)} for text in AWKWARD),
        *({"names": names, "numbers": () if names else None} for names in ((), ("",), ("", ""))),
    ],
)
def test_a_component_is_equal_after_it_was_written_as_a_word(options):
    word = Word("sample", options).complete({"sample": Sample})
    assert read_word(str(word)) == word
    assert read_word(yaml.safe_load(yaml.safe_dump(str(word)))) == word


TABLES = {
    "router": ROUTERS, "objective": OBJECTIVES, "optimizer": OPTIMIZERS, "ema": EMAS,
    "auxiliary": AUXILIARY_LOSSES, "lr_schedule": SCHEDULES,
}  # fmt: skip


@pytest.mark.parametrize("flag", TABLES)
def test_every_component_is_equal_after_it_was_written_as_a_word(flag):
    """With its defaults, and with another value for each option."""
    table = TABLES[flag]
    assert training_flags()[flag].table is table
    ours = ("routers", "diffusion", "training")  # other tests may have added their own
    for name, kind in table.items():
        if kind.__module__.partition(".")[0] not in ours:
            continue
        changed = {one.name: another_value(one) for one in options_of(kind).values()}
        for word in (Word(name), Word(name, changed)):
            word = word.complete(table)
            assert Word.parse(str(word), table) == word
            assert list(word.options) == list(options_of(kind))


def another_value(one: Option):
    """A valid value of an option, other than the default."""
    if one.choices:
        return next(choice for choice in one.choices if choice != one.default)
    if isinstance(one.default, bool):
        return not one.default
    if isinstance(one.default, tuple):
        return tuple(value / 2 for value in one.default)
    candidates = (one.default + 0.0625, one.default - 0.0625, one.default + 1)
    for value in candidates:
        try:
            if one.read(value) != one.default:
                return value
        except ValueError:
            continue
    raise AssertionError(one)


def test_a_word_keeps_the_options_beneath_if_it_names_the_same_component():
    flags = flags_of(SampleConfig)

    def above(top: dict, beneath: dict) -> dict:
        return over(read(top, flags), read(beneath, flags))

    beneath = {"sample": "sample:count=2,number=3"}
    assert above({"sample": "sample:count=4"}, beneath)["sample"].options == {
        "count": 4, "number": 3.0
    }  # fmt: skip
    several = {"several": ["sample:count=4"]}
    assert str(above(several, {"several": ["sample:path=x"]})["several"][0]) == (
        "sample:path=x,count=4"
    )
    two = {"several": ["sample:path=x", "sample:path=y"]}  # neither of them is meant
    assert str(above(several, two)["several"][0]) == "sample:count=4"


def test_a_word_for_another_component_drops_the_options_beneath(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("router: sigmoid:scale=2.5\nlr_schedule: trapezoid:lr_floor=0.1\n")
    config = config_of_command("--config", recipe, "--router", "race", "--lr-schedule", "cosine")
    assert str(config.model.router) == "race:input=modulated,momentum=0.99"
    assert str(config.step.lr_schedule) == "cosine:lr_floor=0.0"


def test_models_take_the_word_of_a_router():
    """A preset's options hold where the word says nothing."""
    model = DiT(router="sigmoid:scale=3", input_size=8, num_experts=4, **SMALL)
    layer = SparseMoEBlock(32, 4, 2, router="sigmoid:scale=3")
    for gate in (model.blocks[1].moe.gate, layer.gate):
        assert gate.scale == 3 and gate.bias_step == 0.001
    word = {"router": "sigmoid:scale=3"}
    sizes = dict(hidden_size=32, num_heads=2, depth=5, input_size=32)
    small = DiT_models["JiTMoE-B/16"](**word, **sizes)
    for config in (config_of("JiTMoE-B/16", **word), small.config):
        assert config.router.options == {"input": "modulated", "scale": 3.0, "bias_step": 0.0}


@pytest.mark.parametrize(
    "make",
    [lambda **fields: DiT(depth=1, **fields), DiT_models["DiT-S/2"],
     lambda **fields: config_of("DiT-S/2", **fields)],
)  # fmt: skip
def test_the_keyword_router_scale_is_answered_with_the_word(make):
    with pytest.raises(
        (ValueError, UserError), match='router_scale: unknown, expected router="sigmoid:scale='
    ):
        make(router="sigmoid", router_scale=3)


def test_the_flags_of_training_and_sampling_are_those_of_the_list():
    """A new flag fails until flags.txt has it; see CONTRIBUTING.md."""
    listed = {"training": [], "sample.py": []}
    for line in (ROOT / "tests" / "flags.txt").read_text().splitlines():
        if line in listed:
            flags = listed[line]
        elif line.startswith("    "):
            flags.append(line.strip())
    assert sorted(listed["training"]) == sorted(training_flags())
    assert sorted(listed["sample.py"]) == sorted(options_of(sample.SampleConfig))
