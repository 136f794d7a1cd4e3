from pathlib import Path

import pytest
from pydantic import BaseModel

from thumbloop.config import ServerConfig, ThumbloopSettings, TrainerConfig, load
from thumbloop.errors import SettingsError

KINDS = [ServerConfig, TrainerConfig]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def every_setting(kind: type[BaseModel], prefix: str = ""):
    """Yield (dotted name, field) of every setting and section."""
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from every_setting(field.annotation, f"{prefix}{name}.")


def test_everything_has_a_default():
    config = load(ServerConfig, None)
    assert (config.listen.host, config.listen.port) == ("127.0.0.1", 50051)
    assert config.metrics.port == 9464
    assert config.limits.max_candidates == 16
    assert load(TrainerConfig, None).metrics.port == 9465


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_says_what_it_means(kind: type[ThumbloopSettings]):
    silent = [name for name, field in every_setting(kind) if not field.description]
    assert silent == []


@pytest.mark.parametrize("kind", KINDS)
def test_settings_cannot_be_changed(kind: type[ThumbloopSettings]):
    with pytest.raises(ValueError, match="frozen"):
        load(kind, None).seed = 3


def test_a_file_sets_what_it_names_and_leaves_the_rest(file: Path):
    file.write_text("guidance: {audit_share: 0.5}\nstate:\n  folder: elsewhere\n")
    config = load(ServerConfig, file)
    assert config.guidance.audit_share == 0.5
    assert config.guidance.num_candidates == 4
    assert config.state.database_file == Path("elsewhere/thumbloop.db")
    assert config.state.versions == Path("elsewhere/versions")


def test_an_empty_file_sets_nothing(file: Path):
    file.write_text("# nothing yet\n")
    assert load(ServerConfig, file) == load(ServerConfig, None)


def test_the_environment_wins_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch):
    file.write_text("guidance: {audit_share: 0.5, temperature: 2.0}\nseed: 1\n")
    monkeypatch.setenv("THUMBLOOP_SERVER_GUIDANCE__AUDIT_SHARE", "0.25")
    monkeypatch.setenv("THUMBLOOP_SERVER_SEED", "2")
    monkeypatch.setenv("THUMBLOOP_TRAINER_SEED", "3")
    config = load(ServerConfig, file)
    assert (config.guidance.audit_share, config.guidance.temperature) == (0.25, 2.0)
    assert config.seed == 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("gidance: {}", "gidance: unknown setting"),
        ("guidance: {audit_shore: 1}", "guidance.audit_shore: unknown setting"),
        ("guidance: {audit_share: 1.5}", "guidance.audit_share: .*less than or equal to 1"),
        ("guidance: {audit_share: .nan}", "guidance.audit_share"),
        ("listen: {port: 70000}", "listen.port"),
        ("listen: {port: many}", "listen.port"),
        ("engine: {max_versions: 2}", "engine.max_versions"),
        ("guidance: {num_candidates: 17}", "num_candidates is above limits.max_candidates"),
        ("sampling: {max_tokens: 2000}", "max_tokens is above limits.max_tokens"),
        ("sampling: {temperature: 0.005}", r"sampling\.temperature has to be 0 \(greedy\)"),
        (
            "rewards: {thumbs: {kind: thumbs, weight: 0.9}}",
            r": rewards: .*the weights sum to 0\.9,",
        ),
        ("rewards: {}", ": rewards: .*the weights sum to 0,"),
        (
            "rewards: {a: {kind: thumbs, weight: 0.5}, b: {kind: thumbs, weight: 0.5}}",
            "one reward model of thumbs",
        ),
        ("rewards: {thumbs: {kind: length, weight: 1}}", "it alone is named thumbs"),
        ("rewards: {form: {kind: format, weight: 1}}", "rewards.form"),
        ("rewards: {form: {kind: format, weight: 1, pattern: '('}}", "no regular expression"),
        ("rewards: {safety: {kind: classifier, weight: 1}}", "rewards.safety"),
        ("rewards: {thumbs: {kind: thumbs, weight: 1, path: x}}", "rewards.thumbs"),
        ("guidance: {checkpoints: [{at: 1.0, keep: 0.5}]}", "guidance.checkpoints.0.at"),
        ("guidance: {checkpoints: [{at: 0.2, keep: 0}]}", "guidance.checkpoints.0.keep"),
        (
            "guidance: {checkpoints: [{at: 0.5, keep: 0.5}, {at: 0.2, keep: 0.2}]}",
            "checkpoints have to come later",
        ),
        ("guidance:", "guidance"),
        ("guidance: 3", "guidance"),
        ("- a\n- list", "expected a mapping"),
        ("1: 2", "expected a mapping"),
        ("{unclosed", "is not YAML"),
        ("seed: 1\nstate: {folder: a}\nseed: 2\n", "'seed' is set twice"),
        ("state:\n  folder: a\n  folder: b\n", "'folder' is set twice"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_in_one_line(file: Path, text: str, named: str):
    file.write_text(text)
    with pytest.raises(SettingsError, match=named) as raised:
        load(ServerConfig, file)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path, file: Path):
    with pytest.raises(SettingsError, match=r"settings\.yaml: cannot be read: No such file"):
        load(ServerConfig, file)
    with pytest.raises(SettingsError, match="cannot be read"):
        load(ServerConfig, tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"settings\.yaml: "):
        load(ServerConfig, file)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("THUMBLOOP_SERVER_GIDANCE", "1", "THUMBLOOP_SERVER_GIDANCE: unknown setting"),
        ("THUMBLOOP_SERVER_GUIDANCE__AUDIT_SHORE", "1", "(?i)guidance.audit_shore: unknown"),
        ("THUMBLOOP_SERVER_GUIDANCE__AUDIT_SHARE", "2", "guidance.audit_share"),
        ("THUMBLOOP_SERVER_LISTEN", "50051", "listen"),
        ("THUMBLOOP_SERVER_LISTEN", "no json", "listen"),
    ],
)
def test_what_is_wrong_in_the_environment_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=named) as raised:
        load(ServerConfig, None)
    assert "\n" not in str(raised.value)


def test_a_round_that_could_never_start_is_refused(file: Path):
    file.write_text("round: {max_rollouts: 32}\n")
    with pytest.raises(SettingsError, match=r"round: .*max_rollouts below min_rollouts"):
        load(TrainerConfig, file)
