import json
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from kdcache.config import Options, library_versions, read_section, resolve_options, write_provenance
from kdcache.errors import ConfigError


class Dump(Options):
    output: str
    top_k: int = 64
    temperatures: tuple[float, ...] = (1.0, 2.0)
    seed: int | None = None


@pytest.fixture
def config(tmp_path):
    def write(content):
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        return str(path)

    return write


def resolve(config=None, **flags):
    return resolve_options(Dump, "dump-teacher", flags, config)


def test_later_places_win(config):
    path = config({"output": "from file", "top-k": 32})
    assert resolve(output="o").top_k == 64
    assert resolve(path).top_k == 32
    assert resolve(path, top_k=16).top_k == 16
    assert resolve(path, top_k=16).output == "from file"


def test_a_flag_that_is_not_given_does_not_win(config):
    assert resolve(config({"output": "o", "top_k": 32}), top_k=None).top_k == 32


@pytest.mark.parametrize("value", [0, False, ""])
def test_a_flag_that_is_given_and_falsy_wins(config, value):
    path = config({"output": "o", "top_k": 32})
    resolved = resolve(path, top_k=0) if value != "" else resolve(path, output="")
    assert (resolved.top_k, resolved.output) == ((0, "o") if value != "" else (32, ""))


@pytest.mark.parametrize("place", ["flag", "file", "section"])
def test_an_unknown_option_is_refused_with_the_nearest(config, place):
    flags = {"output": "o"} | ({"topk": 3} if place == "flag" else {})
    path = {"flag": None, "file": {"topk": 3}, "section": {"dump-teacher": {"topk": 3}}}[place]
    with pytest.raises(ConfigError, match="dump-teacher: there is no option 'topk'") as caught:
        resolve(None if path is None else config(path), **flags)
    assert caught.value.hint == "did you mean 'top_k'?"


def test_an_unknown_option_near_to_nothing(config):
    with pytest.raises(ConfigError) as caught:
        resolve(config({"zzzzzz": 1}))
    assert "known options: output, top_k" in caught.value.hint


def test_a_value_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"dump-teacher: top_k: .*valid integer.* \(found 'many'\)"):
        resolve(output="o", top_k="many")


def test_a_missing_option():
    with pytest.raises(ConfigError, match="--output is needed") as caught:
        resolve()
    assert caught.value.hint == "kdcache dump-teacher --help"


def test_one_file_tells_a_whole_story(config):
    path = config({"dump-teacher": {"output": "o", "top-k": 9}, "train-student": {"student": "s"}})
    assert resolve(path).top_k == 9
    assert read_section(path, "train-student") == {"student": "s"}
    assert read_section(path, "evaluate-student") == {}


@pytest.mark.parametrize("content", [b"", b"dump-teacher:\n", b"# nothing\n"])
def test_an_empty_file_or_section(config, content):
    assert resolve(config(content), output="o").top_k == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "a mapping of option names was expected, found list"),
        (b"just words", "found str"),
        (b"dump-teacher: [1, 2]\n", "found list"),
        (b"a: [1\n", "not YAML"),
        (b"a: \xff\xfe\n", "config file"),
        (b"1: {a: 2}\n", "there is no option '1'"),
        (b"!!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_files_that_are_no_config(config, content, message):
    with pytest.raises(ConfigError, match=message):
        resolve(config(content), output="o")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        resolve(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match="directory"):
        resolve(str(tmp_path))


def test_options_are_frozen():
    with pytest.raises(ValueError):
        resolve(output="o").top_k = 3


class Aliased(Options):
    model_config = {**Options.model_config, "populate_by_name": False}
    lambda_: float = Field(0.5, alias="lambda")


def test_an_option_whose_name_is_a_keyword(config):
    assert resolve_options(Aliased, "train-student", {"lambda": 0.25}, None).lambda_ == 0.25
    with pytest.raises(ConfigError, match="there is no option 'lambda_'"):
        resolve_options(Aliased, "train-student", {"lambda_": 0.25}, None)


@pytest.mark.parametrize("options", [Dump(output="é", top_k=7, seed=3), Dump(output="o")])
def test_what_is_written_repeats_the_run(tmp_path, options):
    write_provenance(tmp_path / "new", "run", "dump-teacher", options, "cpu")
    assert resolve(str(tmp_path / "new" / "run.yaml")) == options


def test_an_aliased_option_repeats_the_run(tmp_path):
    options = resolve_options(Aliased, "train-student", {"lambda": 0.25}, None)
    write_provenance(tmp_path, "run", "train-student", options, "cpu")
    assert resolve_options(Aliased, "train-student", {}, str(tmp_path / "run.yaml")) == options


def test_provenance_names_versions_device_and_command(tmp_path):
    write_provenance(tmp_path, "run", "dump-teacher", Dump(output="o"), "cuda:0")
    found = json.loads(Path(tmp_path / "run.provenance.json").read_text())
    assert found["device"] == "cuda:0" and found["command"] == "dump-teacher"
    assert found["options"]["top_k"] == 64
    assert set(found["versions"]) >= {"python", "kdcache", "torch", "transformers", "numpy"}


def test_versions_of_what_is_not_installed(monkeypatch):
    monkeypatch.setattr("kdcache.config.PACKAGES", ("numpy", "no-such-package"))
    versions = library_versions()
    assert versions["no-such-package"] == "not installed"
    assert versions["numpy"][0].isdigit()
