"""Settings: where they come from, what is refused and in which words."""

from pathlib import Path

import pytest

from eaglerun.config import Config, options, resolve
from eaglerun.errors import ConfigError


def test_flags_beat_environment_beats_file_beats_default(tmp_path: Path):
    file = tmp_path / "preset.toml"
    file.write_text("[scheduling]\nmax_num_seqs = 5\nlag = 1\n[cache]\nkv_cache_gib = 2\n")
    environ = {"EAGLERUN_MAX_NUM_SEQS": "6", "EAGLERUN_LAG": "0", "OTHER": "x"}
    config = resolve({"max_num_seqs": 7}, file, environ)
    assert config.scheduling.max_num_seqs == 7
    assert config.scheduling.lag == 0
    assert config.cache.kv_cache_gib == 2
    assert config.model.seed == 0


def test_a_misspelled_variable_is_refused_and_others_are_left_alone():
    words = "unknown variable EAGLERUN_MAX_NUM_SEQ; did you mean EAGLERUN_MAX_NUM_SEQS?"
    with pytest.raises(ConfigError) as refused:
        resolve(environ={"EAGLERUN_MAX_NUM_SEQ": "3"})
    assert str(refused.value) == words
    # Kubernetes sets these for a service of that name.
    of_a_service = ("PORT", "SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR")
    environ = {f"EAGLERUN_{name}": "tcp://10.0.0.1:8000" for name in of_a_service}
    assert resolve(environ=environ) == resolve(environ={})


def test_what_is_printed_reads_back(tmp_path: Path):
    config = resolve({"draft": "d", "decode_batch_sizes": "1,4", "lag": 1}, environ={})
    file = tmp_path / "printed.toml"
    file.write_text(config.to_toml())
    assert resolve(None, file, {}) == config
    plain = resolve({"draft": None}, environ={})
    file.write_text(plain.to_toml())
    assert resolve(None, file, {}) == plain
    assert config.scheduling.decode_batch_sizes == (1, 4)


def test_names_are_unique_and_documented():
    names = [o.name for o in options()]
    flags = [flag for o in options() for flag in o.flags]
    assert len(set(names)) == len(names) and len(set(flags)) == len(flags)
    assert all(o.help for o in options())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_num_seq": 3}, "unknown setting 'max_num_seq'; did you mean 'max_num_seqs'?"),
        ({"max_num_seqs": 0}, "max_num_seqs = 0: allowed 1 to 4096"),
        ({"max_num_seqs": "many"}, "max_num_seqs = 'many': expected int"),
        ({"max_num_seqs": True}, "max_num_seqs = True: expected int"),
        ({"dtype": "int4"}, "dtype = 'int4': allowed auto, bfloat16"),
        ({"num_draft_tokens": 9}, "num_draft_tokens = 9: allowed 0 to 8"),
        ({"kv_cache_gib": 0}, "kv_cache_gib = 0: allowed at least 0.001"),
        ({"max_itl_ms": 0}, "max_itl_ms = 0: allowed at least 0.001"),
        ({"max_itl_ms": "-5"}, "max_itl_ms = -5.0: allowed at least 0.001"),
        ({"max_itl_ms": "fast"}, "max_itl_ms = 'fast': expected .*float"),
        ({"enable_prefix_caching": "maybe"}, "enable_prefix_caching = 'maybe': expected bool"),
        (
            {"draft": "d", "max_num_seqs": 8, "max_num_batched_tokens": 32},
            "max_num_batched_tokens = 32: must exceed max_num_seqs x .* = 32",
        ),
        (
            {"synthetic_acceptance_length": 2.0, "synthetic_acceptance_rate": 0.5},
            "synthetic_acceptance_length = 2.0 and synthetic_acceptance_rate = 0.5: give one",
        ),
        (
            {"synthetic_acceptance_length": 2.0, "draft": "d", "num_draft_tokens": 0},
            "synthetic acceptance needs a draft and num_draft_tokens >= 1; draft = d, .* = 0",
        ),
        (
            {"synthetic_acceptance_length": 9.0, "draft": "d"},
            "synthetic_acceptance_length = 9.0: allowed 1 to 4",
        ),
        (
            {"draft": "d", "scripted": "drafts", "draft_sampling": "probabilistic"},
            "scripted = 'drafts' with draft_sampling = 'probabilistic'",
        ),
        ({"kv_cache_gib": "nan"}, "kv_cache_gib = nan: expected a finite number"),
        ({"decode_batch_sizes": "0,-3"}, "-3 is not a whole number >= 0"),
        ({"decode_batch_sizes": ["a"]}, "'a' is not a whole number >= 0"),
    ],
)
def test_refusals(settings: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        resolve(settings, environ={})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[scheduler]\n", r"unknown section \[scheduler\]; did you mean 'scheduling'"),
        ("[cache]\nblocksize = 3\n", "unknown key cache.blocksize; did you mean 'block_size'"),
        ("[model]\nlag = 1\n", "unknown key model.lag"),
        ("x = [", "is not TOML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, words: str):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        resolve(None, file, {})
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(None, tmp_path / "none.toml", {})


def test_rate_is_a_length():
    config = resolve({"draft": "d", "synthetic_acceptance_rate": 0.5}, environ={})
    assert config.synthetic_length == 2.5
    assert Config().num_draft_tokens == 0
